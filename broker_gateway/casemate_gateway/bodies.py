"""What a request carries: read within bounds, and only as the bytes its signature covers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Final

import aiohttp
from aiohttp import web
from casemate_schemas.errors import AuthenticationError, MalformedError, TooLargeError

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Body:
    """A request's body. Whoever has all of it knows that it has the signed SHA-256 ``digest``.

    Nothing is read before it is asked for, and never more than about 128 KiB ahead; a sender who waits for
    ``100 Continue`` gets it then, so what is refused before is never sent. One who stops for ``idle_s`` or stays below
    ``min_bytes_per_s`` is answered 408.
    """

    def __init__(self, request: web.Request, digest: bytes, *, idle_s: float, min_bytes_per_s: int) -> None:
        self.content_length = request.content_length
        self._request = request
        self._is_awaited = request.headers.get("Expect", "").lower() == "100-continue"
        self._content = request.content
        self._digest = digest
        self._idle_s = idle_s
        self._min_bytes_per_s = min_bytes_per_s
        self._started = time.monotonic()
        self._hasher = hashlib.sha256()
        self._bytes = 0

    async def whole(self, max_bytes: int) -> bytes:
        """All of it. Raises :class:`TooLargeError` over ``max_bytes``, and as :meth:`rest`."""
        if self.content_length is not None and self.content_length > max_bytes:
            raise TooLargeError(f"expected a body of at most {max_bytes} bytes, got {self.content_length}")
        return b"".join([piece async for piece in self.rest(max_bytes)])

    async def take(self, count: int) -> bytes:
        """The next ``count`` bytes (a few hundred KiB at most). Raises :class:`MalformedError` if there are fewer."""
        await self._invite()
        return self._seen(await self._in_time(self._content.readexactly(count)))

    async def rest(self, max_bytes: int) -> AsyncIterator[bytes]:
        """What is left, in pieces; the last one is held back until the digest of the whole body is right.

        Raises :class:`AuthenticationError` if it is not, :class:`TooLargeError` as soon as more than ``max_bytes`` are
        left, and :class:`MalformedError` if the connection ends before the body does.
        """
        await self._invite()
        held, left = b"", max_bytes
        while piece := self._seen(await self._in_time(self._content.readany())):
            left -= len(piece)
            if left < 0:
                raise TooLargeError(f"expected at most {max_bytes} bytes")
            if held:
                yield held
            held = piece
        if not hmac.compare_digest(self._hasher.digest(), self._digest):
            raise AuthenticationError("the body does not have the signed content-digest")
        if held:
            yield held

    async def _invite(self) -> None:
        """Has the sender begin, if it waits for that."""
        if self._is_awaited:
            self._is_awaited = False
            await self._request.writer.write(_CONTINUE)
            self._request.writer.output_size = 0  # of the answer, nothing was written yet

    def _seen(self, piece: bytes) -> bytes:
        self._hasher.update(piece)
        self._bytes += len(piece)
        allowed_s = self._idle_s + self._bytes / self._min_bytes_per_s
        if time.monotonic() - self._started > allowed_s:
            raise web.HTTPRequestTimeout
        return piece

    async def _in_time(self, reading: Awaitable[bytes]) -> bytes:
        try:
            return await asyncio.wait_for(reading, self._idle_s)
        except TimeoutError as error:
            raise web.HTTPRequestTimeout from error
        except (asyncio.IncompleteReadError, aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError) as error:
            raise MalformedError("the body ends before it is whole") from error
