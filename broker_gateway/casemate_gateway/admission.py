"""How a job gets from ``awaiting_approval`` into the queue, or does not.

All that admission knows is in the records, so whatever it was doing when it died, the next one takes up: answers that
were stored are not asked for again, a message that was queued is not queued twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Final, Literal

from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.queue import WorkQueue
from casemate_messaging.rpc import call
from casemate_schemas import subjects
from casemate_schemas.admission import MAX_TERMS_ENVELOPE_BYTES, PrecheckAnswer, PrecheckRequest, Submission
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import (
    AuthorisationError,
    CasemateError,
    IntegrityError,
    MalformedError,
    SignatureError,
    StateError,
    problem_of,
)
from casemate_schemas.job_state import (
    MAX_DELEGATION_BYTES,
    MAX_ROUTING_BYTES,
    TERMINAL,
    Approval,
    JobRecord,
    JobState,
    revise,
)
from casemate_schemas.signatures import Signed
from nats.aio.client import Client

from .dispatch import Dispatcher
from .records import Job, RecordReader
from .schedule import Entry
from .tasks import end
from .transitions import Transitions

MAX_SUBMISSION_BYTES: Final = MAX_TERMS_ENVELOPE_BYTES + MAX_ROUTING_BYTES + MAX_DELEGATION_BYTES + (4 << 10)
MAX_ANSWER_BYTES: Final = 8 << 10
MAX_CONCURRENT_ROUNDS: Final = 16
"""Jobs being asked about at once; each holds its submission in memory."""

Left = Literal["nothing", "answers", "approvals"]
"""What a job still waits for: key brokers that did not answer, or people."""

_EXPIRING: Final = frozenset[JobState]({"awaiting_approval", "queued", "claimed", "running"})
"""States that a passed deadline ends. From ``committing`` on a result may already be decided."""


class Admission:
    """Asks key brokers, then queues. One task for each job that waits; several gateways may do the same at once."""

    def __init__(
        self,
        client: Client,
        *,
        consortium: Callable[[], Consortium],
        jobs: JobStore,
        blobs: BlobStore,
        envelopes: EnvelopeStore,
        queue: WorkQueue,
        dispatcher: Dispatcher,
        transitions: Transitions,
        records: RecordReader,
        log: ProgramLog,
        clock: Callable[[], int],
        key_broker_timeout_s: float,
        retry_s: float,
        max_wait_s: float,
        counted: Callable[[Counter[JobState], float], None] = lambda _states, _oldest: None,
    ) -> None:
        """``counted`` hears at each reconciliation of jobs by state, and how many seconds the oldest one queues."""
        self._client = client
        self._consortium = consortium
        self._jobs = jobs
        self._blobs = blobs
        self._envelopes = envelopes
        self._queue = queue
        self._dispatcher = dispatcher
        self._transitions = transitions
        self._records = records
        self._log = log
        self._clock = clock
        self._key_broker_timeout_s = key_broker_timeout_s
        self._retry_s = retry_s
        self._max_wait_s = max_wait_s
        self._counted = counted
        self._woken: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._rounds = asyncio.Semaphore(MAX_CONCURRENT_ROUNDS)

    def take_up(self, job_id: str) -> None:
        """Begins or goes on admitting a job, in the background."""
        if job_id not in self._tasks:
            self._woken[job_id] = asyncio.Event()
            self._tasks[job_id] = asyncio.create_task(self._admit(job_id))
            self._tasks[job_id].add_done_callback(lambda _: self._forget(job_id))

    def _forget(self, job_id: str) -> None:
        self._tasks.pop(job_id, None)
        self._woken.pop(job_id, None)

    def wake(self, job_id: str) -> None:
        """Somebody may have approved this job: it is asked about again, ``retry_s`` after the last time."""
        if (event := self._woken.get(job_id)) is not None:
            event.set()

    async def run(self, every_s: float) -> None:
        """Reconciles now and every ``every_s`` seconds, for ever."""
        while True:
            try:
                await self.reconcile()
            except CasemateError as error:
                self._log.warning("reconcile_failed", reason=error.reason)
            await asyncio.sleep(every_s)

    async def reconcile(self) -> None:
        """Brings what the records say and what is under way together.

        1. Jobs past their deadline expire, and leave the queue.
        2. Jobs that wait for approval are taken up.
        3. Jobs that a worker has, or should have, have their message in the queue: should it be lost, it is put back.
        4. Jobs that wait for a worker are dispatched in their turn.

        A record that cannot be read is logged, and holds up no other job.
        """
        since = self._dispatcher.moments()
        states, going, queued = Counter[JobState](), list[tuple[Entry, int | None]](), list[int]()
        async for record, _ in self._jobs.list(self._broken):
            states[record.state] += 1
            if record.state == "queued":
                queued.append(record.updated)
            if record.state not in TERMINAL and (entry := self._dispatcher.entry(record)) is not None:
                going.append((entry, record.deadline))
        self._counted(states, (self._clock() - min(queued)) / 1000 if queued else 0.0)
        for entry, deadline in going:
            if entry.state in _EXPIRING and deadline is not None and self._clock() >= deadline:  # 1
                await self._expire(entry.job_id)
            elif entry.state == "awaiting_approval":  # 2
                self.take_up(entry.job_id)
            elif entry.state != "queued":  # 3
                await self._queue.publish(entry.job_id)
        await self._dispatcher.reconcile([entry for entry, _ in going], since)  # 3, 4

    def _broken(self, job_id: str, error: IntegrityError) -> None:
        self._log.error("record_broken", job_id=job_id, reason=error.reason)

    async def close(self) -> None:
        """Stops where it is; another admission goes on from the records."""
        await end(self._tasks.values())

    async def _admit(self, job_id: str) -> None:
        """Asks again and again until the job waits no more. What fails here, the next reconciliation takes up."""
        wait_s = self._retry_s
        try:
            while (left := await self._round(job_id)) != "nothing":
                await asyncio.sleep(self._retry_s)
                if left == "answers":
                    wait_s = self._retry_s
                    continue
                woken = await self._slept(job_id, wait_s - self._retry_s)
                wait_s = self._retry_s if woken else min(2 * wait_s, max(self._max_wait_s, self._retry_s))
        except StateError:
            return  # somebody ended the job meanwhile
        except CasemateError as error:
            self._log.warning("admission_interrupted", job_id=job_id, reason=error.reason)
        except Exception as error:
            self._log.error("unexpected", job_id=job_id, error=type(error).__name__)

    async def _slept(self, job_id: str, seconds: float) -> bool:
        """Waits so long for somebody to wake the job; whether they did."""
        event = self._woken[job_id]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
        woken = event.is_set()
        event.clear()
        return woken

    async def _round(self, job_id: str) -> Left:
        """One round of questions; what another one is needed for.

        1. A job that waits no more, or no longer may, is left alone or expires.
        2. Every key broker that has not answered is asked, all at once; each answer is stored as it comes.
        3. One refusal ends the job, whatever the others would say.
        4. With every yes the job is queued: from there on it is dispatched, by whichever gateway comes to it first.
        """
        record, _ = await self._jobs.get(job_id)
        if record.state != "awaiting_approval":
            return "nothing"
        if record.deadline is not None and self._clock() >= record.deadline:
            await self._expire(job_id)
            return "nothing"
        async with self._rounds:
            record = await self._ask_pending(record)
        if record.state != "awaiting_approval":
            return "nothing"
        if any(approval.verdict == "refused" for approval in record.approvals.values()):
            await self._transitions.move(job_id, "refused", reason=record.reason or AuthorisationError.reason)
            return "nothing"
        pending = [approval for approval in record.approvals.values() if approval.verdict == "pending"]
        if pending:
            return "approvals" if all(approval.answer for approval in pending) else "answers"
        self._dispatcher.see(await self._transitions.move(job_id, "queued"))
        return "nothing"

    async def _ask_pending(self, record: JobRecord) -> JobRecord:
        """Puts the question to all who have not answered; the record with what they said."""
        pending = [name for name, approval in sorted(record.approvals.items()) if approval.verdict == "pending"]
        if not pending:
            return record
        job = self._records.open(record)
        head = await self._envelopes.head(record.job_envelope)
        stored = b"".join([piece async for piece in self._blobs.get(record.submission)])
        submission = decode(Submission, stored, max_bytes=MAX_SUBMISSION_BYTES)
        question = encode(PrecheckRequest(submission=submission, job_head=head.signed))
        asking = [asyncio.create_task(self._ask(job, key_broker, question)) for key_broker in pending]
        try:
            for answer in asyncio.as_completed(asking):
                if await answer == "refused":
                    break
        finally:
            await end(asking)
        return (await self._jobs.get(record.job_id))[0]

    async def _ask(self, job: Job, key_broker: str, question: bytes) -> str:
        """Asks one key broker and stores what it says; its verdict, ``pending`` if it gives no answer."""
        subject = subjects.key_broker_op(key_broker, "precheck")
        try:
            answer = await call(self._client, subject, question, self._key_broker_timeout_s)
        except CasemateError as error:
            self._log.warning("precheck_failed", job_id=job.record.job_id, key_broker=key_broker, reason=error.reason)
            if problem_of(error).delivery == "term":
                return await self._store(job, key_broker, Approval(verdict="refused"), error.reason)
            return "pending"
        try:
            decision = self._verified(job, key_broker, answer)
        except CasemateError as error:
            self._log.warning("answer_refused", job_id=job.record.job_id, key_broker=key_broker, reason=error.reason)
            return "pending"
        verdict = "pending" if decision.decision == "awaiting" else decision.decision
        return await self._store(job, key_broker, Approval(verdict=verdict, answer=answer), decision.reason)

    def _verified(self, job: Job, key_broker: str, answer: bytes) -> PrecheckAnswer:
        """The answer, if that key broker signed it about these very terms."""
        signed = decode(Signed, answer, max_bytes=MAX_ANSWER_BYTES)
        consortium = self._consortium()
        decision = signed.verify(PrecheckAnswer, consortium.manifest.key_broker(key_broker).signing_key)
        told = (decision.consortium, decision.key_broker, decision.job_id, decision.terms)
        if told != (consortium.id, key_broker, job.routing.job_id, job.routing.terms):
            raise SignatureError("the key broker's answer is about something else")
        if (decision.decision == "refused") != (decision.reason is not None):
            raise MalformedError("a refusal, and nothing else, has a reason")
        return decision

    async def _store(self, job: Job, key_broker: str, approval: Approval, reason: str | None) -> str:
        """Writes one key broker's say into the record, whatever the others are doing to it; the verdict.

        What is awaited now is told to those who watch.
        """
        is_news = False

        def said(record: JobRecord) -> JobRecord:
            nonlocal is_news
            known = record.approvals[key_broker]
            is_news = record.state == "awaiting_approval" and known.verdict == "pending" and known != approval
            if not is_news:
                return record
            changes = {} if record.reason or not reason else {"reason": reason}
            approvals = {**record.approvals, key_broker: approval}
            return revise(record, now_ms=self._clock(), approvals=approvals, **changes)

        record = await self._jobs.change(job.record.job_id, said)
        if is_news and approval.verdict == "pending":
            await self._transitions.tell(record)
        return approval.verdict

    async def _expire(self, job_id: str) -> None:
        with contextlib.suppress(StateError):
            await self._transitions.move(job_id, "expired", reason=None)
            await self._queue.remove(job_id)
