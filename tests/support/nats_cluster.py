"""Three nats-servers on this machine, run from the files that ``consortium init`` writes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats.errors
from casemate.deployment import read_plan, write_deployment
from casemate_messaging.server import bound_to_this_process, find_binary
from casemate_messaging.setup import StreamSettings, ensure_streams, stream_configs
from casemate_schemas.codec import encode
from casemate_schemas.errors import UnavailableError
from nats.aio.client import Client
from nats.js import JetStreamContext

from .consortium import ConsortiumKeys
from .tls import Authority

NAMES = ("nats-1", "nats-2", "nats-3")
POLL_S = 0.1
PATIENCE_S = 60.0
_REPLICATED = StreamSettings(replicas=len(NAMES))


def plan_file(folder: Path, keys: ConsortiumKeys, ours: Authority, **changes: Any) -> Path:
    """A plan for three servers with TLS on ports that are free now."""
    (folder / "consortium.bin").write_bytes(encode(keys.chain))
    ports = iter(free_ports(2 * len(NAMES)))
    lines = [
        f'manifest = "{changes.get("manifest", "consortium.bin")}"',
        f'consortium = "{changes.get("consortium", keys.consortium.id.hex())}"',
        'gateways = ["gateway-1", "gateway-2"]',
        'workers = ["worker-1"]',
        f'ca_file = "{ours.file}"',
    ]
    for name in NAMES:
        certificate, key = ours.issue(name)
        lines += [
            "[[nats]]",
            f'name = "{name}"',
            'host = "127.0.0.1"',
            f"port = {next(ports)}",
            f"cluster_port = {next(ports)}",
            f'store_dir = "{folder / "stores" / name}"',
            f'certificate_file = "{certificate}"',
            f'key_file = "{key}"',
        ]
    path = folder / "plan.toml"
    path.write_text("\n".join(lines))
    return path


def deploy(plan: Path, out: Path) -> Path:
    """The written folder."""
    write_deployment(read_plan(plan), out)
    return out


class NatsCluster:
    """The servers of one deployment."""

    def __init__(self, deployed: Path) -> None:
        self._deployed = deployed
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, name: str) -> None:
        """Starts one server, and waits until it listens."""
        folder = self._deployed / "nats" / name
        self._processes[name] = process = await asyncio.create_subprocess_exec(
            *bound_to_this_process([str(find_binary())]),
            *("--config", str(folder / "nats-server.json"), "--ports_file_dir", str(folder)),
            *("--log", str(folder / "nats-server.log")),
        )
        ports = folder / f"nats-server_{process.pid}.ports"
        async with asyncio.timeout(30):
            while not ports.exists():
                assert process.returncode is None, (folder / "nats-server.log").read_text()
                await asyncio.sleep(0.01)

    async def kill(self, name: str) -> None:
        """Kills one server as a power cut would."""
        process = self._processes.pop(name)
        process.send_signal(signal.SIGKILL)
        await process.wait()

    async def stop(self) -> None:
        """Ends all of them."""
        for name in tuple(self._processes):
            await self.kill(name)


@contextlib.asynccontextmanager
async def running_cluster(deployed: Path) -> AsyncIterator[NatsCluster]:
    """All three, running."""
    cluster = NatsCluster(deployed)
    try:
        await asyncio.gather(*map(cluster.start, NAMES))
        yield cluster
    finally:
        await cluster.stop()


async def set_up(client: Client) -> None:
    """Makes all streams, with a replica on each server, once the servers have found each other."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(UnavailableError):
                return await ensure_streams(client.jetstream(), _REPLICATED)
            await asyncio.sleep(POLL_S)


async def all_current(client: Client) -> None:
    """Waits until every stream's replicas are all there: then the next server may be lost."""
    js = client.jetstream()
    async with asyncio.timeout(PATIENCE_S):
        for config in stream_configs(_REPLICATED):
            while not await _is_current(js, config.name or ""):  # noqa: ASYNC110 - another process
                await asyncio.sleep(POLL_S)


async def _is_current(js: JetStreamContext, stream: str) -> bool:
    with contextlib.suppress(nats.errors.Error):
        info = await js.stream_info(stream)
        replicas = (info.cluster and info.cluster.replicas) or []
        return len(replicas) == len(NAMES) - 1 and all(r.current and not r.offline for r in replicas)
    return False


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()
