"""What a job and its datasets look like once opened: checked against the terms before anything is computed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from casemate_messaging.envelopes import EnvelopeStore
from casemate_schemas.codec import decode, digest_of
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import MalformedError, ReleaseError, TooLargeError
from casemate_schemas.job import JOB_SECTIONS, DatasetUse, JobSpec
from casemate_schemas.job_state import JobRecord
from casemate_schemas.sealing import EnvelopeOpener, check_consortium, open_ciphertext
from casemate_schemas.sections import unpack_sections
from casemate_schemas.signatures import Signed
from casemate_schemas.terms import VerifiedTerms, verify_terms, weights_commitment

from .attempt import Attempt, check_routing
from .keys import Keys

_MAX_JOB_BYTES: Final = 4 << 30


@dataclass(frozen=True)
class OpenedJob:
    """Spec, terms and initial weights that agree with each other and with the routing header."""

    spec: JobSpec
    signed_terms: Signed
    terms: VerifiedTerms
    weights: memoryview = field(repr=False)


async def open_job(
    record: JobRecord, attempt: Attempt, keys: Keys, store: EnvelopeStore, consortium: Consortium
) -> OpenedJob:
    """The job in its envelope.

    1. Fetch and open the envelope that the routing header names, with the key that was granted.
    2. Terms: verified by themselves, and the very ones the key brokers were asked about.
    3. The submitter signed routing header and envelope.
    4. Routing, spec and terms name the same job, plan, model and weights.

    Raises what is wrong: :class:`MalformedError`, :class:`SealError`, :class:`SignatureError`, :class:`ReleaseError`.
    """
    stored = await store.head(attempt.routing.job_envelope)  # 1
    header = stored.head.header
    check_consortium(stored.head, consortium.id)
    if header.preamble.kind != "job":
        raise MalformedError(f"expected a job envelope, got a {header.preamble.kind} envelope")
    if header.ciphertext_bytes > _MAX_JOB_BYTES:
        raise TooLargeError(f"expected a job of at most {_MAX_JOB_BYTES} bytes")
    ciphertext = b"".join([piece async for piece in store.ciphertext(stored)])
    plain = open_ciphertext(header, keys.content_key(header.digest), ciphertext)
    sections = unpack_sections(plain, JOB_SECTIONS)
    signed_terms = decode(Signed, bytes(sections["terms"]))  # 2
    terms = verify_terms(signed_terms, consortium)
    if terms.digest != attempt.routing.terms:
        raise ReleaseError("the job's terms are not the ones in its routing header")
    routing = check_routing(record, terms.submitter)  # 3
    if header.preamble.sender != terms.submitter.signing_key:
        raise ReleaseError("the job envelope is not the submitter's")
    spec = decode(JobSpec, bytes(sections["spec"]))
    opened = OpenedJob(spec, signed_terms, terms, sections["weights"])
    check_agreement(opened, routing.job_id, routing.key_brokers)  # 4
    return opened


def check_agreement(job: OpenedJob, job_id: str, key_brokers: tuple[str, ...]) -> None:
    """Raises :class:`ReleaseError` unless routing, terms, spec and weights are about one and the same job."""
    terms = job.terms.terms
    agree = {
        "job id": job_id == terms.job_id == job.spec.job_id,
        "key brokers": key_brokers == terms.key_brokers,
        "plan": job.spec.plan == terms.plan,
        "model": terms.plan.model in (None, digest_of(job.spec.model)),
        "job spec": digest_of(job.spec) == terms.job_spec_commitment,
        "initial weights": weights_commitment(job.spec, job.weights) == terms.initial_weights_commitment,
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
    opener = EnvelopeOpener(header, keys.content_key(header.digest))
    async for piece in store.ciphertext(stored):
        for plain in opener.update(piece):
            yield plain
    yield opener.finish()
