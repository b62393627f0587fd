"""Who gets at a job and its result, and who does not: over the gateway, from another process, with stolen bytes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import casemate as cm
import pytest
from casemate.identity import load_keys, new_person, now_ms
from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_schemas.api import JOBS_PATH
from casemate_schemas.errors import (
    AuthenticationError,
    AuthorisationError,
    DatasetError,
    NotFoundError,
    SealError,
    StateError,
)
from casemate_schemas.keyring import KeyRing
from casemate_schemas.result import Release
from casemate_schemas.sealing import open_ciphertext, unseal_content_key, unseal_key
from support.road import COLLEAGUE, SCIENTIST, STRANGER, Road, ask, card, ended, licence, patients, request, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

_DAY_MS = 24 * 3600 * 1000


@pytest.mark.parametrize(
    ("person", "status", "result"),
    [
        (SCIENTIST, 200, 200),
        (COLLEAGUE, 200, 403),
        ("sam@north", 200, 403),
        (STRANGER, 404, 404),
        ("sam@east", 404, 404),
    ],
)
async def test_a_result_is_for_its_recipients(road: Road, trained: Any, person: str, status: int, result: int) -> None:
    keys = load_keys(road.layout.person_keys(person))
    path = f"{JOBS_PATH}/{trained.result.job_id}"
    answers = {part: await ask(road, keys, "GET", path + part) for part in ("", "/release", "/result")}
    assert [answers[part][0] for part in answers] == [status, result, result]
    for code, problem, _ in answers.values():
        assert code == 200 or problem["reason"] == {403: "not_allowed", 404: "not_found"}[code]


async def test_the_sdk_says_so_with_typed_errors(road: Road, trained: Any) -> None:
    async with road.connected(COLLEAGUE) as consortium:
        with pytest.raises(AuthorisationError, match="recipient"):
            await (await consortium.job(trained.result.job_id)).result()
    async with road.connected(STRANGER) as consortium:
        with pytest.raises(NotFoundError):
            await consortium.job(trained.result.job_id)


async def test_stolen_bytes_open_with_nobody_elses_key(road: Road, trained: Any) -> None:
    """Whoever runs NATS has every envelope, and the release with all its sealed keys."""
    layout, release = road.layout, trained.result.bundle.release.peek(Release)
    people = {person: load_keys(layout.person_keys(person)) for person in layout.read_facts().people}
    facts = layout.read_facts()
    member_run = [name for name in facts.members if name not in facts.hosted]
    brokers = {name: load_keys(layout.member(name) / "key-broker.key") for name in member_run}
    async with road.nats("gateway") as client:
        store = EnvelopeStore(client, BlobStore(client))
        stored = {use.dataset: await store.head(use.envelope) for use in trained.result.terms.plan.datasets}
        stored["result"] = await store.head(release.result)
        ciphertext = b"".join([piece async for piece in store.ciphertext(stored["result"])])
    opens = {what: _openers(head.head, {**people, **brokers}) for what, head in stored.items()}
    assert opens == {"shared@north": {"north"}, "shared@south": {"south"}, "result": set()}
    header = stored["result"].head.header
    for person, keys in people.items():
        for sealed in release.sealed_keys:
            if person == SCIENTIST:
                key = unseal_key(sealed, header, keys.sealing)
                assert trained.result.bundle.envelope.endswith(ciphertext)
                assert len(open_ciphertext(header, key, ciphertext)) > 0
            else:
                with pytest.raises(SealError):
                    unseal_key(sealed, header, keys.sealing)


def _openers(head: Any, parties: dict[str, KeyRing]) -> set[str]:
    found = set()
    for name, keys in parties.items():
        try:
            unseal_content_key(head, keys.sealing)
        except SealError:
            continue
        found.add(name)
    return found


_ELSEWHERE = """
import asyncio, hashlib, sys
import casemate as cm

async def main(url, identity, consortium, state, job_id):
    async with cm.connect(url, identity=identity, consortium=consortium, state_dir=state) as there:
        job = await there.job(job_id)
        result = await job.result()
        print((await job.status()).state, hashlib.sha256(result.arrays["0.weight"].tobytes()).hexdigest())

asyncio.run(main(*sys.argv[1:]))
"""


async def test_another_process_opens_the_job_by_its_id(road: Road, trained: Any, tmp_path: Any) -> None:
    facts = road.layout.read_facts()
    arguments = (facts.url, str(road.layout.person_keys(SCIENTIST)), facts.consortium, str(tmp_path))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", _ELSEWHERE, *arguments, trained.result.job_id),
        stdout=asyncio.subprocess.PIPE,
        env={},
    )
    told, _ = await process.communicate()
    weights = hashlib.sha256(trained.result.arrays["0.weight"].tobytes()).hexdigest()
    assert (process.returncode, told.decode().split()) == (0, ["sealed", weights])


async def test_the_blocking_form_does_the_same(road: Road, trained: Any) -> None:
    facts, layout = road.layout.read_facts(), road.layout

    def block() -> None:
        connection = cm.sync.connect(
            facts.url,
            identity=layout.person_keys(SCIENTIST),
            consortium=facts.consortium,
            state_dir=layout.member("university") / "blocking",
        )
        with connection as consortium:
            assert set(trained.datasets) <= {dataset.id for dataset in consortium.datasets()}
            assert trained.result.job_id in {status.job_id for status in consortium.jobs()}
            job = consortium.job(trained.result.job_id)
            assert job.status().state == "sealed"
            assert [event.state for event in job.events()][-1] == "sealed"
            assert job.result().arrays["0.weight"].tobytes() == trained.result.arrays["0.weight"].tobytes()
            with pytest.raises(StateError):
                job.cancel()

    await asyncio.to_thread(block)


# --- people ---------------------------------------------------------------------------------------------------------


async def test_keys_without_a_delegation_are_nobody(road: Road) -> None:
    keys = KeyRing.generate()
    with pytest.raises(AuthenticationError, match="without a delegation"):
        async with road.connected(SCIENTIST, identity=keys):
            pass


@pytest.mark.parametrize("case", ["expired", "not yet", "signed by oneself", "signed by another member"])
async def test_a_delegation_that_does_not_hold(road: Road, case: str) -> None:
    members = {name: load_keys(road.layout.member_keys(name)) for name in ("university", "north")}
    signer = {"signed by oneself": KeyRing.generate(), "signed by another member": members["north"]}
    start = {"expired": -2, "not yet": 2}.get(case, 0)
    person = new_person(
        signer.get(case, members["university"]),
        consortium=bytes.fromhex(road.layout.read_facts().consortium),
        member="university",
        person="mallory",
        roles=("scientist",),
        not_before=now_ms() + start * _DAY_MS,
        lasts_ms=_DAY_MS,
    )
    with pytest.raises(AuthenticationError):
        async with road.connected(SCIENTIST, identity=person):
            pass
    code, problem, _ = await ask(road, person, "GET", JOBS_PATH)
    assert (code, problem["reason"]) == (401, "not_authenticated")


async def test_roles_are_kept_apart(road: Road, trained: Any) -> None:
    own = card("not-mine", "north")
    async with road.connected(STRANGER) as consortium:
        with pytest.raises(AuthorisationError, match="steward"):
            await consortium.push(patients("north"), own, licence=licence(own.id))
        with pytest.raises(AuthorisationError, match="steward"):
            await consortium.budget(trained.datasets[0])
    async with road.connected("sam@north") as consortium:
        with pytest.raises(DatasetError, match="may list"):
            await consortium.train(**request(trained.datasets))
        with pytest.raises(AuthorisationError, match="steward of south"):
            await consortium.budget(trained.datasets[1])
        with pytest.raises(AuthorisationError, match="submitter's member"):
            await (await consortium.job(trained.result.job_id)).cancel()


# --- waiting and ending -----------------------------------------------------------------------------------------------


async def test_a_running_job_is_cancelled_and_gives_its_worker_back(road: Road) -> None:
    datasets = await road.push("long", "north")
    async with road.connected(SCIENTIST) as consortium:
        job = await consortium.train(**request(datasets, steps=100_000))
        async with asyncio.timeout(60):
            async for event in job.events():
                if event.state == "running" and event.step:
                    break
        assert len(_training(road)) == 1
        assert (await job.cancel()).state == "cancelled"
        status = await ended(job)
        assert status.state == "cancelled" and status.step is not None and status.step < 100_000
        with pytest.raises(StateError):
            await job.result()
        assert (await job.cancel()).state == "cancelled"
    await until(lambda: not _training(road), "the training process to be gone")
    assert await road.charged(datasets) == [[job.id]], "data was opened: no refund"


def _training(road: Road) -> list[str]:
    """Children of the workers."""
    tasks = [Path(f"/proc/{road.stack.programs[name].pid}/task") for name in road.layout.read_facts().workers]
    return [child for task in tasks for file in task.glob("*/children") for child in file.read_text().split()]


async def _answered(job: cm.Job, key_broker: str) -> None:
    """Returns once that key broker's answer shows in the job's status; no event tells of a single answer."""
    async with asyncio.timeout(30):
        while (await _verdicts(job))[key_broker] == "pending":  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def _verdicts(job: cm.Job) -> dict[str, str]:
    return {approval.key_broker: approval.verdict for approval in (await job.status()).approvals}


async def test_a_key_broker_that_is_away_delays_a_job_and_values_out_of_bounds_are_clamped(road: Road) -> None:
    """The university's key broker holds no data, so planning does not need it; the job does."""
    wild = patients("south")
    wild["age"][:6] = (1e308, -1e308, float("inf"), float("-inf"), float("nan"), -0.5)
    wild["sick"][6:9] = (7.0, -7.0, float("nan"))
    datasets = await road.push("wild", "south", columns=wild)
    away = road.stack.programs["key-broker-university"].pid
    os.kill(away, signal.SIGSTOP)
    try:
        async with road.connected(SCIENTIST) as consortium:
            job = await consortium.train(**request(datasets))
            await _answered(job, "south")
            assert await _verdicts(job) == {"south": "yes", "university": "pending"}
            assert (await job.status()).state == "awaiting_approval"
            assert await road.charged(datasets) == [[]]
            os.kill(away, signal.SIGCONT)
            assert (await ended(job)).state == "sealed"
            result = await job.result()
    finally:
        os.kill(away, signal.SIGCONT)
    assert all(tensor.isfinite().all() for tensor in result.weights.values())
    assert result.weights["0.weight"].abs().max() > 0
    assert await road.charged(datasets) == [[job.id]]
