"""The Azure driver's four TPM commands against a real TPM implementation, up to a verdict on the evidence."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime

import pytest
from casemate_attestation.evidence import verify_evidence
from casemate_attestation.guest_vtpm import AzureGuest
from casemate_attestation.simulated_chip import SimulatedAuthority, SimulatedKeys
from casemate_schemas.attestation_policy import AcceptedProduct, AttestationPolicy, PcrRule, VtpmRules
from casemate_schemas.evidence import Evidence, KeyBrokerNonce, WorkerClaims
from casemate_schemas.keys import SEALING_PUBLIC_BYTES
from support.swtpm import MISSING, software_tpm
from support.vtpm import hcl_report, jwk, runtime_data

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

PARAVISOR = b"\x4d" * 48


@pytest.mark.parametrize("scheme", ["rsassa", "rsapss"])
def test_evidence_of_a_guest_with_a_software_tpm(scheme: str) -> None:
    chip = SimulatedAuthority(SimulatedKeys.generate()).issue_chip()
    claims = WorkerClaims(
        consortium=os.urandom(32),
        manifest=os.urandom(32),
        job_id="0" * 32,
        terms=os.urandom(32),
        attempt=1,
        sealing_key=os.urandom(SEALING_PUBLIC_BYTES),
        signing_key=os.urandom(32),
        nonces=(KeyBrokerNonce(key_broker="north", nonce=os.urandom(32)),),
    )
    with software_tpm() as tpm:
        runtime = runtime_data(jwk(tpm.make_key(scheme)))
        report = chip.launch(PARAVISOR).attest(hashlib.sha256(runtime).digest() + bytes(32)).report
        tpm.write_report(hcl_report(report, runtime))
        tpm.extend(4, b"\x04" * 32)
        guest = AzureGuest(lambda _: chip.certificates, transport=tpm.transport)
        evidence = Evidence(claims=claims, components=(guest.attest(claims.report_data),))
        tpm.extend(9, b"\x09" * 32)  # another program starts
        later = Evidence(claims=claims, components=(guest.attest(claims.report_data),))
    measured = hashlib.sha256(bytes(32) + b"\x04" * 32).digest()
    policy = AttestationPolicy(
        simulation=True,
        products=(AcceptedProduct(product="Milan", ark_sha256=(chip.root.ark_sha256,)),),
        measurements=(PARAVISOR,),
        evidence_types=(("sev-snp-vtpm",),),
        vtpm=VtpmRules(pcrs=(PcrRule(index=4, digests=(measured,)), PcrRule(index=9, digests=(bytes(32),)))),
    )
    verdict = verify_evidence(evidence, policy, datetime.now(UTC))
    assert verdict.ok, str(verdict)
    assert {check.name: check.got for check in verdict.checks}["quote_signature"] == scheme.upper()
    assert verify_evidence(later, policy, datetime.now(UTC)).failed == ("pcr_values",)
