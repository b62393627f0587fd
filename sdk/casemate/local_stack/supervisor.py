"""Starts a stack's programs in the right order, restarts what dies, and ends all of them, whatever happens.

Every program is a child of this process and, on Linux, is killed by the kernel should this process be killed itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

from casemate_messaging.server import EmbeddedServer, bound_to_this_process
from casemate_messaging.tasks import end
from casemate_schemas.errors import SetupError, UnavailableError

from .founding import nats_users, write_settings
from .hosting import list_hosted
from .layout import Facts, Layout

READY_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 10.0
_RESTART_DELAY_S: Final = 0.5
_MAX_LINE_BYTES: Final = 64 << 10
_WORKER_MODULES: Final = frozenset({"casemate_worker", "casemate_attestation.simulated_chip"})


class Program:
    """One program: its Python and what that is told, its log file, its process while it runs."""

    def __init__(self, name: str, python: str, command: list[str], layout: Layout) -> None:
        self.name = name
        self._python = python
        self._command = command
        self._layout = layout
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[dict[str, object]] | None = None

    @property
    def pid(self) -> int:
        """The process id. Raises :class:`SetupError` if it does not run."""
        if self._process is None or self._process.returncode is not None:
            raise SetupError(f"{self.name} does not run")
        return self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether the process that was started last has said so."""
        return self._ready is not None and self._ready.done() and self._ready.exception() is None

    async def start(self) -> dict[str, object]:
        """Starts it and waits for its event ``ready``; returns that event's fields.

        Raises :class:`SetupError` if it ends before, :class:`UnavailableError` if it takes too long.
        """
        self._ready = asyncio.get_running_loop().create_future()
        self._process = await asyncio.create_subprocess_exec(
            *bound_to_this_process([self._python, "-I", *self._command]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
            cwd=self._layout.folder,
            env={},
        )
        self._reader = asyncio.create_task(self._read(self._process, self._ready))
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return await asyncio.shield(self._ready)
        except TimeoutError as error:
            raise UnavailableError(f"{self.name} was not ready within {READY_TIMEOUT_S:.0f} s") from error

    async def wait(self) -> int | None:
        """Waits until the process has ended; its exit status, None if it was never started."""
        return None if self._process is None else await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL. Does nothing if it does not run."""
        process, reader = self._process, self._reader
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if reader is not None:
            await reader

    async def _read(self, process: asyncio.subprocess.Process, ready: asyncio.Future[dict[str, object]]) -> None:
        """Copies standard error to the log until it ends, and notices ``ready``."""
        last = b""
        with (self._layout.logs / f"{self.name}.log").open("ab") as log:
            if process.stderr is not None:
                async for line in _lines(process.stderr):
                    last = line
                    log.write(line)
                    log.flush()
                    if not ready.done() and (event := _ready_event(line)) is not None:
                        ready.set_result(event)
        await process.wait()
        if not ready.done():
            text = last.decode("utf-8", "replace").strip()[:500]
            ready.set_exception(SetupError(f"{self.name} ended with status {process.returncode}: {text}"))


class LocalStack:
    """A founded stack's programs, running. Use as an async context manager.

    ``overrides`` are settings, as for :func:`write_settings`. ``commands`` has the Python arguments that start a program
    (by its name in :attr:`programs`) in place of ``-m`` and its module; what it is told follows them.
    ``worker_python`` is another interpreter for the workers: the packages that it imports are the worker image, so it also
    runs the simulated chip, which measures them. ``max_store_bytes`` bounds what NATS stores; the disk does if not given.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        gateway_port: int = 0,
        overrides: Mapping[str, Mapping[str, object]] | None = None,
        commands: Mapping[str, Sequence[str]] | None = None,
        worker_python: Path | None = None,
        max_store_bytes: int | None = None,
    ) -> None:
        self.layout = layout
        self._worker_python = str(worker_python or sys.executable)
        self.programs: dict[str, Program] = {}
        self._gateway_port = gateway_port
        self._overrides = overrides or {}
        self._commands = commands or {}
        self._guards: list[asyncio.Task[None]] = []
        self.nats = EmbeddedServer(layout.nats, nats_users(layout), max_store_bytes=max_store_bytes)

    @property
    def facts(self) -> Facts:
        """What a client needs to know."""
        return self.layout.read_facts()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Ends every program, NATS last."""
        await end(self._guards, again_s=STOP_TIMEOUT_S)  # one may be ending a program that it began to start
        self._guards.clear()
        await asyncio.gather(*(program.stop() for program in self.programs.values()), return_exceptions=True)
        await self.nats.stop()

    async def _start(self) -> None:
        """
        1. NATS.
        2. The gateway, which sets up the streams, beside the chip and the key brokers.
        3. Key brokers in enclaves, once there is a chip to launch them; at the first start members attest and list them.
        4. The workers.
        5. From here on whatever dies is started again, but for a worker that was drained.
        """
        url = await self.nats.start()  # 1
        files = write_settings(self.layout, url, gateway_port=self._gateway_port, overrides=self._overrides)
        facts = self.facts
        gateway = self._program("gateway", "casemate_gateway", "--settings", str(files["gateway"]))
        chip = ["--socket", str(self.layout.chip_socket), "--key-dir", str(self.layout.chip)]
        if facts.hosted:
            chip += ["--key-broker-socket", str(self.layout.key_broker_socket)]
        first = [gateway, self._program("simulated-chip", "casemate_attestation.simulated_chip", *chip)]
        key_brokers = {
            name: self._program(f"key-broker-{name}", "casemate_key_broker", "--settings", str(files[name]))
            for name in facts.members
        }
        first += [program for name, program in key_brokers.items() if name not in facts.hosted]
        ready, *_ = await asyncio.gather(*(program.start() for program in first))  # 2
        port = int(str(ready["address"]).rpartition(":")[2])
        write_settings(self.layout, url, gateway_port=port, overrides=self._overrides)
        self.layout.write_facts(replace(facts, url=f"http://127.0.0.1:{port}"))
        await asyncio.gather(*(key_brokers[name].start() for name in facts.hosted))  # 3
        await list_hosted(self.layout, self.facts.url)
        workers = [self._program(name, "casemate_worker", "--settings", str(files[name])) for name in facts.workers]
        await asyncio.gather(*(program.start() for program in workers))  # 4
        self._guards = [asyncio.create_task(self._guard(program)) for program in self.programs.values()]  # 5
        self._guards.append(asyncio.create_task(self._guard_nats()))

    def _program(self, name: str, module: str, *arguments: str) -> Program:
        command = [*self._commands.get(name, ("-m", module)), *arguments]
        python = self._worker_python if module in _WORKER_MODULES else sys.executable
        self.programs[name] = Program(name, python, command, self.layout)
        return self.programs[name]

    async def _guard(self, program: Program) -> None:
        while True:
            if await program.wait() == 0 and program.name in self.facts.workers:
                return  # it was drained
            await asyncio.sleep(_RESTART_DELAY_S)
            with contextlib.suppress(SetupError, UnavailableError):
                await program.start()

    async def _guard_nats(self) -> None:
        while True:
            await self.nats.wait()
            await asyncio.sleep(_RESTART_DELAY_S)
            with contextlib.suppress(SetupError, UnavailableError):
                await self.nats.start()


async def run_until_told(stack: LocalStack) -> None:
    """Keeps a started stack running until SIGTERM or SIGINT; its pid file says who to tell meanwhile."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    pid_file = stack.layout.pid_file
    pid_file.write_text(json.dumps({"pid": os.getpid(), "started": process_start(os.getpid())}))
    try:
        await stop.wait()
    finally:
        pid_file.unlink(missing_ok=True)


def running_supervisor(layout: Layout) -> int | None:
    """Process id of the stack's supervisor, if the one that wrote the pid file still runs."""
    try:
        value = json.loads(layout.pid_file.read_text())
        pid, started = int(value["pid"]), value["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if process_start(pid) == started is not None else None


def process_start(pid: int) -> str | None:
    """When a process started, in the kernel's words, so that a reused pid is not taken for the old one; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "running" if not Path("/proc/self/stat").exists() else None


def _ready_event(line: bytes) -> dict[str, object] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and event.get("event") == "ready" else None


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # a line over the limit: its bytes are dropped, not kept
            continue
        if not line:
            return
        yield line
