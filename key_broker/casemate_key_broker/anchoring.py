"""The program's side of the anchor: it meets the newest head before it decides anything, and leaves one after each decision."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from casemate_messaging.ledger_heads import LedgerHeadStore
from casemate_messaging.logs import ProgramLog
from casemate_schemas.codec import decode
from casemate_schemas.errors import AuthenticationError, ConflictError, MalformedError, RolledBackError
from casemate_schemas.requests import LedgerHead
from casemate_schemas.signatures import Signed

from .service import KeyBroker

_Place = tuple[int, int, bytes, bytes]


class Anchoring:
    """Of one key broker, on one event loop."""

    def __init__(
        self, store: LedgerHeadStore, key_broker_id: str, broker: Callable[[], KeyBroker], log: ProgramLog
    ) -> None:
        self._store = store
        self._id = key_broker_id
        self._broker = broker
        self._log = log
        self._lock = asyncio.Lock()
        self._met = False
        self._sequence = 0
        self._left: _Place | None = None

    async def meet(self) -> None:
        """Shows the key broker the newest head that is anchored, once. Raises :class:`UnavailableError` if none can be asked
        for: then nothing may be decided.
        """
        async with self._lock:
            if not self._met:
                await self._look()
                self._met = True

    async def leave(self) -> None:
        """Anchors where the state stands, if it has moved: before the answer of the decision that moved it leaves.

        A state that is known to be set back leaves nothing, or it would hide the newer head. If another head was anchored
        since the last one, a copy of this state is at work: that one is met, and this one stops. Raises
        :class:`UnavailableError` (:class:`RolledBackError` then): the answer stays here, and whoever asked asks again.
        """
        async with self._lock:
            try:
                signed = await asyncio.to_thread(self._broker().head)
            except RolledBackError:
                return
            if (place := _place(signed)) == self._left:
                return
            try:
                self._sequence = await self._store.put(self._id, signed, after=self._sequence)
            except ConflictError:
                await self._look()
                signed = await asyncio.to_thread(self._broker().head)
                self._sequence = await self._store.put(self._id, signed, after=self._sequence)
            self._left = place

    async def _look(self) -> None:
        """Shows the key broker what is anchored now."""
        stored = await self._store.stored(self._id)
        self._sequence = 0 if stored is None else stored.sequence
        if stored is not None:
            try:
                await asyncio.to_thread(self._broker().observe, stored.data)
            except (MalformedError, AuthenticationError) as error:
                self._log.warning("anchor_unreadable", key_broker=self._id, reason=error.reason)


def _place(signed: bytes) -> _Place:
    head = decode(Signed, signed).peek(LedgerHead)
    return head.branch, head.entries, head.ledger, head.audit_root
