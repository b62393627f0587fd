"""How much each member has stored: one message an envelope, with its size, under its member's name.

There is no counter that could drift: a total is the sum of what is there. Whoever is about to store an envelope writes
its entry first and adds up then, so of two gateways that store at once at least one sees the other's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final

import nats.js.errors
from casemate_schemas import subjects
from casemate_schemas.codec import WireModel, decode, encode
from casemate_schemas.errors import MalformedError
from nats.aio.client import Client
from nats.js.api import Header
from pydantic import Field

from .connection import REQUEST_TIMEOUT_S, is_wrong_revision, repeated, translated
from .direct import Stored, read_batch

_BATCH: Final = 256
_MAX_ENTRY_BYTES: Final = 64


class StoredSize(WireModel):
    """The size of an envelope that somebody stored, or has begun to."""

    KIND: ClassVar[str] = "stored-size"

    size: Annotated[int, Field(ge=0, lt=1 << 48)]


@dataclass(frozen=True)
class Total:
    """The bytes of a member's entries up to a sequence of the stream. Entries removed since are still in it."""

    size: int = 0
    sequence: int = 0


class StoredSizes:
    """The bucket ``stored``, shared by all gateways. For them alone: workers have no permission."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)

    async def add(self, member: str, envelope: str, size: int) -> bool:
        """Notes that ``member`` stores the envelope of that digest (hexadecimal); False if that was noted before.

        Raises :class:`StorageFullError`, :class:`UnavailableError`.
        """
        subject, data = _subject(member, envelope), encode(StoredSize(size=size))
        with translated("noting what is stored"):
            try:
                headers: dict[str, Any] = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE: "0"}
                await repeated(lambda: self._js.publish(subject, data, headers=headers))
            except nats.js.errors.APIError as error:
                if not is_wrong_revision(error):
                    raise
                return False
        return True

    async def remove(self, envelope: str, member: str = "*", *, sequence: int | None = None) -> None:
        """Forgets an envelope; with ``sequence``, only if it was noted no later. Raises :class:`UnavailableError`."""
        before = None if sequence is None else sequence + 1
        with translated("forgetting what was stored"):
            await self._js.purge_stream(subjects.STORED_STREAM, subject=_subject(member, envelope), seq=before)

    async def total(self, member: str, known: Total | None = None) -> Total:
        """What a member's entries add up to, counted on from a ``known`` total: then it may be too much, never too little.

        Raises :class:`UnavailableError`.
        """
        known = known or Total()
        size, sequence = known.size, known.sequence
        async for stored in self._read(_subject(member, "*"), sequence + 1):
            size, sequence = size + _size(stored), stored.sequence
        return Total(size, sequence)

    async def list(self) -> AsyncIterator[tuple[str, Stored]]:
        """Every envelope that is noted, by its digest, the longest noted first. Raises :class:`UnavailableError`."""
        async for stored in self._read(_subject("*", "*"), 1):
            yield stored.subject.rpartition(".")[2], stored

    async def _read(self, subject: str, start: int) -> AsyncIterator[Stored]:
        while batch := await read_batch(self._client, subjects.STORED_STREAM, subject, start=start, limit=_BATCH):
            for stored in batch:
                yield stored
            start = batch[-1].sequence + 1


def _subject(member: str, envelope: str) -> str:
    wanted = [part if part == "*" else subjects.token(part) for part in (member, envelope)]
    return ".".join(("$KV", subjects.STORED_BUCKET, *wanted))


def _size(stored: Stored) -> int:
    """What is noted; of a note that cannot be read nothing, or it would hold up all that its member ever sends."""
    try:
        return decode(StoredSize, stored.data, max_bytes=_MAX_ENTRY_BYTES).size
    except MalformedError:
        return 0
