"""Saying that this worker is there, and hearing that it is to take no more jobs."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from casemate_messaging.logs import ProgramLog
from casemate_messaging.presence import Presence, PresenceStore, WorkerState
from casemate_schemas.errors import CasemateError
from nats.aio.client import Client

from .settings import Settings


class Announcer:
    """Announces one run of a worker for as long as it lasts. What it cannot say or hear it tries again at the next turn."""

    def __init__(
        self,
        settings: Settings,
        client: Client,
        *,
        is_working: Callable[[], bool],
        manifest_number: Callable[[], int],
        clock: Callable[[], int],
        log: ProgramLog,
    ) -> None:
        self.drained = asyncio.Event()
        """Set once an order to drain was heard."""
        self._settings = settings
        self._store = PresenceStore(client)
        self._instance = secrets.token_bytes(16)
        self._is_working = is_working
        self._manifest_number = manifest_number
        self._since = clock()
        self._log = log
        self._failed = ""

    async def run(self) -> None:
        """Goes on for ever."""
        while True:
            try:
                await self._turn()
                self._failed = ""
            except CasemateError as error:
                if error.reason != self._failed:
                    self._log.warning("announce_failed", reason=error.reason)
                self._failed = error.reason
            await asyncio.sleep(self._settings.presence_s)

    async def _turn(self) -> None:
        await self._store.announce(self._presence())
        if not self.drained.is_set() and await self._store.is_to_drain(self._settings.name, self._instance):
            self._log.info("draining", worker=self._settings.name)
            self.drained.set()
            await self._store.announce(self._presence())

    def _presence(self) -> Presence:
        state: WorkerState = "working" if self._is_working() else "waiting"
        return Presence(
            worker=self._settings.name,
            instance=self._instance,
            state="draining" if self.drained.is_set() else state,
            since=self._since,
            manifest_number=self._manifest_number(),
        )
