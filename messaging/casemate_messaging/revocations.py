"""Whose delegations were revoked: how that travels, and what a program believes of it.

A revocation is one signed sentence of a member's, and stands for ever. What a program believes is the union of all that
it ever accepted: there is no order to get wrong, no older list to be offered, no fork. NATS and the gateway can withhold
a revocation (until the delegations that it is about end by themselves), never make or unmake one.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from casemate_schemas import subjects
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import Consortium, verify_revocation
from casemate_schemas.errors import AuthenticationError, CasemateError, IntegrityError, SetupError, TooLargeError
from casemate_schemas.identity import Revocation
from casemate_schemas.signatures import Signed
from nats.aio.client import Client

from .connection import REQUEST_TIMEOUT_S, publish_once, translated
from .direct import Stored, read_batch
from .logs import ProgramLog
from .settings import ProgramSettings

MAX_REVOCATION_BYTES: Final = 1024
MAX_PEOPLE: Final = 4096
"""Bound on the people of one member who were ever revoked; each counts once."""

_BATCH: Final = 64
_MAX_BATCHES: Final = 256
_FROM_THE_START: Final = 30
"""Every so many polls all is read again: the store may have been set up anew, or a manifest names a newer key."""


class RevocationStore:
    """The stream of revocations over one connection. What is read is as untrusted as NATS."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)

    async def put(self, signed: Signed) -> None:
        """Stores a revocation durably; storing it again changes nothing. The gateway only. Raises :class:`UnavailableError`."""
        with translated("storing a revocation"):
            await publish_once(self._js, subjects.revocation(signed.digest.hex()), encode(signed))

    async def read(self, start: int) -> list[Stored]:
        """What is stored from sequence ``start`` on, in order, not verified; some of it. Raises :class:`UnavailableError`."""
        every = subjects.EVERY_REVOCATION
        return await read_batch(self._client, subjects.REVOCATION_STREAM, every, start=start, limit=_BATCH)


class TrustedRevocations:
    """All revocations that this program has accepted. They only ever grow, for its threads together."""

    def __init__(
        self,
        versions: Callable[[], tuple[Consortium, ...]],
        *,
        known: Iterable[Signed] = (),
        keep: Callable[[Revocation, Signed], None] = lambda *_: None,
        after_news: Callable[[], None] = lambda: None,
    ) -> None:
        """``versions`` gives the consortium at each manifest, ``known`` are those that were accepted before.

        ``keep`` writes each new one to the disk, before it counts; ``after_news`` hears of it once it does. Raises
        :class:`IntegrityError` if one of those ``known`` does not verify.
        """
        self._versions = versions
        self._keep = keep
        self._lock = threading.Lock()
        self._revoked: dict[tuple[str, str], int] = {}
        try:
            for signed in known:
                self._add(self._verified(signed))
        except CasemateError as error:
            raise IntegrityError("the revocations kept here do not verify") from error
        self.after_news = after_news

    def applied_to(self, consortium: Consortium) -> Consortium:
        """The consortium, in which the delegations that were revoked are not valid."""
        return replace(consortium, revoked=self._revoked)

    def offer(self, signed: Signed) -> bool:
        """Accepts a revocation; whether it was news.

        A key counts that some manifest lists for the member: a revocation outlives its member's key. Raises
        :class:`AuthenticationError`, :class:`MalformedError`, :class:`TooLargeError`, and what ``keep`` raises.
        """
        revocation = self._verified(signed)
        with self._lock:
            member = revocation.member
            who = (member, revocation.person)
            if revocation.before <= self._revoked.get(who, 0):
                return False
            if who not in self._revoked and sum(name == member for name, _ in self._revoked) >= MAX_PEOPLE:
                raise TooLargeError(f"{member} has revoked {MAX_PEOPLE} people already, the most that it can")
            self._keep(revocation, signed)
            self._add(revocation)
        self.after_news()
        return True

    def _add(self, revocation: Revocation) -> None:
        """A new mapping, since consortiums hold the old one."""
        self._revoked = {**self._revoked, (revocation.member, revocation.person): revocation.before}

    def _verified(self, signed: Signed) -> Revocation:
        *earlier, newest = self._versions()
        for consortium in reversed(earlier):
            with contextlib.suppress(AuthenticationError):
                return verify_revocation(signed, consortium)
        return verify_revocation(signed, newest)


class RevocationFollower:
    """Brings :class:`TrustedRevocations` up to date from NATS."""

    def __init__(
        self, revocations: TrustedRevocations, store: RevocationStore, settings: ProgramSettings, log: ProgramLog
    ) -> None:
        self._revocations = revocations
        self._store = store
        self._poll_s = settings.manifest_poll_s
        self._log = log
        self._polls = 0
        self._next = 1
        self._said: str | None = None

    async def run(self) -> None:
        """Catches up every ``manifest_poll_s``, for ever. Raises as :meth:`catch_up`."""
        while True:
            await asyncio.sleep(self._poll_s)
            await self.catch_up()

    async def catch_up(self) -> None:
        """Accepts every revocation that is to be had. What cannot be read is logged, and tried again.

        Raises :class:`SetupError` or :class:`IntegrityError` if the program cannot go on.
        """
        if self._polls % _FROM_THE_START == 0:
            self._next = 1
        self._polls += 1
        try:
            for _ in range(_MAX_BATCHES):
                batch = await self._store.read(self._next)
                for stored in batch:
                    await self._take(stored.data)
                    self._next = stored.sequence + 1
                if len(batch) < _BATCH:
                    break
            self._said = None
        except (SetupError, IntegrityError):
            raise
        except CasemateError as error:
            if error.reason != self._said:
                self._log.warning("revocations_not_read", reason=error.reason)
            self._said = error.reason

    async def _take(self, data: bytes) -> None:
        """One that no member signed, or none yet, is passed over, and looked at again when all is read again."""
        try:
            signed = decode(Signed, data, max_bytes=MAX_REVOCATION_BYTES)
            is_news = await asyncio.to_thread(self._revocations.offer, signed)
        except (SetupError, IntegrityError):
            raise
        except CasemateError as error:
            self._log.warning("revocation_refused", reason=error.reason)
            return
        if is_news:
            self._log.info("revocation", member=signed.peek(Revocation).member)
