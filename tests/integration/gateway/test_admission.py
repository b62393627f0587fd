"""Admission that dies at any point, and the next one that takes up from the records."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from casemate_gateway.app import make_gateway
from casemate_gateway.gateway import Gateway
from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.manifests import TrustedManifests
from casemate_messaging.queue import WorkQueue
from casemate_schemas import subjects
from casemate_schemas.api import ENVELOPES_PATH, JOBS_PATH
from casemate_schemas.codec import encode
from casemate_schemas.job_state import Approval, JobRecord, JobState, advance, revise
from support.gateway import House, now_ms
from support.waiting import record_once


class _Crash(BaseException):
    """What a kill is to the code it hits: nothing after it runs."""


async def record_of(house: House, job_id: str) -> JobRecord:
    return (await JobStore(await house.client("worker-1")).get(job_id))[0]


async def in_state(house: House, job_id: str, state: str) -> JobRecord:
    jobs = JobStore(await house.client("gateway"))
    return await record_once(jobs, job_id, lambda record: record.state == state)


async def first_message(house: House) -> str | None:
    """What a worker is given first."""
    delivery = await WorkQueue(await house.client("worker-1")).pull(10)
    return delivery and delivery.job_id


async def queued_messages(house: House) -> list[str]:
    """Every message in the queue."""
    queue, found = WorkQueue(await house.client("worker-1")), []
    while (delivery := await queue.pull(0.3)) is not None:
        found.append(delivery.job_id)
    return found


@asynccontextmanager
async def waiting_job(house: House) -> AsyncIterator[str]:
    """A job that was submitted to a gateway that then went away before any key broker could answer."""
    async with house.gateway_running():
        clara = house.caller("clara")
        _, reply = await house.submitted(clara)
    yield reply.json["job_id"]


async def crashed(house: House, job_id: str, at: str) -> None:
    """An admission of the job that dies at the named step, and not before."""
    gateway = make_gateway(
        house.settings,
        await house.client("gateway"),
        TrustedManifests.open(house.settings),
        origin="http://nowhere",
        log=ProgramLog("gateway"),
    )
    owner, name = at.split(".")
    admission: Any = gateway.admission
    target = {"transitions": admission._transitions, "jobs": admission._jobs}[owner]

    async def dies(*_: object, **__: object) -> None:
        raise _Crash

    setattr(target, name, dies)
    with pytest.raises(_Crash):
        await admission._round(job_id)


async def test_the_next_admission_asks_again_for_answers_that_were_not_stored(a_house: House) -> None:
    async with waiting_job(a_house) as job_id:
        asked = [await a_house.key_broker(name) for name in ("clara", "north")]
        await crashed(a_house, job_id, "jobs.change")
        before = await record_of(a_house, job_id)
        assert before.state == "awaiting_approval"
        assert {approval.verdict for approval in before.approvals.values()} == {"pending"}
        questions = sum(len(program.asked) for program in asked)
        async with a_house.gateway_running():
            await in_state(a_house, job_id, "queued")
            assert await first_message(a_house) == job_id
        assert await queued_messages(a_house) == []
        assert sum(len(program.asked) for program in asked) - questions == 2


async def test_with_every_yes_in_the_record_nobody_is_asked_again(a_house: House) -> None:
    async with waiting_job(a_house) as job_id:
        asked = [await a_house.key_broker(name) for name in ("clara", "north")]
        jobs, yes = JobStore(await a_house.client("worker-1")), Approval(verdict="yes", answer=b"signed")
        await jobs.change(job_id, lambda r: revise(r, now_ms=now_ms(), approvals=dict.fromkeys(r.approvals, yes)))
        async with a_house.gateway_running():
            await in_state(a_house, job_id, "queued")
            assert await first_message(a_house) == job_id
        assert [program.asked for program in asked] == [[], []]


async def test_the_last_yes_queues_the_job_in_the_same_write(a_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that come together are stored together, with what follows from them: the record is written twice in all."""
    monkeypatch.setattr("casemate_gateway.admission._TOGETHER_S", 20.0)
    for name in ("clara", "north"):
        await a_house.key_broker(name)
    async with a_house.gateway_running() as gateway:
        _, reply = await a_house.submitted(a_house.caller("clara"))
        record = await in_state(a_house, reply.json["job_id"], "queued")
        assert [approval.verdict for approval in record.approvals.values()] == ["yes", "yes"]
        assert all(approval.answer for approval in record.approvals.values())
        assert (await gateway.jobs.get(record.job_id))[1] == 2


async def test_a_queued_job_whose_message_is_gone_is_queued_again(a_house: House) -> None:
    async with waiting_job(a_house) as job_id:
        jobs = JobStore(await a_house.client("worker-1"))
        await jobs.change(job_id, lambda record: advance(record, "queued", now_ms=now_ms()))
        async with a_house.gateway_running():
            assert await first_message(a_house) == job_id
        assert await queued_messages(a_house) == []


async def test_a_message_that_the_queue_lost_after_it_was_handed_out_is_put_back(a_house: House) -> None:
    async with waiting_job(a_house) as job_id:
        jobs = JobStore(await a_house.client("worker-1"))
        await jobs.change(job_id, lambda record: advance(record, "queued", now_ms=now_ms()))
        async with a_house.gateway_running() as gateway:
            assert await first_message(a_house) == job_id
            await gateway.queue.remove(job_id)
            assert await queued_messages(a_house) == []
            await gateway.admission.reconcile()
            assert await first_message(a_house) == job_id


@pytest.mark.parametrize(
    ("steps", "ends"),
    [
        (("queued",), True),
        (("queued", "claimed"), True),
        (("queued", "claimed", "running", "committing"), False),
        (("queued", "claimed", "running", "committing", "claimed"), False),
    ],
)
async def test_a_passed_deadline_ends_what_nobody_may_have_committed(
    a_house: House, steps: tuple[JobState, ...], ends: bool
) -> None:
    """And of what somebody may, the message is put back if the queue has lost it."""
    async with waiting_job(a_house) as job_id:
        jobs = JobStore(await a_house.client("worker-1"))
        for state in steps:
            changes = {"upload": bytes(32)} if state == "committing" else {}
            record = await jobs.change(job_id, lambda r, s=state, c=changes: advance(r, s, now_ms=now_ms(), **c))
        if ends:
            await WorkQueue(await a_house.client("gateway")).publish(job_id)
        later = (record.deadline or 0) + 1
        gateway = late_gateway(a_house, await a_house.client("gateway"), later)
        await gateway.admission.reconcile()
        assert (await record_of(a_house, job_id)).state == ("expired" if ends else state)
        assert await queued_messages(a_house) == ([] if ends else [job_id])


def late_gateway(house: House, client: Any, now: int) -> Gateway:
    manifests, log = TrustedManifests.open(house.settings), ProgramLog("gateway")
    return make_gateway(house.settings, client, manifests, origin="http://nowhere", log=log, clock=lambda: now)


async def test_two_gateways_admit_the_same_jobs_once(a_house: House) -> None:
    async with waiting_job(a_house) as job_id:
        for name in ("clara", "north"):
            await a_house.key_broker(name)
        async with a_house.gateway_running(), a_house.gateway_running():
            await in_state(a_house, job_id, "queued")
            assert await first_message(a_house) == job_id
            assert await queued_messages(a_house) == []


async def test_a_submission_outlives_a_crash_before_its_record(a_house: House) -> None:
    """The blob is stored, the record is not: the same submission simply works."""
    async with a_house.gateway_running() as gateway:
        clara = a_house.caller("clara")
        envelope = a_house.envelope(clara, "job", secrets.token_bytes(100))
        stored = await clara.post(ENVELOPES_PATH, envelope)
        submission = encode(a_house.submission(clara, bytes.fromhex(stored.json["envelope"])))
        create = gateway.jobs.create

        async def dies(_: JobRecord) -> tuple[JobRecord, int, bool]:
            raise RuntimeError

        gateway.jobs.create = dies  # type: ignore[method-assign]
        assert (await clara.post(JOBS_PATH, submission)).status == 500
        gateway.jobs.create = create  # type: ignore[method-assign]
        assert (await clara.post(JOBS_PATH, submission)).status == 202


@pytest.mark.parametrize("what", ["the submission", "a chunk of it", "the envelope"])
async def test_a_job_whose_submission_is_destroyed_fails_and_says_why(a_house: House, what: str) -> None:
    """Not at once, for it may only be late; and what comes after it is admitted."""
    async with waiting_job(a_house) as job_id:
        asked = [await a_house.key_broker(name) for name in ("clara", "north")]
        record, gateway = await record_of(a_house, job_id), await a_house.client("gateway")
        if what == "the envelope":
            await EnvelopeStore(gateway, BlobStore(gateway)).delete_head(record.job_envelope, sequence=1 << 60)
        elif what == "the submission":
            await BlobStore(gateway, may_purge=True).delete(record.submission)
        else:
            chunks = f"casemate.blob.chunk.{record.submission.hex()}.*"
            await gateway.jetstream().purge_stream(subjects.BLOB_STREAM, subject=chunks)
        before = [len(program.asked) for program in asked]
        async with a_house.gateway_running(lost_after_s=0.2):
            assert (await in_state(a_house, job_id, "failed")).reason == "not_found"
            assert [len(program.asked) for program in asked] == before
            _, reply = await a_house.submitted(a_house.caller("clara"))
            await in_state(a_house, reply.json["job_id"], "queued")
