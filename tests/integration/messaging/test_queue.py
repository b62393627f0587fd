"""What a worker is told when it asks for a job."""

from __future__ import annotations

import asyncio

import pytest
from casemate_messaging.jobs import JobStore
from casemate_messaging.queue import WorkItem, WorkQueue
from casemate_schemas import subjects
from casemate_schemas.codec import encode
from casemate_schemas.job_state import JobRecord, advance, revise
from nats.js.api import PersistMode
from support.nats import WORKERS, NatsStack

JOB = "0" * 31 + "1"


async def test_nothing_now_is_said_at_once_and_a_job_is_given(nats_stack: NatsStack) -> None:
    gateway, worker = (
        WorkQueue(await nats_stack.gateway()),
        WorkQueue(await nats_stack.connect("worker-1")),
    )
    assert await worker.pull(0) is None
    assert await gateway.publish(JOB)
    assert not await gateway.publish(JOB)
    delivery = await worker.pull(0)
    assert delivery is not None
    assert (delivery.job_id, delivery.count) == (JOB, 1)
    assert await worker.pull(0) is None
    await delivery.ack()
    async with asyncio.timeout(10):
        while not await gateway.publish(JOB):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)


async def test_a_job_that_comes_while_a_worker_waits_reaches_it(nats_stack: NatsStack) -> None:
    gateway, worker = (
        WorkQueue(await nats_stack.gateway()),
        WorkQueue(await nats_stack.connect("worker-1")),
    )
    assert await worker.pull(0.05) is None
    waiting = asyncio.create_task(worker.pull(30))
    await gateway.publish(JOB)
    delivery = await waiting
    assert delivery is not None
    assert delivery.job_id == JOB


async def test_a_worker_that_stopped_waiting_and_waits_again_is_given_one_job(nats_stack: NatsStack) -> None:
    """As when another consortium's drain breaks off a wait: the earlier wish must not take a job that nobody looks at."""
    gateway = WorkQueue(await nats_stack.gateway())
    worker, other = [WorkQueue(await nats_stack.connect(name)) for name in WORKERS]
    assert await worker.pull(0) is None
    waiting = asyncio.create_task(worker.pull(30))
    async with asyncio.timeout(10):
        while not (await gateway.backlog()).waiting_workers:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait([waiting])
    waiting = asyncio.create_task(worker.pull(30))
    for number in range(2):
        await gateway.publish(f"{number:032x}")
    given = [await waiting, await other.pull(5)]
    assert [delivery.job_id for delivery in given if delivery is not None] == [f"{number:032x}" for number in range(2)]


async def test_what_is_handed_back_comes_again_with_its_count(nats_stack: NatsStack) -> None:
    gateway, worker = (
        WorkQueue(await nats_stack.gateway()),
        WorkQueue(await nats_stack.connect("worker-1")),
    )
    await gateway.publish(JOB)
    for count in (1, 2, 3):
        delivery = await worker.pull(10)
        assert delivery is not None
        assert delivery.count == count
        await delivery.nak(0.01)


def a_record(job_id: str = JOB, *, routing: bytes = b"r") -> JobRecord:
    return JobRecord(
        job_id=job_id,
        state="queued",
        routing=routing,
        job_envelope=bytes(32),
        submission=bytes(32),
        approvals={},
        created=1,
        updated=1,
    )


@pytest.mark.parametrize("is_stale", [False, True])
async def test_a_delivered_record_is_claimed_unread_and_never_against_the_newest(
    nats_stack: NatsStack, monkeypatch: pytest.MonkeyPatch, is_stale: bool
) -> None:
    """What a delivery holds is a guess: the server compares revisions, so a later change is not lost."""
    gateway, worker = await nats_stack.gateway(), await nats_stack.connect("worker-1")
    store, claiming, reads = JobStore(gateway), JobStore(worker), list[str]()
    await store.create(a_record())
    await WorkQueue(gateway).publish(JOB, store.known(JOB))
    if is_stale:
        await JobStore(gateway).change(JOB, lambda record: revise(record, now_ms=2, step=7))
    delivery = await WorkQueue(worker).pull(10)
    assert delivery is not None and delivery.known == (a_record(), 1)
    read = claiming.get

    async def counted(job_id: str) -> tuple[JobRecord, int]:
        reads.append(job_id)
        return await read(job_id)

    monkeypatch.setattr(claiming, "get", counted)
    claimed = await claiming.change(JOB, lambda r: advance(r, "claimed", now_ms=3), known=delivery.known)
    assert (claimed.state, claimed.step) == ("claimed", 7 if is_stale else None)
    assert reads == [JOB] * is_stale
    assert (await store.get(JOB))[0] == claimed


@pytest.mark.parametrize("record", [b"\xc1", encode(a_record("f" * 32))], ids=["broken", "another job's"])
async def test_a_delivered_record_that_cannot_be_used_is_left_to_be_read(nats_stack: NatsStack, record: bytes) -> None:
    gateway = await nats_stack.gateway()
    item = WorkItem(job_id=JOB, revision=1, record=record)
    await gateway.jetstream().publish(subjects.work("cpu", JOB), encode(item))
    delivery = await WorkQueue(await nats_stack.connect("worker-1")).pull(10)
    assert delivery is not None
    assert (delivery.job_id, delivery.known) == (JOB, None)


async def test_a_large_record_is_left_to_be_read(nats_stack: NatsStack) -> None:
    queue = WorkQueue(await nats_stack.gateway())
    large = a_record(routing=bytes(64 << 10)).model_copy(update={"release": bytes(100 << 10)})
    await queue.publish(JOB, (large, 1))
    delivery = await WorkQueue(await nats_stack.connect("worker-1")).pull(10)
    assert delivery is not None
    assert (delivery.job_id, delivery.known) == (JOB, None)


async def test_records_lie_in_every_bucket_and_only_the_queue_is_not_synced(nats_stack: NatsStack) -> None:
    gateway = await nats_stack.gateway()
    store, names = JobStore(gateway), [f"{number:032x}" for number in range(64)]
    for name in names:
        await store.create(a_record(name))
    assert {subjects.job_shard(name) for name in names} == set(range(subjects.JOB_SHARDS))
    assert sorted([record.job_id async for record, _ in store.list()]) == names
    modes = {name: (await gateway.jetstream().stream_info(name)).config.persist_mode for name in subjects.JOB_STREAMS}
    assert PersistMode.ASYNC not in modes.values()
    work = await gateway.jetstream().stream_info(subjects.work_stream("cpu"))
    assert work.config.persist_mode == PersistMode.ASYNC
