"""Signed heads of envelopes by the digest of their header.

An envelope is stored as two things: its ciphertext as a blob, then its head here. So a head that can be found belongs to
a ciphertext that is complete.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from casemate_schemas import subjects
from casemate_schemas.envelope import MAX_HEAD_BYTES
from casemate_schemas.errors import TooLargeError
from nats.aio.client import Client

from .connection import REQUEST_TIMEOUT_S, publish_once, translated
from .direct import Stored, read_all, read_last


class HeadStore:
    """Heads over one connection. What is read is as untrusted as NATS: open it with ``envelope.open_head``, and check
    that its header has the digest asked for.
    """

    def __init__(self, client: Client, *, patience_s: float = 0.0) -> None:
        """``patience_s`` is how long :meth:`get` looks for what a replica may not have yet."""
        self._client = client
        self._patience_s = patience_s
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)

    async def put(self, digest: bytes, signed_head: bytes) -> bool:
        """Stores a head durably under its header's ``digest``; False if there is one already, which stays.

        Raises :class:`TooLargeError` over ``MAX_HEAD_BYTES``, :class:`StorageFullError`, :class:`UnavailableError`.
        """
        if len(signed_head) > MAX_HEAD_BYTES:
            raise TooLargeError(f"expected an envelope head of at most {MAX_HEAD_BYTES} bytes, got {len(signed_head)}")
        with translated("storing an envelope's head"):
            return await publish_once(self._js, subjects.head(digest.hex()), signed_head)

    async def get(self, digest: bytes) -> bytes:
        """The signed head stored under ``digest``. Raises :class:`NotFoundError`, :class:`UnavailableError`."""
        subject = subjects.head(digest.hex())
        return (await read_last(self._client, subjects.HEAD_STREAM, subject, patience_s=self._patience_s)).data

    async def delete(self, digest: bytes, *, sequence: int | None = None) -> None:
        """Removes the head if it is there. The gateway only.

        ``sequence``, if given, is the head's as :meth:`list` told it: one that was stored since stays.
        """
        before = None if sequence is None else sequence + 1
        with translated("removing an envelope's head"):
            await self._js.purge_stream(subjects.HEAD_STREAM, subject=subjects.head(digest.hex()), seq=before)

    async def list(self) -> AsyncIterator[tuple[bytes, Stored]]:
        """Every digest with the head stored under it, the oldest first. The gateway only."""
        prefix = subjects.head("x").removesuffix("x")
        async for stored in read_all(self._client, subjects.HEAD_STREAM, prefix + "*", batch=16):
            with contextlib.suppress(ValueError):
                yield bytes.fromhex(stored.subject.removeprefix(prefix)), stored
