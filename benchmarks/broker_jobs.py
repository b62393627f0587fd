"""What the work queue does for a job, beside its peers: same work, same durability, one interleaved run.

The work: so many jobs are submitted, each is given to a handler that does nothing, and each one's result can be read from the
store. As many submits and as many handlers are under way at once for all, in one process. ``ours`` does what its peers do: a
message is published, pulled, the result written to the KV bucket of jobs, the delivery acknowledged with the server's word
for it. ``ours, fenced`` does all that happens to a real job: the record is created before, and claimed by compare-and-set
before the handler begins, so that no other worker can publish; that is two more writes that wait for the disk.

**The same durability** means that whatever is acknowledged is on the disk: NATS with ``sync_interval: always`` for ours,
taskiq-nats and FastStream, Redis with ``appendfsync always`` for arq. arq is measured with its own poll interval and with one
of 10 ms, and the better counts; taskiq-nats as it comes, pulling one message at a time, and (``…_batched``) as many as there are
handlers. Beside that, each peer with its server's own defaults, which lose acknowledged work when the machine stops.

``idle_p50_ms``: from the record saying ``queued`` to its saying ``sealed``, one job at a time, through the gateway's dispatcher.

``fairness_wait_jobs``: two consortia with a NATS server each, two workers that serve both; ten thousand jobs are queued in
one. How many jobs each worker began, at most, between the other's first job being queued and being begun.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import nats
from _bench import Metric, Samples
from _servers import nats_server, redis_binary, redis_server
from casemate_gateway.dispatch import Dispatcher
from casemate_gateway.records import RecordReader
from casemate_messaging.events import EventLog
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.queue import Delivery, WorkQueue
from casemate_messaging.setup import ensure_streams
from casemate_schemas.admission import Routing
from casemate_schemas.codec import encode
from casemate_schemas.job_state import JobRecord, advance, event_of
from casemate_worker.turns import serve_in_turn
from nats.aio.client import Client
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.gateway import house, now_ms
from support.nats import WORKERS, NatsStack

AT_ONCE: Final = 16
"""Submits and handlers under way at a time, for all."""
PULL_S: Final = 1.0
RECORD_BYTES: Final = 2048
"""Of what a record holds that does not change: routing and delegation."""


class Case(Protocol):
    """One system, running."""

    async def work(self, jobs: int) -> None:
        """Returns once so many new jobs were submitted and the result of each can be read."""


class _Done:
    """Counts ends."""

    def __init__(self) -> None:
        self._left = 0
        self._event = asyncio.Event()

    def expect(self, count: int) -> None:
        self._left = count
        self._event.clear()

    def one(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._event.set()

    async def all(self) -> None:
        async with asyncio.timeout(600):
            await self._event.wait()


async def _submit_all(jobs: int, submit: Callable[[str], Awaitable[object]]) -> None:
    """``jobs`` submits, :data:`AT_ONCE` at a time."""
    ids = iter([secrets.token_hex(16) for _ in range(jobs)])

    async def some() -> None:
        for job_id in ids:
            await submit(job_id)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))


class Ours:
    """The queue and the job store; ``fenced``: with a record from the start, and a claim."""

    def __init__(self, gateway: Client, worker: Client, *, fenced: bool) -> None:
        self._jobs, self._queue = JobStore(gateway), WorkQueue(gateway)
        self._worker, self._done, self._fenced = worker, _Done(), fenced

    async def work(self, jobs: int) -> None:
        self._done.expect(jobs)
        await _submit_all(jobs, self._submit)
        await self._done.all()

    async def _submit(self, job_id: str) -> None:
        if self._fenced:
            await self._jobs.create(_record(job_id))
        await self._queue.publish(job_id)

    async def handle(self) -> None:
        """One handler, for ever."""
        queue, jobs = WorkQueue(self._worker), JobStore(self._worker)
        while True:
            delivery = await queue.pull(PULL_S)
            if delivery is None:
                continue
            if self._fenced:
                await handled(delivery, jobs, self._done.one)
            else:
                await jobs.create(_sealed(delivery.job_id))
                self._done.one()
                await delivery.ack()


async def handled(delivery: Delivery, jobs: JobStore, readable: Callable[[], None]) -> JobRecord:
    """Claims the job, does nothing, writes the result, says that it is ``readable``, acknowledges."""
    await jobs.change(delivery.job_id, lambda record: advance(record, "claimed", now_ms=now_ms(), worker=WORKERS[0]))
    record = await jobs.change(delivery.job_id, _end)
    readable()
    await delivery.ack()
    return record


def _end(record: JobRecord) -> JobRecord:
    for state in ("running", "committing"):
        record = advance(record, state, now_ms=now_ms())  # type: ignore[arg-type]
    return advance(record, "sealed", now_ms=now_ms(), release=bytes(1024))


def _sealed(job_id: str) -> JobRecord:
    return _record(job_id).model_copy(update={"state": "sealed", "release": bytes(1024)})


def _record(job_id: str) -> JobRecord:
    now = now_ms()
    return JobRecord(
        job_id=job_id,
        state="queued",
        routing=os.urandom(RECORD_BYTES // 2),
        delegation=os.urandom(RECORD_BYTES // 2),
        job_envelope=bytes(32),
        submission=bytes(32),
        approvals={},
        created=now,
        updated=now,
    )


def ours(*, fenced: bool) -> Callable[[str], AbstractAsyncContextManager[Case]]:
    """What this project has."""

    @asynccontextmanager
    async def running(url: str) -> AsyncIterator[Case]:
        gateway, worker = await nats.connect(url), await nats.connect(url)
        await ensure_streams(gateway.jetstream(timeout=30))
        case = Ours(gateway, worker, fenced=fenced)
        handlers = [asyncio.create_task(case.handle()) for _ in range(AT_ONCE)]
        try:
            yield case
        finally:
            for task in handlers:
                task.cancel()
            await asyncio.gather(*handlers, return_exceptions=True)
            await gateway.close()
            await worker.close()

    return running


class _Peer:
    def __init__(self, submit: Callable[[str], Awaitable[object]], done: _Done) -> None:
        self._submit, self._done = submit, done

    async def work(self, jobs: int) -> None:
        self._done.expect(jobs)
        await _submit_all(jobs, self._submit)
        await self._done.all()


def taskiq(batch: int) -> Callable[[str], AbstractAsyncContextManager[Case]]:
    """taskiq-nats: its JetStream broker that pulls ``batch`` messages at a time, and its results in an object store."""

    @asynccontextmanager
    async def running(url: str) -> AsyncIterator[Case]:
        from taskiq.receiver import Receiver
        from taskiq_nats import NATSObjectStoreResultBackend, PullBasedJetStreamBroker

        done = _Done()

        class Results(NATSObjectStoreResultBackend[None]):
            async def set_result(self, task_id: str, result: Any) -> None:
                await super().set_result(task_id, result)
                done.one()

        broker = PullBasedJetStreamBroker(servers=url, pull_consume_batch=batch).with_result_backend(Results(url))
        broker.is_worker_process = True

        @broker.task
        async def noop(job_id: str) -> None: ...

        await broker.startup()
        finish = asyncio.Event()
        listening = asyncio.create_task(Receiver(broker, max_async_tasks=AT_ONCE, run_startup=False).listen(finish))
        try:
            yield _Peer(noop.kiq, done)
        finally:
            finish.set()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            await broker.shutdown()

    return running


@asynccontextmanager
async def faststream(url: str) -> AsyncIterator[Case]:
    """FastStream: JetStream by a pull consumer; it keeps no results, so the handler puts one into a KV bucket."""
    from faststream.nats import JStream, NatsBroker, PullSub

    done, broker, stream = _Done(), NatsBroker(url, logger=None), JStream(name="PEER_FASTSTREAM", subjects=["peer.fs"])
    results = await nats.connect(url)
    kv = await results.jetstream(timeout=30).create_key_value(bucket="peer_faststream")

    @broker.subscriber(
        "peer.fs", stream=stream, durable="peer", pull_sub=PullSub(batch_size=AT_ONCE, timeout=1.0), max_workers=AT_ONCE
    )
    async def noop(job_id: str) -> None:
        await kv.put(job_id, bytes(1024))
        done.one()

    await broker.start()
    try:
        yield _Peer(lambda job_id: broker.publish(job_id, "peer.fs", stream="PEER_FASTSTREAM", timeout=30), done)
    finally:
        await broker.stop()
        await results.close()


def arq(poll_s: float) -> Callable[[int], Any]:
    """arq, its worker looking for work every ``poll_s`` seconds."""

    @asynccontextmanager
    async def running(port: int) -> AsyncIterator[Case]:
        from arq.connections import RedisSettings, create_pool
        from arq.worker import Worker, func

        done = _Done()

        async def noop(_: dict[Any, Any], job_id: str) -> None: ...

        async def ended(_: dict[Any, Any]) -> None:
            done.one()

        settings = RedisSettings(port=port)
        pool = await create_pool(settings)
        worker = Worker(
            [func(noop, name="noop")],
            redis_settings=settings,
            max_jobs=AT_ONCE,
            poll_delay=poll_s,
            handle_signals=False,
            after_job_end=ended,
        )
        working = asyncio.create_task(worker.async_run())
        try:
            yield _Peer(lambda job_id: pool.enqueue_job("noop", job_id, _job_id=job_id), done)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await worker.close()
            await pool.aclose()

    return running


NATS_CASES: Final = {
    "ours": ours(fenced=False),
    "ours, fenced": ours(fenced=True),
    "taskiq-nats": taskiq(1),
    f"taskiq-nats, batch {AT_ONCE}": taskiq(AT_ONCE),
    "FastStream": faststream,
}


async def throughput(jobs: int, rounds: int) -> dict[str, Samples]:
    """Seconds that ``jobs`` no-op jobs took, by each system, by turns; ``defaults`` are those of its server."""
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        cases = dict[str, Case]()
        for suffix, fsync in (("", True), (" (defaults)", False)):
            for name, system in NATS_CASES.items():
                url = await exits.enter_async_context(nats_server(folder / f"{name}{fsync}", fsync=fsync))
                cases[name + suffix] = await exits.enter_async_context(system(url))
            if redis_binary() is not None:
                for name, poll_s in (("arq", 0.5), ("arq, 10 ms", 0.01)):
                    port = await exits.enter_async_context(redis_server(folder / f"{name}{fsync}", fsync=fsync))
                    cases[name + suffix] = await exits.enter_async_context(arq(poll_s)(port))
        return await _in_turn(cases, jobs, rounds)


async def _in_turn(cases: Mapping[str, Case], jobs: int, rounds: int) -> dict[str, Samples]:
    names, seconds = list(cases), {name: list[float]() for name in cases}
    for count in range(-1, rounds):
        turn = max(0, count) % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            await cases[name].work(jobs if count >= 0 else AT_ONCE)
            if count >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


async def idle(jobs: int) -> Samples:
    """Seconds from ``queued`` to ``sealed``, through dispatcher, queue, claim and end, while nothing else is going on."""
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        stack = NatsStack(folder / "stack")
        exits.push_async_callback(stack.close)
        await stack.start()
        home = await exits.enter_async_context(house(folder, stack))
        gateway, worker = await stack.connect("gateway"), await stack.connect("worker-1")
        jobs_seen, log = JobStore(gateway), ProgramLog("gateway")
        reader = RecordReader(lambda: (home.keys.consortium,))
        queue = WorkQueue(gateway)
        dispatcher = Dispatcher(gateway, {"cpu": queue}, jobs_seen, reader, log, now_ms)
        clara, ended = home.caller("clara"), _Done()
        background = [asyncio.create_task(dispatcher.run()), asyncio.create_task(_serve(worker, ended))]
        await asyncio.sleep(0.1)
        seconds = []
        for number in range(-5, jobs):
            submission = home.submission(clara, bytes(32))
            routing, delegation = encode(submission.routing), encode(submission.delegation)
            record = _record(submission.routing.peek(Routing).job_id).model_copy(
                update={"routing": routing, "delegation": delegation}
            )
            ended.expect(1)
            await jobs_seen.create(record)
            began = time.perf_counter()
            dispatcher.see(record)
            await ended.all()
            if number >= 0:
                seconds.append(time.perf_counter() - began)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        return Samples(tuple(seconds))


async def _serve(client: Client, ended: _Done) -> None:
    """A worker that does nothing with each job, tells its end as real ones do, and says so."""
    queue, jobs, events = WorkQueue(client), JobStore(client), EventLog(client)
    while True:
        delivery = await queue.pull(PULL_S)
        if delivery is None:
            continue
        ended_record = await handled(delivery, jobs, ended.one)
        await events.publish(event_of(ended_record))


class _Counting:
    """A worker of one consortium: which consortium's job it began is noted."""

    pull_wait_s = 5.0

    def __init__(self, consortium: str, queue: WorkQueue, began: Callable[[str], Awaitable[None]]) -> None:
        self._consortium, self._queue, self._began = consortium, queue, began
        self.drained = asyncio.Event()

    async def pull(self, wait_s: float) -> Delivery | None:
        return await self._queue.pull(wait_s)

    async def handle(self, delivery: Delivery) -> None:
        await self._began(self._consortium)
        await delivery.ack()

    async def close(self) -> None:
        await self._queue.close()


async def fairness(crowd: int, times: int) -> float:
    """The most jobs that any worker began between the quiet consortium's job being queued and being begun."""
    worst = 0.0
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        stacks = {name: NatsStack(folder / name) for name in ("crowded", "quiet")}
        for stack in stacks.values():
            exits.push_async_callback(stack.close)
            await stack.start()
        crowded, quiet = [WorkQueue(await stack.gateway()) for stack in stacks.values()]
        await _submit_all(crowd, crowded.publish)
        begun, found, stop = dict.fromkeys(WORKERS, 0), asyncio.Event(), asyncio.Event()
        serving = []
        for worker in WORKERS:

            async def began(consortium: str, worker: str = worker) -> None:
                if consortium == "quiet":
                    found.set()
                elif not found.is_set():
                    begun[worker] += 1
                await asyncio.sleep(0.01)

            takers = [_Counting(name, WorkQueue(await stack.connect(worker)), began) for name, stack in stacks.items()]
            serving.append(asyncio.create_task(serve_in_turn(takers, stop, asyncio.Event())))
        await asyncio.sleep(1.0)
        for _ in range(times):
            found.clear()
            await quiet.publish(secrets.token_hex(16))
            begun.update(dict.fromkeys(WORKERS, 0))
            await asyncio.wait_for(found.wait(), 30)
            worst = max(worst, *begun.values())
            await asyncio.sleep(0.05)
        stop.set()
        await asyncio.gather(*serving)
    return worst


def print_throughput(samples: Mapping[str, Samples], jobs: int) -> None:
    """Jobs a second by the median, and by the quartiles."""
    title = f"{jobs} no-op jobs, {AT_ONCE} at once, fsync before each acknowledgement unless (defaults)"
    table = Table("", "median jobs/s", "quartiles jobs/s", "runs", title=title)
    for name, sample in samples.items():
        low_s, high_s = sample.quartiles_s
        spread = f"{jobs / high_s:.0f} to {jobs / low_s:.0f}"
        table.add_row(name, f"{jobs / sample.median_s:.0f}", spread, str(len(sample.seconds)))
    Console().print(table)


async def measured(*, quick: bool) -> tuple[list[Metric], dict[str, Any]]:
    """All of it: metrics, and the runs they come from."""
    jobs, rounds = (150, 3) if quick else (1000, 7)
    samples = await throughput(jobs, rounds)
    print_throughput(samples, jobs)
    waits = await idle(100 if quick else 1000)
    wait_jobs = await fairness(500 if quick else 10_000, 20)
    own = samples["ours"].median_s
    metrics = [
        Metric("jobs_per_s", jobs / own, "jobs/s", better="higher"),
        Metric("fenced_jobs_per_s", jobs / samples["ours, fenced"].median_s, "jobs/s", better="higher"),
    ]
    metrics.append(Metric("jobs_vs_taskiq_nats", samples["taskiq-nats"].median_s / own, "×", 2.0, "higher"))
    batched = samples[f"taskiq-nats, batch {AT_ONCE}"].median_s
    metrics.append(Metric("jobs_vs_taskiq_nats_batched", batched / own, "×", better="higher"))
    metrics.append(Metric("jobs_vs_faststream", samples["FastStream"].median_s / own, "×", better="higher"))
    if "arq" in samples:
        best = min(samples["arq"].median_s, samples["arq, 10 ms"].median_s)
        metrics.append(Metric("jobs_vs_arq", best / own, "×", 1.5, "higher"))
    metrics.append(Metric("idle_p50_ms", waits.median_s * 1e3, "ms", 4.0))
    metrics.append(Metric("fairness_wait_jobs", wait_jobs, "jobs", 1.0))
    runs = {name: sample.summary() for name, sample in samples.items()} | {"idle": waits.summary()}
    return metrics, runs
