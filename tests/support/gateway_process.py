"""The gateway as a process of its own, and an address in front of several of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .gateway import House


class Program:
    """``python -m casemate_gateway`` and what it says."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any]) -> None:
        self.process = process
        self.ready = ready

    def memory_bytes(self, field: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{field}:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024


def settings_file(folder: Path, house: House, **changes: Any) -> Path:
    values = {**house.settings.model_dump(mode="json", exclude_defaults=True), **changes}
    path = folder / "gateway.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    return path


@asynccontextmanager
async def program(settings: Path) -> AsyncIterator[Program]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "casemate_gateway", "--settings", str(settings), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    drain: asyncio.Task[bytes] | None = None
    try:
        async with asyncio.timeout(30):
            line = json.loads(await process.stderr.readline())
            while line["event"] != "ready":
                line = json.loads(await process.stderr.readline())
        drain = asyncio.create_task(process.stderr.read())
        yield Program(process, line)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        if drain is not None:
            await drain


@dataclass
class Balancer:
    """One address; each new connection goes to the next of the gateways behind it."""

    origin: str = ""
    gateways: list[str] = field(default_factory=list)
    connections: list[str] = field(default_factory=list)
    """Where each one went."""
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            chosen = self.gateways[len(self.connections) % len(self.gateways)]
            self.connections.append(chosen)
            host, _, port = chosen.removeprefix("http://").rpartition(":")
            back_reader, back_writer = await asyncio.open_connection(host, int(port))
            self._open |= {writer, back_writer}
            await asyncio.gather(_pass_on(reader, back_writer), _pass_on(back_reader, writer))
        writer.close()

    def cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def balancer() -> AsyncIterator[Balancer]:
    found = Balancer()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.close()
        found.cut()
        await server.wait_closed()
