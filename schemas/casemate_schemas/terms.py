"""What owners judge, signed by the submitter. Change any field and it is another job, charged anew."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

from .codec import Digest, Name, UnixMs, WireModel, domain_hash
from .consortium import Consortium, verify_delegation
from .errors import AuthenticationError, AuthorisationError, ManifestError, ParameterError
from .identity import Delegation
from .job import JobId, JobSpec, Plan
from .licence import Actor, actor_of
from .signatures import Signed


class Terms(WireModel):
    """The plan, who submits it, and commitments to what owners do not see: the model and its initial weights."""

    KIND: ClassVar[str] = "terms"

    version: Literal[1] = 1
    consortium: Digest
    manifest: Digest
    manifest_number: int
    job_id: JobId
    created: UnixMs
    deadline: UnixMs
    submitter: Signed
    """The submitter's signed delegation."""
    job_key_broker: Name
    plan: Plan
    job_spec_commitment: Digest
    initial_weights_commitment: Digest

    @property
    def key_brokers(self) -> tuple[str, ...]:
        """Ids of all key brokers concerned, sorted; the first decides between rival commits."""
        return tuple(sorted({self.job_key_broker, *(use.key_broker for use in self.plan.datasets)}))


@dataclass(frozen=True)
class VerifiedTerms:
    """Terms whose signatures hold, with the people they name."""

    digest: bytes
    terms: Terms
    submitter: Delegation
    recipients: tuple[Delegation, ...]

    @property
    def submitter_actor(self) -> Actor:
        """The submitter as licence rules see it."""
        return actor_of(self.submitter)

    @property
    def recipient_actors(self) -> tuple[Actor, ...]:
        """The recipients as licence rules see them."""
        return tuple(actor_of(person) for person in self.recipients)


def weights_commitment(spec: JobSpec, weights: bytes | memoryview) -> bytes:
    """A hiding commitment to the initial weights: their digest under the job's salt."""
    commitment = weights_hash(spec)
    commitment.update(weights)
    return commitment.digest()


def weights_hash(spec: JobSpec) -> hashlib._Hash:
    """The hash whose digest :func:`weights_commitment` is, for weights that stream by."""
    commitment = domain_hash("initial-weights")
    commitment.update(spec.salt)
    return commitment


def verify_terms(signed: Signed, consortium: Consortium) -> VerifiedTerms:
    """What every party checks of terms before it judges them.

    1. They are for this consortium, and name a manifest of its chain. All that follows must hold at its newest one,
       so terms outlast a manifest that changes nothing about them, and a party that left it no longer counts.
    2. The submitter's delegation was valid when they were created, includes the role scientist, and its key signed them.
    3. Every recipient's delegation was valid then too.
    4. Each key broker named is the one that serves that owner, or the submitter's member.
    5. The deadline is after the creation.

    Raises :class:`ManifestError`, :class:`AuthenticationError`, :class:`AuthorisationError` or :class:`ParameterError`,
    and :class:`UnavailableError` for a manifest newer than the newest one known here.
    """
    claimed = signed.peek(Terms)
    if claimed.consortium != consortium.id:
        raise ManifestError("the terms are for another consortium")
    consortium.check_seen(claimed.manifest_number, claimed.manifest)
    submitter = verify_delegation(claimed.submitter, consortium, at=claimed.created)
    terms = signed.verify(Terms, submitter.signing_key)
    if "scientist" not in submitter.roles:
        raise AuthorisationError("the submitter is not a scientist of its member")
    recipients = tuple(verify_delegation(item, consortium, at=terms.created) for item in terms.plan.recipients)
    _check_key_brokers(terms, submitter, consortium)
    if terms.deadline <= terms.created:
        raise ParameterError("the deadline is not after the creation")
    return VerifiedTerms(digest=signed.digest, terms=terms, submitter=submitter, recipients=recipients)


def _check_key_brokers(terms: Terms, submitter: Delegation, consortium: Consortium) -> None:
    if consortium.manifest.key_broker_of(submitter.member).id != terms.job_key_broker:
        raise AuthenticationError("the job's key broker does not serve the submitter's member")
    serving = {(member, broker.id) for broker in consortium.manifest.key_brokers for member in broker.serves}
    for use in terms.plan.datasets:
        if (use.owner, use.key_broker) not in serving:
            raise AuthorisationError(f"key broker {use.key_broker} does not serve the owner of {use.dataset}")
