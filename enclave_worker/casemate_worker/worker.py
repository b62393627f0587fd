"""The worker: takes a job from the queue, earns its keys, trains, commits, releases. It trusts none of what carries it."""

from __future__ import annotations

import asyncio
import contextlib
import platform
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Final

from casemate_attestation.guest import GuestDriver
from casemate_messaging.blobs import BlobStore
from casemate_messaging.direct import REPLICA_LAG_S
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.events import EventLog
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.queue import Delivery, WorkQueue
from casemate_messaging.rpc import call
from casemate_messaging.tasks import end
from casemate_privacy.auditing import audit_report
from casemate_privacy.statement import planned_epsilon, privacy_statement
from casemate_schemas.audit import AuditCounts, AuditReport
from casemate_schemas.codec import encode
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import (
    CasemateError,
    ConflictError,
    DeadlineError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    ReleaseError,
    SealError,
    SetupError,
    StateError,
    TrainingError,
    UnavailableError,
    problem_of,
)
from casemate_schemas.evidence import MAX_ATTEMPTS, Evidence
from casemate_schemas.job import Plan
from casemate_schemas.job_state import (
    TERMINAL,
    JobRecord,
    JobState,
    advance,
    check_attempt,
    event_of,
    revise,
)
from casemate_schemas.result import ResultManifest
from casemate_schemas.sections import sections_head
from casemate_schemas.subjects import WorkerOp, key_broker_op
from nats.aio.client import Client

from .attempt import Attempt, begin_attempt
from .evidence import gather_evidence
from .executor import CheckpointReady, StepDone, Trained, TrainingProcess
from .isolation import SECCOMP
from .job_input import OpenedJob, open_dataset, open_job
from .key_schedule import attempt_seed, fresh_entropy
from .keys import Keys, check_cover, committed_digest, request_grant
from .presence import Announcer
from .sealed_output import SealedOutput, commit, granted, release
from .settings import Settings
from .turns import CLEAN_UP_S

_EVENT_INTERVAL_S: Final = 0.25
_SAY_AFTER_S: Final = 0.005
"""How long an event is held back, so that it is not synced to the disk beside the write that the job waits for."""
_MAX_DOUBLINGS: Final = 7
"""Of the retry delay: it ends at 128 times the setting, some four minutes by default."""


class Worker:
    """One worker, one job at a time."""

    def __init__(
        self,
        settings: Settings,
        client: Client,
        consortium: Callable[[], Consortium],
        guest: GuestDriver,
        *,
        clock: Callable[[], int],
        log: ProgramLog,
    ) -> None:
        """``consortium`` gives the newest one known. An attempt keeps the one that it began with."""
        self.pull_wait_s = settings.pull_wait_s
        self._is_working = False
        self.announcer = Announcer(
            settings,
            client,
            is_working=lambda: self._is_working,
            manifest_number=lambda: consortium().manifest.number,
            clock=clock,
            log=log,
        )
        self.drained = self.announcer.drained
        self._resting_until = 0.0
        self._settings = settings
        self._client = client
        self._consortium = consortium
        self._guest = guest
        self._clock = clock
        self._log = log
        self._queue = WorkQueue(client)
        self._jobs = JobStore(client)
        self._events = EventLog(client)
        self._unsaid: list[JobRecord] = []
        self._speaking = asyncio.Lock()
        self._saying: set[asyncio.Task[None]] = set()
        blobs = BlobStore(client, patience_s=REPLICA_LAG_S)
        self._store = EnvelopeStore(client, blobs, patience_s=REPLICA_LAG_S)
        self._output = SealedOutput(self._store, consortium().id, settings.scratch_dir)

    async def pull(self, wait_s: float) -> Delivery | None:
        """The next delivery, or None after ``wait_s`` seconds (0: if there is none now).

        A queue that could not be asked is left alone for ``retry_delay_s``: until then there is nothing in it.
        """
        now = asyncio.get_running_loop().time()
        if now < self._resting_until:
            await asyncio.sleep(min(wait_s, self._resting_until - now))
            return None
        try:
            return await self._queue.pull(wait_s)
        except UnavailableError as error:
            self._log.warning("pull_failed", reason=error.reason)
            self._resting_until = asyncio.get_running_loop().time() + self._settings.retry_delay_s
            return None

    async def close(self) -> None:
        """Pulls no more."""
        await self._queue.close()

    async def handle(self, delivery: Delivery) -> None:
        """One delivery, from claim to ack.

        1. Claim the job by compare-and-set: this starts the next attempt, and shuts out every earlier one.
        2. Work on it, keeping the delivery alive, until done, cancelled or superseded.
        3. Acknowledge last; or let the kind of error decide what becomes of job and delivery.
        """
        record: JobRecord | None = None
        self._is_working = True
        try:
            record = await self._claim(delivery)  # 1
            if record is not None:
                await self._watched(delivery, record)  # 2
                await self._say_all()
                await delivery.ack()  # 3
        except CasemateError as error:
            await self._give_up(delivery, record, error)
        except Exception as error:
            # Whatever nobody foresaw: say its class, leave the delivery to time out and go to another worker.
            self._log.error("delivery_failed", job_id=delivery.job_id, error=type(error).__name__)
        finally:
            self._is_working = False

    async def _work(self, record: JobRecord) -> None:
        """The straight road of one attempt (docs/protocol.md, "One job").

        1. Fresh keys; evidence that holds every key broker's nonce.
        2. The job's key; open the job; submitter, spec, terms and routing must agree.
        3. Build and probe the model in the training process: a bad one is refused before any other owner is asked.
        4. The owners' Grants, each with its reservation.
        5. Train, unless a predecessor's result is committed already; upload it for no recipient to read.
        6. Commit: every key broker's receipt for this one result.
        7. Release: the recipients' keys.
        """
        attempt = begin_attempt(record, self._consortium())
        simulation = attempt.consortium.manifest.simulation
        async with await TrainingProcess.start(self._settings.threads, simulation=simulation) as child:
            keys = Keys()
            evidence = await gather_evidence(attempt, attempt.consortium, self._guest, self._ask)  # 1
            await self._grant(attempt.routing.job_key_broker, attempt, evidence, keys)  # 2
            job = await open_job(record, attempt, keys, self._store, attempt.consortium)
            await child.prepare(job.spec, job.weights)  # 3
            self._check_isolation(child, attempt.consortium)
            owners = [name for name in job.terms.terms.key_brokers if name not in keys.grants]
            await asyncio.gather(*(self._grant(name, attempt, evidence, keys) for name in owners))  # 4
            check_cover(keys, job.terms.terms)
            await self._move(attempt, "running", step=0, steps=job.spec.plan.training.steps)
            result = committed_digest(keys, job.terms.terms)
            if result is None:
                result = await self._train(record, attempt, job, evidence, keys, child)  # 5
        header, content_key = await self._output.content_key(result, "result", keys.resume_key(job.terms.digest))
        await self._move(attempt, "committing", upload=result)
        receipts = await commit(job.terms, attempt, result, attempt.consortium, self._ask)  # 6
        opened = release(job.terms, attempt, evidence, keys, receipts, header, content_key, at=self._clock())  # 7
        await self._move(attempt, "sealed", release=encode(opened))

    async def _train(
        self,
        record: JobRecord,
        attempt: Attempt,
        job: OpenedJob,
        evidence: Evidence,
        keys: Keys,
        child: TrainingProcess,
    ) -> bytes:
        """Datasets in, checkpoints out, and at the end the uploaded result's digest."""
        for use in job.spec.plan.datasets:
            await child.feed(open_dataset(use, keys, self._store, attempt.consortium))
        resume_key = keys.resume_key(job.terms.digest)
        seed = attempt_seed(keys.shares, job.terms.digest, attempt.number, fresh_entropy())
        progress, saving = _Throttle(_EVENT_INTERVAL_S), _Throttle(self._settings.checkpoint_interval_s)
        async for report in child.train(seed, await self._last_checkpoint(record, resume_key)):
            match report:
                case StepDone(step) if progress.is_due():
                    await self._tell(attempt, job, step)
                    progress.wait()
                case CheckpointReady(step, state) if saving.is_due():
                    digest = await self._output.put("checkpoint", state, attempt, resume_key, created=self._clock())
                    await self._revise(attempt, checkpoint=digest)
                    self._log.info("checkpoint", job_id=attempt.job_id, attempt=attempt.number, step=step)
                    saving.wait()
                case Trained():
                    return await self._upload(attempt, job, evidence, keys, child, report)
        raise TrainingError("the training process ended without weights")

    async def _upload(
        self,
        attempt: Attempt,
        job: OpenedJob,
        evidence: Evidence,
        keys: Keys,
        child: TrainingProcess,
        trained: Trained,
    ) -> bytes:
        """The result envelope, sealed under the resume key alone; its digest."""
        plan = job.spec.plan
        await self._tell(attempt, job, plan.training.steps)
        manifest = ResultManifest(
            consortium=attempt.consortium.id,
            job_id=attempt.job_id,
            simulation=attempt.consortium.manifest.simulation,
            terms=job.signed_terms,
            evidence=evidence,
            grants=granted(keys, job.terms.terms),
            privacy=await asyncio.to_thread(privacy_statement, plan),
            metrics=trained.metrics,
            audit=await asyncio.to_thread(_audit_report, plan, trained.audit),
            clipping=trained.clipping,
            software=_software(),
            isolation=child.isolation,
            finished=self._clock(),
        )
        resume_key = keys.resume_key(job.terms.digest)
        plaintext = _result(encode(manifest), trained)
        return await self._output.put("result", plaintext, attempt, resume_key, created=self._clock())

    async def _last_checkpoint(self, record: JobRecord, resume_key: bytes) -> AsyncIterator[bytes] | None:
        """The newest checkpoint of an earlier attempt, if the record names one that opens; else start from the beginning."""
        if record.checkpoint is None:
            return None
        try:
            return await self._output.open(record.checkpoint, "checkpoint", resume_key)
        except (SealError, NotFoundError, IntegrityError, ReleaseError) as error:
            self._log.warning("checkpoint_unusable", job_id=record.job_id, reason=error.reason)
            return None

    # --- key brokers ---

    async def _grant(self, name: str, attempt: Attempt, evidence: Evidence, keys: Keys) -> None:
        header = await request_grant(name, attempt, evidence, attempt.consortium, self._ask, keys)
        self._log.info("granted", job_id=header.job_id, attempt=header.attempt, key_broker=name)

    async def _ask(self, name: str, op: WorkerOp, request: bytes) -> bytes:
        return await call(self._client, key_broker_op(name, op), request, self._settings.rpc_timeout_s)

    def _check_isolation(self, child: TrainingProcess, consortium: Consortium) -> None:
        """Outside simulation data is never opened by a process that could reach a network."""
        if child.isolation != SECCOMP and not consortium.manifest.simulation:
            raise SetupError("the training process could not be cut off from the network on this system")

    # --- the record ---

    async def _claim(self, delivery: Delivery) -> JobRecord | None:
        """The record, claimed for the next attempt; None if there is nothing (or not yet anything) to do.

        Whether the deadline has passed is not for this clock to say: the gateway expires jobs, and key brokers give no keys.
        """

        def claim(record: JobRecord) -> JobRecord:
            if record.state in TERMINAL or record.state == "awaiting_approval":
                return record
            if record.attempt >= MAX_ATTEMPTS:
                return advance(record, "failed", now_ms=self._clock(), reason="attempts_exhausted")
            return advance(record, "claimed", now_ms=self._clock(), worker=self._settings.name)

        record = await self._jobs.change(delivery.job_id, claim, known=delivery.known)
        if record.state == "awaiting_approval":
            await delivery.nak(self._retry_delay_s(delivery))
            return None
        if record.state in TERMINAL:
            await self._events.publish(event_of(record))
            await delivery.ack()
            return None
        self._log.info("claimed", job_id=record.job_id, attempt=record.attempt)
        self._say(record)
        return record

    async def _move(self, attempt: Attempt, state: JobState, **changes: object) -> None:
        """Moves the job on, unless this attempt has been superseded, and tells it."""

        def move(record: JobRecord) -> JobRecord:
            check_attempt(record, worker=self._settings.name, attempt=attempt.number)
            return advance(record, state, now_ms=self._clock(), **changes)

        record = await self._jobs.change(attempt.job_id, move)
        self._say(record)
        self._log.info("job", job_id=record.job_id, attempt=record.attempt, state=record.state)

    async def _revise(self, attempt: Attempt, **changes: object) -> JobRecord:
        def change(record: JobRecord) -> JobRecord:
            check_attempt(record, worker=self._settings.name, attempt=attempt.number)
            return revise(record, now_ms=self._clock(), **changes)

        return await self._jobs.change(attempt.job_id, change)

    async def _tell(self, attempt: Attempt, job: OpenedJob, step: int) -> None:
        """Step and planned epsilon: all that may be known before the commit."""
        epsilon = await asyncio.to_thread(planned_epsilon, job.spec.plan, step)
        self._say(await self._revise(attempt, step=step, epsilon=epsilon))

    def _say(self, record: JobRecord) -> None:
        """Tells soon how the job is now. Nothing waits for that: what counts is the record, whose next write goes first."""
        self._unsaid.append(record)
        if len(self._unsaid) == 1:
            task = asyncio.create_task(self._say_soon())
            self._saying.add(task)
            task.add_done_callback(self._saying.discard)

    async def _say_soon(self) -> None:
        await asyncio.sleep(_SAY_AFTER_S)
        await self._say_all()

    async def _say_all(self) -> None:
        """Tells what was not told yet, in order. An event that cannot be stored is lost; the gateway makes up for the last."""
        async with self._speaking:
            while self._unsaid:
                record = self._unsaid[0]
                try:
                    await self._events.publish(event_of(record))
                except CasemateError as error:
                    self._log.warning("event_lost", job_id=record.job_id, state=record.state, reason=error.reason)
                del self._unsaid[0]

    async def _watched(self, delivery: Delivery, record: JobRecord) -> None:
        """Works on the job for as long as it is this worker's: a cancelled or superseded attempt ends at once."""
        work = asyncio.create_task(self._work(record))
        watch: asyncio.Task[None] = asyncio.create_task(self._watch(delivery, record))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                watch.result()
            await work
        finally:
            await end([work], again_s=CLEAN_UP_S)
            await end([watch])

    async def _watch(self, delivery: Delivery, record: JobRecord) -> None:
        """Keeps the delivery alive. Raises :class:`ConflictError` or :class:`StateError` when the job is no longer ours."""
        while True:
            await asyncio.sleep(self._settings.heartbeat_s)
            try:
                await delivery.in_progress()
                current, _ = await self._jobs.get(record.job_id)
            except UnavailableError as error:
                self._log.warning("heartbeat_failed", job_id=record.job_id, reason=error.reason)
                continue
            check_attempt(current, worker=self._settings.name, attempt=record.attempt)
            if current.state in TERMINAL and current.state != "sealed":
                raise StateError(f"the job was ended as {current.state}")

    async def _give_up(self, delivery: Delivery, record: JobRecord | None, error: CasemateError) -> None:
        """What the error table says: end the job, hand it back, or leave it to time out."""
        fate = problem_of(error).delivery
        attempt = 0 if record is None else record.attempt
        self._log.warning("gave_up", job_id=delivery.job_id, attempt=attempt, reason=error.reason, state=fate)
        with contextlib.suppress(CasemateError):
            if isinstance(error, StateError) and await self._has_ended(delivery.job_id):
                await delivery.ack()
            elif fate == "term":
                if record is not None:
                    await self._end(record, error)
                await delivery.ack()
            elif fate == "nak":
                await delivery.nak(self._retry_delay_s(delivery))

    def _retry_delay_s(self, delivery: Delivery) -> float:
        """Doubled with each delivery: a short absence is bridged quickly, a long one does not use up the attempts."""
        return self._settings.retry_delay_s * 2.0 ** min(delivery.count - 1, _MAX_DOUBLINGS)

    async def _has_ended(self, job_id: str) -> bool:
        """By the record: a :class:`StateError` may also be what a key broker answered."""
        record, _ = await self._jobs.get(job_id)
        return record.state in TERMINAL

    async def _end(self, record: JobRecord, error: CasemateError) -> None:
        """Failed once data was opened, expired if a key broker says so, else refused. Only the reason code is told.

        Past its upload no job expires: a key broker that says so then has forgotten what it granted.
        """
        state: JobState = "failed" if isinstance(error, TrainingError | ReleaseError) else "refused"
        if isinstance(error, DeadlineError) and record.upload is None:
            state = "expired"

        def end(current: JobRecord) -> JobRecord:
            check_attempt(current, worker=self._settings.name, attempt=record.attempt)
            return advance(current, state, now_ms=self._clock(), reason=error.reason)

        with contextlib.suppress(ConflictError):
            self._say(await self._jobs.change(record.job_id, end))
            await self._say_all()


class _Throttle:
    """Leaves an interval between two turns, from the end of one: what takes longer than that is not done all the time."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next = 0.0

    def is_due(self) -> bool:
        """Whether the interval is over."""
        return asyncio.get_running_loop().time() >= self._next

    def wait(self) -> None:
        """The interval begins now."""
        self._next = asyncio.get_running_loop().time() + self._interval_s


async def _result(manifest: bytes, trained: Trained) -> AsyncIterator[bytes]:
    """A result's plaintext, as the weights come."""
    yield sections_head({"manifest": len(manifest), "weights": trained.weights_bytes}) + manifest
    async for piece in trained.weights:
        yield piece


def _audit_report(plan: Plan, counts: AuditCounts | None) -> AuditReport | None:
    """What an audit proves. Counts come from the training process: what is wrong with them is one failure of it like any."""
    try:
        return None if counts is None else audit_report(plan, counts)
    except ParameterError as error:
        raise TrainingError("training failed") from error


def _software() -> dict[str, str]:
    """Versions that the computation depends on."""
    packages = ("casemate", "torch", "dp-accounting", "cryptography")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
