"""Privacy that is real, seen from outside: fresh noise for every attempt, one charge for every job, and none for a repeat."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import casemate as cm
import numpy as np
import pytest
import safetensors.numpy
from casemate.identity import load_keys
from casemate_key_broker.seed_shares import SeedSecrets
from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.jobs import JobStore
from casemate_messaging.queue import WorkQueue
from casemate_schemas.api import JOBS_PATH
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import ConflictError, KeyReusedError
from casemate_schemas.job_state import JobRecord, revise
from casemate_schemas.result import Release
from casemate_schemas.sealing import open_ciphertext, unseal_content_key
from casemate_schemas.terms import Terms
from casemate_worker.key_schedule import resume_key
from casemate_worker.training.state import TrainingState
from nats.aio.client import Client
from support.road import SCIENTIST, Road, ask, ended, request
from support.waiting import record_once

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_two_attempts_at_the_same_terms_draw_different_noise(road: Road) -> None:
    """A host that replays gives the job to both workers and hides the first one's checkpoint from the second.

    Owners together can derive the resume key, so this test, which has their folders, opens both checkpoints.
    """
    datasets = await road.push("replayed", "north")
    async with road.connected(SCIENTIST) as consortium, road.nats("gateway") as host:
        job = await consortium.train(**request(datasets, steps=3000, checkpoint_every_steps=600))
        known = consortium._session.state.job(job.id)
        assert known is not None
        first = await _checkpointed(host, job.id, attempt=1)
        await JobStore(host).change(job.id, lambda record: revise(record, now_ms=record.updated, checkpoint=None))
        await WorkQueue(host).remove(job.id)
        await WorkQueue(host).publish(job.id)
        second = await _checkpointed(host, job.id, attempt=2)
        resume = _resume_key(road, known.terms.peek(Terms), known.terms.digest)
        states = [await _opened(host, record, resume) for record in (first, second)]
        assert (await ended(job)).state == "sealed"
        weights = (await job.result()).arrays["0.weight"]
    assert (first.worker, second.worker) in (("worker-1", "worker-2"), ("worker-2", "worker-1"))
    assert [state.step for state in states] == [600, 600]
    drawn = [safetensors.numpy.load(state.tensors)["model/0.weight"] for state in states]
    assert not np.any(drawn[0] == drawn[1]) and np.isfinite(weights).all()
    assert await road.charged(datasets) == [[job.id]]


async def _checkpointed(host: Client, job_id: str, *, attempt: int) -> JobRecord:
    """The job's record as soon as that attempt has left a checkpoint."""
    record = await record_once(JobStore(host), job_id, lambda r: r.attempt >= attempt and r.checkpoint is not None)
    assert record.attempt == attempt
    return record


def _resume_key(road: Road, terms: Terms, digest: bytes) -> bytes:
    folders = [road.layout.member(name) / "key-broker" for name in terms.key_brokers]
    return resume_key([SeedSecrets(folder, needed=set()).share(1, digest) for folder in folders], digest)


async def _opened(host: Client, record: JobRecord, key: bytes) -> TrainingState:
    store = EnvelopeStore(host, BlobStore(host))
    assert record.checkpoint is not None
    stored = await store.head(record.checkpoint)
    ciphertext = b"".join([piece async for piece in store.ciphertext(stored)])
    return decode(TrainingState, open_ciphertext(stored.head.header, unseal_content_key(stored.head, key), ciphertext))


async def test_the_same_job_again_is_the_same_job_and_a_changed_field_another(road: Road) -> None:
    datasets = await road.push("counted", "south")
    wanted = request(datasets, job_id=secrets.token_hex(16))
    async with road.connected(SCIENTIST) as consortium:
        job = await consortium.train(**wanted)
        assert (await consortium.train(**wanted)).id == job.id
        with pytest.raises(ConflictError, match="another job was submitted"):
            await consortium.train(**{**wanted, "optimizer": cm.SGD(lr=0.25)})
        other = await consortium.train(**{**wanted, "optimizer": cm.SGD(lr=0.25), "job_id": None})
        statuses = await asyncio.gather(ended(job), ended(other))
        assert [status.state for status in statuses] == ["sealed", "sealed"]
        assert (await consortium.train(**wanted)).id == job.id
        results = [await job.result(), await other.result()]
    assert results[0].manifest.terms.digest != results[1].manifest.terms.digest
    budget = await road.budget(datasets[0])
    charged = {line.job_id: line for line in budget.lines}
    assert len(budget.lines) == 2 and charged.keys() == {job.id, other.id}
    assert {line.terms for line in budget.lines} == {result.manifest.terms.digest for result in results}
    assert {line.committed for line in budget.lines} == {_result_of(result) for result in results}
    assert budget.epsilon_spent > max(line.epsilon for line in budget.lines) > 0.9


def _result_of(result: cm.Result) -> bytes:
    return result.bundle.release.peek(Release).result


async def test_a_submission_posted_again_after_its_end_changes_nothing(road: Road, trained: Any) -> None:
    keys, job_id = load_keys(road.layout.person_keys(SCIENTIST)), trained.result.job_id
    before = await road.charged(trained.datasets)
    code, status, _ = await ask(road, keys, "POST", JOBS_PATH, encode(trained.submission))
    assert (code, status["job_id"], status["state"]) == (200, job_id, "sealed")
    assert await road.charged(trained.datasets) == before
    assert [charged.count(job_id) for charged in before] == [1, 1]


async def test_an_id_that_is_taken_is_not_another_jobs(road: Road, trained: Any, tmp_path: Any) -> None:
    """From another machine of the same person, which does not know the salt: other terms, so not the same job."""
    async with road.connected(SCIENTIST, state_dir=tmp_path) as consortium:
        before = await road.charged(trained.datasets)
        with pytest.raises(KeyReusedError, match="another job with this id"):
            await consortium.train(**trained.request)
    assert await road.charged(trained.datasets) == before
