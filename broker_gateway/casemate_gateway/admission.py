"""How a job gets from ``awaiting_approval`` into the queue, or does not.

All that admission knows is in the records, so whatever it was doing when it died, the next one takes up: answers that
were stored are not asked for again, a message that was queued is not queued twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.queue import WorkQueue
from casemate_messaging.rpc import call
from casemate_messaging.tasks import end
from casemate_schemas import subjects
from casemate_schemas.admission import MAX_TERMS_ENVELOPE_BYTES, PrecheckAnswer, PrecheckRequest, Submission
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import (
    AuthorisationError,
    CasemateError,
    IntegrityError,
    MalformedError,
    NotFoundError,
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
    advance,
    revise,
)
from casemate_schemas.signatures import Signed
from nats.aio.client import Client

from .dispatch import Dispatcher
from .records import Job, RecordReader
from .schedule import Entry
from .tracing import OFF, Tracing
from .transitions import Transitions

MAX_SUBMISSION_BYTES: Final = MAX_TERMS_ENVELOPE_BYTES + MAX_ROUTING_BYTES + MAX_DELEGATION_BYTES + (4 << 10)
MAX_ANSWER_BYTES: Final = 8 << 10
MAX_CONCURRENT_ROUNDS: Final = 16
"""Jobs being asked about at once; each holds its submission in memory."""

_TOGETHER_S: Final = 0.05
"""How long a key broker's answer waits for others', to be stored with them. Lost meanwhile, it is asked for again."""

_TELL_AFTER_S: Final = 0.005
"""How long the event of a queued job is held back, so that it is not synced to the disk beside the job's claim."""

Left = Literal["nothing", "answers", "approvals", "submission"]
"""What a job still waits for: key brokers that did not answer, people, or what was submitted, which cannot be read."""

_EXPIRING: Final = frozenset[JobState]({"awaiting_approval", "queued", "claimed", "running"})
"""States that a passed deadline ends. From ``committing`` on a result may already be decided."""

_LOOK_AT_ALL_MS: Final = 600_000


@dataclass(frozen=True)
class _Going:
    """A job that has not ended, as its record was last seen; without an entry if what it holds is not what was signed."""

    entry: Entry | None
    state: JobState
    deadline: int | None
    updated: int


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
        lost_after_s: float,
        counted: Callable[[Counter[JobState], float], None] = lambda _states, _oldest: None,
        tracing: Tracing = OFF,
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
        self._lost_after_s = lost_after_s
        self._counted = counted
        self._tracing = tracing
        self._woken: dict[str, asyncio.Event] = {}
        self._questions: dict[str, PrecheckRequest] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._rounds = asyncio.Semaphore(MAX_CONCURRENT_ROUNDS)
        self._seen_up_to: dict[str, int] = {}
        self._going: dict[str, _Going] = {}
        self._ended: list[JobRecord] = []
        self._over = Counter[JobState]()
        self._look_at_all_at = 0

    def take_up(self, job_id: str, question: PrecheckRequest | None = None) -> None:
        """Begins or goes on admitting a job, in the background; ``question``, if it is known, need not be read again."""
        if job_id not in self._tasks:
            if question is not None and len(self._questions) < MAX_CONCURRENT_ROUNDS:
                self._questions[job_id] = question
            self._woken[job_id] = asyncio.Event()
            self._tasks[job_id] = asyncio.create_task(self._admit(job_id))
            self._tasks[job_id].add_done_callback(lambda _: self._forget(job_id))

    def _forget(self, job_id: str) -> None:
        self._tasks.pop(job_id, None)
        self._woken.pop(job_id, None)
        self._questions.pop(job_id, None)

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

        1. What changed since the last time is read; who follows a job that has ended is told so.
        2. Jobs past their deadline expire, and leave the queue.
        3. Jobs that wait for approval are taken up.
        4. Jobs that a worker has, or should have, have their message in the queue: should it be lost, it is put back.
        5. Jobs that wait for a worker are dispatched in their turn.

        A record that cannot be read is logged, and holds up no other job.
        """
        since = self._dispatcher.moments()
        await self._look()  # 1
        self._count()
        going = [(known.entry, known.deadline) for known in self._going.values() if known.entry is not None]
        for entry, deadline in going:
            is_late = entry.state in _EXPIRING and deadline is not None and self._clock() >= deadline
            if is_late and await self._expire(entry.job_id):  # 2
                continue
            if entry.state == "awaiting_approval":  # 3
                self.take_up(entry.job_id)
            elif entry.state != "queued":  # 4
                await self._queue.publish(entry.job_id)
        await self._dispatcher.reconcile([entry for entry, _ in going], since)  # 4, 5

    async def _look(self) -> None:
        """Reads what has changed, now and then everything: a NATS that was set back has changes that look old.

        Ends are told at two looks, for somebody may have begun to follow at the first.
        """
        if is_all := self._clock() >= self._look_at_all_at:
            self._seen_up_to, self._going, self._over = {}, {}, Counter()
        told_before = len(self._ended)
        async for record, _ in self._jobs.list(self._broken, self._seen_up_to):
            self._going.pop(record.job_id, None)
            if record.state not in TERMINAL:
                entry = self._dispatcher.entry(record)
                self._going[record.job_id] = _Going(entry, record.state, record.deadline, record.updated)
                continue
            self._over[record.state] += 1
            if not is_all or self._transitions.is_followed(record.job_id):
                self._ended.append(record)
        if is_all:
            self._look_at_all_at = self._clock() + _LOOK_AT_ALL_MS
        for record in self._ended:
            if self._transitions.is_followed(record.job_id):
                await self._transitions.tell_end(record)
        del self._ended[:told_before]

    def _count(self) -> None:
        """Tells how many jobs are in each state."""
        queued = [known.updated for known in self._going.values() if known.state == "queued"]
        states = self._over + Counter(known.state for known in self._going.values())
        self._counted(states, (self._clock() - min(queued)) / 1000 if queued else 0.0)

    def _broken(self, job_id: str, error: IntegrityError) -> None:
        self._going.pop(job_id, None)
        self._log.error("record_broken", job_id=job_id, reason=error.reason)

    async def close(self) -> None:
        """Stops where it is; another admission goes on from the records."""
        await end(self._tasks.values())

    async def _admit(self, job_id: str) -> None:
        """Asks again and again until the job waits no more. What fails here, the next reconciliation takes up."""
        wait_s, absence = self._retry_s, _Absence(self._lost_after_s)
        try:
            while (left := await self._round(job_id)) != "nothing":
                if absence.is_for_good(left == "submission"):
                    await self._transitions.move(job_id, "failed", reason=NotFoundError.reason)
                    return
                await asyncio.sleep(self._retry_s)
                if left != "approvals":
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
        2. Every key broker that has not answered is asked, all at once, if there is still what to ask; each answer is stored
           as it comes.
        3. One refusal ends the job, whatever the others would say.
        4. With every yes the job is queued: from there on it is dispatched, by whichever gateway comes to it first.
        """
        found, _ = self._jobs.known(job_id) or await self._jobs.get(job_id)
        if found.state != "awaiting_approval":
            return "nothing"
        if found.deadline is not None and self._clock() >= found.deadline:
            await self._expire(job_id)
            return "nothing"
        async with self._rounds:
            record = await self._ask_pending(found)
        if record is None:
            return "submission"
        if record.state != "awaiting_approval":
            return "nothing"
        if _is_refused(record):
            await self._transitions.move(job_id, "refused", reason=record.reason or AuthorisationError.reason)
            return "nothing"
        pending = [approval for approval in record.approvals.values() if approval.verdict == "pending"]
        if pending:
            return "approvals" if all(approval.answer for approval in pending) else "answers"
        self._dispatcher.see(await self._transitions.move(job_id, "queued"))
        return "nothing"

    async def _ask_pending(self, record: JobRecord) -> JobRecord | None:
        """Puts the question to all who have not answered; the record with what they said. None if there is no question."""
        pending = [name for name, approval in sorted(record.approvals.items()) if approval.verdict == "pending"]
        if not pending:
            return record
        job = self._records.open(record)
        if (question := await self._question(record)) is None:
            return None
        asking = [asyncio.create_task(self._ask(job, key_broker, question)) for key_broker in pending]
        left = set(asking)
        try:
            while left and record.state == "awaiting_approval" and not _is_refused(record):
                said, left = await _come_together(left)
                record = await self._store(job, [answer for answer in said if answer is not None])
        finally:
            await end(asking)
        return record

    async def _question(self, record: JobRecord) -> bytes | None:
        """What key brokers are asked. None if the store does not have, or not whole, what was submitted."""
        if (question := self._questions.pop(record.job_id, None)) is not None:
            return encode(question)
        try:
            head = await self._envelopes.head(record.job_envelope)
            stored = b"".join([piece async for piece in self._blobs.get(record.submission)])
            submission = decode(Submission, stored, max_bytes=MAX_SUBMISSION_BYTES)
        except (NotFoundError, IntegrityError, MalformedError) as error:
            self._log.error("submission_unreadable", job_id=record.job_id, reason=error.reason)
            return None
        return encode(PrecheckRequest(submission=submission, job_head=head.signed))

    async def _ask(self, job: Job, key_broker: str, question: bytes) -> _Answer | None:
        """What one key broker says; None if it gives no answer."""
        with self._tracing.precheck(job.record.job_id, key_broker) as told:
            if (answer := await self._said(job, key_broker, question)) is not None:
                told["verdict"] = answer.approval.verdict
            return answer

    async def _said(self, job: Job, key_broker: str, question: bytes) -> _Answer | None:
        subject = subjects.key_broker_op(key_broker, "precheck")
        try:
            answer = await call(self._client, subject, question, self._key_broker_timeout_s)
        except CasemateError as error:
            self._log.warning("precheck_failed", job_id=job.record.job_id, key_broker=key_broker, reason=error.reason)
            is_refusal = problem_of(error).delivery == "term"
            return _Answer(key_broker, Approval(verdict="refused"), error.reason) if is_refusal else None
        try:
            decision = self._verified(job, key_broker, answer)
        except CasemateError as error:
            self._log.warning("answer_refused", job_id=job.record.job_id, key_broker=key_broker, reason=error.reason)
            return None
        verdict = "pending" if decision.decision == "awaiting" else decision.decision
        return _Answer(key_broker, Approval(verdict=verdict, answer=answer), decision.reason)

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

    async def _store(self, job: Job, answers: Sequence[_Answer]) -> JobRecord:
        """Writes what key brokers said into the record, whatever else becomes of it; the record as it is then.

        The write that holds the last yes queues the job as well. That, and what is awaited now, is told to those who watch.
        """
        if not answers:
            return (await self._jobs.get(job.record.job_id))[0]
        news: dict[str, Approval] = {}

        def said(record: JobRecord) -> JobRecord:
            news.clear()
            if record.state == "awaiting_approval":
                news.update((a.key_broker, a.approval) for a in answers if _is_news(record, a))
            if not news:
                return record
            approvals = {**record.approvals, **news}
            if all(approval.verdict == "yes" for approval in approvals.values()):
                return advance(record, "queued", now_ms=self._clock(), approvals=approvals)
            reason = record.reason or next((a.reason for a in answers if a.key_broker in news and a.reason), None)
            return revise(record, now_ms=self._clock(), approvals=approvals, reason=reason)

        record = await self._jobs.change(job.record.job_id, said)
        if news and record.state == "queued":
            self._dispatcher.see(record)
            await asyncio.sleep(_TELL_AFTER_S)
            await self._transitions.tell(record)
        elif any(approval.verdict == "pending" for approval in news.values()):
            await self._transitions.tell(record)
        return record

    async def _expire(self, job_id: str) -> bool:
        """Ends the job, unless it has ended, or its result may be committed already; whether it did."""
        try:
            await self._transitions.move(job_id, "expired", reason=None)
        except StateError:
            return False
        await self._queue.remove(job_id)
        return True


@dataclass(frozen=True)
class _Answer:
    """What a key broker says of a job, and why if that is no."""

    key_broker: str
    approval: Approval
    reason: str | None


def _is_news(record: JobRecord, answer: _Answer) -> bool:
    known = record.approvals[answer.key_broker]
    return known.verdict == "pending" and known != answer.approval


def _is_refused(record: JobRecord) -> bool:
    return any(approval.verdict == "refused" for approval in record.approvals.values())


async def _come_together(
    asking: set[asyncio.Task[_Answer | None]],
) -> tuple[list[_Answer | None], set[asyncio.Task[_Answer | None]]]:
    """The next answers, with those that come at about the same time: one write for all. Who is still being asked."""
    done, left = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    if left and not any((answer := task.result()) and answer.approval.verdict == "refused" for task in done):
        more, left = await asyncio.wait(left, timeout=_TOGETHER_S)
        done |= more
    return [task.result() for task in done], left


class _Absence:
    """Whether something has been missing at every look for so long that it will not come back.

    A replica that is behind, or a message garbled on its way, is no loss.
    """

    def __init__(self, for_good_s: float) -> None:
        self._for_good_s = for_good_s
        self._since: float | None = None

    def is_for_good(self, is_missing: bool) -> bool:
        """Takes note of one look."""
        now = asyncio.get_running_loop().time()
        self._since = (now if self._since is None else self._since) if is_missing else None
        return self._since is not None and now - self._since >= self._for_good_s
