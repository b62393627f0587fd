"""Job records, the work queue, events and nonces on a real server."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest
from casemate_messaging.connection import settle
from casemate_messaging.events import EventLog
from casemate_messaging.jobs import JobStore
from casemate_messaging.nonces import NonceStore
from casemate_messaging.queue import Delivery, WorkQueue
from casemate_messaging.setup import StreamSettings, ensure_streams
from casemate_schemas import subjects
from casemate_schemas.errors import ConflictError, IntegrityError, MalformedError, NotFoundError, SetupError, StateError
from casemate_schemas.job_state import JobRecord, advance, event_of, revise
from nats.js.api import RetentionPolicy
from support.nats import NatsStack

JOB = "a" * 32
OTHER = "b" * 32


def a_record(job_id: str = JOB, **changes) -> JobRecord:
    fields = {
        "job_id": job_id,
        "routing": b"routing",
        "job_envelope": b"j" * 32,
        "submission": b"s" * 32,
        "approvals": {},
        "created": 1000,
        "updated": 1000,
    }
    return JobRecord(**{**fields, **changes})


async def test_create_is_idempotent_and_gives_back_what_is_there(nats_stack: NatsStack) -> None:
    gateway, worker = JobStore(await nats_stack.connect("gateway")), JobStore(await nats_stack.connect("worker-1"))
    record, revision, new = await gateway.create(a_record())
    assert new and await worker.get(JOB) == (record, revision)
    queued = await gateway.change(JOB, lambda r: advance(r, "queued", now_ms=2000))
    again, later, new = await gateway.create(a_record(routing=b"another"))
    assert not new and again == queued and again.routing == b"routing" and later > revision


async def test_a_job_that_is_not_there(nats_stack: NatsStack) -> None:
    store = JobStore(await nats_stack.connect("worker-1"))
    with pytest.raises(NotFoundError):
        await store.get(JOB)
    with pytest.raises(NotFoundError):
        await store.change(JOB, lambda record: record)
    with pytest.raises(MalformedError):
        await store.get("a.>")


async def test_exactly_one_of_twenty_claims(nats_stack: NatsStack) -> None:
    stores = [JobStore(await nats_stack.connect(f"worker-{1 + i % 2}")) for i in range(4)]
    record, _, _ = await stores[0].create(a_record(state="queued"))
    read = [await store.get(JOB) for store in stores for _ in range(5)]

    async def claim(number: int) -> int:
        record, revision = read[number]
        return await stores[number % 4].update(advance(record, "claimed", now_ms=2000, worker=f"w{number}"), revision)

    results = await asyncio.gather(*(claim(number) for number in range(20)), return_exceptions=True)
    (winner,) = [number for number, result in enumerate(results) if isinstance(result, int)]
    assert sum(isinstance(result, ConflictError) for result in results) == 19
    assert (await stores[0].get(JOB))[0].worker == f"w{winner}"
    assert record.worker is None


async def test_change_loses_no_update(nats_stack: NatsStack) -> None:
    """Twenty changes at once from two connections: every one is in the end result."""
    stores = [JobStore(await nats_stack.connect(f"worker-{1 + i}")) for i in range(2)]
    await stores[0].create(a_record(state="running", step=0))

    def one_more(record: JobRecord) -> JobRecord:
        return revise(record, now_ms=2000, step=(record.step or 0) + 1)

    await asyncio.gather(*(stores[i % 2].change(JOB, one_more) for i in range(20)))
    assert (await stores[0].get(JOB))[0].step == 20


async def test_what_was_written_last_is_never_taken_for_the_newest(nats_stack: NatsStack) -> None:
    """A store tries what it wrote itself first; whatever it concludes is from what is there now."""
    own, other = [JobStore(await nats_stack.connect(f"worker-{1 + i}")) for i in range(2)]
    await own.create(a_record(state="running", step=0))
    await own.change(JOB, lambda r: revise(r, now_ms=2000, step=1))
    await other.change(JOB, lambda r: revise(r, now_ms=2000, step=7))
    assert (await own.change(JOB, lambda r: r)).step == 7
    assert (await own.change(JOB, lambda r: revise(r, now_ms=2000, step=(r.step or 0) + 1))).step == 8
    await other.change(JOB, lambda r: advance(r, "cancelled", now_ms=2000))
    with pytest.raises(StateError):
        await own.change(JOB, lambda r: advance(r, "committing", now_ms=2000))
    await own.create(a_record(OTHER, state="running", step=0))
    await own.change(OTHER, lambda r: revise(r, now_ms=2000, step=1))
    await other.change(OTHER, lambda r: advance(r, "claimed", now_ms=2000, worker="w2"))

    def ours_only(record: JobRecord) -> JobRecord:
        if record.worker != "w2":
            raise ConflictError("refused by what is not the newest")
        return revise(record, now_ms=2000, step=2)

    assert (await own.change(OTHER, ours_only)).step == 2


async def test_a_refused_change_changes_nothing(nats_stack: NatsStack) -> None:
    store = JobStore(await nats_stack.connect("gateway"))
    await store.create(a_record(state="sealed"))
    before = await store.get(JOB)
    with pytest.raises(StateError):
        await store.change(JOB, lambda r: advance(r, "cancelled", now_ms=2000))
    assert await store.change(JOB, lambda r: r) == before[0]
    assert await store.get(JOB) == before


@pytest.mark.parametrize("revision", [0, -1])
async def test_an_unread_record_is_not_replaced(nats_stack: NatsStack, revision: int) -> None:
    """nats-py takes 0 to mean "must not exist": then an update would create."""
    store = JobStore(await nats_stack.connect("worker-1"))
    with pytest.raises(ConflictError):
        await store.update(a_record(), revision)
    with pytest.raises(NotFoundError):
        await store.get(JOB)


async def test_a_broken_record_is_not_guessed_at(nats_stack: NatsStack) -> None:
    worker = await nats_stack.connect("worker-1")
    store = JobStore(worker)
    await worker.jetstream().publish(subjects.job_record(JOB), b"\xc1 nonsense")
    with pytest.raises(IntegrityError):
        await store.get(JOB)
    await store.create(a_record(OTHER))
    stolen = await worker.jetstream().get_last_msg(subjects.job_stream(OTHER), subjects.job_record(OTHER), direct=True)
    await worker.jetstream().publish(subjects.job_record(JOB), stolen.data)
    with pytest.raises(IntegrityError):
        await store.get(JOB)
    gateway, left_out = JobStore(await nats_stack.gateway()), list[str]()
    with pytest.raises(IntegrityError):
        [record async for record, _ in gateway.list()]
    listed = [record.job_id async for record, _ in gateway.list(lambda key, _: left_out.append(key))]
    assert (listed, left_out) == ([OTHER], [JOB])


async def test_a_long_list_is_whole_although_records_move_meanwhile(nats_stack: NatsStack) -> None:
    store = JobStore(await nats_stack.connect("gateway"))
    ids = [f"{number:032x}" for number in range(150)]
    for job_id in ids:
        await store.create(a_record(job_id))
    found: list[str] = []
    async for record, revision in store.list():
        found.append(record.job_id)
        if len(found) in (1, 70):  # one that was read, and one that was not yet
            for moved in (found[0], ids[-1]):
                await store.change(moved, lambda r: revise(r, now_ms=r.updated + 1, reason="moved"))
        assert revision > 0
    assert sorted(found) == ids


async def test_what_changes_while_changes_are_read_is_told_all_the_same(nats_stack: NatsStack) -> None:
    store, seen_up_to = JobStore(await nats_stack.connect("gateway")), dict[str, int]()
    await store.create(a_record(state="queued"))
    found: list[str] = []
    for _ in range(2):
        async for record, _ in store.list(seen_up_to=seen_up_to):
            found.append(record.state)
            if record.state == "queued":
                await store.change(JOB, lambda r: advance(r, "claimed", now_ms=2000))
    assert found == ["queued", "claimed"]


async def test_list(nats_stack: NatsStack) -> None:
    store = JobStore(await nats_stack.connect("gateway"))
    assert [found async for found in store.list()] == []
    await store.create(a_record())
    await store.create(a_record(OTHER))
    assert {record.job_id async for record, _ in store.list()} == {JOB, OTHER}


async def pulled(queue: WorkQueue) -> Delivery:
    delivery = await queue.pull(10)
    assert delivery is not None
    return delivery


async def test_a_job_is_queued_once_and_gone_after_the_ack(nats_stack: NatsStack) -> None:
    gateway, worker = WorkQueue(await nats_stack.connect("gateway")), WorkQueue(await nats_stack.connect("worker-1"))
    assert await gateway.publish(JOB)
    assert not await gateway.publish(JOB)
    delivery = await pulled(worker)
    assert (delivery.job_id, delivery.count) == (JOB, 1)
    assert not await gateway.publish(JOB)
    assert await worker.pull(0.05) is None
    await delivery.ack()
    assert await worker.pull(0.05) is None
    assert await gateway.publish(JOB)


async def test_two_workers_get_different_jobs(nats_stack: NatsStack) -> None:
    gateway = WorkQueue(await nats_stack.connect("gateway"))
    workers = [WorkQueue(await nats_stack.connect(user)) for user in ("worker-1", "worker-2")]
    await gateway.publish(JOB)
    await gateway.publish(OTHER)
    deliveries = await asyncio.gather(*(pulled(worker) for worker in workers))
    assert {delivery.job_id for delivery in deliveries} == {JOB, OTHER}


async def test_nak_term_and_remove(nats_stack: NatsStack) -> None:
    gateway, worker = WorkQueue(await nats_stack.connect("gateway")), WorkQueue(await nats_stack.connect("worker-1"))
    await gateway.publish(JOB)
    await (await pulled(worker)).nak(0.01)
    again = await pulled(worker)
    assert (again.job_id, again.count) == (JOB, 2)
    await again.term()
    await gateway.publish(OTHER)
    assert (await pulled(worker)).job_id == OTHER
    await gateway.remove(OTHER)
    assert await gateway.publish(OTHER)
    assert (await pulled(worker)).count == 1


async def test_a_malformed_delivery_is_removed(nats_stack: NatsStack) -> None:
    gateway, worker = await nats_stack.connect("gateway"), WorkQueue(await nats_stack.connect("worker-1"))
    for number, payload in enumerate((b"", b"\xff", b"a.b", b"x" * 1000)):
        await gateway.jetstream().publish(subjects.work("cpu", f"bad{number}"), payload)
        assert await worker.pull(5) is None
    await WorkQueue(gateway).publish(JOB)
    assert (await pulled(worker)).job_id == JOB


async def test_a_job_nobody_acknowledged_goes_to_another_worker(impatient: NatsStack) -> None:
    gateway = WorkQueue(await impatient.connect("gateway"))
    dying_client = await impatient.connect("worker-1")
    survivor = WorkQueue(await impatient.connect("worker-2"))
    await gateway.publish(JOB)
    lost = await pulled(WorkQueue(dying_client))
    await dying_client.close()
    found = await pulled(survivor)
    assert (lost.count, found.count, found.job_id) == (1, 2, JOB)
    await found.ack()
    assert await survivor.pull(1.0) is None


async def test_in_progress_keeps_a_job(impatient: NatsStack) -> None:
    gateway, worker, other = [WorkQueue(await impatient.connect(u)) for u in ("gateway", "worker-1", "worker-2")]
    await gateway.publish(JOB)
    delivery = await pulled(worker)
    async with delivery.kept(every_s=0.1):
        assert await other.pull(1.5) is None
    assert (await pulled(other)).count == 2


async def test_a_job_that_fails_every_worker_is_told_and_stays(impatient: NatsStack) -> None:
    """After ``max_deliver`` deliveries: an advisory, no more deliveries, and the message until it is removed."""
    gateway = await impatient.connect("gateway")
    advisory = await gateway.subscribe(subjects.max_deliveries_advisory("cpu"))
    queue, worker = WorkQueue(gateway), WorkQueue(await impatient.connect("worker-1"))
    await queue.publish(JOB)
    assert [(await pulled(worker)).count for _ in range(3)] == [1, 2, 3]
    assert await worker.pull(1.5) is None
    await advisory.next_msg(timeout=10)
    assert not await queue.publish(JOB)
    await queue.remove(JOB)
    assert await queue.publish(JOB)


async def test_events_replay_and_follow(nats_stack: NatsStack) -> None:
    gateway, worker = EventLog(await nats_stack.connect("gateway")), EventLog(await nats_stack.connect("worker-1"))
    record = a_record()
    first = await worker.publish(event_of(record))
    await worker.publish(event_of(a_record(OTHER, state="queued")))
    record = advance(record, "queued", now_ms=2000)
    second = await worker.publish(event_of(record))
    assert [(s, e.state) async for s, e in gateway.replay(JOB)] == [(first, "awaiting_approval"), (second, "queued")]
    assert [s async for s, _ in gateway.replay(JOB, after=first)] == [second]
    assert [s async for s, _ in gateway.replay(JOB, after=second)] == []
    assert [s async for s, _ in gateway.replay("c" * 32)] == []
    followed: list[tuple[int, str]] = []
    states = iter(("claimed", "running", "committing", "sealed"))
    async with aclosing(gateway.follow(JOB, after=first, poll_s=3600)) as events:
        async for sequence, event in events:
            followed.append((sequence, event.state))
            if (state := next(states, None)) is not None:
                record = advance(record, state, now_ms=3000)
                await worker.publish(event_of(record))
    assert [state for _, state in followed] == ["queued", "claimed", "running", "committing", "sealed"]
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(followed))


async def test_more_events_than_one_batch(nats_stack: NatsStack) -> None:
    log = EventLog(await nats_stack.connect("gateway"))
    sequences = [await log.publish(event_of(a_record(state="running", step=n))) for n in range(300)]
    assert [(s, e.step) async for s, e in log.replay(JOB)] == list(zip(sequences, range(300), strict=True))


async def test_a_follower_wakes_for_an_event_that_comes_while_it_waits(nats_stack: NatsStack) -> None:
    reader, worker = await nats_stack.connect("gateway"), EventLog(await nats_stack.connect("worker-1"))
    await worker.publish(event_of(a_record()))
    async with aclosing(EventLog(reader).follow(JOB, poll_s=3600)) as events:
        assert (await anext(events))[1].state == "awaiting_approval"
        waiting = asyncio.ensure_future(anext(events))
        for _ in range(20):
            await settle(reader)
        assert not waiting.done()
        await worker.publish(event_of(a_record(state="failed", reason="training_failed")))
        assert (await asyncio.wait_for(waiting, 10))[1].reason == "training_failed"
        with pytest.raises(StopAsyncIteration):
            await anext(events)


async def test_followers_share_one_subscription(nats_stack: NatsStack) -> None:
    reader, worker = await nats_stack.connect("gateway"), EventLog(await nats_stack.connect("worker-1"))
    log, job_ids = EventLog(reader), ["a" * 32, "b" * 32, "b" * 32]
    before = len(reader._subs)
    async with AsyncExitStack() as exits:
        follows = [await exits.enter_async_context(aclosing(log.follow(name, poll_s=3600))) for name in job_ids]
        waiting = [asyncio.ensure_future(anext(events)) for events in follows]
        for _ in range(20):
            await settle(reader)
        assert len(reader._subs) == before + 1
        await worker.publish(event_of(a_record("b" * 32)))
        told = await asyncio.wait_for(asyncio.gather(*waiting[1:]), 10)
        assert [event.job_id for _, event in told] == job_ids[1:]
        assert not waiting[0].done()
        waiting[0].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_forged_event_is_told(nats_stack: NatsStack) -> None:
    worker = await nats_stack.connect("worker-1")
    await worker.jetstream().publish(subjects.event(JOB), b"loss=0.123")
    log = EventLog(await nats_stack.connect("gateway"))
    with pytest.raises(IntegrityError):
        [event async for event in log.replay(JOB)]


async def test_a_nonce_counts_once(nats_stack: NatsStack) -> None:
    stores = [NonceStore(await nats_stack.connect("gateway")) for _ in range(2)]
    used = await asyncio.gather(*(stores[i % 2].first_use("ab" * 16) for i in range(20)))
    assert sum(used) == 1
    assert await stores[0].first_use("cd" * 16)
    with pytest.raises(MalformedError):
        await stores[0].first_use("*")


async def test_a_nonce_is_forgotten_in_time(tmp_path: Path) -> None:
    stack = NatsStack(tmp_path / "forgetful")
    try:
        await stack.start(StreamSettings(nonce_age_s=0.2))
        gateway = await stack.connect("gateway")
        store = NonceStore(gateway)
        assert await store.first_use("aa")
        assert not await store.first_use("aa")
        async with asyncio.timeout(20):
            while not await NonceStore(gateway).first_use("aa"):
                await gateway.flush()
    finally:
        await stack.close()


async def test_setup_runs_again_and_follows_settings(nats_stack: NatsStack) -> None:
    js = (await nats_stack.connect("gateway")).jetstream()
    await ensure_streams(js)
    await ensure_streams(js, StreamSettings(max_events_per_job=7, ack_wait_s=9.0))
    assert (await js.stream_info("EVENTS")).config.max_msgs_per_subject == 7
    seen = []

    async def advance_and_set_up() -> None:
        seen.append(await ensure_streams(js))

    await asyncio.gather(advance_and_set_up(), advance_and_set_up())
    assert (await js.stream_info("EVENTS")).config.max_msgs_per_subject == 4096
    assert (await js.stream_info("WORK_cpu")).config.retention == RetentionPolicy.WORK_QUEUE


async def test_setup_refuses_what_it_cannot_mend(tmp_path: Path) -> None:
    stack = NatsStack(tmp_path / "spoilt")
    try:
        await stack.server.start()
        js = (await stack.connect("gateway")).jetstream()
        await js.add_stream(name="WORK_cpu", subjects=["casemate.work.cpu.*"])
        with pytest.raises(SetupError, match="WORK_cpu"):
            await ensure_streams(js)
    finally:
        await stack.close()
