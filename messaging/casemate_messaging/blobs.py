"""The blob store: ciphertext by its SHA-256, in chunks on a JetStream stream.

Chunks of one upload share a subject that no other upload has; one small marker message, which the server lets nobody
replace, makes an upload *the* blob. So a blob is there whole or not at all, and uploads never mix. What an upload left
behind that never got a marker is removed by :meth:`BlobStore.sweep`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator
from typing import Annotated, ClassVar, Final, Literal

from casemate_schemas import subjects
from casemate_schemas.codec import Name, UnixMs, WireModel, decode, encode
from casemate_schemas.errors import (
    CasemateError,
    IntegrityError,
    MalformedError,
    NotFoundError,
    SealError,
    TooLargeError,
    UnavailableError,
)
from nats.aio.client import Client
from nats.js.api import PubAck
from pydantic import Field

from .connection import REQUEST_TIMEOUT_S, publish_once, translated
from .direct import read_batch, read_last

CHUNK_BYTES: Final = 512 << 10
WINDOW: Final = 16
"""Chunks in flight at most, each way: what one transfer holds in memory is WINDOW * CHUNK_BYTES and little more."""

CHUNK_TIMEOUT_S: Final = 30.0
"""How long one chunk may wait for the disk, behind all others in flight."""

MAX_BLOB_BYTES: Final = 4 << 30
MAX_UPLOAD_S: Final = 6 * 3600.0
"""An upload that takes longer is given up, so that :meth:`BlobStore.sweep` never meets a live one."""

_MAX_MARKER_BYTES: Final = 1024


class BlobMarker(WireModel):
    """Which upload is the blob, and where its chunks lie in the stream."""

    KIND: ClassVar[str] = "blob-marker"

    version: Literal[1] = 1
    upload_id: Name
    size: Annotated[int, Field(ge=0, le=MAX_BLOB_BYTES)]
    chunks: Annotated[int, Field(ge=0, le=MAX_BLOB_BYTES // CHUNK_BYTES)]
    first_sequence: Annotated[int, Field(ge=0)]
    created: UnixMs


class BlobStore:
    """Blobs by digest over one connection.

    ``may_purge`` says whether this user's permissions let it remove chunks (the gateway's do): then a failed upload is
    cleaned up at once, else by the gateway's next sweep.
    """

    def __init__(self, client: Client, *, max_blob_bytes: int = MAX_BLOB_BYTES, may_purge: bool = False) -> None:
        self._client = client
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        self._max_blob_bytes = min(max_blob_bytes, MAX_BLOB_BYTES)
        self._may_purge = may_purge

    async def put(self, digest: bytes, size: int, chunks: AsyncIterable[bytes]) -> bool:
        """Stores the blob that ``chunks`` (pieces of any length) add up to; True if it was not there before.

        1. A blob that is there already is left alone and ``chunks`` is not read.
        2. Memory stays bounded by :data:`WINDOW` chunks; each is acknowledged by the disk.
        3. Only if the size is ``size`` and the SHA-256 is ``digest`` does the marker make the upload visible.

        Raises :class:`TooLargeError` for a ``size`` over the bound (before reading), :class:`MalformedError` for a size
        that is not the declared one, :class:`SealError` for another digest, :class:`StorageFullError`,
        :class:`UnavailableError`, and whatever ``chunks`` raises. After any of them nothing is visible.
        """
        _check_digest(digest)
        if not 0 <= size <= self._max_blob_bytes:
            raise TooLargeError(f"expected a blob of 0 to {self._max_blob_bytes} bytes, declared {size}")
        if await self._found(digest):
            return False
        upload = _Upload(self._client, digest, size)
        try:
            async with asyncio.timeout(MAX_UPLOAD_S):
                marker = await upload.run(chunks)
        except TimeoutError as error:
            await self._discard(upload.subject)
            raise UnavailableError("the upload took too long") from error
        except BaseException:
            await self._discard(upload.subject)
            raise
        # From here on an error leaves the chunks: the marker may have been stored although nobody said so.
        if await self._commit(digest, marker):
            return True
        await self._discard(upload.subject)
        return False

    async def stat(self, digest: bytes) -> int:
        """Size of a complete blob in bytes. Raises :class:`NotFoundError`, :class:`UnavailableError`."""
        return (await self._marker(digest)).size

    async def get(self, digest: bytes) -> AsyncIterator[bytes]:
        """The blob in order, in chunks of up to :data:`CHUNK_BYTES`.

        The last chunk is held back until the SHA-256 of the whole is ``digest``; what came before is unverified until
        the iterator has ended. Raises :class:`NotFoundError` before the first chunk, :class:`IntegrityError` if the
        stored bytes are not the blob, :class:`UnavailableError`.
        """
        marker = await self._marker(digest)
        hasher, held = hashlib.sha256(), b""
        async for chunk in self._chunks(digest, marker):
            hasher.update(chunk)
            if held:
                yield held
            held = chunk
        if hasher.digest() != digest:
            raise IntegrityError("the stored bytes do not have the blob's digest")
        if held:
            yield held

    async def delete(self, digest: bytes) -> None:
        """Removes the blob if it is there; a reader under way fails. Needs ``may_purge``."""
        marker = subjects.blob_marker(digest.hex())
        _check_digest(digest)
        await self._purge(subjects.BLOB_MARKER_STREAM, marker)
        await self._purge(subjects.BLOB_STREAM, subjects.blob_chunk(digest.hex(), "x").removesuffix("x") + "*")

    async def sweep(self, *, now_ms: int) -> int:
        """Removes chunks of uploads begun over twice :data:`MAX_UPLOAD_S` ago that never became a blob; how many uploads.

        Needs ``may_purge``.
        """
        with translated("listing uploads"):
            info = await self._js.stream_info(subjects.BLOB_STREAM, subjects_filter="casemate.blob.chunk.*.*")
        horizon, removed = now_ms - int(2000 * MAX_UPLOAD_S), 0
        for subject in info.state.subjects or {}:
            digest_hex, upload_id = subject.split(".")[3:]
            if _started_ms(upload_id) < horizon and not await self._is_blob(digest_hex, upload_id):
                await self._purge(subjects.BLOB_STREAM, subject)
                removed += 1
        return removed

    async def _is_blob(self, digest_hex: str, upload_id: str) -> bool:
        try:
            return (await self._marker(bytes.fromhex(digest_hex))).upload_id == upload_id
        except (NotFoundError, ValueError, MalformedError):
            return False

    async def _found(self, digest: bytes) -> bool:
        try:
            await self._marker(digest)
        except NotFoundError:
            return False
        return True

    async def _marker(self, digest: bytes) -> BlobMarker:
        _check_digest(digest)
        stored = await read_last(self._client, subjects.BLOB_MARKER_STREAM, subjects.blob_marker(digest.hex()))
        try:
            return decode(BlobMarker, stored.data, max_bytes=_MAX_MARKER_BYTES)
        except MalformedError as error:
            raise IntegrityError("the blob's marker is broken") from error

    async def _chunks(self, digest: bytes, marker: BlobMarker) -> AsyncIterator[bytes]:
        """The chunks the marker promises, a window at a time; no more bytes than it promises."""
        subject, start = subjects.blob_chunk(digest.hex(), marker.upload_id), marker.first_sequence
        missing, left = marker.chunks, marker.size
        while missing:
            batch = await read_batch(
                self._client, subjects.BLOB_STREAM, subject, start=start, limit=min(missing, WINDOW)
            )
            if not batch:
                raise IntegrityError(f"the blob lacks {missing} of {marker.chunks} chunks")
            for stored in batch:
                left -= len(stored.data)
                if left < 0:
                    raise IntegrityError("the blob is larger than its marker says")
                yield stored.data
            missing, start = missing - len(batch), batch[-1].sequence + 1

    async def _commit(self, digest: bytes, marker: BlobMarker) -> bool:
        """Makes the upload the blob; False if another upload of the same digest was first."""
        with translated("committing a blob"):
            if await publish_once(self._js, subjects.blob_marker(digest.hex()), encode(marker)):
                return True
        return (await self._marker(digest)).upload_id == marker.upload_id

    async def _discard(self, subject: str) -> None:
        """Best effort: the error that ended the upload is the one to tell, and a sweep removes what is left."""
        if self._may_purge:
            with contextlib.suppress(CasemateError):
                await asyncio.shield(self._purge(subjects.BLOB_STREAM, subject))

    async def _purge(self, stream: str, subject: str) -> None:
        with translated("removing a blob"):
            await self._js.purge_stream(stream, subject=subject)


class _Upload:
    """One upload under way: at most WINDOW chunks published and not yet acknowledged."""

    def __init__(self, client: Client, digest: bytes, size: int) -> None:
        self._js = client.jetstream(timeout=CHUNK_TIMEOUT_S)
        self._digest = digest
        self._size = size
        self._created = time.time_ns() // 1_000_000
        self._upload_id = f"{self._created:012x}-{secrets.token_hex(8)}"
        self._in_flight: deque[asyncio.Task[PubAck]] = deque()
        self._sequences: list[int] = []
        self.subject = subjects.blob_chunk(digest.hex(), self._upload_id)

    async def run(self, pieces: AsyncIterable[bytes]) -> BlobMarker:
        """Sends everything and returns the marker that would make it the blob."""
        hasher, total = hashlib.sha256(), 0
        try:
            async for chunk in _rechunked(pieces, self._size):
                hasher.update(chunk)
                total += len(chunk)
                await self._send(chunk)
            while self._in_flight:
                await self._acknowledged()
        finally:
            await self._cancel()
        if total != self._size:
            raise MalformedError(f"expected {self._size} bytes, got {total}")
        if hasher.digest() != self._digest:
            raise SealError("the bytes do not have the declared digest")
        return BlobMarker(
            upload_id=self._upload_id,
            size=total,
            chunks=len(self._sequences),
            first_sequence=self._sequences[0] if self._sequences else 0,
            created=self._created,
        )

    async def _send(self, chunk: bytes) -> None:
        if len(self._in_flight) == WINDOW:
            await self._acknowledged()
        self._in_flight.append(asyncio.create_task(self._js.publish(self.subject, chunk)))

    async def _acknowledged(self) -> None:
        """Waits for the oldest; chunks that were stored out of order would read back as another blob."""
        with translated("storing a blob"):
            sequence = (await self._in_flight.popleft()).seq
        if self._sequences and sequence <= self._sequences[-1]:
            raise UnavailableError("chunks were stored out of order; try again")
        self._sequences.append(sequence)

    async def _cancel(self) -> None:
        for task in self._in_flight:
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)
        self._in_flight.clear()


async def _rechunked(pieces: AsyncIterable[bytes], size: int) -> AsyncIterator[bytes]:
    """``pieces`` cut anew into chunks of CHUNK_BYTES; stops with an error as soon as there are more than ``size``."""
    buffer, total = bytearray(), 0
    async for piece in pieces:
        total += len(piece)
        if total > size:
            raise MalformedError(f"expected {size} bytes, got more")
        view = memoryview(piece)
        while view:
            room = CHUNK_BYTES - len(buffer)
            buffer += view[:room]
            view = view[room:]
            if len(buffer) == CHUNK_BYTES:
                yield bytes(buffer)
                buffer.clear()
    if buffer:
        yield bytes(buffer)


def _check_digest(digest: bytes) -> None:
    if len(digest) != hashlib.sha256().digest_size:
        raise MalformedError(f"expected a SHA-256 digest of 32 bytes, got {len(digest)}")


def _started_ms(upload_id: str) -> int:
    """When the upload began; what is no upload id of ours counts as ancient."""
    try:
        return int(upload_id.partition("-")[0], 16)
    except ValueError:
        return 0
