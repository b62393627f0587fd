"""Job records in KV buckets, changed only by compare-and-set."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Final

import nats.js.errors
from casemate_schemas import subjects
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import CasemateError, ConflictError, IntegrityError, MalformedError
from casemate_schemas.job_state import TERMINAL, JobRecord
from nats.aio.client import Client
from nats.js.api import Header

from .connection import REQUEST_TIMEOUT_S, repeated, translated
from .direct import REPLICA_LAG_S, read_all, read_last
from .publishing import Publisher

MAX_RECORD_BYTES: Final = 900 << 10
_MAX_TRIES: Final = 64
_RETRY_S: Final = 0.05
_LIST_BATCH: Final = 64
_MAX_REMEMBERED: Final = 32
"""Records of jobs under way that a store has in memory, some kilobytes each."""
_NOT_DELETED: Final = frozenset({10043, 10057})
"""No message of that sequence; or another reason, in words."""


Known = tuple[JobRecord, int]
"""A record, and the revision at which it was so."""


class JobStore:
    """The buckets ``jobs-*``: one record a job, in the bucket that its id tells, one revision kept.

    NATS syncs a stream's messages one after the other, those of several streams together: hence more than one bucket.
    In a cluster any replica may answer a read, a moment behind the newest; writes are decided by the revision alone.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        self._publisher = Publisher(client)
        self._written: OrderedDict[str, Known] = OrderedDict()

    async def create(self, record: JobRecord) -> tuple[JobRecord, int, bool]:
        """Stores a new job, durably; or returns the record that already has its id.

        Returns (record as stored, revision, whether this call made it for certain). Raises :class:`StorageFullError`,
        :class:`UnavailableError`: then the caller may simply try again.
        """
        data = _bytes(record)
        try:
            with translated("creating a job"):
                revision = await repeated(lambda: self._put(record.job_id, data, 0))
        except ConflictError:
            return *(await self.get(record.job_id, patience_s=REPLICA_LAG_S)), False
        self._remember(record, revision)
        return record, revision, True

    async def get(self, job_id: str, *, patience_s: float = 0.0) -> tuple[JobRecord, int]:
        """(record, revision). Raises :class:`NotFoundError`, :class:`IntegrityError`, :class:`UnavailableError`.

        A replica that does not have what this store wrote last is asked again for a while; one that has no record at all, for
        ``patience_s`` seconds.
        """
        written = self._written.get(job_id)
        until = asyncio.get_running_loop().time() + REPLICA_LAG_S
        while True:
            patience_s = patience_s if written is None else REPLICA_LAG_S
            where = subjects.job_stream(job_id), subjects.job_record(job_id)
            stored = await read_last(self._client, *where, patience_s=patience_s)
            if written is None or stored.sequence >= written[1]:
                return _owned(_decoded(stored.data), job_id), stored.sequence
            if asyncio.get_running_loop().time() >= until:  # it was not written, or at another revision: NATS can lie
                self._written.pop(job_id, None)
                written = None
            await asyncio.sleep(_RETRY_S)

    async def update(self, record: JobRecord, revision: int) -> int:
        """Replaces the record if it is still at ``revision``; returns the new one.

        Raises :class:`ConflictError` if somebody was faster, and as :meth:`create`.
        """
        if revision < 1:
            raise ConflictError("a record that was never read cannot be replaced")
        with translated("changing a job"):
            written = await self._put(record.job_id, _bytes(record), revision)
        self._remember(record, written)
        return written

    def known(self, job_id: str) -> Known | None:
        """What this store itself wrote last about a job under way, if it was lately. Others may have written since."""
        return self._written.get(job_id)

    def _remember(self, record: JobRecord, revision: int) -> None:
        self._written.pop(record.job_id, None)
        if record.state not in TERMINAL:
            self._written[record.job_id] = record, revision
        while len(self._written) > _MAX_REMEMBERED:
            self._written.popitem(last=False)

    async def _put(self, job_id: str, data: bytes, revision: int) -> int:
        """Raises errors of NATS unless the record is at ``revision``, 0 for none."""
        headers = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(revision)}
        return await self._publisher.publish(subjects.job_record(job_id), data, headers)

    async def change(
        self, job_id: str, fn: Callable[[JobRecord], JobRecord], *, known: Known | None = None
    ) -> JobRecord:
        """Applies the pure ``fn`` to the newest record until no one else got in between; returns what was stored.

        What this store itself wrote last, or else ``known``, is tried first without being read again: only the server, which
        compares revisions, decides, and nothing but a write is ever concluded from it.

        ``fn`` may be called several times and may raise to refuse; returning its argument changes nothing. Raises
        what ``fn`` raises, :class:`ConflictError` after many lost races, and as :meth:`get` and :meth:`update`.
        """
        guess = self._written.get(job_id) or known
        for _ in range(_MAX_TRIES):
            is_guess, (record, revision) = guess is not None, guess or await self.get(job_id)
            guess = None
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
                await self.update(changed, revision)
            except ConflictError:
                if not is_guess:
                    await asyncio.sleep(_RETRY_S * random.random())  # noqa: S311 - spreads rivals, guards nothing
                continue
            return changed
        raise ConflictError(f"job {job_id} changed {_MAX_TRIES} times meanwhile")

    async def forget(self, job_id: str, revision: int) -> None:
        """Removes the record that :meth:`list` told of with this revision, and no later one. For the gateway.

        If the server says that it could not, the record has changed or is gone, or the next sweep finds it again. Raises
        :class:`UnavailableError`.
        """
        with translated("forgetting a job"):
            try:
                await self._js.delete_msg(subjects.job_stream(job_id), revision)
            except nats.js.errors.APIError as error:
                if error.err_code not in _NOT_DELETED:
                    raise

    async def list(
        self, broken: Callable[[str, IntegrityError], None] | None = None, seen_up_to: dict[str, int] | None = None
    ) -> AsyncIterator[tuple[JobRecord, int]]:
        """Every job once, those of a bucket in the order of their last changes. For the gateway: workers have no permission.

        A record that cannot be read is told to ``broken`` (its key, and why) and left out. Without ``broken`` it raises
        :class:`IntegrityError`: for those who must know all jobs or none.

        With ``seen_up_to``, empty the first time, only what has changed since the last time: it keeps how far each stream was
        read. A job that changes meanwhile may then come twice, for nothing that was read past comes again.

        Read from the streams, which hold one message a job: nats-py's watch can say that there is nothing when the first
        records are still on their way (its initial marker races with them).
        """
        seen: set[str] = set()
        last = {} if seen_up_to is None else seen_up_to
        for bucket, stream in zip(subjects.JOB_BUCKETS, subjects.JOB_STREAMS, strict=True):
            start = last.get(stream, 0) + 1
            async for stored in read_all(self._client, stream, f"$KV.{bucket}.*", batch=_LIST_BATCH, start=start):
                last[stream] = stored.sequence
                key = stored.subject.rpartition(".")[2]
                if key in seen and seen_up_to is None:
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


def _owned(record: JobRecord, key: str) -> JobRecord:
    if record.job_id != key:
        raise IntegrityError(f"the stored record of job {key} is another job's")
    return record
