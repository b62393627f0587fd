"""``/v1/jobs``: submitting, looking, watching, cancelling."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Final

from aiohttp import web
from casemate_messaging.tasks import end
from casemate_schemas.admission import MAX_TERMS_ENVELOPE_BYTES, PrecheckRequest, Routing, Submission
from casemate_schemas.api import JOBS_PATH, JobList
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import MAX_CLOCK_SKEW_MS, verify_delegation
from casemate_schemas.envelope import EnvelopeHead, open_head, split_envelope
from casemate_schemas.errors import (
    AuthenticationError,
    AuthorisationError,
    CasemateError,
    KeyReusedError,
    MalformedError,
    NotFoundError,
    ParameterError,
    SealError,
    StateError,
)
from casemate_schemas.identity import Delegation
from casemate_schemas.job_state import (
    MAX_DELEGATION_BYTES,
    MAX_ROUTING_BYTES,
    TERMINAL,
    Approval,
    JobEvent,
    JobRecord,
)
from casemate_schemas.keys import sealing_key_id

from casemate_gateway.admission import MAX_SUBMISSION_BYTES
from casemate_gateway.authentication import Person
from casemate_gateway.gateway import Gateway, gateway_of
from casemate_gateway.problems import JOB_ID
from casemate_gateway.records import Job

_UNHEARD: Final = 4
"""Heartbeats after which a stream looks for events that it was not told of. Ends that nobody told :mod:`.admission` tells."""


async def submit(request: web.Request) -> web.Response:
    """``POST /v1/jobs``: a job, for key brokers to admit and workers to run.

    1. The submission holds a delegation of the person who posts it, and their routing header for this consortium.
    2. A job that is there already is shown, if it is this very one.
    3. Times, key brokers and roles are what they may be.
    4. The job envelope is stored, and from the same person.
    5. The terms envelope is whole, from that person too, and sealed to exactly the key brokers concerned.
    6. The member may have one more job.
    7. The submission is stored, then the record created, once. Admission goes on from there: key brokers are being asked
       while the rest is done.
    8. The job is told to those who watch. What its record refers to was not removed meanwhile, or the job ends.
    """
    gateway = gateway_of(request)
    person, body = await gateway.authenticate(request)
    submission = decode(Submission, await body.whole(MAX_SUBMISSION_BYTES), max_bytes=MAX_SUBMISSION_BYTES)
    routing, submitter = _check_signatures(gateway, person, submission)
    request[JOB_ID] = routing.job_id
    if (known := await _same_job(gateway, person, submission, routing)) is not None:
        return _answer(gateway, *known, status=200)
    _check_routing(gateway, submitter, routing)
    job_head = await _check_job_envelope(gateway, person, routing)
    _check_terms_envelope(gateway, person, routing, submission.terms_envelope)
    async with gateway.quotas.job(person.member):
        digest = await _store(gateway, encode(submission))
        record = _record(gateway, submission, routing, digest)
        stored, revision, new = await gateway.jobs.create(record)
        gateway.dispatcher.see(stored)
    if not new and stored.routing != record.routing:
        raise _key_reused()
    gateway.admission.take_up(record.job_id, PrecheckRequest(submission=submission, job_head=job_head))
    if new:
        await gateway.transitions.tell(stored)
    await _check_kept(gateway, stored)
    return _answer(gateway, gateway.records.open(stored), revision, status=202 if new else 200)


async def show(request: web.Request) -> web.Response:
    """``GET /v1/jobs/{job_id}``: its status, or 304 if the asker has it."""
    gateway = gateway_of(request)
    person = await gateway.authenticate_empty(request)
    job, revision = await gateway.visible_job(request.match_info["job_id"], person)
    known = {tag.value for tag in request.if_none_match or ()}
    if known & {_etag(revision), "*"}:
        return _with_headers(gateway, web.Response(status=304), job, revision)
    return _answer(gateway, job, revision, status=200)


async def listing(request: web.Request) -> web.Response:
    """``GET /v1/jobs``: the newest jobs of the asker's member."""
    gateway = gateway_of(request)
    person = await gateway.authenticate_empty(request)
    newest: list[tuple[int, str, Job]] = []

    def broken(job_id: str, error: CasemateError) -> None:
        gateway.log.error("record_broken", job_id=job_id, reason=error.reason)

    async for record, _ in gateway.jobs.list(broken):
        try:
            job = gateway.records.open(record)
        except CasemateError as error:
            broken(record.job_id, error)
            continue
        if job.submitter.member == person.member:
            push = heapq.heappush if len(newest) < gateway.settings.max_jobs_listed else heapq.heappushpop
            push(newest, (record.created, record.job_id, job))
    simulation = gateway.consortium.manifest.simulation
    found = JobList(jobs=tuple(job.status(simulation=simulation) for *_, job in sorted(newest, reverse=True)))
    return web.json_response(text=found.model_dump_json())


async def cancel(request: web.Request) -> web.Response:
    """``POST /v1/jobs/{job_id}/cancel``: ends the job, unless its result may be decided already."""
    gateway = gateway_of(request)
    person = await gateway.authenticate_empty(request)
    job, _ = await gateway.visible_job(request.match_info["job_id"], person)
    job.check_submitter(person)
    gateway.dispatcher.see(await gateway.transitions.move(job.record.job_id, "cancelled"))
    await gateway.queue.remove(job.record.job_id)
    job, revision = await gateway.visible_job(job.record.job_id, person)
    return _answer(gateway, job, revision, status=202)


async def events(request: web.Request) -> web.StreamResponse:
    """``GET /v1/jobs/{job_id}/events``: server-sent events from ``Last-Event-ID`` on, until the job ends.

    A client that has seen the end already is answered 204, which tells it not to come back.
    """
    gateway = gateway_of(request)
    person = await gateway.authenticate_empty(request)
    job, _ = await gateway.visible_job(request.match_info["job_id"], person)
    after = _last_event_id(request)
    await gateway.transitions.tell_end(job.record)
    if job.record.state in TERMINAL and not await _ends_after(gateway, job, after):
        return web.Response(status=204)
    with gateway.event_streams.one():
        response = web.StreamResponse(headers={"X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        await response.prepare(request)
        try:
            await _send_events(gateway, job.record.job_id, after, response)
        except (CasemateError, ConnectionError) as error:
            gateway.log.info("event_stream_ended", job_id=job.record.job_id, error=type(error).__name__)
        return response


async def _send_events(gateway: Gateway, job_id: str, after: int, response: web.StreamResponse) -> None:
    """Every event as it comes, and a comment whenever ``heartbeat_s`` have passed without one."""
    stopping = asyncio.create_task(gateway.stopping.wait())
    async with aclosing(
        gateway.events.follow(job_id, after, poll_s=_UNHEARD * gateway.settings.heartbeat_s)
    ) as followed:
        coming = asyncio.create_task(anext(followed, None))
        try:
            while True:
                await asyncio.wait(
                    {coming, stopping}, timeout=gateway.settings.heartbeat_s, return_when=asyncio.FIRST_COMPLETED
                )
                if gateway.stopping.is_set():
                    return
                if not coming.done():
                    await response.write(b": still here\n\n")
                    continue
                if (found := coming.result()) is None:
                    return
                await response.write(_frame(*found))
                coming = asyncio.create_task(anext(followed, None))
        finally:
            await end([stopping, coming])


def _frame(sequence: int, event: JobEvent) -> bytes:
    return f"id: {sequence}\nevent: job\ndata: {event.model_dump_json()}\n\n".encode()


async def _ends_after(gateway: Gateway, job: Job, after: int) -> bool:
    """Whether the end is still to be told. What a worker told too late, after it, is no news."""
    stored: AsyncIterator[tuple[int, JobEvent]] = gateway.events.replay(job.record.job_id, after)
    async for _, event in stored:
        if event.state in TERMINAL:
            return True
    return False


def _last_event_id(request: web.Request) -> int:
    value = request.headers.get("Last-Event-ID", "0")
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise MalformedError("expected a Last-Event-ID that this gateway gave")
    return int(value)


def _check_signatures(gateway: Gateway, person: Person, submission: Submission) -> tuple[Routing, Delegation]:
    """The routing header, and the delegation under which it was signed; both by the person who posts them."""
    if len(encode(submission.routing)) > MAX_ROUTING_BYTES or len(encode(submission.delegation)) > MAX_DELEGATION_BYTES:
        raise MalformedError("the routing header or the delegation is too large")
    routing = submission.routing.verify(Routing, person.signing_key)
    if routing.consortium != gateway.consortium.id:
        raise AuthorisationError("the routing header is for another consortium")
    submitter = verify_delegation(submission.delegation, gateway.consortium, at=routing.created)
    if (submitter.signing_key, submitter.member) != (person.signing_key, person.member):
        raise AuthenticationError("the submission holds another person's delegation")
    return routing, submitter


async def _same_job(
    gateway: Gateway, person: Person, submission: Submission, routing: Routing
) -> tuple[Job, int] | None:
    """The job with this id, if there is one. Raises :class:`KeyReusedError` if it is another one."""
    try:
        record, revision = await gateway.jobs.get(routing.job_id)
    except NotFoundError:
        return None
    if record.routing != encode(submission.routing):
        raise _key_reused()
    gateway.admission.take_up(record.job_id)
    return gateway.records.open(record), revision


async def _check_kept(gateway: Gateway, record: JobRecord) -> None:
    """A job whose envelope was removed while it was submitted can only fail. Raises :class:`NotFoundError`."""
    try:
        await gateway.housekeeping.check_kept(envelopes=(record.job_envelope,), blobs=(record.submission,))
    except NotFoundError as error:
        with contextlib.suppress(StateError):  # it has ended already
            await gateway.transitions.move(record.job_id, "failed", reason=NotFoundError.reason)
        raise NotFoundError("the job envelope was stored too long ago and is gone: submit a new job") from error


def _key_reused() -> KeyReusedError:
    """The job id is the submission's idempotency key, and the record's ``create`` in the KV store what it is checked by."""
    return KeyReusedError("there is another job with this id: choose a new one for another submission")


def _check_routing(gateway: Gateway, submitter: Delegation, routing: Routing) -> None:
    now_ms, settings, manifest = gateway.clock(), gateway.settings, gateway.consortium.manifest
    if "scientist" not in submitter.roles:
        raise AuthorisationError("the submitter is not a scientist of its member")
    if not now_ms - 1000 * settings.max_submission_age_s <= routing.created <= now_ms + MAX_CLOCK_SKEW_MS:
        raise ParameterError(f"expected a routing header made within the last {settings.max_submission_age_s:.0f} s")
    if not now_ms < routing.deadline <= routing.created + 1000 * settings.max_job_s:
        raise ParameterError(f"expected a deadline ahead, at most {settings.max_job_s:.0f} s after the creation")
    if not set(routing.key_brokers) <= {key_broker.id for key_broker in manifest.key_brokers}:
        raise ParameterError("the routing header names a key broker that is not in this consortium")
    if manifest.key_broker_of(submitter.member).id != routing.job_key_broker:
        raise AuthorisationError("the job's key broker does not serve the submitter's member")


async def _check_job_envelope(gateway: Gateway, person: Person, routing: Routing) -> bytes:
    """The job envelope's signed head."""
    try:
        stored = await gateway.envelopes.head(routing.job_envelope)
    except NotFoundError as error:
        raise NotFoundError("the job envelope is not stored: upload it before the submission") from error
    _check_envelope(gateway, person, stored.head, "job")
    return stored.signed


def _check_terms_envelope(gateway: Gateway, person: Person, routing: Routing, envelope: bytes) -> None:
    signed_head, ciphertext = split_envelope(envelope, max_bytes=MAX_TERMS_ENVELOPE_BYTES)
    head = open_head(signed_head)
    _check_envelope(gateway, person, head, "terms")
    if hashlib.sha256(ciphertext).digest() != head.header.ciphertext_digest:
        raise SealError("the terms envelope's ciphertext does not have the digest its header says")
    concerned = [gateway.consortium.manifest.key_broker(key_broker) for key_broker in routing.key_brokers]
    wanted = sorted(sealing_key_id(key_broker.sealing_key) for key_broker in concerned)
    if sorted(sealed.recipient for sealed in head.sealed_keys) != wanted:
        raise ParameterError("expected a terms envelope sealed to the key brokers concerned, and to nobody else")


def _check_envelope(gateway: Gateway, person: Person, head: EnvelopeHead, kind: str) -> None:
    preamble = head.header.preamble
    if preamble.kind != kind:
        raise MalformedError(f"expected a {kind} envelope, got a {preamble.kind} envelope")
    if preamble.sender != person.signing_key or preamble.consortium != gateway.consortium.id:
        raise AuthorisationError(f"the {kind} envelope is from another sender, or for another consortium")


async def _store(gateway: Gateway, data: bytes) -> bytes:
    """Stores a small blob; its SHA-256."""

    async def once() -> AsyncIterator[bytes]:
        yield data

    digest = hashlib.sha256(data).digest()
    await gateway.blobs.put(digest, len(data), once())
    return digest


def _record(gateway: Gateway, submission: Submission, routing: Routing, digest: bytes) -> JobRecord:
    now_ms = gateway.clock()
    return JobRecord(
        job_id=routing.job_id,
        resource_class=routing.resource_class,
        routing=encode(submission.routing),
        delegation=encode(submission.delegation),
        job_envelope=routing.job_envelope,
        submission=digest,
        approvals={key_broker: Approval() for key_broker in routing.key_brokers},
        created=now_ms,
        updated=now_ms,
        deadline=routing.deadline,
    )


def _answer(gateway: Gateway, job: Job, revision: int, *, status: int) -> web.Response:
    shown = job.status(simulation=gateway.consortium.manifest.simulation)
    response = web.json_response(text=shown.model_dump_json(), status=status)
    return _with_headers(gateway, response, job, revision)


def _with_headers(gateway: Gateway, response: web.Response, job: Job, revision: int) -> web.Response:
    """What those who poll need: the revision they saw, and when to come back."""
    response.etag = _etag(revision)
    response.headers["Location"] = f"{JOBS_PATH}/{job.record.job_id}"
    if job.record.state not in TERMINAL:
        response.headers["Retry-After"] = str(gateway.pace.after_s())
    return response


def _etag(revision: int) -> str:
    return f"r{revision}"
