"""What a job and its datasets look like once opened: checked against the terms before anything is computed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from casemate_messaging.envelopes import EnvelopeStore
from casemate_schemas.codec import decode, digest_of
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import MalformedError, ReleaseError, TooLargeError
from casemate_schemas.job import JOB_SECTIONS, DatasetUse, JobSpec
from casemate_schemas.job_state import JobRecord
from casemate_schemas.sealing import check_consortium
from casemate_schemas.sections import stream_sections
from casemate_schemas.signatures import Signed
from casemate_schemas.terms import VerifiedTerms, verify_terms, weights_hash

from .attempt import Attempt, check_routing
from .keys import Keys
from .sealed_output import opened

_MAX_JOB_BYTES: Final = 4 << 30
_MAX_SPEC_AND_TERMS_BYTES: Final = 2 << 20


@dataclass(frozen=True)
class OpenedJob:
    """Spec, terms and initial weights that agree with each other and with the routing header."""

    spec: JobSpec
    signed_terms: Signed
    terms: VerifiedTerms
    weights: AsyncGenerator[bytes] = field(repr=False)
    """As they come out of the envelope. They have ended only if they are the ones in the terms: else :class:`ReleaseError`."""


async def open_job(
    record: JobRecord, attempt: Attempt, keys: Keys, store: EnvelopeStore, consortium: Consortium
) -> OpenedJob:
    """The job in its envelope, of which the weights are still to come.

    1. Fetch and open the envelope that the routing header names, with the key that was granted.
    2. Terms: verified by themselves, and the very ones the key brokers were asked about.
    3. The submitter signed routing header and envelope.
    4. Routing, spec and terms name the same job, plan and model; the weights are checked as they come.

    Raises what is wrong: :class:`MalformedError`, :class:`SealError`, :class:`SignatureError`, :class:`ReleaseError`.
    """
    stored = await store.head(attempt.routing.job_envelope)  # 1
    header = stored.head.header
    check_consortium(stored.head, consortium.id)
    if header.preamble.kind != "job":
        raise MalformedError(f"expected a job envelope, got a {header.preamble.kind} envelope")
    if header.ciphertext_bytes > _MAX_JOB_BYTES:
        raise TooLargeError(f"expected a job of at most {_MAX_JOB_BYTES} bytes")
    plain = opened(header, keys.content_key(header.digest), store.ciphertext(stored))
    sections, weights = await stream_sections(plain, JOB_SECTIONS, max_bytes=_MAX_SPEC_AND_TERMS_BYTES)
    signed_terms = decode(Signed, sections["terms"])  # 2
    terms = verify_terms(signed_terms, consortium)
    if terms.digest != attempt.routing.terms:
        raise ReleaseError("the job's terms are not the ones in its routing header")
    routing = check_routing(record, terms.submitter)  # 3
    if header.preamble.sender != terms.submitter.signing_key:
        raise ReleaseError("the job envelope is not the submitter's")
    spec = decode(JobSpec, sections["spec"])
    job = OpenedJob(spec, signed_terms, terms, committed(weights, spec, terms))
    check_agreement(job, routing.job_id, routing.key_brokers)  # 4
    return job


async def committed(weights: AsyncGenerator[bytes], spec: JobSpec, terms: VerifiedTerms) -> AsyncGenerator[bytes]:
    """``weights``, which end only if they are the ones that the terms commit to. Raises :class:`ReleaseError`."""
    commitment = weights_hash(spec)
    async for piece in weights:
        commitment.update(piece)
        yield piece
    if commitment.digest() != terms.terms.initial_weights_commitment:
        raise ReleaseError("routing, terms and job do not agree on: initial weights")


def check_agreement(job: OpenedJob, job_id: str, key_brokers: tuple[str, ...]) -> None:
    """Raises :class:`ReleaseError` unless routing, terms and spec are about one and the same job."""
    terms = job.terms.terms
    agree = {
        "job id": job_id == terms.job_id == job.spec.job_id,
        "key brokers": key_brokers == terms.key_brokers,
        "plan": job.spec.plan == terms.plan,
        "model": terms.plan.model in (None, digest_of(job.spec.model)),
        "job spec": digest_of(job.spec) == terms.job_spec_commitment,
    }
    if wrong := [what for what, same in agree.items() if not same]:
        raise ReleaseError(f"routing, terms and job do not agree on: {', '.join(wrong)}")


async def open_dataset(
    use: DatasetUse, keys: Keys, store: EnvelopeStore, consortium: Consortium
) -> AsyncIterator[bytes]:
    """A dataset's plaintext as it comes out of its envelope; whole only when the iterator has ended.

    Raises :class:`MalformedError`, :class:`SealError` and the like.
    """
    stored = await store.head(use.envelope)
    check_consortium(stored.head, consortium.id)
    header = stored.head.header
    if header.preamble.kind != "dataset":
        raise MalformedError(f"expected a dataset envelope, got a {header.preamble.kind} envelope")
    async for plain in opened(header, keys.content_key(header.digest), store.ciphertext(stored)):
        yield plain
