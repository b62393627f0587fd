"""One running stack whose programs obey orders to die, and everything else that can be done to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import casemate as cm
import nats.errors
import nats.js.errors
from casemate.client import Consortium
from casemate.jobs import Job
from casemate.local_stack.layout import Layout
from casemate.local_stack.supervisor import LocalStack
from casemate_messaging.blobs import CHUNK_BYTES, BlobStore
from casemate_messaging.connection import REQUEST_TIMEOUT_S, connect
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.queue import WorkQueue
from casemate_schemas import subjects
from casemate_schemas.codec import encode
from casemate_schemas.errors import CasemateError
from casemate_schemas.job_state import TERMINAL
from nats.aio.client import Client
from support.byzantine import ByzantineProxy, byzantine
from support.invariants import Invariants, Run
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
from support.waiting import PATIENCE_S, POLL_S, bounded, until
from torch import nn

STEPS: Final = 12
CHECKPOINT_EVERY_STEPS: Final = 5
STORE_BYTES: Final = 96 << 20
"""Room for all that nats-server stores; 64 MiB of it are reserved for nonces."""
ACK_WAIT_S: Final = 3.0
LAUNCHER: Final = Path(__file__).parents[1] / "faults" / "launcher.py"

OVERRIDES: Final[dict[str, dict[str, object]]] = {
    "gateway": {
        "ack_wait_s": ACK_WAIT_S,
        "key_broker_timeout_s": 3.0,
        "precheck_retry_s": 0.5,
        "lost_after_s": 1.0,
        "reconcile_every_s": 1.0,
        "heartbeat_s": 1.0,
        "poll_after_s": 1,
    },
    **{
        name: {
            "heartbeat_s": 0.5,
            "pull_wait_s": 1.0,
            "rpc_timeout_s": 2.0,
            "retry_delay_s": 0.5,
            "checkpoint_interval_s": 0.0,
        }
        for name in WORKERS
    },
}
"""Impatient programs, so that a test need not wait long for a job to be given to the next."""


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
        self.hold_at(point, who)
        try:
            yield
        finally:
            self.let_go(point, who)

    def hold_at(self, point: str, who: str = "anyone") -> None:
        """Whoever reaches ``point`` waits there until :meth:`let_go`."""
        (self._folder / f"hold@{who}@{point}").touch()

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


class Bench(Invariants):
    """The stack, the scientist's connection, what can be done to all of it, and the checks afterwards."""

    def __init__(self, stack: LocalStack, orders: Orders, scientist: Consortium, host: Client) -> None:
        super().__init__(stack, host)
        self.orders = orders
        self.scientist = scientist
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
        await self.lose_blob(head.header.ciphertext_digest)

    async def lose_blob(self, digest: bytes) -> None:
        """The store has nothing any more of that digest."""
        await BlobStore(self.host, may_purge=True).delete(digest)

    def first_step(self, run: Run, attempt: int) -> int:
        """The first step that attempt told of."""
        claims = [number for number, event in enumerate(run.events) if event.state == "claimed"]
        return min(event.step for event in run.events[claims[attempt - 1] :] if event.state == "running" and event.step)

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
        await self.replaced(program, pid)

    async def replaced(self, program: str, pid: int) -> None:
        """Waits until another process than ``pid`` has taken its place."""

        def is_another() -> bool:
            with contextlib.suppress(CasemateError):
                return self.pid(program) != pid
            return False

        await until(is_another)

    @contextlib.contextmanager
    def unwritable(self, program: str) -> Iterator[None]:
        """No file takes another byte of that program's until the block ends, as on a disk that is full."""
        pid, free = self.pid(program), resource.prlimit(self.pid(program), resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, free[1]))
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and another took its place
                resource.prlimit(pid, resource.RLIMIT_FSIZE, free)

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
        """nats-server has stored as much as it may of whatever kind (``max_file_store``) until the block ends."""
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
