"""What the work queue does for a job, beside its peers: same work, same durability, one interleaved run.

The same work, for all: a job is submitted, and the submit acknowledged once it is durable; it is given to a handler that does
nothing; its result is durable, and can be read. As many submits and as many handlers are under way at once for all, in one
process, and every handler gives the delivery back as its queue would have it.

==================  =====================================================================  ==================
row                 writes that are on the disk before anything goes on                    per job
==================  =====================================================================  ==================
ours                the record, queued; the record, with its end and result                2
ours, claimed       and the claim, before the handler begins: no other worker can publish  3
ours, whole record  every state that a training job goes through, and an event of each     6, and 6 events
taskiq-nats         the message; the result in an object store, body and head              3
FastStream          the message; the result in a KV bucket                                 2
arq                 the message; that it began; the result, all in Redis' log              3
==================  =====================================================================  ==================

Ours and the peers' are thus compared by the first row (``jobs_vs_…``), and by what fencing and the whole record cost
(``claimed_vs_…``, ``record_vs_…``). All of ours go by compare-and-set on one record: of two workers with one delivery one
has its result read, which no peer promises. The message in our work queue is no such write: it follows from the record and is
put back from there. "Whole record" is the worker's own road (:class:`casemate_worker.worker.Worker`) around an empty job.

**The same durability** means that whatever is acknowledged is on the disk: NATS with ``sync_interval: always`` for ours,
taskiq-nats and FastStream, Redis with ``appendfsync always`` for arq. arq is measured with its own poll interval and with one
of 10 ms, and the better counts; taskiq-nats as it comes, pulling one message at a time, and (``…_batched``) as many as there are
handlers. Beside that, each peer with its server's own defaults, which lose acknowledged work when the machine stops.

``idle_p50_ms``: one job at a time, from the moment that its submitter has the gateway's 202 to the worker's word from NATS
that the result is durable, and so can be read. The gateway is a process of its own; it asks both key brokers, which have their
signed answers ready (what key brokers think is their own time); the worker is a real one around an empty job. Three writes wait
for each other: the answers with ``queued``, the claim, the end. Key brokers are asked once the record is durable, before the 202
leaves; so that nothing hides before it, ``idle_with_submit_p50_ms`` counts from the moment that the submission is sent.

``fairness_wait_jobs``: two consortia with a NATS server each, two workers that serve both; ten thousand jobs are queued in
one. How many jobs each worker began, at most, between the other's first job being queued and being begun.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import nats
from _bench import Metric, Samples
from _servers import nats_server, redis_binary, redis_server
from casemate_messaging.events import EventLog
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.queue import Delivery, WorkQueue
from casemate_messaging.setup import ensure_streams
from casemate_messaging.tasks import end
from casemate_schemas.admission import PrecheckAnswer, Routing, Submission
from casemate_schemas.api import ENVELOPES_PATH, JOBS_PATH
from casemate_schemas.codec import encode
from casemate_schemas.job_state import JobRecord, JobState, advance, event_of
from casemate_schemas.signatures import sign
from casemate_worker.settings import Settings
from casemate_worker.turns import serve_in_turn
from casemate_worker.worker import Worker
from nats.aio.client import Client
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.consortium import consortium_for_tests
from support.gateway import House, house, now_ms
from support.gateway_process import program, settings_file
from support.nats import WORKERS, NatsStack

AT_ONCE: Final = 16
"""Submits and handlers under way at a time, for all."""
PULL_S: Final = 1.0
Kind = Literal["same", "claimed", "whole"]
"""How much of what happens to a real job happens: see the table above."""

TARGETS: Final = {"jobs_vs_taskiq_nats": 2.0, "jobs_vs_arq": 1.5}
_LAST_STEPS: Final[tuple[JobState, ...]] = ("running", "committing", "sealed")
RECORD_BYTES: Final = 2048
"""Of what a record holds that does not change: routing and delegation."""
_UNCHANGING: Final = os.urandom(RECORD_BYTES // 2)


class _Quiet(ProgramLog):
    """Writes nothing: the terminal is no part of the work."""

    def _write(self, *_: object) -> None:
        """Nothing."""


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
    """The queue and the job store, as far as a job of this ``kind`` uses them."""

    def __init__(self, gateway: Client, worker: Client, kind: Kind) -> None:
        self._jobs, self._queue, self._events = JobStore(gateway), WorkQueue(gateway), EventLog(gateway)
        self._worker, self._done, self._kind = worker, _Done(), kind

    async def work(self, jobs: int) -> None:
        self._done.expect(jobs)
        await _submit_all(jobs, self._submit)
        await self._done.all()

    async def _submit(self, job_id: str) -> None:
        record = _record(job_id)
        if self._kind == "whole":
            created = record.model_copy(update={"state": "awaiting_approval"})
            await self._jobs.create(created)
            telling = [asyncio.create_task(self._events.publish(event_of(created)))]
            record = await self._jobs.change(job_id, lambda found: advance(found, "queued", now_ms=now_ms()))
            telling.append(asyncio.create_task(self._events.publish(event_of(record))))
            await asyncio.gather(*telling)
        else:
            await self._jobs.create(record)
        await self._queue.publish(job_id, self._jobs.known(job_id))

    async def handle(self, folder: Path) -> None:
        """One handler, for ever."""
        if self._kind == "whole":
            await _serve(_idle_worker(self._worker, folder, self._done.one, steps=_LAST_STEPS))
        queue, jobs = WorkQueue(self._worker), JobStore(self._worker)
        while True:
            delivery = await queue.pull(PULL_S)
            if delivery is None:
                continue
            job_id, known = delivery.job_id, delivery.known
            if self._kind == "claimed":
                await jobs.change(job_id, _claim, known=known)
                await jobs.change(job_id, _end)
            else:
                await jobs.change(job_id, lambda record: _end(_claim(record)), known=known)
            self._done.one()
            await delivery.ack()


def _idle_worker(
    client: Client, folder: Path, readable: Callable[[], None], *, steps: tuple[JobState, ...] = ("sealed",)
) -> Worker:
    """A worker whose jobs are empty: each is claimed, taken through ``steps`` with a write and an event each, and
    acknowledged as ever. ``readable`` is called when the last one is durable.
    """
    keys = consortium_for_tests()
    settings = Settings(
        name=WORKERS[0],
        nats_url="nats://127.0.0.1:1",
        nats_seed_file=folder / "seed",
        consortium=keys.consortium.id.hex(),
        manifest_file=folder / "manifest",
        scratch_dir=folder,
    )
    guest: Any = None
    worker: Any = Worker(settings, client, lambda: keys.consortium, guest, clock=now_ms, log=_Quiet("worker"))

    async def work(record: JobRecord) -> None:
        for step in steps:
            reach = _end if steps == ("sealed",) else partial(_reach, state=step)
            worker._say(await worker._jobs.change(record.job_id, reach))
        readable()

    worker._work = work
    found: Worker = worker
    return found


async def _serve(worker: Worker) -> None:
    """Takes and handles one job after the other, for ever."""
    while True:
        if (delivery := await worker.pull(PULL_S)) is not None:
            await worker.handle(delivery)


def _claim(record: JobRecord) -> JobRecord:
    return advance(record, "claimed", now_ms=now_ms(), worker=WORKERS[0])


def _reach(record: JobRecord, *, state: JobState) -> JobRecord:
    changes: dict[str, Any] = {"release": bytes(1024)} if state == "sealed" else {}
    return advance(record, state, now_ms=now_ms(), **changes)


def _end(record: JobRecord) -> JobRecord:
    """Through every state to the end, all in one write."""
    for state in _LAST_STEPS:
        record = _reach(record, state=state)
    return record


def _record(job_id: str) -> JobRecord:
    now = now_ms()
    return JobRecord(
        job_id=job_id,
        state="queued",
        routing=_UNCHANGING,
        delegation=_UNCHANGING,
        job_envelope=bytes(32),
        submission=bytes(32),
        approvals={},
        created=now,
        updated=now,
    )


def ours(kind: Kind) -> Callable[[str], AbstractAsyncContextManager[Case]]:
    """What this project has."""

    @asynccontextmanager
    async def running(url: str) -> AsyncIterator[Case]:
        gateway, worker = await nats.connect(url), await nats.connect(url)
        await ensure_streams(gateway.jetstream(timeout=30))
        case = Ours(gateway, worker, kind)
        with tempfile.TemporaryDirectory() as folder:
            handlers = [asyncio.create_task(case.handle(Path(folder))) for _ in range(AT_ONCE)]
            try:
                yield case
            finally:
                await end(handlers)
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
    "ours": ours("same"),
    "ours, claimed": ours("claimed"),
    "ours, whole record": ours("whole"),
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
        gc.collect()
        gc.freeze()  # for all alike, as gateway and worker do once they have started
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


async def idle(jobs: int) -> tuple[Samples, Samples]:
    """Seconds to a durable result, from the 202 and from the submission's sending, through admission, dispatcher, queue, claim
    and end, one job at a time.
    """
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        stack = NatsStack(folder / "stack")
        exits.push_async_callback(stack.close)
        await stack.start()
        home = await exits.enter_async_context(house(folder, stack))
        file = settings_file(folder, home, requests_per_s_per_member=1e6, request_burst_per_member=1_000_000)
        home.origin = (await exits.enter_async_context(program(file))).ready["address"]
        ready, done, ends = await _ready_answers(home), _Done(), list[float]()

        def readable() -> None:
            ends.append(time.perf_counter())
            done.one()

        serving = asyncio.create_task(_serve(_idle_worker(await stack.connect(WORKERS[0]), folder, readable)))
        exits.push_async_callback(end, [serving])
        clara, seconds, whole = home.caller("clara"), list[float](), list[float]()
        stored = await clara.post(ENVELOPES_PATH, home.envelope(clara, "job", bytes(1000)))
        for number in range(-10, jobs):
            submission = home.submission(clara, bytes.fromhex(stored.json["envelope"]))
            ready(submission)
            done.expect(1)
            sent = time.perf_counter()
            reply = await clara.post(JOBS_PATH, encode(submission))
            accepted = time.perf_counter()
            if reply.status != 202:
                raise SystemExit(f"the gateway answered {reply.status}")
            await done.all()
            if number >= 0:
                seconds.append(ends[-1] - accepted)
                whole.append(ends[-1] - sent)
        return Samples(tuple(seconds)), Samples(tuple(whole))


async def _ready_answers(home: House) -> Callable[[Submission], None]:
    """Starts key brokers; before each job is submitted they are told which one to have their yes ready for."""
    ready: dict[str, bytes] = {}

    def prepare(submission: Submission) -> None:
        routing = submission.routing.peek(Routing)
        for name in routing.key_brokers:
            answer = PrecheckAnswer(
                consortium=routing.consortium,
                key_broker=name,
                job_id=routing.job_id,
                terms=routing.terms,
                decision="yes",
                reason=None,
                detail=None,
                at=now_ms(),
            )
            ready[name] = encode(sign(answer, home.keys.key_brokers[name].signing))

    def answering(name: str) -> Callable[[bytes], Awaitable[bytes]]:
        async def answer(_: bytes) -> bytes:
            return ready[name]

        return answer

    for name in ("clara", "north"):
        (await home.key_broker(name)).answers = answering(name)
    return prepare


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
    waits, whole = await idle(100 if quick else 1000)
    wait_jobs = await fairness(500 if quick else 10_000, 20)
    own = samples["ours"].median_s
    metrics = [
        Metric("jobs_per_s", jobs / own, "jobs/s", better="higher"),
        Metric("claimed_jobs_per_s", jobs / samples["ours, claimed"].median_s, "jobs/s", better="higher"),
        Metric("record_jobs_per_s", jobs / samples["ours, whole record"].median_s, "jobs/s", better="higher"),
    ]
    peers = {"taskiq_nats": samples["taskiq-nats"].median_s, "faststream": samples["FastStream"].median_s}
    peers["taskiq_nats_batched"] = samples[f"taskiq-nats, batch {AT_ONCE}"].median_s
    if "arq" in samples:
        peers["arq"] = min(samples["arq"].median_s, samples["arq, 10 ms"].median_s)
    for row, name in (("jobs", "ours"), ("claimed", "ours, claimed"), ("record", "ours, whole record")):
        for peer, seconds in peers.items():
            target = TARGETS.get(f"{row}_vs_{peer}")
            metrics.append(Metric(f"{row}_vs_{peer}", seconds / samples[name].median_s, "×", target, "higher"))
    metrics.append(Metric("idle_p50_ms", waits.median_s * 1e3, "ms", 4.0))
    metrics.append(Metric("idle_with_submit_p50_ms", whole.median_s * 1e3, "ms"))
    metrics.append(Metric("fairness_wait_jobs", wait_jobs, "jobs", 1.0))
    runs = samples | {"idle": waits, "idle with submit": whole}
    return metrics, {name: sample.summary() for name, sample in runs.items()}
