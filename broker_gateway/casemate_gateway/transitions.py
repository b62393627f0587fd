"""The gateway's own steps of the state machine: compare and set, then tell of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from casemate_messaging.events import EventLog as JobEvents
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_schemas.errors import CasemateError
from casemate_schemas.job_state import TERMINAL, JobRecord, JobState, advance, event_of


class Transitions:
    """Moves jobs, and tells of them. An event that could not be stored is made up for by :meth:`tell_end`."""

    def __init__(self, jobs: JobStore, events: JobEvents, log: ProgramLog, clock: Callable[[], int]) -> None:
        self._jobs = jobs
        self._events = events
        self._log = log
        self._clock = clock

    async def move(self, job_id: str, state: JobState, **changes: Any) -> JobRecord:
        """Moves the job to ``state``; where it is already, nothing happens.

        Raises :class:`StateError` if the state machine has no such transition, and as :meth:`JobStore.change`.
        """
        moved = False

        def step(record: JobRecord) -> JobRecord:
            nonlocal moved
            moved = record.state != state
            return advance(record, state, now_ms=self._clock(), **changes) if moved else record

        record = await self._jobs.change(job_id, step)
        if moved:
            await self.tell(record)
        return record

    async def tell_end(self, record: JobRecord) -> None:
        """Makes sure that the events of a job that has ended say so, for a program may die before it tells."""
        if record.state not in TERMINAL:
            return
        async for _, event in self._events.replay(record.job_id):
            if event.state in TERMINAL:
                return
        await self.tell(record)

    def is_followed(self, job_id: str) -> bool:
        """Whether somebody follows the job here. Who comes later is told its end then."""
        return self._events.is_followed(job_id)

    async def tell(self, record: JobRecord) -> None:
        """Tells those who watch the job how it is now, if the event can be stored."""
        self._log.info("job", job_id=record.job_id, state=record.state, reason=record.reason or "")
        try:
            await self._events.publish(event_of(record))
        except CasemateError as error:
            self._log.warning("event_lost", job_id=record.job_id, state=record.state, reason=error.reason)
