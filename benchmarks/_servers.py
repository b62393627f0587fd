"""Servers that benchmarks start for themselves, on the loopback and a free port, gone when the block ends."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from casemate_messaging.server import find_binary

START_S = 20.0
_POLL_S = 0.01


@asynccontextmanager
async def nats_server(folder: Path, *, fsync: bool = True) -> AsyncIterator[str]:
    """The URL of a nats-server without accounts, so that peers may do what they like.

    With ``fsync`` each message is on the disk before it is acknowledged, as ours are; without, it keeps its default, two
    minutes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sync = ", sync_interval: always" if fsync else ""
    config = folder / "nats.conf"
    config.write_text(
        f'host: 127.0.0.1\nport: -1\nmax_payload: 2MB\nports_file_dir: "{folder}"\n'
        f'jetstream {{ store_dir: "{folder}/store"{sync} }}\n'
    )
    process = await asyncio.create_subprocess_exec(
        str(find_binary()), "--config", str(config), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(START_S):
            while not (ports := list(folder.glob("*.ports"))) or not ports[0].read_text():  # noqa: ASYNC110 - a file
                await asyncio.sleep(_POLL_S)
        yield ports[0].read_text().split('"nats":')[1].split('"')[1]
    finally:
        process.terminate()
        await process.wait()


def redis_binary() -> str | None:
    """Where redis-server is, if it is installed (Debian: ``redis-server``)."""
    return shutil.which("redis-server")


@asynccontextmanager
async def redis_server(folder: Path, *, fsync: bool = True) -> AsyncIterator[int]:
    """The port of a redis-server. With ``fsync`` its log is on the disk before it answers; without, its defaults hold."""
    binary = redis_binary()
    if binary is None:
        raise SystemExit("redis-server is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    durable = ("--appendonly", "yes", "--appendfsync", "always") if fsync else ()
    process = await asyncio.create_subprocess_exec(
        *(binary, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), *durable),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(START_S):
            while not await _listens(port):  # noqa: ASYNC110 - another process
                await asyncio.sleep(_POLL_S)
        yield port
    finally:
        process.terminate()
        await process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
