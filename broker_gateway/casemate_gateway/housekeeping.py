"""Removes what nobody needs any more: uploads that were given up, envelopes and blobs that no job refers to.

A gateway cannot tell which datasets are registered, so none is ever removed here; their senders do that. Checkpoints are
needed until a job ends; its envelopes, result and submission for as long after that as the operator says, its record longer.

One gateway does it at a time, by a lease. What is to go is *condemned* first, in the lease's own record; then it is looked
once more whether a job refers to it; then it goes. Whoever begins to refer to something that was there before writes the
reference first, then waits until it is not condemned, then looks whether it is still there
(:meth:`Housekeeping.check_kept`). So at least one of the two sees the other. Things are removed by their sequence in the
stream: what was stored anew under the same digest stays, however long a housekeeper was asleep.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from casemate_messaging.blobs import BlobStore
from casemate_messaging.direct import Stored
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.jobs import JobStore
from casemate_messaging.leases import MAX_CONDEMNED, LeaseStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.stored import StoredSizes
from casemate_messaging.uploads import UploadStore
from casemate_schemas.codec import decode
from casemate_schemas.envelope import MAX_HEAD_BYTES, EnvelopeHead, EnvelopeHeader
from casemate_schemas.errors import CasemateError, ConflictError, IntegrityError, UnavailableError
from casemate_schemas.job_state import TERMINAL, JobRecord
from casemate_schemas.result import Release
from casemate_schemas.signatures import Signed
from nats.aio.client import Client

LEASE_S: Final = 60.0
_CONDEMNED_POLL_S: Final = 0.1
_MAX_WAIT_S: Final = 2 * LEASE_S


@dataclass(frozen=True)
class Retention:
    """What the operator chose, in seconds."""

    unreferenced_s: float
    """How long something that nobody refers to is kept: longer than it takes to refer to it."""
    ended_s: float
    """How long results, submissions and job envelopes are kept after their job has ended."""
    records_s: float
    """How long its record is."""


@dataclass
class Removed:
    """How much went."""

    uploads: int = 0
    envelopes: int = 0
    blobs: int = 0
    orphans: int = 0
    """Writers whose chunks never became a blob."""
    records: int = 0


@dataclass(frozen=True)
class _Found:
    digest: bytes
    sequence: int


class Housekeeping:
    """One gateway's part in it. ``clock`` gives Unix ms."""

    def __init__(
        self,
        client: Client,
        *,
        jobs: JobStore,
        blobs: BlobStore,
        envelopes: EnvelopeStore,
        uploads: UploadStore,
        sizes: StoredSizes,
        retention: Retention,
        log: ProgramLog,
        clock: Callable[[], int],
    ) -> None:
        self._jobs = jobs
        self._blobs = blobs
        self._envelopes = envelopes
        self._uploads = uploads
        self._sizes = sizes
        self._retention = retention
        self._log = log
        self._clock = clock
        self._lease = LeaseStore(client, "housekeeping", secrets.token_hex(8), clock=clock, lasts_s=LEASE_S)

    async def run(self, every_s: float) -> None:
        """Every ``every_s`` seconds, for ever."""
        while True:
            await asyncio.sleep(every_s)
            try:
                if (removed := await self.collect()) is not None:
                    self._log.info(
                        "collected",
                        uploads=removed.uploads,
                        envelopes=removed.envelopes,
                        blobs=removed.blobs,
                        orphans=removed.orphans,
                        records=removed.records,
                    )
            except CasemateError as error:
                self._log.warning("sweep_failed", reason=error.reason)

    async def collect(self) -> Removed | None:
        """Removes all that may go now; None if another gateway is at it.

        1. Uploads past their expiry. 2. Envelopes. 3. Blobs, those of these envelopes included. 4. Chunks of no blob.
        5. Sizes that were noted of envelopes that are neither there nor on their way. 6. Records of jobs that ended long ago.

        Raises :class:`ConflictError` if the lease was lost, :class:`IntegrityError` for a job record that cannot be read
        (then nothing is removed that it may refer to), :class:`UnavailableError`.
        """
        if not await self._lease.take():
            return None
        removed = Removed()
        try:
            removed.uploads = await self._end_uploads()  # 1
            removed.envelopes = await self._remove(await self._old_envelopes(), self._wanted_envelopes, self._drop_head)
            removed.blobs = await self._remove(await self._old_blobs(), self._wanted_blobs, self._drop_blob)  # 3
            unfinished = [segment.upload_id async for state, _ in self._uploads.list() for segment in state.segments]
            removed.orphans = await self._blobs.sweep(now_ms=self._clock(), kept=frozenset(unfinished))  # 4
            await self._forget_sizes()  # 5
            removed.records = await self._forget_jobs()  # 6
        finally:
            with contextlib.suppress(CasemateError):
                await self._lease.give_back()
        return removed

    async def check_kept(self, *, envelopes: tuple[bytes, ...] = (), blobs: tuple[bytes, ...] = ()) -> None:
        """To be called once a reference to things that were there before is stored: they are there, and stay.

        Raises :class:`NotFoundError` if one was removed meanwhile, :class:`UnavailableError`.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_MAX_WAIT_S):
                while not (await self._lease.condemned()).isdisjoint(envelopes + blobs):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(_CONDEMNED_POLL_S)
                for digest in envelopes:
                    await self._envelopes.head(digest)
                for digest in blobs:
                    await self._blobs.stat(digest)
                return
        raise UnavailableError("what is referred to is being removed: try again")

    async def _end_uploads(self) -> int:
        ended = 0
        async for state, revision in self._uploads.list():
            if state.expires <= self._clock():
                with contextlib.suppress(ConflictError):  # somebody has gone on with it just now
                    await self._uploads.give_up(state, revision)
                    ended += 1
        return ended

    async def _forget_sizes(self) -> None:
        noted = [(envelope, note.sequence) async for envelope, note in self._sizes.list() if self._is_old(note)]
        there = {digest.hex() async for digest, _ in self._envelopes.heads()}
        there |= {state.envelope async for state, _ in self._uploads.list()}
        for envelope, sequence in noted:
            if envelope not in there:
                await self._lease.keep()
                await self._sizes.remove(envelope, sequence=sequence)

    async def _forget_jobs(self) -> int:
        """By revision, which a job that has ended never changes."""
        ended = [
            (record.job_id, revision)
            async for record, revision in self._jobs.list()
            if record.state in TERMINAL and self._is_past(record, self._retention.records_s)
        ]
        for job_id, revision in ended:
            await self._lease.keep()
            await self._jobs.forget(job_id, revision)
        return len(ended)

    async def _remove(
        self,
        candidates: list[_Found],
        wanted: Callable[[], Awaitable[set[bytes]]],
        drop: Callable[[_Found], Awaitable[None]],
    ) -> int:
        """Condemns some, looks who refers to them, drops the others; then the next ones."""
        removed = 0
        for start in range(0, len(candidates), MAX_CONDEMNED):
            some = candidates[start : start + MAX_CONDEMNED]
            await self._lease.hold(tuple(found.digest for found in some))
            kept = await wanted()
            for found in some:
                if found.digest not in kept:
                    await self._lease.keep()
                    await drop(found)
                    removed += 1
            await self._lease.hold()
        return removed

    async def _drop_head(self, found: _Found) -> None:
        await self._envelopes.delete_head(found.digest, sequence=found.sequence)

    async def _drop_blob(self, found: _Found) -> None:
        await self._blobs.delete(found.digest, sequence=found.sequence)

    async def _old_envelopes(self) -> list[_Found]:
        wanted, found = await self._wanted_envelopes(), []
        async for digest, stored in self._envelopes.heads():
            header = self._header(digest, stored)
            if header is None or header.preamble.kind == "dataset" or digest in wanted:
                continue
            if self._is_old(stored):
                found.append(_Found(digest, stored.sequence))
        return found

    async def _old_blobs(self) -> list[_Found]:
        wanted = await self._wanted_blobs()
        markers = [(digest, stored) async for digest, stored in self._blobs.markers() if digest not in wanted]
        return [_Found(digest, stored.sequence) for digest, stored in markers if self._is_old(stored)]

    async def _wanted_envelopes(self) -> set[bytes]:
        """Envelopes that jobs refer to."""
        wanted: set[bytes] = set()
        async for record, _ in self._jobs.list():
            if self._is_kept(record):
                named = (record.job_envelope, record.upload, _result(record))
                wanted |= {digest for digest in named if digest is not None}
            if record.state not in TERMINAL and record.checkpoint is not None:
                wanted.add(record.checkpoint)
        return wanted

    async def _wanted_blobs(self) -> set[bytes]:
        """Ciphertexts of the envelopes that there are, and submissions of jobs.

        Raises :class:`IntegrityError` if an envelope's head cannot be read: its ciphertext is not known then.
        """
        wanted = {record.submission async for record, _ in self._jobs.list() if self._is_kept(record)}
        async for digest, stored in self._envelopes.heads():
            if (header := self._header(digest, stored)) is None:
                raise IntegrityError("an envelope's head cannot be read: no ciphertext is removed")
            wanted.add(header.ciphertext_digest)
        return wanted

    def _is_kept(self, record: JobRecord) -> bool:
        return record.state not in TERMINAL or not self._is_past(record, self._retention.ended_s)

    def _is_past(self, record: JobRecord, seconds: float) -> bool:
        return record.updated + 1000 * seconds <= self._clock()

    def _is_old(self, stored: Stored) -> bool:
        return stored.stored_ms + 1000 * self._retention.unreferenced_s <= self._clock()

    def _header(self, digest: bytes, stored: Stored) -> EnvelopeHeader | None:
        try:
            return decode(Signed, stored.data, max_bytes=MAX_HEAD_BYTES).peek(EnvelopeHead).header
        except CasemateError:
            self._log.error("head_broken", envelope=digest.hex())
            return None


def _result(record: JobRecord) -> bytes | None:
    """The result that the record's release names. Raises :class:`IntegrityError` if it cannot be read."""
    if record.release is None:
        return None
    try:
        return decode(Signed, record.release).peek(Release).result
    except CasemateError as error:
        raise IntegrityError("a job's release cannot be read") from error
