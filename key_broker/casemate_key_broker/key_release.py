"""Giving a worker its keys: is it the worker it claims to be, is it welcome, and the seal that only it can open."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from casemate_attestation.chain import ChainCache
from casemate_attestation.evidence import verify_evidence
from casemate_attestation.verdict import Verdict
from casemate_schemas.codec import digest_of, encode
from casemate_schemas.envelope import EnvelopeHead, open_head
from casemate_schemas.errors import IntegrityError, ManifestError
from casemate_schemas.evidence import Evidence, WorkerClaims
from casemate_schemas.grant import Grant, GrantHeader, GrantSecrets, grant_info
from casemate_schemas.job import DatasetUse
from casemate_schemas.licence import obligation_of
from casemate_schemas.sealing import ContentKey, SealingKey, seal_secret, unseal_content_key

from . import dataset_keys, licences
from .database import Transaction
from .known_terms import KnownTerms
from .ledger import Reservation
from .party import Party
from .prechecks import OwnedUse


@dataclass(frozen=True)
class Decision:
    """What the ledger says once keys may be released, and the content keys by envelope digest."""

    reservation: Reservation
    ledger_head: bytes
    committed: bytes | None
    content_keys: dict[bytes, ContentKey]


def check_claims(claims: WorkerClaims, party: Party) -> None:
    """Raises :class:`ManifestError` unless the claims name this consortium at this very manifest."""
    if (claims.consortium, claims.manifest) != (party.consortium.id, party.consortium.digest):
        raise ManifestError(f"the claims are for another manifest than number {party.consortium.manifest.number}")


def appraise_evidence(evidence: Evidence, party: Party, now: int, crl: bytes | None, chains: ChainCache) -> Verdict:
    """Whether the worker is genuine, the manifest's policy accepts it and its evidence vouches for its claims."""
    at = datetime.fromtimestamp(now / 1000, UTC)
    return verify_evidence(evidence, party.consortium.manifest.attestation, at, crl, chains)


def accepted_measurement(verdict: Verdict) -> bytes:
    """The measurement of a worker whose evidence was accepted.

    Raises :class:`VerificationError` or :class:`AppraisalError`, whose message lists each failed check.
    """
    verdict.raise_for_failure()
    if verdict.claims is None:
        raise IntegrityError("a verdict without a failed check carries no claims")
    return verdict.claims.report.measurement


@dataclass(frozen=True)
class Sealed:
    """An envelope's head, and the key that its content key is sealed to."""

    head: EnvelopeHead
    key: SealingKey


def load_heads(tx: Transaction, known: KnownTerms, uses: tuple[OwnedUse, ...], party: Party) -> tuple[Sealed, ...]:
    """The envelopes whose keys this job needs from here: the job's own, the datasets' versions in the terms.

    Raises :class:`NotFoundError`, or :class:`DatasetError` for a version that was erased.
    """
    return (*load_job_head(known, party), *(_load_version(tx, owned.use) for owned in uses))


def load_job_head(known: KnownTerms, party: Party) -> tuple[Sealed, ...]:
    """The job's own envelope, if this key broker opens it: all that releasing a committed result needs."""
    return () if known.job_head is None else (Sealed(open_head(known.job_head), party.sealing),)


def open_content_keys(envelopes: tuple[Sealed, ...]) -> dict[bytes, ContentKey]:
    """Each envelope's content key by envelope digest, in the order of digests. Raises :class:`SealError`."""
    keys = {sealed.head.header.digest: unseal_content_key(sealed.head, sealed.key) for sealed in envelopes}
    return dict(sorted(keys.items()))


def seal_grant(
    decision: Decision,
    evidence: Evidence,
    uses: tuple[OwnedUse, ...],
    party: Party,
    *,
    seed_share: bytes,
    now: int,
    ttl_ms: int,
) -> bytes:
    """The signed :class:`Grant` whose secrets open only under the sealing key in the worker's attested claims."""
    claims = evidence.claims
    header = GrantHeader(
        consortium=party.consortium.id,
        manifest=party.consortium.digest,
        manifest_number=party.consortium.manifest.number,
        key_broker=party.id,
        job_id=claims.job_id,
        terms=claims.terms,
        attempt=claims.attempt,
        envelopes=tuple(decision.content_keys),
        licences=tuple(sorted(owned.use.licence for owned in uses)),
        evidence=digest_of(evidence),
        worker_key=claims.signing_key,
        reservation=decision.reservation.hash,
        ledger_head=decision.ledger_head,
        committed=decision.committed,
        issued=now,
        expires=now + ttl_ms,
        obligations=tuple(obligation_of(owned.dataset.licence) for owned in uses),
    )
    keys = tuple(key.to_bytes() for key in decision.content_keys.values())
    secrets = encode(GrantSecrets(content_keys=keys, seed_share=seed_share))
    return party.signed(
        Grant(header=header, sealed_secrets=seal_secret(secrets, claims.sealing_key, info=grant_info(header)))
    )


def _load_version(tx: Transaction, use: DatasetUse) -> Sealed:
    _, head = licences.find_version(tx, use.dataset, use.envelope)
    return Sealed(head, dataset_keys.load(tx, use.envelope, use.dataset))
