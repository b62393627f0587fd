"""A stack's NATS as a cluster of three servers on this machine: any one of them may be lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from casemate.local_stack.founding import nats_users
from casemate.local_stack.layout import Layout
from casemate_messaging.accounts import User
from casemate_messaging.connection import connect
from casemate_messaging.server import EmbeddedServer
from casemate_schemas.errors import SetupError
from support.nats_cluster import NAMES, all_current, free_ports, set_up


class _Node(EmbeddedServer):
    """One server, which knows the others' routes."""

    def __init__(self, folder: Path, users: Sequence[User], port: int, section: dict[str, Any]) -> None:
        super().__init__(folder, users, port=port)
        self._section = section

    def _write_config(self) -> Path:
        path = super()._write_config()
        path.write_text(json.dumps({**json.loads(path.read_text()), **self._section}))
        return path


class Cluster:
    """Three servers in the place of a :class:`LocalStack`'s one. Who is killed comes back when :meth:`start` is called."""

    def __init__(self, layout: Layout) -> None:
        self._seed = layout.program("gateway") / "nats.seed"
        folder, users = layout.nats, nats_users(layout)
        ports = free_ports(2 * len(NAMES))
        routes = [f"nats://127.0.0.1:{port}" for port in ports[: len(NAMES)]]
        self.nodes: dict[str, EmbeddedServer] = {}
        for name, route, port in zip(NAMES, routes, ports[len(NAMES) :], strict=True):
            cluster = {"name": "tests", "listen": route.removeprefix("nats://"), "routes": routes}
            self.nodes[name] = _Node(folder / name, users, port, {"server_name": name, "cluster": cluster})
        self.url = ",".join(f"nats://127.0.0.1:{port}" for port in ports[len(NAMES) :])

    async def start(self) -> str:
        """Starts all that do not run; returns once every stream has all its replicas."""
        for node in self.nodes.values():
            with contextlib.suppress(SetupError):
                await node.start()
        client = await connect(self.url, self._seed, user="gateway")
        try:
            await set_up(client)
            await all_current(client)
        finally:
            await client.close()
        return self.url

    async def stop(self) -> None:
        await asyncio.gather(*(node.stop() for node in self.nodes.values()))

    async def wait(self) -> None:
        """The supervisor need not care: who is killed is started again by whoever killed it."""
        await asyncio.Event().wait()

    async def kill(self, name: str) -> None:
        """``kill -9``; returns once it is gone."""
        os.kill(self.nodes[name].pid, signal.SIGKILL)
        await self.nodes[name].wait()
