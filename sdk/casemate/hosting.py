"""Enclave-hosted key brokers: attested before anything is sealed to them, told the time, and put into a manifest."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from casemate_attestation.key_broker import verify_key_broker
from casemate_attestation.verdict import Verdict
from casemate_schemas import api
from casemate_schemas.attestation_policy import AttestationPolicy
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import Consortium, ConsortiumManifest, KeyBroker
from casemate_schemas.errors import AppraisalError, NonceError, UnavailableError
from casemate_schemas.evidence import NONCE_BYTES
from casemate_schemas.key_broker_evidence import (
    EvidenceRequest,
    HandOver,
    HandOverOrder,
    KeyBrokerClaims,
    KeyBrokerEvidence,
)
from casemate_schemas.signatures import sign

from ._http import BytesBody, Gateway
from .identity import Identity
from .parameters import parameter_errors

MAX_EVIDENCE_BYTES: Final = 64 << 10


@dataclass(frozen=True)
class AttestedKeyBroker:
    """A key broker whose keys were made in an enclave that the policy accepts, and have never left it."""

    claims: KeyBrokerClaims
    verdict: Verdict
    evidence: KeyBrokerEvidence


async def attest(
    gateway: Gateway, consortium: Consortium, key_broker: str, *, now: int, policy: AttestationPolicy | None = None
) -> AttestedKeyBroker:
    """Fresh evidence of a hosted key broker, checked. Whether a manifest lists its keys is not asked here.

    1. Ask for evidence over a new nonce.
    2. The claims name this consortium, this key broker and that nonce.
    3. The report is genuine, vouches for the claims, and its image is one that the policy accepts for key brokers.
    4. The key broker has accepted the newest manifest that is known here.

    Args:
        now: Unix ms.
        policy: the manifest's, or one that is about to be put into the next.

    Raises :class:`NonceError`, :class:`~casemate_schemas.errors.VerificationError`, :class:`AppraisalError`,
    :class:`~casemate_schemas.errors.ManifestError` or :class:`UnavailableError`.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    path = f"{api.KEY_BROKERS_PATH}/{key_broker}/evidence"
    reply = await gateway.post(path, BytesBody(encode(EvidenceRequest(nonce=nonce))), max_bytes=MAX_EVIDENCE_BYTES)  # 1
    evidence = decode(KeyBrokerEvidence, reply.body, max_bytes=MAX_EVIDENCE_BYTES)
    verdict = check_evidence(evidence, consortium, key_broker, nonce=nonce, now=now, policy=policy)  # 2-4
    return AttestedKeyBroker(evidence.claims, verdict, evidence)


def check_evidence(
    evidence: KeyBrokerEvidence,
    consortium: Consortium,
    key_broker: str,
    *,
    nonce: bytes,
    now: int,
    policy: AttestationPolicy | None = None,
) -> Verdict:
    """Steps 2 to 4 of :func:`attest`: the verdict, in which every check passed. Raises as there."""
    claims = evidence.claims
    if claims.nonce != nonce:  # 2
        raise NonceError("the evidence is over another nonce: it is not fresh")
    if (claims.consortium, claims.key_broker) != (consortium.id, key_broker):
        raise AppraisalError("the evidence is of another key broker, or of another consortium's")
    at = datetime.fromtimestamp(now / 1000, UTC)
    verdict = verify_key_broker(evidence, policy or consortium.manifest.attestation, at)  # 3
    verdict.raise_for_failure()
    consortium.check_seen(claims.manifest_number, claims.manifest)  # 4
    if claims.manifest_number < consortium.manifest.number:
        raise UnavailableError(f"key broker {key_broker} has not accepted manifest {consortium.manifest.number} yet")
    return verdict


def check_listed(broker: KeyBroker, claims: KeyBrokerClaims) -> None:
    """Raises :class:`AppraisalError` unless the attested keys are the very ones that the manifest lists."""
    if (claims.sealing_key, claims.signing_key) != (broker.sealing_key, broker.signing_key):
        raise AppraisalError(
            f"the manifest lists other keys for key broker {broker.id} than those that its enclave holds: "
            "nothing is sealed to it"
        )


def with_hosted_key_broker(manifest: ConsortiumManifest, claims: KeyBrokerClaims) -> dict[str, Any]:
    """The changed fields that put an attested key broker in the place of the one of its id, for those whom that one serves.

    Raises :class:`~casemate_schemas.errors.ManifestError` if there is none of that id.
    """
    before = manifest.key_broker(claims.key_broker)
    after = before.model_copy(
        update={"hosted": "enclave", "signing_key": claims.signing_key, "sealing_key": claims.sealing_key}
    )
    return {"key_brokers": tuple(after if broker.id == before.id else broker for broker in manifest.key_brokers)}


def with_key_broker_measurement(policy: AttestationPolicy, measurement: bytes) -> AttestationPolicy:
    """The policy that accepts this image of a key broker as well. Raises :class:`~casemate_schemas.errors.ParameterError`."""
    accepted = tuple(dict.fromkeys((*policy.key_broker_measurements, measurement)))
    with parameter_errors("key_broker_measurements"):
        return AttestationPolicy(**dict(policy) | {"key_broker_measurements": accepted})


def hand_over_order(consortium: Consortium, identity: Identity, successor: AttestedKeyBroker, *, at: int) -> bytes:
    """The signed order to hand a hosted key broker's state over to an attested ``successor``.

    Raises :class:`AppraisalError` if that is the enclave that the manifest lists already.
    """
    claims = successor.claims
    if claims.signing_key == consortium.manifest.key_broker(claims.key_broker).signing_key:
        raise AppraisalError("the enclave that answers is the one that the manifest lists: start its successor first")
    word = HandOver(consortium=consortium.id, key_broker=claims.key_broker, successor=successor.evidence, at=at)
    order = HandOverOrder(hand_over=sign(word, identity.keys.signing), delegation=identity.signed_delegation)
    return encode(order)
