"""Is it a key broker to seal to: evidence of an enclave-hosted key broker against a consortium's policy."""

from __future__ import annotations

from datetime import datetime

from casemate_schemas.attestation_policy import AttestationPolicy
from casemate_schemas.errors import AppraisalError
from casemate_schemas.key_broker_evidence import KeyBrokerEvidence

from .appraise import verify_and_appraise
from .verdict import Verdict


def verify_key_broker(
    evidence: KeyBrokerEvidence, policy: AttestationPolicy, now: datetime, crl: bytes | None = None
) -> Verdict:
    """Whether ``evidence`` is genuine, vouches for its own claims and meets the policy for key brokers.

    All of the policy's demands hold, but its list of measurements is the key brokers': an image of a worker is none of a
    key broker. That the claims are the expected ones (keys, nonce, manifest) is for the caller to check.

    Args:
        evidence: as received.
        policy: the manifest's.
        now: the time to verify at, with a time zone.
        crl: DER of the ARK's revocation list.

    Returns: a verdict; it carries the chip's claims if, and only if, every check passed.

    Raises: :class:`AppraisalError` if the policy names no image of a key broker or takes no plain SEV-SNP evidence, and
    :class:`ParameterError` if ``now`` has no time zone.
    """
    if not policy.key_broker_measurements:
        raise AppraisalError("this consortium accepts no enclave-hosted key broker: its policy names no image of one")
    if ("sev-snp",) not in policy.evidence_types:
        raise AppraisalError("this consortium accepts no plain SEV-SNP evidence, and a hosted key broker has no other")
    for_key_brokers = policy.model_copy(update={"measurements": policy.key_broker_measurements})
    component, report_data = evidence.component, evidence.claims.report_data
    return verify_and_appraise(component.report, component.certificates, for_key_brokers, report_data, now, crl)
