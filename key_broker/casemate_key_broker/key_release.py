"""Giving a worker its keys: is it the worker it claims to be, is it welcome, and the seal that only it can open."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from casemate_attestation.appraise import verify_and_appraise
from casemate_schemas.codec import digest_of, encode
from casemate_schemas.envelope import EnvelopeHead, open_head
from casemate_schemas.errors import IntegrityError, ManifestError
from casemate_schemas.evidence import Evidence, WorkerClaims
from casemate_schemas.grant import Grant, GrantHeader, GrantSecrets, grant_info
from casemate_schemas.sealing import ContentKey, seal_secret, unseal_content_key

from . import licences
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


def appraise_evidence(evidence: Evidence, party: Party, now: int, crl: bytes | None) -> bytes:
    """The measurement of a genuine worker that the manifest's policy accepts and whose report vouches for its claims.

    Raises :class:`VerificationError` or :class:`AppraisalError`, whose message lists each failed check.
    """
    verdict = verify_and_appraise(
        evidence.report,
        evidence.certificates,
        party.consortium.manifest.attestation,
        evidence.claims.report_data,
        datetime.fromtimestamp(now / 1000, UTC),
        crl,
    )
    verdict.raise_for_failure()
    if verdict.claims is None:
        raise IntegrityError("a verdict without a failed check carries no claims")
    return verdict.claims.report.measurement


def load_heads(tx: Transaction, known: KnownTerms, uses: tuple[OwnedUse, ...]) -> tuple[EnvelopeHead, ...]:
    """Heads of the envelopes whose keys this job needs from here: the job's own, the datasets' versions in the terms."""
    datasets = tuple(licences.find_version(tx, owned.use.dataset, owned.use.envelope)[1] for owned in uses)
    return datasets if known.job_head is None else (open_head(known.job_head), *datasets)


def open_content_keys(heads: tuple[EnvelopeHead, ...], party: Party) -> dict[bytes, ContentKey]:
    """Each envelope's content key by envelope digest, in the order of digests. Raises :class:`SealError`."""
    keys = {head.header.digest: unseal_content_key(head, party.sealing) for head in heads}
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
    )
    keys = tuple(key.to_bytes() for key in decision.content_keys.values())
    secrets = encode(GrantSecrets(content_keys=keys, seed_share=seed_share))
    return party.signed(
        Grant(header=header, sealed_secrets=seal_secret(secrets, claims.sealing_key, info=grant_info(header)))
    )
