"""One running stack whose programs obey orders to die, and what must hold for each of its jobs whatever died."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, ParamSpec, Self, TypeVar

import casemate as cm
import nats.errors
import nats.js.errors
import numpy as np
import pytest
from casemate.client import Consortium
from casemate.identity import load_keys
from casemate.jobs import Job
from casemate.local_stack.layout import Layout
from casemate.local_stack.supervisor import LocalStack
from casemate.results import Result
from casemate_key_broker import audit_log, ledger
from casemate_key_broker.database import Database
from casemate_messaging.blobs import CHUNK_BYTES, BlobStore
from casemate_messaging.connection import REQUEST_TIMEOUT_S, connect
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.jobs import JobStore
from casemate_messaging.queue import WorkQueue
from casemate_schemas import subjects
from casemate_schemas.admission import Routing
from casemate_schemas.codec import decode, encode
from casemate_schemas.envelope import open_head
from casemate_schemas.errors import CasemateError, IntegrityError, NotFoundError, SealError, UnavailableError
from casemate_schemas.grant import AuditEntry
from casemate_schemas.job_state import TERMINAL, JobEvent, JobRecord
from casemate_schemas.requests import Budget
from casemate_schemas.result import Release
from casemate_schemas.sealing import unseal_content_key, unseal_key
from casemate_schemas.signatures import Signed
from nats.aio.client import Client
from support.byzantine import ByzantineProxy, byzantine
from support.stack import (
    DELTA,
    EPSILON_PER_JOB,
    MEMBERS,
    OWNERS,
    PURPOSE,
    SCIENTIST,
    TARGET,
    WORKERS,
    connected,
    push,
)
from torch import nn

_P = ParamSpec("_P")
_R = TypeVar("_R")

STEPS: Final = 12
CHECKPOINT_EVERY_STEPS: Final = 5
POLL_S: Final = 0.02
PATIENCE_S: Final = 60.0
STORE_BYTES: Final = 96 << 20
"""Room for all that nats-server stores; 64 MiB of it are reserved for nonces."""
ACK_WAIT_S: Final = 3.0
LAUNCHER: Final = Path(__file__).parents[1] / "faults" / "launcher.py"

OVERRIDES: Final[dict[str, dict[str, object]]] = {
    "gateway": {
        "ack_wait_s": ACK_WAIT_S,
        "key_broker_timeout_s": 3.0,
        "precheck_retry_s": 0.5,
        "reconcile_every_s": 1.0,
        "heartbeat_s": 1.0,
        "poll_after_s": 1,
    },
    **{
        name: {
            "heartbeat_s": 0.5,
            "pull_wait_s": 1.0,
            "rpc_timeout_s": 2.0,
            "retry_delay_s": 1.0,
            "checkpoint_interval_s": 0.0,
        }
        for name in WORKERS
    },
}
"""Impatient programs, so that a test need not wait long for a job to be given to the next."""


def bounded(function: Callable[_P, Awaitable[_R]]) -> Callable[_P, Coroutine[Any, Any, _R]]:
    """What waits for another process says so when it has waited for long enough."""

    @functools.wraps(function)
    async def waiting(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        async with asyncio.timeout(PATIENCE_S):
            return await function(*args, **kwargs)

    return waiting


@bounded
async def until(condition: Callable[[], bool]) -> None:
    """Waits for what other processes do to files or processes."""
    while not condition():  # noqa: ASYNC110 - the other side is another process
        await asyncio.sleep(POLL_S)


class Orders:
    """What ``launcher.py`` is told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def commands(self) -> dict[str, tuple[str, ...]]:
        """For :class:`LocalStack`: workers and key brokers under the launcher."""
        modules = dict.fromkeys(WORKERS, "casemate_worker")
        modules |= {f"key-broker-{name}": "casemate_key_broker" for name in MEMBERS}
        return {name: (str(LAUNCHER), str(self._folder), name, module) for name, module in modules.items()}

    def die(self, point: str, who: str = "anyone") -> None:
        """The first to reach ``point`` kills itself there."""
        (self._folder / f"die@{who}@{point}").touch()

    def stop(self, point: str, who: str = "anyone") -> None:
        """The first to reach ``point`` stops there until SIGCONT."""
        (self._folder / f"stop@{who}@{point}").touch()

    @contextlib.contextmanager
    def hold(self, point: str, who: str = "anyone") -> Iterator[None]:
        """Whoever reaches ``point`` waits there until the block ends."""
        order = self._folder / f"hold@{who}@{point}"
        order.touch()
        try:
            yield
        finally:
            order.unlink(missing_ok=True)

    def let_go(self, point: str, who: str = "anyone") -> None:
        """Nobody waits at ``point`` any more."""
        (self._folder / f"hold@{who}@{point}").unlink(missing_ok=True)

    def skew(self, program: str, ahead_ms: int) -> None:
        """The program's clock is wrong from its next start until the next one after :meth:`forget`."""
        (self._folder / f"skew@{program}").write_text(str(ahead_ms))

    def keep_away(self, worker: str) -> None:
        """Should the worker die, it does not come back before :meth:`forget`."""
        (self._folder / f"died@{worker}").touch()

    async def died(self, *candidates: str) -> str:
        """Which program killed itself, once one did; workers stay away until :meth:`forget`."""
        return await self._noted("died", candidates or WORKERS)

    async def stopped(self) -> str:
        """Which worker stopped itself, once one did."""
        return await self._noted("stopped", WORKERS)

    async def held(self, point: str, *candidates: str) -> str:
        """Which program waits at ``point``, once one does."""
        return await self._noted("held", candidates or WORKERS, point)

    def all_obeyed(self) -> bool:
        """Whether no order to die or stop stands any more."""
        return not any(file.name.startswith(("die@", "stop@")) for file in self._folder.iterdir())

    def forget(self) -> None:
        """No orders stand, and no worker stays away any more."""
        for file in self._folder.iterdir():
            file.unlink(missing_ok=True)

    @bounded
    async def _noted(self, what: str, candidates: tuple[str, ...], text: str = "") -> str:
        while True:
            for name in candidates:
                with contextlib.suppress(FileNotFoundError):
                    if (self._folder / f"{what}@{name}").read_text() == text:
                        return name
            await asyncio.sleep(POLL_S)


@dataclass
class Run:
    """One job under fault, on datasets of its own."""

    job: Job
    dataset: str
    routing: bytes | None
    """What was submitted, if the SDK remembers it."""
    events: list[JobEvent] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _collector: asyncio.Task[None] | None = None

    def collect(self) -> Self:
        """Begins to follow the job as the scientist does."""
        self._collector = asyncio.create_task(self._collect())
        return self

    @bounded
    async def reached(self, state: str) -> None:
        """Waits for an event with that state."""
        while not any(event.state == state for event in self.events):
            self._changed.clear()
            await self._changed.wait()

    @bounded
    async def ended(self) -> str:
        """Waits for the end; the state the job ended in."""
        assert self._collector is not None
        await asyncio.shield(self._collector)
        return self.events[-1].state

    async def close(self) -> None:
        if self._collector is not None:
            self._collector.cancel()
            await asyncio.gather(self._collector, return_exceptions=True)

    async def _collect(self) -> None:
        async for event in self.job.events():
            self.events.append(event)
            self._changed.set()


class Bench:
    """The stack, the scientist's connection, the host's eyes on NATS, and the checks after every fault."""

    def __init__(self, stack: LocalStack, orders: Orders, scientist: Consortium, host: Client) -> None:
        self.stack = stack
        self.orders = orders
        self.scientist = scientist
        self.host = host
        """A connection with the gateway's key: whoever runs NATS sees and may change as much."""
        self.records = JobStore(host)
        self._queue = WorkQueue(host)
        self._runs: list[Run] = []
        self._number = 0

    # --- jobs ---

    async def new_dataset(self) -> str:
        """The name of a dataset that each owner has just registered: nothing is spent yet."""
        self._number += 1
        name = f"points-{self._number}"
        await asyncio.gather(*(push(self.stack.layout, owner, name) for owner in OWNERS))
        return name

    async def submit(
        self,
        *,
        net: nn.Module | None = None,
        dataset: str | None = None,
        job_id: str | None = None,
        deadline_s: float = 24 * 3600,
    ) -> Run:
        """A small training job on both owners' newest datasets, followed from the start."""
        dataset = dataset or await self.new_dataset()
        job = await self.scientist.train(
            model=net or zeroed(nn.Sequential(nn.Linear(3, 1))),
            datasets=[f"{dataset}@{owner}" for owner in OWNERS],
            target=TARGET,
            steps=STEPS,
            batch_size=32,
            optimizer=cm.SGD(lr=0.1),
            privacy=cm.Privacy(epsilon=EPSILON_PER_JOB, delta=DELTA),
            purpose=PURPOSE,
            checkpoint_every_steps=CHECKPOINT_EVERY_STEPS,
            job_id=job_id,
            deadline_s=deadline_s,
        )
        return self.follow(job, dataset)

    def follow(self, job: Job, dataset: str) -> Run:
        """A job that was submitted by other means."""
        known = self.scientist._session.state.job(job.id)
        run = Run(job, dataset, None if known is None else encode(known.submission.routing)).collect()
        self._runs.append(run)
        return run

    async def lose_ciphertext(self, envelope: bytes) -> None:
        """The store has the envelope's head, and of its ciphertext nothing any more."""
        head = (await EnvelopeStore(self.host, BlobStore(self.host)).head(envelope)).head
        await BlobStore(self.host, may_purge=True).delete(head.header.ciphertext_digest)

    def first_step(self, run: Run, attempt: int) -> int:
        """The first step that attempt told of."""
        claims = [number for number, event in enumerate(run.events) if event.state == "claimed"]
        return min(event.step for event in run.events[claims[attempt - 1] :] if event.state == "running" and event.step)

    async def record(self, run: Run) -> JobRecord:
        """The job's record as NATS holds it."""
        return (await self.records.get(run.job.id))[0]

    async def cleared(self) -> None:
        """Whatever a test left behind is gone: orders, stopped workers, jobs that never ended."""
        self.orders.forget()
        for name in WORKERS:
            with contextlib.suppress(CasemateError, ProcessLookupError):
                self.go_on(name)
        for run in self._runs:
            if not run.events or run.events[-1].state not in TERMINAL:
                with contextlib.suppress(CasemateError):
                    await run.job.cancel()
                await self._queue.remove(run.job.id)
            await run.close()
        self._runs.clear()

    # --- processes ---

    def pid(self, program: str) -> int:
        """Process id of a running program, ``nats`` included."""
        return self.stack.nats.pid if program == "nats" else self.stack.programs[program].pid

    async def restart(self, program: str) -> None:
        """:meth:`kill`, and waits until the new one says that it is ready."""
        await self.kill(program)
        await until(lambda: self.stack.programs[program].is_ready)

    async def kill(self, program: str) -> None:
        """``kill -9``; returns once the process is gone and another has taken its place."""
        pid = self.pid(program)
        os.kill(pid, signal.SIGKILL)

        def replaced() -> bool:
            with contextlib.suppress(CasemateError):
                return self.pid(program) != pid
            return False

        await until(replaced)

    @contextlib.contextmanager
    def paused(self, program: str) -> Iterator[int]:
        """SIGSTOP until the block ends; gives the process id."""
        pid = self.pid(program)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGCONT)

    @contextlib.asynccontextmanager
    async def full_disk(self) -> AsyncIterator[None]:
        """nats-server stores nothing more, of whatever kind, until the block ends: it then has room again."""
        js, subject = (
            self.host.jetstream(timeout=REQUEST_TIMEOUT_S),
            subjects.blob_chunk("0" * 64, secrets.token_hex(16)),
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                with contextlib.suppress(nats.js.errors.APIError):
                    while True:
                        await asyncio.gather(*(js.publish(subject, bytes(CHUNK_BYTES)) for _ in range(16)))
            yield
        finally:
            await js.purge_stream(subjects.BLOB_STREAM, subject=subject)

    def go_on(self, program: str) -> None:
        """SIGCONT."""
        os.kill(self.pid(program), signal.SIGCONT)

    def training_process(self, worker: str) -> int:
        """Process id of the worker's training child."""
        (child,) = [child for child in children(self.pid(worker)) if b"casemate_worker.child" in command(child)]
        return child

    @bounded
    async def logged(self, program: str, event: str, job_id: str) -> dict[str, Any]:
        """The program's first log line with that event about that job, once there is one."""
        path = self.stack.layout.logs / f"{program}.log"
        while True:
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    value: dict[str, Any] = json.loads(line)
                    if (value["event"], value.get("job_id")) == (event, job_id):
                        return value
            await asyncio.sleep(POLL_S)

    # --- what must hold ---

    async def check_one_result(self, run: Run) -> Result:
        """The invariants of a job that was to succeed.

        1. It ended once, as sealed, and left the work queue.
        2. Its one result is verified and opened, and holds finite weights.
        3. Each owner was charged once, a single job's epsilon, and holds the commit of this very result.
        4. Each key broker's ledger and audit log verify, and tell of one reservation and one commit.
        """
        assert await run.ended() == "sealed"  # 1
        assert [event.state for event in run.events if event.state in TERMINAL] == ["sealed"]
        await self.queue_is_empty()
        record = await self.record(run)
        assert (record.state, record.reason) == ("sealed", None)
        result = await run.job.result()  # 2
        digest = self.released(record)
        assert result.job_id == run.job.id and all(np.isfinite(array).all() for array in result.arrays.values())
        terms = result.manifest.terms.digest
        for owner, privacy in zip(OWNERS, result.privacy.owners, strict=True):  # 3
            budget = await self.budget(run, owner)
            assert [(line.job_id, line.terms, line.committed) for line in budget.lines] == [(run.job.id, terms, digest)]
            assert budget.lines[0].epsilon == budget.epsilon_spent == privacy.epsilon <= EPSILON_PER_JOB
        for name in MEMBERS:  # 4
            booked, audited = self.books(name, terms)
            assert booked == ["reserve" if name in OWNERS else "release", "commit"], name
            told = [entry.event for entry in audited if entry.event in ("prechecked", "committed")]
            assert told == ["prechecked", "committed"], name
            assert [entry.result for entry in audited if entry.event == "committed"] == [digest], name
            assert any(entry.event == "granted" for entry in audited), name
        return result

    async def check_invariants(self, runs: Sequence[Run], *, hostile: bool = False) -> Counter[str]:
        """What must hold of jobs that have settled, whatever happened meanwhile; how many ended in which state.

        1. No submit that was acknowledged is lost: each job has its record, which says how it ended. Where NATS itself was
           ``hostile`` the record may be destroyed: then it is taken for nothing else, and counts as ``broken``.
        2. Nobody was told of any other end.
        3. The scientist opens the one result of each sealed job, verified, and none of any other.
        4. Each key broker's ledger and audit log verify, hold one charge of the job's terms at most, and one commit, of this
           result; of a sealed job all hold both.
        5. Nobody but the recipient opens a released result, and nobody at all a result that was uploaded and not released.
        """
        found = Counter[str]()
        for run in runs:
            record = await self._record_unless_broken(run) if hostile else await self.record(run)  # 1
            state = "broken" if record is None else record.state
            assert state in (*TERMINAL, "broken"), (run.job.id, state)
            if not hostile:  # 2
                assert {event.state for event in run.events if event.state in TERMINAL} <= {state}, run.job.id
            digest = self.released(record) if record is not None and state == "sealed" else None
            if not await self._check_readable(run, digest, hostile=hostile):  # 3
                digest, state = None, "broken"
            self._check_booked(run.job.id, self._terms(run, record), digest)  # 4
            found[state] += 1
        await self._check_sealed_from_others()  # 5
        return found

    async def settled(self, runs: Sequence[Run], patience_s: float = PATIENCE_S) -> None:
        """Waits until every one has ended, or has a record that nobody can read."""
        waiting = list(runs)
        async with asyncio.timeout(patience_s):
            while waiting:
                run = waiting[-1]
                with contextlib.suppress(UnavailableError):
                    record = await self._record_unless_broken(run)
                    if record is None or record.state in TERMINAL:
                        waiting.pop()
                        continue
                await asyncio.sleep(POLL_S)

    async def _record_unless_broken(self, run: Run) -> JobRecord | None:
        """The record, if it is the one of what was submitted."""
        try:
            record = await self.record(run)
        except (IntegrityError, NotFoundError):
            return None
        return record if run.routing in (None, record.routing) else None

    async def _check_readable(self, run: Run, digest: bytes | None, *, hostile: bool) -> bool:
        """That the scientist opens this very result, or none. False where none opens of what was garbled after its release."""
        if digest is None:
            with pytest.raises(CasemateError):
                await run.job.result()
            return True
        try:
            result = await run.job.result()
        except CasemateError:
            if not hostile:
                raise
            return False
        assert result.job_id == run.job.id and result.bundle.release.peek(Release).result == digest
        assert all(np.isfinite(array).all() for array in result.arrays.values())
        return True

    @staticmethod
    def _terms(run: Run, record: JobRecord | None) -> bytes:
        routing = run.routing if record is None else record.routing
        assert routing is not None
        return decode(Signed, routing).peek(Routing).terms

    def _check_booked(self, job_id: str, terms: bytes, digest: bytes | None) -> None:
        for name in MEMBERS:
            booked, audited = self.books(name, terms)
            charge = "reserve" if name in OWNERS else "release"
            committed = {entry.result for entry in audited if entry.event == "committed"}
            assert booked in ([], [charge], [charge, "commit"]), (job_id, name, booked)
            assert len(committed) <= 1, (job_id, name)
            if digest is not None:
                assert (booked, committed) == ([charge, "commit"], {digest}), (job_id, name)

    async def _check_sealed_from_others(self) -> None:
        """By the store as whoever runs NATS sees it."""
        layout = self.stack.layout
        people = {person: load_keys(layout.person_keys(person)).sealing for person in layout.read_facts().people}
        releases = {
            release.result: release
            async for record, _ in self.records.list(lambda *_: None)
            if record.release is not None and (release := decode(Signed, record.release).peek(Release))
        }
        async for digest, stored in EnvelopeStore(self.host, BlobStore(self.host)).heads():
            try:
                head = open_head(stored.data)
            except CasemateError:
                continue  # garbled on its way into the store: nobody opens that
            if head.header.preamble.kind != "result":
                continue
            for person, key in people.items():
                with pytest.raises(SealError):
                    unseal_content_key(head, key)
                for sealed in releases[digest].sealed_keys if digest in releases and person != SCIENTIST else ():
                    with pytest.raises(SealError):
                        unseal_key(sealed, head.header, key)

    async def budget(self, run: Run, owner: str) -> Budget:
        """What the owner's steward sees of this run's dataset."""
        async with connected(self.stack.layout, f"sam@{owner}") as consortium:
            return await consortium.budget(f"{run.dataset}@{owner}")

    @staticmethod
    def released(record: JobRecord) -> bytes:
        """Digest of the result that the record's release opens."""
        assert record.release is not None
        return decode(Signed, record.release).peek(Release).result

    @bounded
    async def queue_is_empty(self) -> None:
        """Waits until every delivery was acknowledged."""
        js = self.host.jetstream(timeout=1)
        while True:
            with contextlib.suppress(nats.errors.Error):  # after a crash of NATS this connection has to be made anew
                if (await js.stream_info("WORK_cpu")).state.messages == 0:
                    return
            await asyncio.sleep(POLL_S)

    def books(self, key_broker: str, terms: bytes) -> tuple[list[str], list[AuditEntry]]:
        """(ledger events, audit entries) about ``terms``, from a verified copy of the key broker's state at rest."""
        state = self.stack.layout.member(key_broker) / "key-broker"
        with tempfile.TemporaryDirectory() as folder:
            for file in state.glob("key-broker.sqlite*"):
                shutil.copy(file, folder)
            database = Database(Path(folder))
            try:
                with database.transaction() as tx:
                    ledger.verify(tx)
                    audit_log.verify(tx)
                    rows = tx.execute("SELECT event FROM ledger WHERE terms = ? ORDER BY number", (terms,)).fetchall()
                    return [event for (event,) in rows], [e for e in audit_log.entries(tx) if e.terms == terms]
            finally:
                database.close()


def zeroed(net: nn.Module) -> nn.Module:
    """The module with every parameter at zero, so that submitting it again is the same job."""
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    return net


def children(pid: int) -> list[int]:
    """Child processes of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def command(pid: int) -> bytes:
    """A process's command line; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextlib.asynccontextmanager
async def running_bench(stack: LocalStack, orders: Orders) -> AsyncIterator[Bench]:
    """A started stack with everything around it."""
    seed = stack.layout.program("gateway") / "nats.seed"
    async with stack, connected(stack.layout, SCIENTIST) as scientist:
        host = await connect(stack.nats.url, seed, user="gateway", name="test")
        try:
            yield Bench(stack, orders, scientist, host)
        finally:
            await host.close()


@contextlib.asynccontextmanager
async def through(
    seed: str, layout: Layout, orders: Orders, *, rate: float = 0.05
) -> AsyncIterator[tuple[LocalStack, ByzantineProxy]]:
    """A stack, not started, whose programs know NATS by the address of a proxy, which is honest until it is told not to be."""

    def upstream() -> int:
        return int(stack.nats.url.rpartition(":")[2])

    async with byzantine(seed, upstream, rate=rate) as proxy:
        told = {"nats_url": proxy.url}
        overrides = {name: {**OVERRIDES.get(name, {}), **told} for name in ("gateway", *WORKERS, *MEMBERS)}
        stack = LocalStack(layout, overrides=overrides, commands=orders.commands(), max_store_bytes=STORE_BYTES)
        yield stack, proxy
