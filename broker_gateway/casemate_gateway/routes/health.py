"""``/livez`` and ``/readyz``: unsigned, and silent about why."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web
from casemate_messaging.setup import StreamSettings, stream_configs
from casemate_schemas.errors import UnavailableError
from nats.aio.client import Client
from nats.errors import Error as NatsError

from casemate_gateway.gateway import gateway_of

_REMEMBERED_S = 2.0
_TIMEOUT_S = 5.0


class Readiness:
    """Whether NATS answers and has every stream; asked at most every two seconds, however often others ask."""

    def __init__(self, client: Client, settings: StreamSettings) -> None:
        self._client = client
        self._streams = [config.name or "" for config in stream_configs(settings)]
        self._lock = asyncio.Lock()
        self._asked = float("-inf")
        self._ready = False

    async def ready(self) -> bool:
        """The newest finding."""
        async with self._lock:
            if time.monotonic() - self._asked > _REMEMBERED_S:
                self._ready = self._client.is_connected and await self._streams_exist()
                self._asked = time.monotonic()
        return self._ready

    async def _streams_exist(self) -> bool:
        js = self._client.jetstream(timeout=_TIMEOUT_S)
        try:
            await asyncio.gather(*(js.stream_info(name) for name in self._streams))
        except (NatsError, OSError, TimeoutError):
            return False
        return True


READINESS = web.AppKey("readiness", Readiness)


async def live(_: web.Request) -> web.Response:
    """``GET /livez``: this process answers."""
    return web.Response(text="ok\n")


async def ready(request: web.Request) -> web.Response:
    """``GET /readyz``: it can serve. Raises :class:`UnavailableError`."""
    if gateway_of(request).stopping.is_set() or not await request.app[READINESS].ready():
        raise UnavailableError("not ready")
    return web.Response(text="ok\n")
