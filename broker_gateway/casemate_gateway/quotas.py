"""What one member may have at once: jobs that have not ended, and bytes that its people have stored.

A gateway keeps none of it. Jobs are counted from their records as the dispatcher follows them; so a gateway never lets in
one too many of its own, and several together no more than reach them before they hear of each other's (the time of an
event). Bytes are counted from NATS, every gateway's own entry included, before anything of an envelope is taken.
"""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator
from typing import Final

from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.stored import StoredSizes, Total
from casemate_messaging.uploads import UploadStore
from casemate_schemas.errors import NotFoundError, QuotaError, ThrottledError

from .dispatch import Dispatcher

JOBS_RETRY_S: Final = 60.0
_MAX_TOTALS: Final = 1024


class Quotas:
    """One gateway's part in it."""

    def __init__(
        self,
        sizes: StoredSizes,
        envelopes: EnvelopeStore,
        uploads: UploadStore,
        dispatcher: Dispatcher,
        *,
        max_bytes: int,
        max_jobs: int,
    ) -> None:
        """``max_bytes`` and ``max_jobs`` are one member's."""
        self._sizes = sizes
        self._envelopes = envelopes
        self._uploads = uploads
        self._dispatcher = dispatcher
        self._max_bytes = max_bytes
        self._max_jobs = max_jobs
        self._totals: OrderedDict[str, Total] = OrderedDict()
        self._coming: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def job(self, member: str) -> AsyncGenerator[None]:
        """Holds room for one more job of ``member``'s while the block creates it.

        Raises :class:`ThrottledError` if there is none, :class:`UnavailableError` before the jobs were counted once.
        """
        if await self._dispatcher.jobs_of(member) + self._coming[member] >= self._max_jobs:
            raise ThrottledError(
                f"the member has {self._max_jobs} jobs that have not ended, as many as it may", JOBS_RETRY_S
            )
        self._coming[member] += 1
        try:
            yield
        finally:
            self._coming[member] -= 1

    async def envelope(self, member: str, envelope: str, size: int) -> None:
        """Counts an envelope of that digest (hexadecimal) as stored by ``member``, before it is.

        1. It is noted, once. 2. All that is noted adds up to no more than the member may have: by what this gateway knew
        and what was noted since, or else, as things may have been removed, counted anew. 3. If not, the note goes.

        Raises :class:`QuotaError`, :class:`StorageFullError`, :class:`UnavailableError`.
        """
        if not await self._sizes.add(member, envelope, size):  # 1
            return
        if await self._total(member) <= self._max_bytes:  # 2
            return
        self._totals.pop(member, None)
        if await self._total(member) > self._max_bytes:
            self._totals.pop(member, None)
            await self._sizes.remove(envelope, member)  # 3
            raise QuotaError("the member has stored as much as it may: delete what is no longer needed")

    async def kept(self, member: str, envelope: str, size: int) -> None:
        """An envelope is stored: its note is there, also if whoever else began to store it has given up meanwhile."""
        await self._sizes.add(member, envelope, size)

    async def given_up(self, member: str, envelope: str) -> None:
        """An envelope was not stored, or is removed: it counts no longer, unless it is there all the same."""
        if await self._envelopes.has(bytes.fromhex(envelope)):
            return
        with contextlib.suppress(NotFoundError):
            await self._uploads.get(member, envelope)
            return
        await self._sizes.remove(envelope, member)
        self._totals.pop(member, None)

    async def _total(self, member: str) -> int:
        total = self._totals[member] = await self._sizes.total(member, self._totals.get(member))
        self._totals.move_to_end(member)
        if len(self._totals) > _MAX_TOTALS:
            self._totals.popitem(last=False)
        return total.size
