"""A job as a worker opens it: what must agree, broken one at a time, with the real envelope in a store of one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from casemate_messaging.envelopes import StoredHead
from casemate_models.tracing import trace
from casemate_schemas.admission import Routing
from casemate_schemas.codec import digest_of, encode
from casemate_schemas.envelope import EnvelopeKind, open_head, split_envelope
from casemate_schemas.errors import CasemateError, MalformedError, ReleaseError, SealError, SignatureError
from casemate_schemas.job import JobSpec
from casemate_schemas.job_state import JobRecord
from casemate_schemas.keyring import KeyRing
from casemate_schemas.sealing import seal_envelope, unseal_content_key
from casemate_schemas.sections import pack_sections
from casemate_schemas.signatures import Signed, SigningKey, sign
from casemate_schemas.terms import Terms, verify_terms, weights_commitment
from casemate_worker.attempt import Attempt, begin_attempt
from casemate_worker.job_input import OpenedJob, check_agreement, open_job
from casemate_worker.keys import Keys
from support.results import JOB_ID, World
from torch import nn

OTHER = b"\x0b" * 32


@dataclass(frozen=True)
class Parts:
    """All that a submitter makes; each can be replaced before it is sealed and signed."""

    spec: JobSpec
    weights: bytes
    terms: Signed

    @property
    def opened(self) -> Terms:
        return self.terms.peek(Terms)


@pytest.fixture(scope="module")
def parts(w: World) -> Parts:
    model, weights = trace(nn.Sequential(nn.Linear(2, 1)), (2,))
    spec = JobSpec(job_id=JOB_ID, salt=b"\x05" * 32, model=model, plan=w.plan())
    commitments = {
        "job_spec_commitment": digest_of(spec),
        "initial_weights_commitment": weights_commitment(spec, weights),
    }
    return Parts(spec, weights, w.terms(lambda terms: terms.model_copy(update=commitments)))


def opened(w: World, parts: Parts) -> OpenedJob:
    return OpenedJob(parts.spec, parts.terms, verify_terms(parts.terms, w.consortium), parts.weights)  # type: ignore[arg-type]


# --- check_agreement ------------------------------------------------------------------------------------------------


def test_a_whole_job_agrees(w: World, parts: Parts) -> None:
    check_agreement(opened(w, parts), JOB_ID, parts.opened.key_brokers)


Break = Callable[[World, OpenedJob], tuple[OpenedJob, str, tuple[str, ...]]]
BROKERS = ("lab", "north", "south")


def _spec(**changed: Any) -> Break:
    return lambda w, job: (replace(job, spec=job.spec.model_copy(update=changed)), JOB_ID, BROKERS)


def _terms(**changed: Any) -> Break:
    def broken(w: World, job: OpenedJob) -> tuple[OpenedJob, str, tuple[str, ...]]:
        terms = replace(job.terms, terms=job.terms.terms.model_copy(update=changed))
        return replace(job, terms=terms), JOB_ID, BROKERS

    return broken


def _plan_of_another_noise(w: World, job: OpenedJob) -> tuple[OpenedJob, str, tuple[str, ...]]:
    """The spec commits to itself, and computes with less noise than the owners judged."""
    training = job.spec.plan.training.model_copy(update={"noise_multiplier": 0.3})
    spec = job.spec.model_copy(update={"plan": job.spec.plan.model_copy(update={"training": training})})
    terms = job.terms.terms.model_copy(
        update={
            "job_spec_commitment": digest_of(spec),
            "initial_weights_commitment": weights_commitment(spec, job.weights),
        }
    )
    return replace(job, spec=spec, terms=replace(job.terms, terms=terms)), JOB_ID, BROKERS


def _plan_of(model: bytes) -> Break:
    """Everybody judged a model, and commits to it; the spec holds this one."""

    def broken(w: World, job: OpenedJob) -> tuple[OpenedJob, str, tuple[str, ...]]:
        plan = job.spec.plan.model_copy(update={"model": model})
        spec = job.spec.model_copy(update={"plan": plan})
        commitments = {
            "plan": plan,
            "job_spec_commitment": digest_of(spec),
            "initial_weights_commitment": weights_commitment(spec, job.weights),
        }
        terms = replace(job.terms, terms=job.terms.terms.model_copy(update=commitments))
        return replace(job, spec=spec, terms=terms), JOB_ID, BROKERS

    return broken


def test_the_model_that_owners_were_told_agrees(w: World, parts: Parts) -> None:
    check_agreement(*_plan_of(digest_of(parts.spec.model))(w, opened(w, parts)))


@pytest.mark.parametrize(
    ("breaking", "named"),
    [
        (_plan_of(OTHER), ["model"]),
        (lambda w, job: (job, "f" * 32, BROKERS), ["job id"]),
        (_spec(job_id="f" * 32), ["job id", "job spec"]),
        (_terms(job_id="f" * 32), ["job id"]),
        (lambda w, job: (job, JOB_ID, ("lab", "north")), ["key brokers"]),
        (_terms(job_key_broker="north"), ["key brokers"]),
        (_plan_of_another_noise, ["plan"]),
        (_terms(job_spec_commitment=OTHER), ["job spec"]),
        (_spec(salt=OTHER), ["job spec"]),
    ],
)
def test_each_disagreement_is_refused_by_name(w: World, parts: Parts, breaking: Break, named: list[str]) -> None:
    with pytest.raises(ReleaseError) as caught:
        check_agreement(*breaking(w, opened(w, parts)))
    assert str(caught.value).partition(": ")[2].split(", ") == named


# --- open_job -------------------------------------------------------------------------------------------------------


class OneEnvelope:
    """A store that gives out one envelope, whatever it is asked for."""

    def __init__(self, envelope: bytes) -> None:
        signed_head, ciphertext = split_envelope(envelope, max_bytes=1 << 20)
        self.stored = StoredHead(open_head(signed_head), bytes(signed_head))
        self._ciphertext = bytes(ciphertext)

    async def head(self, _: bytes) -> StoredHead:
        return self.stored

    async def ciphertext(self, _: StoredHead) -> AsyncIterator[bytes]:
        yield self._ciphertext


async def open_as_submitted(
    w: World,
    parts: Parts,
    *,
    kind: EnvelopeKind = "job",
    consortium: bytes | None = None,
    sender: SigningKey | None = None,
    routing: dict[str, Any] | None = None,
    routing_signer: SigningKey | None = None,
    content_key_of: str | None = None,
) -> OpenedJob:
    """Seals and signs ``parts`` as the SDK does, hands the worker its keys, and opens the job."""
    broker, clara = KeyRing.generate(), w.clara.keys.signing
    plain = pack_sections({"spec": encode(parts.spec), "terms": encode(parts.terms), "weights": parts.weights})

    def sealed(kind: EnvelopeKind) -> OneEnvelope:
        return OneEnvelope(
            seal_envelope(
                kind,
                plain,
                [broker.sealing.public],
                consortium=consortium or w.consortium.id,
                key=sender or clara,
                created=w.now,
            )
        )

    store, other = sealed(kind), sealed("job")
    header = store.stored.head.header
    fields: dict[str, Any] = {
        "consortium": w.consortium.id,
        "job_id": JOB_ID,
        "terms": parts.terms.digest,
        "job_envelope": header.digest,
        "job_key_broker": "lab",
        "key_brokers": BROKERS,
        "recipients": (clara.public,),
        "created": w.now,
        "deadline": w.now + 1000,
    }
    signed = sign(Routing(**{**fields, **(routing or {})}), routing_signer or clara)
    record = JobRecord(
        job_id=JOB_ID,
        routing=encode(signed),
        job_envelope=header.digest,
        submission=bytes(32),
        approvals={},
        created=w.now,
        updated=w.now,
        attempt=1,
    )
    source = other if content_key_of == "another envelope" else store
    keys = Keys(content_keys={header.digest: unseal_content_key(source.stored.head, broker.sealing)})
    attempt: Attempt = begin_attempt(record, w.consortium)
    return await open_job(record, attempt, keys, store, w.consortium)  # type: ignore[arg-type]


async def test_a_job_opens(w: World, parts: Parts) -> None:
    job = await open_as_submitted(w, parts)
    weights = b"".join([piece async for piece in job.weights])
    assert (job.spec, weights, job.terms.digest) == (parts.spec, parts.weights, parts.terms.digest)


@pytest.mark.parametrize("change", [lambda weights: weights[:-1], lambda weights: weights + b"\0", lambda _: b""])
async def test_other_weights_than_the_terms_commit_to_never_end(
    w: World, parts: Parts, change: Callable[[bytes], bytes]
) -> None:
    job = await open_as_submitted(w, replace(parts, weights=change(parts.weights)))
    with pytest.raises(ReleaseError, match="initial weights"):
        [piece async for piece in job.weights]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        pytest.param({"consortium": OTHER}, SealError, id="envelope of another consortium"),
        pytest.param({"kind": "dataset"}, MalformedError, id="envelope of another kind"),
        pytest.param({"content_key_of": "another envelope"}, SealError, id="another key granted"),
        pytest.param({"routing": {"terms": OTHER}}, ReleaseError, id="routing for other terms"),
        pytest.param({"routing": {"key_brokers": ("lab", "north")}}, ReleaseError, id="routing without an owner"),
        pytest.param({"routing": {"consortium": OTHER}}, MalformedError, id="routing of another consortium"),
        pytest.param({"routing_signer": SigningKey.generate()}, SignatureError, id="routing by another"),
        pytest.param({"sender": SigningKey.generate()}, ReleaseError, id="envelope by another"),
    ],
)
async def test_what_is_not_the_submitters_own_job_is_refused(
    w: World, parts: Parts, wrong: dict[str, Any], error: type[CasemateError]
) -> None:
    with pytest.raises(error):
        await open_as_submitted(w, parts, **wrong)


async def test_terms_signed_by_another_than_their_delegation_names_are_refused(w: World, parts: Parts) -> None:
    forged = sign(parts.opened, SigningKey.generate())
    assert forged.digest == parts.terms.digest
    with pytest.raises(SignatureError):
        await open_as_submitted(w, replace(parts, terms=forged))
