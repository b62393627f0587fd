"""Evidence as a whole: the right components and no other, each over the very claims that stand beside it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from casemate_attestation.evidence import RULES as EVIDENCE_RULES
from casemate_attestation.evidence import verify_evidence
from casemate_schemas.attestation_policy import AttestationPolicy, EvidenceType, PcrRule, VtpmRules
from casemate_schemas.codec import decode, encode, pack, unpack
from casemate_schemas.errors import AppraisalError, MalformedError, ParameterError, VerificationError
from casemate_schemas.evidence import Evidence, KeyBrokerNonce, SevSnp, SevSnpVtpm, WorkerClaims
from casemate_schemas.keys import SEALING_PUBLIC_BYTES
from pydantic import ValidationError
from support.vtpm import RULES, Paravisor

from .conftest import MEASUREMENT, Bench

CLAIMS = WorkerClaims(
    consortium=b"\x01" * 32,
    manifest=b"\x02" * 32,
    job_id="0" * 32,
    terms=b"\x03" * 32,
    attempt=1,
    sealing_key=b"\x04" * SEALING_PUBLIC_BYTES,
    signing_key=b"\x05" * 32,
    nonces=(KeyBrokerNonce(key_broker="north", nonce=bytes(32)),),
)
BOTH = (("sev-snp",), ("sev-snp-vtpm",))


@pytest.fixture
def snp(milan: Bench) -> SevSnp:
    return milan.chip.launch(MEASUREMENT).attest(CLAIMS.report_data)


@pytest.fixture
def vtpm(milan: Bench) -> SevSnpVtpm:
    launch = milan.chip.launch(MEASUREMENT)

    def attest(report_data: bytes) -> tuple[bytes, tuple[bytes, bytes, bytes]]:
        component = launch.attest(report_data)
        return component.report, component.certificates

    return Paravisor(attest).component(CLAIMS.report_data)


def evidence(*components: SevSnp | SevSnpVtpm) -> Evidence:
    return Evidence(claims=CLAIMS, components=components)


def test_there_is_a_rule_for_every_type() -> None:
    components = {component.model_fields["type"].default for component in (SevSnp, SevSnpVtpm)}
    assert set(EVIDENCE_RULES) == set(get_args(EvidenceType)) == components


def test_one_report(milan: Bench, snp: SevSnp) -> None:
    verdict = verify_evidence(evidence(snp), milan.policy(), milan.now)
    assert verdict.ok and verdict.claims is not None and verdict.claims.report.measurement == MEASUREMENT
    names = [check.name for check in verdict.checks]
    assert names[:2] == ["evidence_types", "format"] and "report_data" in names


def test_one_quote(milan: Bench, vtpm: SevSnpVtpm) -> None:
    for accepted in (BOTH, BOTH[1:]):
        verdict = verify_evidence(evidence(vtpm), milan.policy(evidence_types=accepted, vtpm=RULES), milan.now)
        assert verdict.ok and verdict.claims is not None, str(verdict)


def test_a_type_that_the_policy_does_not_accept(milan: Bench, snp: SevSnp, vtpm: SevSnpVtpm) -> None:
    verdict = verify_evidence(evidence(snp), milan.policy(evidence_types=BOTH[1:], vtpm=RULES), milan.now)
    assert verdict.failed == ("evidence_types",) and verdict.claims is None
    with pytest.raises(AppraisalError, match="expected sev-snp-vtpm, got sev-snp"):
        verdict.raise_for_failure()
    unasked = verify_evidence(evidence(vtpm), milan.policy(vtpm=RULES), milan.now)
    assert unasked.failed == ("evidence_types",) and unasked.claims is None


def test_a_component_that_nobody_asked_for(milan: Bench, snp: SevSnp, vtpm: SevSnpVtpm) -> None:
    """Each is good, and accepted alone."""
    verdict = verify_evidence(evidence(snp, vtpm), milan.policy(evidence_types=BOTH, vtpm=RULES), milan.now)
    assert verdict.failed == ("evidence_types",) and verdict.claims is None


def test_in_a_composite_every_check_names_its_component(milan: Bench, snp: SevSnp, vtpm: SevSnpVtpm) -> None:
    broken = snp.model_copy(update={"report": snp.report[:0x2A0] + bytes(512)})
    verdict = verify_evidence(evidence(broken, vtpm), milan.policy(evidence_types=BOTH, vtpm=RULES), milan.now)
    assert verdict.failed == ("evidence_types", "sev-snp/signature")
    names = [check.name for check in verdict.checks]
    assert "sev-snp-vtpm/pcr_values" in names and names.index("sev-snp/format") < names.index("sev-snp-vtpm/format")
    with pytest.raises(VerificationError):
        verdict.raise_for_failure()


@pytest.mark.parametrize(("kind", "failed"), [("sev-snp", "report_data"), ("sev-snp-vtpm", "quote_nonce")])
def test_every_component_covers_the_claims_beside_it(
    milan: Bench, snp: SevSnp, vtpm: SevSnpVtpm, kind: str, failed: str
) -> None:
    component = snp if kind == "sev-snp" else vtpm
    other = Evidence(claims=CLAIMS.model_copy(update={"attempt": 2}), components=(component,))
    verdict = verify_evidence(other, milan.policy(evidence_types=BOTH, vtpm=RULES), milan.now)
    assert verdict.failed == (failed,)


def test_a_paravisors_report_is_no_evidence_alone(milan: Bench, vtpm: SevSnpVtpm) -> None:
    alone = SevSnp(report=vtpm.report, certificates=vtpm.certificates)
    verdict = verify_evidence(evidence(alone), milan.policy(evidence_types=BOTH, vtpm=RULES), milan.now)
    assert verdict.failed == ("report_data",)


def test_a_time_without_a_zone(milan: Bench, snp: SevSnp) -> None:
    with pytest.raises(ParameterError):
        verify_evidence(evidence(snp), milan.policy(), milan.now.replace(tzinfo=None))


# --- on the wire ------------------------------------------------------------------------------------------------------


def test_evidence_is_read_back_as_it_was(snp: SevSnp, vtpm: SevSnpVtpm) -> None:
    for components in ((snp,), (vtpm,), (snp, vtpm)):
        message = evidence(*components)
        assert decode(Evidence, encode(message)) == message


def changed(message: Evidence, **fields: Any) -> bytes:
    """Canonical bytes of evidence whose first component has other fields."""
    value = unpack(encode(message))
    return pack(value | {"components": ({**value["components"][0], **fields}, *value["components"][1:])})


def test_unknown_double_and_unsorted_components_are_refused(snp: SevSnp, vtpm: SevSnpVtpm) -> None:
    one = evidence(snp)
    hostile = [
        changed(one, type="tdx"),
        changed(one, type="sev-snp-vtpm"),
        changed(one, more=b""),
        changed(one, report=bytes(1183)),
        changed(one, certificates=snp.certificates[:2]),
        changed(one, certificates=(*snp.certificates[:2], b"")),
        changed(evidence(vtpm), runtime_data=bytes((16 << 10) + 1)),
        changed(evidence(vtpm), pcrs=()),
        changed(evidence(vtpm), pcrs=[{"index": 24, "digest": bytes(32)}]),
        changed(evidence(vtpm), pcrs=[{"index": 1, "digest": bytes(32)}, {"index": 1, "digest": bytes(32)}]),
        pack(unpack(encode(one)) | {"components": ()}),
        pack(unpack(encode(one)) | {"components": unpack(encode(one))["components"] * 2}),
        pack(unpack(encode(one)) | {"components": unpack(encode(evidence(snp, vtpm)))["components"][::-1]}),
    ]
    for data in hostile:
        with pytest.raises(MalformedError):
            decode(Evidence, data)


RULE = PcrRule(index=4, digests=(bytes(32),))
WRONG_POLICIES: list[dict[str, Any]] = [
    {"evidence_types": ()},
    {"evidence_types": ((),)},
    {"evidence_types": (("sev-snp-vtpm",),)},
    {"evidence_types": BOTH},
    {"evidence_types": (("sev-snp", "sev-snp-vtpm"),), "vtpm": RULES},
    {"evidence_types": (("sev-snp", "sev-snp"),)},
    {"evidence_types": (("tdx",),)},
]


@pytest.mark.parametrize("wrong", WRONG_POLICIES, ids=range(len(WRONG_POLICIES)))
def test_policies_that_cannot_be_written_down(milan: Bench, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        milan.policy(**wrong)


@pytest.mark.parametrize("rules", [(RULE, RULE), (PcrRule(index=9, digests=(bytes(32),)), RULE)])
def test_rules_for_registers_stand_in_one_order_one_each(rules: tuple[PcrRule, ...]) -> None:
    with pytest.raises(ValidationError):
        VtpmRules(pcrs=rules)


@pytest.mark.parametrize("fields", [{"index": 16}, {"index": -1}, {"digests": ()}, {"digests": (bytes(31),)}])
def test_a_rule_names_a_lasting_register_and_its_values(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PcrRule(**({"index": 4, "digests": (bytes(32),)} | fields))


def test_a_policy_accepts_plain_reports_alone_unless_it_says_otherwise(milan: Bench) -> None:
    policy = milan.policy()
    assert policy.evidence_types == (("sev-snp",),)
    both = milan.policy(evidence_types=BOTH, vtpm=RULES)
    assert decode(AttestationPolicy, encode(both)) == both
