"""Uploads that may be broken off and gone on with: what has been stored of each stands in a KV bucket, so any gateway can go on.

Each piece is written as segments of its own (:mod:`.blobs`), and counts from the moment a compare-and-set puts them into
the upload's state. Of two who send the same piece at the same time one wins, and what the other wrote is removed; what a
program wrote before it was killed is in no state, and swept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from casemate_schemas import subjects
from casemate_schemas.codec import Name, UnixMs, WireModel, decode, encode
from casemate_schemas.envelope import MAX_HEAD_BYTES
from casemate_schemas.errors import ConflictError, IntegrityError, MalformedError, SealError, TooLargeError
from casemate_schemas.subjects import token
from nats.aio.client import Client
from nats.js.api import Header
from nats.js.kv import KeyValue
from pydantic import Field, StringConstraints, model_validator

from .blobs import MAX_BLOB_BYTES, MAX_SEGMENTS, BlobStore, Hasher, Segments, chunks_of
from .connection import REQUEST_TIMEOUT_S, repeated, translated
from .direct import Stored, read_all

MAX_STATE_BYTES: Final = 512 << 10
_MAX_HASHERS: Final = 64
_REMOVED: Final = "KV-Operation"


class UploadState(WireModel):
    """An envelope that is being uploaded: its signed head, and where the ciphertext lies that has come so far."""

    KIND: ClassVar[str] = "upload-state"

    version: Literal[1] = 1
    member: Name
    envelope: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """The header's digest, which names the upload as well."""
    signed_head: Annotated[bytes, Field(max_length=MAX_HEAD_BYTES)]
    digest: Annotated[bytes, Field(min_length=32, max_length=32)]
    """Of the whole ciphertext."""
    size: Annotated[int, Field(ge=0, le=MAX_BLOB_BYTES)]
    """Of the whole ciphertext."""
    offset: Annotated[int, Field(ge=0)] = 0
    """How much of the ciphertext is stored."""
    segments: Segments = ()
    created: UnixMs
    expires: UnixMs

    @model_validator(mode="after")
    def _segments_hold_the_offset(self) -> Self:
        if self.offset > self.size or sum(s.chunks for s in self.segments) != chunks_of(self.offset):
            raise ValueError("the segments do not hold what is said to be stored")
        return self


class UploadStore:
    """Uploads under way over one connection. For gateways: workers have no permission."""

    def __init__(self, client: Client, blobs: BlobStore) -> None:
        self._client = client
        self._blobs = blobs
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        self._kv = KeyValue(
            name=subjects.UPLOAD_BUCKET,
            stream=subjects.UPLOAD_STREAM,
            pre=f"$KV.{subjects.UPLOAD_BUCKET}.",
            js=self._js,
            direct=True,
        )
        self._hashers: OrderedDict[str, Hasher] = OrderedDict()
        """By an upload's last segment: the hash of all up to its end. Nothing that could not be read again."""

    async def create(self, state: UploadState) -> int:
        """Begins an upload; its revision. Raises :class:`ConflictError` if it was begun already, and as :meth:`append`."""
        with translated("beginning an upload"):
            return await self._kv.create(_key(state), encode(state))

    async def get(self, member: str, envelope: str) -> tuple[UploadState, int]:
        """(state, revision). Raises :class:`NotFoundError`, :class:`IntegrityError`, :class:`UnavailableError`."""
        key = f"{token(member)}.{token(envelope)}"
        with translated("reading an upload"):
            entry = await repeated(lambda: self._kv.get(key))
        state = _decoded(entry.value or b"")
        if _key(state) != key or entry.revision is None:
            raise IntegrityError("the stored state of an upload is another one's")
        return state, entry.revision

    async def append(
        self, state: UploadState, revision: int, pieces: AsyncIterable[bytes], count: int, *, expires: int
    ) -> tuple[UploadState, int]:
        """Stores the next ``count`` bytes, durably; (state, revision) from then on.

        ``count`` is a multiple of the chunk size, but for the end of the upload. If this raises, nothing of it counts:
        :class:`ConflictError` if somebody was faster, :class:`TooLargeError` for too many pieces,
        :class:`StorageFullError`, :class:`UnavailableError`, and whatever ``pieces`` raises.
        """
        if len(state.segments) + 1 >= MAX_SEGMENTS:
            raise TooLargeError(f"expected an upload in fewer than {MAX_SEGMENTS} pieces")
        hasher = self._hasher(state)
        segments = await self._blobs.write(state.digest, count, pieces, hasher)
        changes = {"offset": state.offset + count, "segments": state.segments + segments, "expires": expires}
        changed = _changed(state, **changes)
        try:
            with translated("storing a piece of an upload"):
                revision = await self._kv.update(_key(state), encode(changed), last=revision)
        except ConflictError:
            await self._blobs.discard(state.digest, segments)
            raise
        if hasher is not None:
            self._remember(changed, hasher)
        return changed, revision

    async def finish(self, state: UploadState) -> bool:
        """Makes the whole ciphertext a blob; False if it was one already. Safe to repeat.

        Raises :class:`SealError` if it does not have its digest, :class:`IntegrityError`, :class:`UnavailableError`.
        """
        if state.offset != state.size:
            raise ConflictError("the upload is not whole yet")
        if (hasher := self._hasher(state)) is None:
            hasher = hashlib.sha256()
            async with aclosing(self._blobs.read(state.digest, state.size, state.segments, hasher=hasher)) as chunks:
                async for _ in chunks:
                    pass
            self._remember(state, hasher)
        if hasher.digest() != state.digest:
            raise SealError("the bytes do not have the declared digest")
        return await self._blobs.commit(state.digest, state.size, state.segments)

    async def forget(self, state: UploadState, revision: int) -> None:
        """Ends an upload whose ciphertext is a blob. Raises :class:`ConflictError` if it has changed since."""
        with translated("ending an upload"):
            subject = f"$KV.{subjects.UPLOAD_BUCKET}.{_key(state)}"
            headers = {_REMOVED: "DEL", Header.EXPECTED_LAST_SUBJECT_SEQUENCE: str(revision)}
            removed = await self._js.publish(subject, headers=headers)
            await self._js.purge_stream(subjects.UPLOAD_STREAM, subject=subject, seq=removed.seq + 1)

    async def give_up(self, state: UploadState, revision: int) -> None:
        """Ends an upload and removes what came of it. Raises as :meth:`forget`, and then nothing is removed."""
        await self.forget(state, revision)
        await self._blobs.discard(state.digest, state.segments)

    async def list(self, member: str = "*") -> AsyncIterator[tuple[UploadState, int]]:
        """Every upload (of one member) that has not ended, nor lost its state: nobody can go on with such a one.

        Raises :class:`UnavailableError`.
        """
        subject = f"$KV.{subjects.UPLOAD_BUCKET}.{member if member == '*' else token(member)}.*"
        async for stored in read_all(self._client, subjects.UPLOAD_STREAM, subject, batch=16):
            if _is_removed(stored):
                continue
            try:
                state = _decoded(stored.data)
            except IntegrityError:
                continue
            yield state, stored.sequence

    def _hasher(self, state: UploadState) -> Hasher | None:
        """The hash of what is stored so far, if it is known here."""
        if not state.segments:
            return hashlib.sha256()
        hasher = self._hashers.get(_end(state))
        return None if hasher is None else hasher.copy()

    def _remember(self, state: UploadState, hasher: Hasher) -> None:
        self._hashers[_end(state)] = hasher
        if len(self._hashers) > _MAX_HASHERS:
            self._hashers.popitem(last=False)


def _key(state: UploadState) -> str:
    return f"{state.member}.{state.envelope}"


def _end(state: UploadState) -> str:
    return state.segments[-1].upload_id if state.segments else ""


def _is_removed(stored: Stored) -> bool:
    return _REMOVED in stored.headers


def _changed(state: UploadState, **changes: Any) -> UploadState:
    fields = {name: getattr(state, name) for name in UploadState.model_fields}
    return UploadState.model_validate({**fields, **changes})


def _decoded(data: bytes) -> UploadState:
    try:
        return decode(UploadState, data, max_bytes=MAX_STATE_BYTES)
    except MalformedError as error:
        raise IntegrityError("the stored state of an upload is broken") from error
