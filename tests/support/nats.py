"""A real nats-server for one test, with users as in production.

In a ``conftest.py``: ``from support.nats import nats_stack``; tests then take ``nats_stack``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from casemate_messaging.accounts import User
from casemate_messaging.connection import connect
from casemate_messaging.server import EmbeddedServer, create_user_key
from casemate_messaging.setup import StreamSettings, ensure_streams
from nats.aio.client import Client

WORKERS = ("worker-1", "worker-2")
KEY_BROKERS = ("north", "south", "east", "clara")


class NatsStack:
    """A running server, its users' seed files, and the connections made through it, closed at the end."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.seeds = {user: folder / f"{user}.nk" for user in ("gateway", *WORKERS, *KEY_BROKERS)}
        keys = {user: create_user_key(seed) for user, seed in self.seeds.items()}
        users = [
            User("gateway", "gateway", keys["gateway"]),
            *(User("worker", user, keys[user]) for user in WORKERS),
            *(User("key_broker", user, keys[user]) for user in KEY_BROKERS),
        ]
        self.server = EmbeddedServer(folder / "nats", users)
        self.errors: dict[str, list[Exception]] = {}
        self._clients: list[Client] = []
        self._gateway: Client | None = None

    @property
    def url(self) -> str:
        return self.server.url

    async def start(self, settings: StreamSettings | None = None) -> None:
        """Starts the server and sets up the streams, as the gateway does."""
        await self.server.start()
        await ensure_streams((await self.gateway()).jetstream(), settings)

    async def gateway(self) -> Client:
        """One connection of the gateway's, made once."""
        if self._gateway is None:
            self._gateway = await self.connect("gateway")
        return self._gateway

    async def connect(self, user: str) -> Client:
        """A new connection of ``user``; what it reports on the side is appended to ``errors[user]``."""
        client = await connect(self.url, self.seeds[user], user=user, on_error=self.errors.setdefault(user, []).append)
        self._clients.append(client)
        return client

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        await self.server.stop()


@pytest.fixture
async def nats_stack(tmp_path: Path) -> AsyncIterator[NatsStack]:
    """A started :class:`NatsStack` with streams set up."""
    stack = NatsStack(tmp_path / "nats-stack")
    try:
        await stack.start()
        yield stack
    finally:
        await stack.close()
