"""Events of a job: published once, replayed from any point, followed until the job ends."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from casemate_schemas import subjects
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import IntegrityError, MalformedError
from casemate_schemas.job_state import TERMINAL, JobEvent
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from .connection import settle, translated
from .direct import read_batch
from .publishing import Publisher

MAX_EVENT_BYTES: Final = 4096
_BATCH: Final = 256


class EventLog:
    """The stream ``EVENTS``. Workers and gateway publish, the gateway reads."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._publisher = Publisher(client)
        self._followers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._subscription: Subscription | None = None
        self._listening = asyncio.Lock()

    async def publish(self, event: JobEvent) -> int:
        """Stores an event, durably; returns its sequence, which grows with time over all jobs.

        Raises :class:`StorageFullError`, :class:`UnavailableError`.
        """
        with translated("publishing an event"):
            return await self._publisher.publish(subjects.event(event.job_id), encode(event))

    async def replay(self, job_id: str, after: int = 0) -> AsyncIterator[tuple[int, JobEvent]]:
        """(sequence, event) of all stored events of the job with a sequence over ``after``, oldest first.

        Raises :class:`IntegrityError` for a stored event that is none, :class:`UnavailableError`.
        """
        subject = subjects.event(job_id)
        while batch := await read_batch(self._client, subjects.EVENT_STREAM, subject, start=after + 1, limit=_BATCH):
            for stored in batch:
                yield stored.sequence, _event(job_id, stored.data)
            after = batch[-1].sequence

    async def follow(
        self, job_id: str, after: int = 0, *, poll_s: float = 15.0
    ) -> AsyncGenerator[tuple[int, JobEvent]]:
        """As :meth:`replay`, then each event as it is stored, until one says that the job has ended.

        A lost wake-up (a reconnect, say) costs at most ``poll_s`` seconds, never an event. Close the iterator
        (``aclosing``) when done.
        """
        async with self._woken(job_id) as stored:
            while True:
                stored.clear()
                async for sequence, event in self.replay(job_id, after):
                    after = sequence
                    yield sequence, event
                    if event.state in TERMINAL:
                        return
                try:
                    await asyncio.wait_for(stored.wait(), poll_s)
                except TimeoutError:
                    continue

    def is_followed(self, job_id: str) -> bool:
        """Whether somebody follows the job here."""
        return job_id in self._followers

    @asynccontextmanager
    async def _woken(self, job_id: str) -> AsyncGenerator[asyncio.Event]:
        """What is set whenever an event of the job is stored."""
        stored = asyncio.Event()
        self._followers[job_id].add(stored)
        try:
            await self._listen()
            yield stored
        finally:
            self._followers[job_id].discard(stored)
            if not self._followers[job_id]:
                del self._followers[job_id]

    async def _listen(self) -> None:
        """One subscription for all followers, made for the first one, and kept."""
        async with self._listening:
            if self._subscription is None:
                with translated("following jobs"):
                    subscription = await self._client.subscribe(subjects.EVERY_EVENT_STORED, cb=self._wake)
                    await settle(self._client)
                self._subscription = subscription

    async def _wake(self, message: Msg) -> None:
        for stored in self._followers.get(message.subject.rpartition(".")[2], ()):
            stored.set()


def _event(job_id: str, data: bytes) -> JobEvent:
    try:
        event = decode(JobEvent, data, max_bytes=MAX_EVENT_BYTES)
    except MalformedError as error:
        raise IntegrityError(f"a stored event of job {job_id} is broken") from error
    if event.job_id != job_id:
        raise IntegrityError(f"a stored event of job {job_id} is another job's")
    return event
