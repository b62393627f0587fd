"""From ``queued`` into the work queue: no more jobs at a time than workers wait for, and one that is ready for the next.

What is queued is in the records; this holds an order over them and can be lost at any time. Several gateways may dispatch
side by side: the queue takes a job's message once, and how much is in it they all see.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from casemate_messaging.connection import settle, translated
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.queue import WorkQueue
from casemate_schemas import subjects
from casemate_schemas.admission import URGENCY
from casemate_schemas.errors import CasemateError, IntegrityError, NotFoundError, UnavailableError
from casemate_schemas.job_state import JobRecord
from casemate_schemas.subjects import ResourceClass
from nats.aio.client import Client
from nats.aio.msg import Msg

from .records import RecordReader
from .schedule import Entry, Schedule
from .tracing import OFF, Tracing

_RETRY_S = 1.0
_FIRST_COUNT_S = 10.0


class Dispatcher:
    """Hands out queued jobs in a fair order, as fast as workers take them."""

    def __init__(
        self,
        client: Client,
        queues: Mapping[ResourceClass, WorkQueue],
        jobs: JobStore,
        records: RecordReader,
        log: ProgramLog,
        clock: Callable[[], int],
        tracing: Tracing = OFF,
    ) -> None:
        self._client = client
        self._tracing = tracing
        self._queues = queues
        self._schedules = {resource_class: Schedule() for resource_class in queues}
        self._jobs = jobs
        self._records = records
        self._log = log
        self._clock = clock
        self._changed: set[str] = set()
        self._wake = asyncio.Event()
        self._reconciled = asyncio.Event()

    def see(self, record: JobRecord) -> None:
        """A job's record as it is now."""
        if (entry := self.entry(record)) is not None:
            self._schedules[record.resource_class].see(entry)
            self._wake.set()

    async def jobs_of(self, member: str) -> int:
        """Jobs of a member's that have not ended, as far as known here. Raises :class:`UnavailableError` before any is."""
        try:
            async with asyncio.timeout(_FIRST_COUNT_S):
                await self._reconciled.wait()
        except TimeoutError as error:
            raise UnavailableError("jobs were not counted yet: try again") from error
        return sum(schedule.count(member) for schedule in self._schedules.values())

    def entry(self, record: JobRecord) -> Entry | None:
        """What a job's turn depends on; None for a record that is broken, which waits until someone looks at it.

        What never changes is read once: it takes a signature's verification.
        """
        known = self._schedules[record.resource_class].get(record.job_id)
        if known is not None:
            return replace(known, state=record.state)
        try:
            job = self._records.open(record)
        except CasemateError as error:
            self._log.error("record_broken", job_id=record.job_id, reason=error.reason)
            return None
        return Entry(
            job_id=record.job_id,
            resource_class=record.resource_class,
            member=job.submitter.member,
            state=record.state,
            urgency=URGENCY[job.routing.priority],
            not_before=job.routing.not_before or 0,
            created=record.created,
        )

    def moments(self) -> Mapping[ResourceClass, int]:
        """When it is, for :meth:`reconcile`; to be asked for before jobs are listed."""
        return {resource_class: schedule.moment for resource_class, schedule in self._schedules.items()}

    async def reconcile(self, entries: Iterable[Entry], since: Mapping[ResourceClass, int]) -> None:
        """These were all jobs that had not ended, listed from ``since`` on. What was handed out and lost is put back."""
        found = list(entries)
        for resource_class, schedule in self._schedules.items():
            schedule.replace((e for e in found if e.resource_class == resource_class), since[resource_class])
            for job_id in schedule.handed_out:
                await self._queues[resource_class].publish(job_id)
        self._reconciled.set()
        self._wake.set()

    async def run(self) -> None:
        """Dispatches for ever. Events of jobs wake it; one that is missed costs until the next reconciliation."""

        async def changed(message: Msg) -> None:
            self._changed.add(message.subject.rpartition(".")[2])
            self._wake.set()

        with translated("following all jobs"):
            subscription = await self._client.subscribe(subjects.EVERY_EVENT_STORED, cb=changed)
            await settle(self._client)
        try:
            while True:
                self._wake.clear()
                try:
                    await self.dispatch()
                    if self._changed:
                        await self._refresh()
                        await self.dispatch()
                except CasemateError as error:
                    self._log.warning("dispatch_failed", reason=error.reason)
                    await asyncio.sleep(_RETRY_S)
                    continue
                await self._woken()
        finally:
            with translated("following all jobs"):
                await subscription.unsubscribe()

    async def dispatch(self) -> None:
        """Fills the work queue as far as it should be: one job for each worker that waits, and one more.

        A gateway of whose jobs none is in the queue need not ask how full it is before it puts one there.
        """
        for resource_class, schedule in self._schedules.items():
            queue = self._queues[resource_class]
            if not schedule.handed_out:
                await self._hand_out(queue, schedule, 1)
            if schedule.next(self._clock()) is None:
                continue
            backlog = await queue.backlog()
            await self._hand_out(queue, schedule, 1 + backlog.waiting_workers - backlog.undelivered)

    async def _hand_out(self, queue: WorkQueue, schedule: Schedule, count: int) -> None:
        for _ in range(count):
            if (job_id := schedule.next(self._clock())) is None:
                return
            await queue.publish(job_id, self._jobs.known(job_id))
            schedule.hand_out(job_id)
            if (entry := schedule.get(job_id)) is not None:
                self._tracing.dispatched(job_id, entry.created)

    async def _refresh(self) -> None:
        while self._changed:
            job_id = self._changed.pop()
            try:
                self.see((await self._jobs.get(job_id))[0])
            except NotFoundError:
                continue
            except IntegrityError as error:
                self._log.error("record_broken", job_id=job_id, reason=error.reason)
            except CasemateError:
                self._changed.add(job_id)
                raise

    async def _woken(self) -> None:
        due = [at for schedule in self._schedules.values() if (at := schedule.due_ms()) is not None]
        wait_s = max(0.0, (min(due) - self._clock()) / 1000) if due else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._wake.wait()
