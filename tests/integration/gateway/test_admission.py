"""Admission that dies at any point, and the next one that takes up from the records."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from casemate_gateway.app import make_gateway
from casemate_gateway.gateway import Gateway
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.manifests import TrustedManifests
from casemate_messaging.queue import WorkQueue
from casemate_schemas.api import ENVELOPES_PATH, JOBS_PATH
from casemate_schemas.codec import encode
from casemate_schemas.job_state import JobRecord, advance
from support.gateway import House, now_ms


class _Crash(BaseException):
    """What a kill is to the code it hits: nothing after it runs."""


async def record_of(house: House, job_id: str) -> JobRecord:
    return (await JobStore(await house.client("worker-1")).get(job_id))[0]


async def in_state(house: House, job_id: str, state: str) -> JobRecord:
    jobs = JobStore(await house.client("gateway"))
    async with asyncio.timeout(20), aclosing(jobs.watch(job_id)) as changes:
        return await anext(record async for record, _ in changes if record.state == state)


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


@pytest.mark.parametrize("at", ["jobs.change", "transitions.move"])
async def test_the_next_admission_goes_on(a_house: House, at: str) -> None:
    async with waiting_job(a_house) as job_id:
        asked = [await a_house.key_broker(name) for name in ("clara", "north")]
        await crashed(a_house, job_id, at)
        before = await record_of(a_house, job_id)
        assert before.state == "awaiting_approval"
        verdicts = {approval.verdict for approval in before.approvals.values()}
        assert verdicts == ({"pending"} if at == "jobs.change" else {"yes"})
        questions = sum(len(program.asked) for program in asked)
        async with a_house.gateway_running():
            await in_state(a_house, job_id, "queued")
            assert await first_message(a_house) == job_id
        assert await queued_messages(a_house) == []
        asked_again = sum(len(program.asked) for program in asked) - questions
        assert asked_again == (2 if at == "jobs.change" else 0)


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


@pytest.mark.parametrize(("state", "ends"), [("queued", True), ("claimed", True), ("committing", False)])
async def test_a_passed_deadline_ends_what_nobody_may_have_committed(a_house: House, state: str, ends: bool) -> None:
    async with waiting_job(a_house) as job_id:
        jobs = JobStore(await a_house.client("worker-1"))
        for step in ("queued", "claimed", "running", "committing"):
            record = await jobs.change(job_id, lambda found, step=step: advance(found, step, now_ms=now_ms()))
            if step == state:
                break
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
        create = gateway.transitions.create

        async def dies(_: JobRecord) -> tuple[JobRecord, int, bool]:
            raise RuntimeError

        gateway.transitions.create = dies  # type: ignore[method-assign]
        assert (await clara.post(JOBS_PATH, submission)).status == 500
        gateway.transitions.create = create  # type: ignore[method-assign]
        assert (await clara.post(JOBS_PATH, submission)).status == 202
