"""One job from here: plan it, seal it, submit it; then follow it, call it off, or open its result."""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Final

from casemate_schemas import api
from casemate_schemas.admission import MAX_TERMS_ENVELOPE_BYTES, PrecheckAnswer, Priority, Routing, Submission
from casemate_schemas.codec import decode, digest_of, encode
from casemate_schemas.errors import (
    CasemateError,
    ConflictError,
    MalformedError,
    ParameterError,
    StateError,
    UnavailableError,
    error_from_reason,
)
from casemate_schemas.identity import Delegation
from casemate_schemas.job import JOB_SECTIONS, JobSpec, Plan
from casemate_schemas.job_state import TERMINAL, JobEvent
from casemate_schemas.requests import Refusal
from casemate_schemas.result import Release
from casemate_schemas.sealing import open_envelope, seal_envelope
from casemate_schemas.signatures import Signed, sign
from casemate_schemas.terms import Terms, weights_commitment
from pydantic import ValidationError

from ._http import MAX_JSON_BYTES, BytesBody, printable, read_json, retry_after_s
from ._session import Session
from ._transfers import download
from .datasets import find_datasets, upload_sealed
from .parameters import parameter_errors
from .planning import plan_training
from .results import Result, open_result
from .state import SubmittedJob
from .training_request import TrainingRequest, check_request, is_job_id
from .verification import MAX_RESULT_BYTES, Bundle, Expected

if TYPE_CHECKING:
    from rich.console import Console

_MAX_RELEASE_BYTES: Final = 2 << 20
_EVENT_STREAM: Final = "text/event-stream"
_RECONNECTS: Final = 3
_POLL_S: Final = 2.0


async def train(session: Session, request: TrainingRequest) -> Job:
    """Submit one training job.

    1. Refuse parameters that no plan can mend.
    2. List the datasets: card, licence and remaining budget of each.
    3. Trace the model and infer pipeline and loss; plan rates and noise for the privacy target.
    4. Model and plan make the job; if this id was submitted from here before, it must be the same job.
    5. Sign the terms; seal the job to the own key broker and the terms to all key brokers concerned.
    6. Remember what is submitted, then submit it: of two calls at once under one id, both submit what the first remembered.
    """
    check_request(request)  # 1
    datasets = await find_datasets(session, request.datasets)  # 2
    recipients = request.recipients or (session.identity.signed_delegation,)
    plan, model, weights = await asyncio.to_thread(plan_training, request, datasets, recipients)  # 3
    job_id = request.job_id or secrets.token_hex(16)
    known = session.state.job(job_id)
    with parameter_errors("job"):
        salt = secrets.token_bytes(32) if known is None else known.salt
        spec = JobSpec(job_id=job_id, salt=salt, model=model, plan=plan)
    if known is not None:  # 4
        _check_same_job(known, spec, weights, request)
        return await submit(session, known.submission, job_id)
    signed_terms = sign_terms(session, spec, weights, deadline_s=request.deadline_s)  # 5
    if request.begins is not None and request.begins >= signed_terms.peek(Terms).deadline:
        raise ParameterError(
            f"not_before: the job would begin after its deadline, {request.deadline_s:g} s from now: give a longer deadline_s"
        )
    submission = await seal_job(
        session, spec, signed_terms, weights, priority=request.priority, not_before=request.begins
    )
    mine = SubmittedJob(job_id=job_id, salt=salt, terms=signed_terms, submission=submission)
    kept = session.state.remember_job(mine)  # 6
    if kept != mine:
        _check_same_job(kept, spec.model_copy(update={"salt": kept.salt}), weights, request)
    return await submit(session, kept.submission, job_id)


def sign_terms(session: Session, spec: JobSpec, weights: bytes, *, deadline_s: float) -> Signed:
    """The terms of a job, signed by this person."""
    consortium, created = session.consortium, session.clock()
    with parameter_errors("terms"):
        terms = Terms(
            consortium=consortium.id,
            manifest=consortium.digest,
            manifest_number=consortium.manifest.number,
            job_id=spec.job_id,
            created=created,
            deadline=created + int(deadline_s * 1000),
            submitter=session.identity.signed_delegation,
            job_key_broker=consortium.manifest.key_broker_of(session.identity.delegation.member).id,
            plan=spec.plan,
            job_spec_commitment=digest_of(spec),
            initial_weights_commitment=weights_commitment(spec, weights),
        )
    return sign(terms, session.identity.keys.signing)


async def seal_job(
    session: Session,
    spec: JobSpec,
    signed_terms: Signed,
    weights: bytes,
    *,
    priority: Priority = "normal",
    not_before: int | None = None,
) -> Submission:
    """Seal and upload the job, seal the terms, and sign the routing header: all that is left is to post it."""
    terms, manifest = signed_terms.peek(Terms), session.consortium.manifest
    sections = dict(zip(JOB_SECTIONS, (encode(spec), encode(signed_terms), weights), strict=True))
    uploaded = await upload_sealed(session, "job", sections, manifest.key_broker(terms.job_key_broker))
    for name in terms.key_brokers:
        await session.attest(manifest.key_broker(name))
    terms_envelope = seal_envelope(
        "terms",
        encode(signed_terms),
        [manifest.key_broker(name).sealing_key for name in terms.key_brokers],
        consortium=terms.consortium,
        key=session.identity.keys.signing,
        created=terms.created,
    )
    if len(terms_envelope) > MAX_TERMS_ENVELOPE_BYTES:
        raise ParameterError("the terms are too large: fewer features or recipients")
    routing = Routing(
        consortium=terms.consortium,
        job_id=terms.job_id,
        terms=signed_terms.digest,
        job_envelope=uploaded.digest,
        job_key_broker=terms.job_key_broker,
        key_brokers=terms.key_brokers,
        recipients=_recipient_keys(spec.plan),
        created=terms.created,
        deadline=terms.deadline,
        priority=priority,
        not_before=not_before,
    )
    return Submission(
        routing=sign(routing, session.identity.keys.signing),
        delegation=session.identity.signed_delegation,
        terms_envelope=terms_envelope,
    )


async def submit(session: Session, submission: Submission, job_id: str) -> Job:
    """Post a submission; posting it again is the same job."""
    answer = await session.gateway.post(api.JOBS_PATH, BytesBody(encode(submission)), max_bytes=MAX_JSON_BYTES)
    if read_json(api.JobStatus, answer.body).job_id != job_id:
        raise MalformedError("the gateway answered about another job")
    return Job(session, job_id)


class Job:
    """A handle on one job. Any process of the person (or of a recipient) can have one; it holds no state of its own."""

    def __init__(self, session: Session, job_id: str, *, submitter: str | None = None) -> None:
        if not is_job_id(job_id):
            raise ParameterError("expected a job id of 32 hexadecimal digits")
        self.id = job_id
        self._session = session
        self._submitter = submitter
        self._path = f"{api.JOBS_PATH}/{job_id}"

    async def status(self) -> api.JobStatus:
        """Where the job is, as the gateway says. Raises :class:`~casemate_schemas.errors.NotFoundError`."""
        answer = await self._session.gateway.get(self._path, max_bytes=MAX_JSON_BYTES)
        return self._mine(read_json(api.JobStatus, answer.body))

    async def cancel(self) -> api.JobStatus:
        """Call the job off. Raises :class:`ConflictError` once a result is being committed, or after the end."""
        answer = await self._session.gateway.post(f"{self._path}/cancel", max_bytes=MAX_JSON_BYTES)
        return self._mine(read_json(api.JobStatus, answer.body))

    async def events(self) -> AsyncGenerator[JobEvent]:
        """Every event until the job ends: pushed where that works, polled where not; none twice."""
        last_event_id, patience = "", self._session.gateway.patience(_RECONNECTS)
        broken = UnavailableError("the stream of events ended before the job")
        with suppress(UnavailableError, MalformedError):
            while True:
                try:
                    async with aclosing(self._stream(last_event_id)) as stream:
                        async for event_id, event in stream:
                            last_event_id = event_id
                            patience.renew()
                            yield event
                            if event.state in TERMINAL:
                                return
                except UnavailableError as error:
                    await patience.wait(error)
                else:
                    await patience.wait(broken)
        async for event in self._polled():
            yield event

    async def watch(self, *, console: Console | None = None) -> api.JobStatus:
        """Show a progress bar (step, planned epsilon) until the job ends; returns its last status.

        What a refusal says in words is shown too. Raises nothing for a job that ends badly: ``result()`` does.
        """
        from .progress import Progress

        with Progress(self.id, simulation=self._session.simulation, console=console) as progress:
            async for event in self.events():
                progress.show(event)
                if event.state == "awaiting_approval":
                    progress.wait(self.awaited(await self.status()))
            status = await self.status()
            progress.end(status, self.refusals(status))
        return status

    async def result(self) -> Result:
        """The verified result, opened. Raises :class:`~casemate_schemas.errors.ReleaseError` naming the step that fails.

        A job that has not ended yet is :class:`StateError`; one that ended without a result raises the error of its
        reason, in the key broker's own words where it refused.
        """
        status = await self.status()
        if status.state != "sealed":
            raise self._why_not(status)
        gateway = self._session.gateway
        release = await gateway.get(f"{self._path}/release", max_bytes=_MAX_RELEASE_BYTES)
        signed = decode(Signed, release.body, max_bytes=_MAX_RELEASE_BYTES)
        digest = signed.peek(Release).result
        partial = self._session.state.download_path(digest)
        envelope = await download(gateway, f"{self._path}/result", digest, partial, max_bytes=MAX_RESULT_BYTES)
        bundle = Bundle(await self._session.newest_chain(), signed, envelope)
        return await asyncio.to_thread(open_result, bundle, self._session.identity, self._expected())

    def refusals(self, status: api.JobStatus) -> dict[str, str]:
        """Why key brokers refused, in their own words, for the submitter: verified and opened here."""
        return {
            approval.key_broker: self._said(approval)
            for approval in status.approvals
            if approval.verdict == "refused" and approval.answer is not None
        }

    def awaited(self, status: api.JobStatus) -> dict[str, str]:
        """Which approvals key brokers wait for, in their own words, for the submitter: verified and opened here."""
        return {
            approval.key_broker: self._said(approval)
            for approval in status.approvals
            if approval.verdict == "pending" and approval.answer is not None
        }

    def _expected(self) -> Expected:
        """What was submitted from here decides; else the submitter named; else this person."""
        known = self._session.state.job(self.id)
        terms = None if known is None else known.terms.digest
        return Expected(self._session.consortium.id, self.id, terms, self._submitter)

    def _why_not(self, status: api.JobStatus) -> CasemateError:
        if status.state not in TERMINAL:
            return StateError(f"job {self.id} is {status.state}: its result is not there yet")
        words = "; ".join(f"{name}: {text}" for name, text in self.refusals(status).items())
        message = words or f"job {self.id} ended as {status.state}"
        return error_from_reason(status.reason, message) if status.reason else StateError(message)

    def _said(self, approval: api.ApprovalStatus) -> str:
        session = self._session
        try:
            broker = session.consortium.manifest.key_broker(approval.key_broker)
            signed = decode(Signed, base64.b64decode(approval.answer or "", validate=True))
            answer = signed.verify(PrecheckAnswer, broker.signing_key)
            if answer.job_id != self.id or answer.consortium != session.consortium.id:
                raise MalformedError("the answer is about another job")
            if answer.detail is None:
                return answer.reason or "no reason given"
            return printable(_detail(session, answer, broker.signing_key))
        except (CasemateError, binascii.Error) as error:
            return f"(cannot be read: {error})"

    async def _stream(self, last_event_id: str) -> AsyncGenerator[tuple[str, JobEvent]]:
        """Server-sent events from after that id on."""
        headers = {"Accept": _EVENT_STREAM} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
        async with self._session.gateway.open("GET", f"{self._path}/events", headers=headers) as response:
            if response.status != 200 or response.content_type != _EVENT_STREAM:
                raise MalformedError("the gateway does not push events here")
            event_id, data = last_event_id, ""
            try:
                while line := (await response.content.readline()).decode("utf-8", "replace"):
                    name, _, value = line.rstrip("\r\n").partition(":")
                    if name == "id":
                        event_id = value.strip()[:64]
                    elif name == "data":
                        data = value
                    elif not name and not value and data:
                        yield event_id, self._event(data)
                        data = ""
            except ValueError as error:
                raise MalformedError("the gateway sent a line that is too long") from error

    def _event(self, data: str) -> JobEvent:
        try:
            event = JobEvent.model_validate_json(data)
        except ValidationError as error:
            raise MalformedError("the gateway sent something that is no event") from error
        if event.job_id != self.id:
            raise MalformedError("the gateway sent another job's event")
        return event

    async def _polled(self) -> AsyncGenerator[JobEvent]:
        """The same by polling: an event whenever the status has changed."""
        etag = ""
        while True:
            headers = {"If-None-Match": etag} if etag else {}
            answer = await self._session.gateway.get(self._path, max_bytes=MAX_JSON_BYTES, headers=headers)
            if answer.status != 304:
                etag = answer.headers.get("ETag", "")
                event = _event_of(self._mine(read_json(api.JobStatus, answer.body)))
                yield event
                if event.state in TERMINAL:
                    return
            await self._session.gateway.wait(_poll_s(answer.headers.get("Retry-After")))

    def _mine(self, status: api.JobStatus) -> api.JobStatus:
        if status.job_id != self.id:
            raise MalformedError("the gateway answered about another job")
        return status

    def __repr__(self) -> str:
        return f"<Job {self.id}{' SIMULATED' if self._session.simulation else ''}>"


def _check_same_job(known: SubmittedJob, spec: JobSpec, weights: bytes, request: TrainingRequest) -> None:
    terms, routing = known.terms.peek(Terms), known.submission.routing.peek(Routing)
    same = terms.job_spec_commitment == digest_of(spec)
    same = same and (routing.priority, routing.not_before) == (request.priority, request.begins)
    if not same or terms.initial_weights_commitment != weights_commitment(spec, weights):
        raise ConflictError(f"another job was submitted as {spec.job_id}: give this one an id of its own, or none")


def _recipient_keys(plan: Plan) -> tuple[bytes, ...]:
    return tuple(signed.peek(Delegation).signing_key for signed in plan.recipients)


def _detail(session: Session, answer: PrecheckAnswer, broker_key: bytes) -> str:
    _, plaintext = open_envelope(
        answer.detail or b"",
        session.identity.keys.sealing,
        kind="response",
        consortium=session.consortium.id,
        sender=broker_key,
        max_bytes=64 << 10,
    )
    return decode(Refusal, plaintext).message


def _event_of(status: api.JobStatus) -> JobEvent:
    try:
        return JobEvent(
            job_id=status.job_id,
            state=status.state,
            step=status.step,
            steps=status.steps,
            epsilon=status.epsilon,
            reason=status.reason,
            at=status.updated,
        )
    except ValidationError as error:
        raise MalformedError("the gateway sent a status that cannot be") from error


def _poll_s(retry_after: str | None) -> float:
    return min(max(retry_after_s(retry_after) or _POLL_S, 0.5), 30.0)
