"""The blob store: ciphertext by its SHA-256, in chunks on a JetStream stream.

A blob is a list of *segments*: runs of chunks, in order, that one writer put under a subject of its own. One small marker
message, which the server lets nobody replace, makes a list of segments *the* blob. So a blob is there whole or not at
all, and writers never mix. What was written and never got into a marker is removed by :meth:`BlobStore.sweep`.

Every chunk travels with its SHA-256 and is checked when it is read, so a reader may begin anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Collection
from contextlib import aclosing
from typing import Annotated, ClassVar, Final, Literal, Protocol, Self

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
from pydantic import Field, model_validator

from .connection import REQUEST_TIMEOUT_S, publish_once, translated
from .direct import Stored, read_all, read_batch, read_last
from .tasks import end

CHUNK_BYTES: Final = 512 << 10
WINDOW: Final = 16
"""Chunks in flight at most, each way: what one transfer holds in memory is WINDOW * CHUNK_BYTES and little more."""

SEGMENT_BYTES: Final = 64 << 20
"""A segment holds at most so much: a reader who begins within one reads past its beginning."""
SEGMENT_CHUNKS: Final = SEGMENT_BYTES // CHUNK_BYTES

CHUNK_TIMEOUT_S: Final = 30.0
"""How long one chunk may wait for the disk, behind all others in flight."""

MAX_BLOB_BYTES: Final = 4 << 30
MAX_SEGMENTS: Final = 1025
MAX_UPLOAD_S: Final = 6 * 3600.0
"""Writing that takes longer is given up, so that :meth:`BlobStore.sweep` never meets what is still being written."""

DIGEST_HEADER: Final = "Casemate-SHA256"
"""Of a stored chunk: its SHA-256 in hexadecimal."""

_BATCH: Final = WINDOW // 2
_MAX_MARKER_BYTES: Final = 192 << 10


class Hasher(Protocol):
    """A hash of :mod:`hashlib` under way."""

    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...
    def copy(self) -> Self: ...


class Segment(WireModel):
    """Chunks that one writer put under one subject: from that place in the stream on, so many."""

    KIND: ClassVar[str] = "blob-segment"

    upload_id: Name
    first_sequence: Annotated[int, Field(ge=1)]
    chunks: Annotated[int, Field(ge=1, le=SEGMENT_CHUNKS)]


Segments = Annotated[tuple[Segment, ...], Field(max_length=MAX_SEGMENTS)]


class BlobMarker(WireModel):
    """Which segments are the blob. All chunks but its very last hold :data:`CHUNK_BYTES`."""

    KIND: ClassVar[str] = "blob-marker"

    version: Literal[1] = 1
    size: Annotated[int, Field(ge=0, le=MAX_BLOB_BYTES)]
    segments: Segments
    created: UnixMs

    @model_validator(mode="after")
    def _chunks_hold_the_size(self) -> Self:
        if sum(segment.chunks for segment in self.segments) != chunks_of(self.size):
            raise ValueError("the segments do not hold as many chunks as the size takes")
        return self


def chunks_of(size: int) -> int:
    """How many chunks ``size`` bytes take."""
    return -(-size // CHUNK_BYTES)


class BlobStore:
    """Blobs by digest over one connection.

    ``may_purge`` says whether this user's permissions let it remove chunks (the gateway's do): then a failed upload is
    cleaned up at once, else by the gateway's next sweep.
    """

    def __init__(
        self,
        client: Client,
        *,
        max_blob_bytes: int = MAX_BLOB_BYTES,
        may_purge: bool = False,
        patience_s: float = 0.0,
    ) -> None:
        """``patience_s`` is how long :meth:`get` looks for a blob that a replica may not have yet."""
        self._client = client
        self._patience_s = patience_s
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
        if await self.has(digest):
            return False
        hasher = hashlib.sha256()
        segments = await self.write(digest, size, chunks, hasher)
        if hasher.digest() != digest:
            await self.discard(digest, segments)
            raise SealError("the bytes do not have the declared digest")
        # From here on an error leaves the chunks: the marker may have been stored although nobody said so.
        return await self.commit(digest, size, segments)

    async def write(
        self, digest: bytes, size: int, pieces: AsyncIterable[bytes], hasher: Hasher | None = None
    ) -> tuple[Segment, ...]:
        """Stores exactly ``size`` bytes of a blob, for :meth:`commit` to make visible; ``hasher`` is fed with them.

        Raises :class:`MalformedError` for another size, and as :meth:`put`; then nothing is left of it, or a sweep's.
        """
        writer = _Writer(self._client, digest, size, hasher)
        try:
            async with asyncio.timeout(MAX_UPLOAD_S):
                return await writer.run(pieces)
        except TimeoutError as error:
            await self._clear(writer.subject)
            raise UnavailableError("the upload took too long") from error
        except BaseException:
            await self._clear(writer.subject)
            raise

    async def commit(self, digest: bytes, size: int, segments: tuple[Segment, ...]) -> bool:
        """Makes ``segments`` the blob; False if it was there already, and then ``segments`` are no more.

        Whoever calls this has made sure that the bytes have the ``digest``. Safe to repeat.
        """
        marker = BlobMarker(size=size, segments=segments, created=_now_ms())
        with translated("committing a blob"):
            if await publish_once(self._js, subjects.blob_marker(digest.hex()), encode(marker)):
                return True
        if (await self._marker(digest)).segments == segments:
            return True
        await self.discard(digest, segments)
        return False

    async def discard(self, digest: bytes, segments: Collection[Segment]) -> None:
        """Removes segments that belong to no blob, as far as that succeeds; a sweep removes what is left."""
        for upload_id in {segment.upload_id for segment in segments}:
            await self._clear(subjects.blob_chunk(digest.hex(), upload_id))

    async def stat(self, digest: bytes) -> int:
        """Size of a complete blob in bytes. Raises :class:`NotFoundError`, :class:`UnavailableError`."""
        return (await self._marker(digest)).size

    async def has(self, digest: bytes) -> bool:
        """Whether the blob is there. Raises :class:`UnavailableError`."""
        try:
            await self._marker(digest)
        except NotFoundError:
            return False
        return True

    async def get(self, digest: bytes) -> AsyncGenerator[bytes]:
        """The blob in order, in chunks of up to :data:`CHUNK_BYTES`.

        The last chunk is held back until the SHA-256 of the whole is ``digest``; what came before is unverified until
        the iterator has ended. Raises :class:`NotFoundError` before the first chunk, :class:`IntegrityError` if the
        stored bytes are not the blob, :class:`UnavailableError`.
        """
        marker = await self._marker(digest, patience_s=self._patience_s)
        hasher, held = hashlib.sha256(), b""
        async with aclosing(self.read(digest, marker.size, marker.segments, hasher=hasher)) as chunks:
            async for chunk in chunks:
                if held:
                    yield held
                held = chunk
        if hasher.digest() != digest:
            raise IntegrityError("the stored bytes do not have the blob's digest")
        if held:
            yield held

    async def get_range(self, digest: bytes, start: int, stop: int) -> AsyncGenerator[bytes]:
        """Bytes ``start`` to before ``stop`` of the blob, ``0 <= start < stop <= size``, each chunk checked by itself.

        That finds what a disk spoils, not what a hostile store makes up: the digest of the whole is for the reader to
        check. Raises as :meth:`get`.
        """
        marker = await self._marker(digest, patience_s=self._patience_s)
        stop = min(stop, marker.size)
        position = start - start % CHUNK_BYTES
        async with aclosing(self.read(digest, marker.size, marker.segments, position, stop)) as chunks:
            async for chunk in chunks:
                yield chunk[max(0, start - position) : stop - position]
                position += len(chunk)

    async def read(
        self,
        digest: bytes,
        size: int,
        segments: tuple[Segment, ...],
        start: int = 0,
        stop: int | None = None,
        *,
        hasher: Hasher | None = None,
    ) -> AsyncGenerator[bytes]:
        """The chunks of ``segments``, which hold ``size`` bytes, from that of byte ``start`` to that before ``stop``.

        Half a window is read while the other half is given out; ``hasher`` is fed with it. Raises :class:`IntegrityError`
        for a chunk that is missing, of another length or of another digest than it was written with.
        """
        chunks, index = range(start // CHUNK_BYTES, chunks_of(size if stop is None else stop)), start // CHUNK_BYTES
        async with aclosing(_ahead(self._batches(digest, segments, chunks))) as batches:
            async for batch in batches:
                for stored in batch:
                    length = min(CHUNK_BYTES, size - index * CHUNK_BYTES)
                    found = await asyncio.to_thread(_hashed, stored.data, hasher)
                    if len(stored.data) != length or found != stored.headers.get(DIGEST_HEADER):
                        raise IntegrityError("a stored chunk is not what was written")
                    yield stored.data
                    index += 1

    async def delete(self, digest: bytes, *, sequence: int | None = None) -> None:
        """Removes the blob if it is there; a reader under way fails. Needs ``may_purge``.

        ``sequence``, if given, is the marker's as :meth:`markers` told it: a blob that was uploaded since stays.
        """
        _check_digest(digest)
        subject = subjects.blob_marker(digest.hex())
        try:
            stored = await read_last(self._client, subjects.BLOB_MARKER_STREAM, subject)
        except NotFoundError:
            return
        if sequence is not None and stored.sequence != sequence:
            return
        await self._purge(subjects.BLOB_MARKER_STREAM, subject, before=stored.sequence + 1)
        with contextlib.suppress(IntegrityError):
            await self.discard(digest, _marker_in(stored).segments)

    async def markers(self) -> AsyncIterator[tuple[bytes, Stored]]:
        """Every blob's digest and marker as they are stored, the oldest first."""
        prefix = subjects.blob_marker("x").removesuffix("x")
        async for stored in read_all(self._client, subjects.BLOB_MARKER_STREAM, prefix + "*", batch=256):
            with contextlib.suppress(ValueError):
                yield bytes.fromhex(stored.subject.removeprefix(prefix)), stored

    async def sweep(self, *, now_ms: int, kept: Collection[str] = ()) -> int:
        """Removes chunks written over twice :data:`MAX_UPLOAD_S` ago that belong to no blob; of how many writers.

        ``kept`` are the ``upload_id`` of segments that are still to become blobs. Needs ``may_purge``.
        """
        with translated("listing uploads"):
            info = await self._js.stream_info(subjects.BLOB_STREAM, subjects_filter="casemate.blob.chunk.*.*")
        horizon, removed = now_ms - int(2000 * MAX_UPLOAD_S), 0
        for subject in info.state.subjects or {}:
            digest_hex, upload_id = subject.split(".")[3:]
            if upload_id in kept or _started_ms(upload_id) >= horizon:
                continue
            if not await self._is_in_blob(digest_hex, upload_id):
                await self._purge(subjects.BLOB_STREAM, subject)
                removed += 1
        return removed

    async def _is_in_blob(self, digest_hex: str, upload_id: str) -> bool:
        try:
            marker = await self._marker(bytes.fromhex(digest_hex))
        except (NotFoundError, ValueError, MalformedError):
            return False
        return any(segment.upload_id == upload_id for segment in marker.segments)

    async def _marker(self, digest: bytes, *, patience_s: float = 0.0) -> BlobMarker:
        _check_digest(digest)
        subject = subjects.blob_marker(digest.hex())
        return _marker_in(await read_last(self._client, subjects.BLOB_MARKER_STREAM, subject, patience_s=patience_s))

    async def _batches(
        self, digest: bytes, segments: tuple[Segment, ...], chunks: range
    ) -> AsyncGenerator[list[Stored]]:
        """Those of the blob's chunks, a few at a time; what precedes the first one in its segment is read and dropped."""
        end = 0
        for segment in segments:
            index, end = end, end + segment.chunks
            if end <= chunks.start:
                continue
            subject, start = subjects.blob_chunk(digest.hex(), segment.upload_id), segment.first_sequence
            while (left := min(end, chunks.stop) - index) > 0:
                limit = min(left, _BATCH)
                batch = await read_batch(self._client, subjects.BLOB_STREAM, subject, start=start, limit=limit)
                if not batch:
                    raise IntegrityError(f"the blob lacks {left} of a segment's {segment.chunks} chunks")
                yield batch[max(0, chunks.start - index) :]
                index, start = index + len(batch), batch[-1].sequence + 1

    async def _clear(self, subject: str) -> None:
        """Best effort: the error that ended the upload is the one to tell, and a sweep removes what is left."""
        if self._may_purge:
            with contextlib.suppress(CasemateError):
                await asyncio.shield(self._purge(subjects.BLOB_STREAM, subject))

    async def _purge(self, stream: str, subject: str, *, before: int | None = None) -> None:
        with translated("removing a blob"):
            await self._js.purge_stream(stream, subject=subject, seq=before)


class _Writer:
    """One writer under way: at most WINDOW chunks published and not yet acknowledged."""

    def __init__(self, client: Client, digest: bytes, size: int, hasher: Hasher | None) -> None:
        self._js = client.jetstream(timeout=CHUNK_TIMEOUT_S)
        self._size = size
        self._hasher = hasher
        self._upload_id = f"{_now_ms():012x}-{secrets.token_hex(8)}"
        self._in_flight: deque[asyncio.Task[PubAck]] = deque()
        self._sequences: list[int] = []
        self.subject = subjects.blob_chunk(digest.hex(), self._upload_id)

    async def run(self, pieces: AsyncIterable[bytes]) -> tuple[Segment, ...]:
        """Writes everything; where it lies."""
        total = 0
        try:
            async for chunk in _rechunked(pieces, self._size):
                total += len(chunk)
                await self._send(chunk, await asyncio.to_thread(_hashed, chunk, self._hasher))
            while self._in_flight:
                await self._acknowledged()
        finally:
            await self._settle()
        if total != self._size:
            raise MalformedError(f"expected {self._size} bytes, got {total}")
        starts = range(0, len(self._sequences), SEGMENT_CHUNKS)
        runs = [self._sequences[start : start + SEGMENT_CHUNKS] for start in starts]
        return tuple(Segment(upload_id=self._upload_id, first_sequence=run[0], chunks=len(run)) for run in runs)

    async def _send(self, chunk: bytes, digest: str) -> None:
        if len(self._in_flight) == WINDOW:
            await self._acknowledged()
        headers = {DIGEST_HEADER: digest}
        self._in_flight.append(asyncio.create_task(self._js.publish(self.subject, chunk, headers=headers)))

    async def _acknowledged(self) -> None:
        """Waits for the oldest; chunks that were stored out of order would read back as another blob."""
        with translated("storing a blob"):
            sequence = (await self._in_flight.popleft()).seq
        if self._sequences and sequence <= self._sequences[-1]:
            raise UnavailableError("chunks were stored out of order; try again")
        self._sequences.append(sequence)

    async def _settle(self) -> None:
        """After an error: what was sent is stored or lost by now, so that a purge that follows finds all of it."""
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=REQUEST_TIMEOUT_S)
        await end(self._in_flight)
        self._in_flight.clear()


async def _ahead(batches: AsyncGenerator[list[Stored]]) -> AsyncGenerator[list[Stored]]:
    """``batches``, the next one being fetched while one is used."""
    coming = asyncio.ensure_future(anext(batches, None))
    try:
        while (batch := await coming) is not None:
            coming = asyncio.ensure_future(anext(batches, None))
            yield batch
    finally:
        await end([coming])
        await batches.aclose()


async def _rechunked(pieces: AsyncIterable[bytes], size: int) -> AsyncIterator[bytes]:
    """``pieces`` cut anew into chunks of CHUNK_BYTES; stops with an error as soon as there are more than ``size``."""
    parts, room, total = list[memoryview](), CHUNK_BYTES, 0
    async for piece in pieces:
        total += len(piece)
        if total > size:
            raise MalformedError(f"expected {size} bytes, got more")
        view = memoryview(piece)
        while view:
            parts.append(view[:room])
            view = view[room:]
            room -= len(parts[-1])
            if not room:
                yield b"".join(parts)
                parts, room = [], CHUNK_BYTES
    if parts:
        yield b"".join(parts)


def _hashed(chunk: bytes, hasher: Hasher | None) -> str:
    """The chunk's own SHA-256; ``hasher`` gets the chunk too. On a thread, for it takes a millisecond or two."""
    if hasher is not None:
        hasher.update(chunk)
    return hashlib.sha256(chunk).hexdigest()


def _marker_in(stored: Stored) -> BlobMarker:
    try:
        return decode(BlobMarker, stored.data, max_bytes=_MAX_MARKER_BYTES)
    except MalformedError as error:
        raise IntegrityError("the blob's marker is broken") from error


def _check_digest(digest: bytes) -> None:
    if len(digest) != hashlib.sha256().digest_size:
        raise MalformedError(f"expected a SHA-256 digest of 32 bytes, got {len(digest)}")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _started_ms(upload_id: str) -> int:
    """When the writer began; what is no id of ours counts as ancient."""
    try:
        return int(upload_id.partition("-")[0], 16)
    except ValueError:
        return 0
