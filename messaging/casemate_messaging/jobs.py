"""Job records in a KV bucket, changed only by compare-and-set."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Final

import nats.js.errors
from casemate_schemas import subjects
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import CasemateError, ConflictError, IntegrityError, MalformedError
from casemate_schemas.job_state import JobRecord
from nats.aio.client import Client
from nats.js.kv import KeyValue

from .connection import REQUEST_TIMEOUT_S, repeated, translated
from .direct import read_batch

MAX_RECORD_BYTES: Final = 900 << 10
_MAX_TRIES: Final = 64
_RETRY_S: Final = 0.05
_LIST_BATCH: Final = 64


class JobStore:
    """The bucket ``jobs``: one record a job, one revision kept.

    In a cluster any replica may answer a read, a moment behind the newest; writes are decided by the revision alone.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._kv = KeyValue(
            name=subjects.JOB_BUCKET,
            stream=subjects.JOB_STREAM,
            pre=f"$KV.{subjects.JOB_BUCKET}.",
            js=client.jetstream(timeout=REQUEST_TIMEOUT_S),
            direct=True,
        )
        self._newest: tuple[JobRecord, int] | None = None

    async def create(self, record: JobRecord) -> tuple[JobRecord, int, bool]:
        """Stores a new job, durably; or returns the record that already has its id.

        Returns (record as stored, revision, whether this call made it for certain). Raises :class:`StorageFullError`,
        :class:`UnavailableError`: then the caller may simply try again.
        """
        with translated("creating a job"):
            try:
                data = _bytes(record)
                return record, await repeated(lambda: self._kv.create(record.job_id, data)), True
            except nats.js.errors.KeyWrongLastSequenceError:
                return *(await self.get(record.job_id)), False

    async def get(self, job_id: str) -> tuple[JobRecord, int]:
        """(record, revision). Raises :class:`NotFoundError`, :class:`IntegrityError`, :class:`UnavailableError`."""
        with translated("reading a job"):
            key = subjects.token(job_id)
            entry = await repeated(lambda: self._kv.get(key))
        return _record(entry)

    async def update(self, record: JobRecord, revision: int) -> int:
        """Replaces the record if it is still at ``revision``; returns the new one.

        Raises :class:`ConflictError` if somebody was faster, and as :meth:`create`.
        """
        if revision < 1:
            raise ConflictError("a record that was never read cannot be replaced")
        with translated("changing a job"):
            return await self._kv.update(record.job_id, _bytes(record), last=revision)

    async def change(self, job_id: str, fn: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Applies the pure ``fn`` to the newest record until no one else got in between; returns what was stored.

        What this store itself wrote last is tried first without being read again: only the server, which compares
        revisions, decides, and nothing but a write is ever concluded from it.

        ``fn`` may be called several times and may raise to refuse; returning its argument changes nothing. Raises
        what ``fn`` raises, :class:`ConflictError` after many lost races, and as :meth:`get` and :meth:`update`.
        """
        known = self._newest if self._newest is not None and self._newest[0].job_id == job_id else None
        for _ in range(_MAX_TRIES):
            is_guess, (record, revision) = known is not None, known or await self.get(job_id)
            known = None
            try:
                changed = fn(record)
            except CasemateError:
                if is_guess:
                    continue
                raise
            if changed == record:
                if is_guess:
                    continue
                return record
            try:
                self._newest = changed, await self.update(changed, revision)
            except ConflictError:
                if not is_guess:
                    await asyncio.sleep(_RETRY_S * random.random())  # noqa: S311 - spreads rivals, guards nothing
                continue
            return changed
        raise ConflictError(f"job {job_id} changed {_MAX_TRIES} times meanwhile")

    async def list(
        self, broken: Callable[[str, IntegrityError], None] | None = None
    ) -> AsyncIterator[tuple[JobRecord, int]]:
        """Every job once, the longest unchanged first. For the gateway: workers have no permission.

        A record that cannot be read is told to ``broken`` (its key, and why) and left out. Without ``broken`` it raises
        :class:`IntegrityError`: for those who must know all jobs or none.

        Read from the stream, which holds one message a job: nats-py's watch can say that there is nothing when the first
        records are still on their way (its initial marker races with them).
        """
        seen: set[str] = set()
        subject, start = f"$KV.{subjects.JOB_BUCKET}.*", 1
        while batch := await read_batch(self._client, subjects.JOB_STREAM, subject, start=start, limit=_LIST_BATCH):
            for stored in batch:
                key = stored.subject.rpartition(".")[2]
                if key in seen:
                    continue
                seen.add(key)
                try:
                    record = _owned(_decoded(stored.data), key)
                except IntegrityError as error:
                    if broken is None:
                        raise
                    broken(key, error)
                    continue
                yield record, stored.sequence
            start = batch[-1].sequence + 1

    async def watch(self, job_id: str) -> AsyncIterator[tuple[JobRecord, int]]:
        """A job's record as it is and after each change, for ever; a slow reader skips revisions.

        For the gateway: workers have no permission. Close the iterator (``aclosing``) when done.
        """
        with translated("watching jobs"):
            watcher = await self._kv.watch(subjects.token(job_id), ignore_deletes=True)
        try:
            async for entry in watcher:
                if entry is not None:
                    yield _record(entry)
        finally:
            await watcher.stop()  # type: ignore[no-untyped-call]


def _bytes(record: JobRecord) -> bytes:
    data = encode(record)
    if len(data) > MAX_RECORD_BYTES:
        raise MalformedError(f"a job record holds at most {MAX_RECORD_BYTES} bytes, this one {len(data)}")
    return data


def _decoded(data: bytes) -> JobRecord:
    try:
        return decode(JobRecord, data, max_bytes=MAX_RECORD_BYTES)
    except MalformedError as error:
        raise IntegrityError("the stored record of a job is broken") from error


def _record(entry: KeyValue.Entry) -> tuple[JobRecord, int]:
    if entry.revision is None:
        raise IntegrityError(f"the stored record of job {entry.key} has no revision")
    return _owned(_decoded(entry.value or b""), entry.key), entry.revision


def _owned(record: JobRecord, key: str) -> JobRecord:
    if record.job_id != key:
        raise IntegrityError(f"the stored record of job {key} is another job's")
    return record
