"""Queued jobs on their way to workers: in a fair order, no earlier than they may, and none twice."""

from __future__ import annotations

import asyncio

from casemate_messaging.events import EventLog
from casemate_messaging.jobs import JobStore
from casemate_messaging.queue import WorkQueue
from casemate_schemas import subjects
from casemate_schemas.job_state import advance, event_of
from support.gateway import Caller, House, now_ms
from support.waiting import record_once


async def queued(house: House, caller: Caller, member: str, **changes: object) -> str:
    """A job of ``member`` that waits for a worker."""
    _, reply = await house.submitted(caller, job_key_broker=member, **changes)
    job_id: str = reply.json["job_id"]
    jobs = JobStore(await house.client("gateway"))
    await record_once(jobs, job_id, lambda record: record.state == "queued")
    return job_id


async def claimed(house: House, worker: WorkQueue) -> str:
    """The next job a worker is given, which it claims and tells of, as real ones do."""
    delivery = await worker.pull(10)
    assert delivery is not None
    await moved(house, delivery.job_id, "claimed")
    return delivery.job_id


async def moved(house: House, job_id: str, *states: str) -> None:
    client = await house.client("worker-1")
    for state in states:
        record = await JobStore(client).change(
            job_id,
            lambda found, state=state: advance(found, state, now_ms=now_ms()),  # type: ignore[misc]
        )
        await EventLog(client).publish(event_of(record))


async def test_members_come_in_turn_and_one_job_is_ahead(running_house: House) -> None:
    clara, north = running_house.caller("clara"), running_house.caller("north")
    for name in ("clara", "north"):
        await running_house.key_broker(name)
    crowd = [await queued(running_house, clara, "clara") for _ in range(4)]
    backlog = await WorkQueue(await running_house.client("gateway")).backlog()
    assert (backlog.undelivered, backlog.waiting_workers) == (1, 0)
    first = await queued(running_house, north, "north")
    worker = WorkQueue(await running_house.client("worker-1"))
    order = [await claimed(running_house, worker) for _ in range(5)]
    assert order == [crowd[0], first, *crowd[1:]]
    assert await worker.pull(0) is None


async def test_every_waiting_worker_is_given_a_job_at_once(running_house: House) -> None:
    clara = running_house.caller("clara")
    for name in ("clara", "north"):
        await running_house.key_broker(name)
    workers = [WorkQueue(await running_house.client(name)) for name in ("worker-1", "worker-2")]
    waiting = [asyncio.create_task(worker.pull(20)) for worker in workers]
    gateway = WorkQueue(await running_house.client("gateway"))
    async with asyncio.timeout(10):
        while (await gateway.backlog()).waiting_workers < 2:
            pass
    jobs = {await queued(running_house, clara, "clara") for _ in range(2)}
    given = await asyncio.gather(*waiting)
    assert {delivery.job_id for delivery in given if delivery} == jobs


async def test_a_members_urgent_job_overtakes_its_others(running_house: House) -> None:
    clara = running_house.caller("clara")
    for name in ("clara", "north"):
        await running_house.key_broker(name)
    first, second = [await queued(running_house, clara, "clara") for _ in range(2)]
    urgent = await queued(running_house, clara, "clara", priority="high")
    worker = WorkQueue(await running_house.client("worker-1"))
    assert [await claimed(running_house, worker) for _ in range(3)] == [first, urgent, second]


async def test_a_job_for_later_is_given_to_nobody_before(running_house: House) -> None:
    clara = running_house.caller("clara")
    for name in ("clara", "north"):
        await running_house.key_broker(name)
    begins = now_ms() + 1500
    later = await queued(running_house, clara, "clara", not_before=begins)
    worker = WorkQueue(await running_house.client("worker-1"))
    now = await queued(running_house, clara, "clara")
    assert await claimed(running_house, worker) == now
    assert await claimed(running_house, worker) == later
    assert now_ms() >= begins


async def test_a_cancelled_job_is_given_to_nobody(running_house: House) -> None:
    clara = running_house.caller("clara")
    for name in ("clara", "north"):
        await running_house.key_broker(name)
    ahead, behind, last = [await queued(running_house, clara, "clara") for _ in range(3)]
    for job_id in (ahead, behind):
        assert (await clara.post(f"/v1/jobs/{job_id}/cancel")).status == 202
    worker = WorkQueue(await running_house.client("worker-1"))
    assert await claimed(running_house, worker) == last
    assert await worker.pull(0) is None


async def test_a_broken_record_holds_up_no_other_job(running_house: House) -> None:
    """Any worker may write any record: one that nobody can read is left out, and all others are listed and handed out."""
    clara = running_house.caller("clara")
    for name in ("clara", "north"):
        await running_house.key_broker(name)
    first = await queued(running_house, clara, "clara")
    stranger = await running_house.client("worker-2")
    stored = await stranger.jetstream().get_last_msg(
        subjects.job_stream(first), subjects.job_record(first), direct=True
    )
    for key, data in (("0" * 32, b"\xc1 nonsense"), ("1" * 32, stored.data or b"")):
        await stranger.jetstream().publish(subjects.job_record(key), data)
        record = (await JobStore(stranger).get(first))[0].model_copy(update={"job_id": key})
        await EventLog(stranger).publish(event_of(record))
    worker = WorkQueue(await running_house.client("worker-1"))
    assert await claimed(running_house, worker) == first
    second = await queued(running_house, clara, "clara")
    assert await claimed(running_house, worker) == second
    async with running_house.gateway_running():  # a gateway that starts anew has nothing but the records
        third = await queued(running_house, clara, "clara")
        assert await claimed(running_house, worker) == third
        listed = (await clara.get("/v1/jobs")).json["jobs"]
        assert [job["job_id"] for job in listed] == [third, second, first]
