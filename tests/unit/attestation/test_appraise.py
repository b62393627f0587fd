"""Does it meet policy: every check of ``appraise``, broken alone, is named alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from casemate_attestation.appraise import appraise, verify_and_appraise
from casemate_attestation.products import encode_tcb
from casemate_attestation.verdict import Check, Claims, Verdict
from casemate_schemas.attestation_policy import (
    AcceptedProduct,
    GuestPolicyRules,
    PlatformRules,
    TcbVersion,
)
from casemate_schemas.errors import AppraisalError, ParameterError, VerificationError

from .conftest import MEASUREMENT, REPORT_DATA, TCB, Bench

KEY = b"\x0a" * 48
MILAN_TCB = TCB.model_copy(update={"fmc": 0})


def genuine(bench: Bench, **changed: Any) -> Claims:
    claims = bench.judge(bench.report(**changed), bench.policy(guest_policy=ANYTHING, vmpl=(0, 1, 2, 3))).claims
    assert claims is not None
    return claims


ANYTHING = GuestPolicyRules(debug=True, migrate_ma=True, smt=True, cxl=True)
BASE_POLICY = 0x30133

BROKEN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("measurement", {"measurement": bytes(48)}, {}),
    ("measurement", {}, {"measurements": (bytes(48), b"\1" * 48)}),
    ("host_data", {}, {"host_data": b"\1" * 32}),
    ("guest_policy", {"policy": BASE_POLICY | 1 << 19}, {}),
    ("guest_policy", {"policy": BASE_POLICY | 1 << 18}, {}),
    ("guest_policy", {"policy": BASE_POLICY | 1 << 21}, {}),
    ("guest_policy", {}, {"guest_policy": GuestPolicyRules(smt=False)}),
    ("guest_policy", {}, {"guest_policy": GuestPolicyRules(single_socket=True)}),
    ("guest_policy", {}, {"guest_policy": GuestPolicyRules(mem_aes_256_xts=True)}),
    ("guest_policy", {}, {"guest_policy": GuestPolicyRules(rapl_dis=True)}),
    ("guest_policy", {}, {"guest_policy": GuestPolicyRules(ciphertext_hiding=True)}),
    ("guest_policy", {}, {"guest_policy": GuestPolicyRules(page_swap_disable=True)}),
    ("guest_policy", {}, {"guest_policy": GuestPolicyRules(min_abi=(1, 52))}),
    ("guest_policy", {"policy": 0x30138}, {}),  # ABI 1.56, on firmware 1.55
    ("vmpl", {"vmpl": 1}, {}),
    ("vmpl", {"vmpl": 0xFFFFFFFF}, {"vmpl": (0, 1, 2, 3)}),
    ("guest_svn", {"guest_svn": 2}, {"min_guest_svn": 3}),
    ("family_id", {}, {"family_id": b"\1" * 16}),
    ("image_id", {}, {"image_id": b"\1" * 16}),
    ("id_key", {}, {"id_keys": (KEY,)}),
    ("author_key", {"signer_info": 1}, {"author_keys": (KEY,)}),
    ("author_key", {"author_key_digest": KEY}, {"author_keys": (KEY,)}),  # AUTHOR_KEY_EN is 0
    ("platform", {}, {"platform": PlatformRules(smt=False)}),
    ("platform", {"platform_info": 0x05}, {"platform": PlatformRules(alias_check=True)}),
    ("platform", {}, {"platform": PlatformRules(tsme=True)}),
    ("platform", {"platform_info": 0x21}, {"platform": PlatformRules(ecc=True)}),
    ("platform", {}, {"platform": PlatformRules(rapl_dis=True)}),
    ("platform", {}, {"platform": PlatformRules(ciphertext_hiding=True)}),
    ("platform", {"platform_info": 0xA5}, {"platform": PlatformRules(tio=False)}),
    ("platform", {"platform_info": 0xA5}, {"platform": PlatformRules(iommu_write_safe=True)}),
    ("platform", {"platform_info": 0x65}, {"platform": PlatformRules(iommu_write_safe=False)}),
    ("report_version", {}, {"min_report_version": 4}),
    ("launch_mitigations", {}, {"launch_mitigations": 1}),
    ("current_mitigations", {}, {"current_mitigations": 4}),
    ("chip", {}, {"chip_ids": (bytes(64),)}),
    ("chip", {}, {"csp_ids": ("SIMULATED",)}),
    ("crl", {}, {"crl_required": True}),
    ("provisional", {"committed_firmware": (1, 55, 28)}, {}),
    ("provisional", {"committed_tcb": encode_tcb(MILAN_TCB.model_copy(update={"snp": 1}), "Milan")}, {}),
]


@pytest.mark.parametrize(("name", "report", "policy"), BROKEN)
def test_one_broken_check_is_named_alone(
    milan: Bench, name: str, report: dict[str, Any], policy: dict[str, Any]
) -> None:
    verdict = appraise(genuine_any(milan, **report), milan.policy(**policy), REPORT_DATA)
    assert verdict.failed == (name,)
    assert verdict.claims is None
    with pytest.raises(AppraisalError, match=name):
        verdict.raise_for_failure()


def genuine_any(bench: Bench, **changed: Any) -> Claims:
    """Claims whose report has these fields: appraisal is judged on its own, so anything may be in them."""
    claims = genuine(bench)
    return replace(claims, report=replace(claims.report, **changed))


def test_the_whole_road_names_the_check_too(milan: Bench) -> None:
    assert milan.judge(milan.report(vmpl=2)).failed == ("vmpl",)
    assert milan.judge(milan.report(policy=BASE_POLICY | 1 << 19)).failed == ("guest_policy",)
    assert milan.judge(milan.report(measurement=b"\2" * 48)).failed == ("measurement",)


@pytest.mark.parametrize("data", [bytes(64), REPORT_DATA[:32] + bytes(32), REPORT_DATA[:-1] + b"\0"])
def test_report_data(milan: Bench, data: bytes) -> None:
    assert appraise(genuine(milan), milan.policy(), data).failed == ("report_data",)


def test_report_data_has_64_bytes(milan: Bench) -> None:
    for data in (b"", REPORT_DATA[:63], REPORT_DATA + b"\0"):
        with pytest.raises(ParameterError):
            verify_and_appraise(milan.report(), milan.chip.certificates, milan.policy(), data, milan.now)


@pytest.mark.parametrize("field", ["current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"])
@pytest.mark.parametrize("component", ["bl", "tee", "snp", "ucode"])
def test_min_tcb_holds_for_every_tcb_and_component(milan: Bench, field: str, component: str) -> None:
    """One component lower, all others far higher."""
    mixed = TcbVersion(bl=99, tee=99, snp=99, ucode=250).model_copy(
        update={component: getattr(MILAN_TCB, component) - 1}
    )
    floor = AcceptedProduct(product="Milan", ark_sha256=(milan.chip.root.ark_sha256,), min_tcb=MILAN_TCB)
    policy = milan.policy(products=(floor,), provisional=True)
    assert appraise(genuine(milan), policy, REPORT_DATA).ok
    claims = genuine_any(milan, **{field: encode_tcb(mixed, "Milan")})
    assert appraise(claims, policy, REPORT_DATA).failed == ("min_tcb",)


def test_turins_fmc_has_a_floor(turin: Bench) -> None:
    fmc = turin.chip.facts.tcb.fmc
    floor = AcceptedProduct(product="Turin", ark_sha256=(turin.chip.root.ark_sha256,), min_tcb=TcbVersion(fmc=fmc + 1))
    assert appraise(genuine(turin), turin.policy(products=(floor,)), REPORT_DATA).failed == ("min_tcb",)


def test_min_firmware(milan: Bench) -> None:
    def policy(major: int, minor: int, build: int) -> Any:
        root = milan.chip.root.ark_sha256
        floor = AcceptedProduct(product="Milan", ark_sha256=(root,), min_firmware=(major, minor, build))
        return milan.policy(products=(floor,), provisional=True)

    claims = genuine(milan)
    assert appraise(claims, policy(1, 55, 29), REPORT_DATA).ok
    assert appraise(claims, policy(1, 49, 255), REPORT_DATA).ok  # minor decides before build
    assert appraise(claims, policy(1, 55, 30), REPORT_DATA).failed == ("min_firmware",)
    low = genuine_any(milan, committed_firmware=(1, 54, 99))
    assert appraise(low, policy(1, 55, 29), REPORT_DATA).failed == ("min_firmware",)


def test_mitigation_vectors_are_a_superset(turin: Bench) -> None:
    claims = genuine_any(turin, launch_mitigations=0b101, current_mitigations=0b111)
    assert appraise(claims, turin.policy(launch_mitigations=0b101, current_mitigations=0b11), REPORT_DATA).ok
    lacking = turin.policy(launch_mitigations=0b111)
    assert appraise(claims, lacking, REPORT_DATA).failed == ("launch_mitigations",)


def test_allowed_hardware(milan: Bench, vlek: Bench) -> None:
    chip_id = milan.chip.facts.hardware_id
    assert chip_id is not None
    assert appraise(genuine(milan), milan.policy(chip_ids=(chip_id,)), REPORT_DATA).ok
    assert appraise(genuine(vlek), vlek.policy(csp_ids=("SIMULATED",)), REPORT_DATA).ok
    assert appraise(genuine(vlek), vlek.policy(csp_ids=("another",)), REPORT_DATA).failed == ("chip",)
    assert appraise(genuine(vlek), vlek.policy(chip_ids=(chip_id,)), REPORT_DATA).failed == ("chip",)


def test_crl_required(milan: Bench) -> None:
    policy = milan.policy(crl_required=True)
    assert milan.judge(policy=policy).failed == ("crl",)
    assert milan.judge(policy=policy, crl=milan.authority.issue_crl()).ok


def test_crl_age(milan: Bench) -> None:
    """The simulated authority's lists are two days old. A bound on the age demands that there is a list."""
    crl, day_s = milan.authority.issue_crl(), 86_400
    assert milan.judge(policy=milan.policy(max_crl_age_s=2 * day_s + 600), crl=crl).ok
    assert milan.judge(policy=milan.policy(max_crl_age_s=2 * day_s - 600), crl=crl).failed == ("crl_age",)
    assert milan.judge(policy=milan.policy(max_crl_age_s=9 * day_s)).failed == ("crl",)
    claims = replace(genuine(milan), crl_age_s=day_s)
    assert appraise(claims, milan.policy(max_crl_age_s=day_s), REPORT_DATA).ok


def test_allowed_values_are_accepted(milan: Bench) -> None:
    claims = genuine_any(
        milan, id_key_digest=KEY, author_key_digest=KEY, signer_info=1, host_data=b"\3" * 32, family_id=b"\4" * 16
    )
    policy = milan.policy(
        measurements=(bytes(48), MEASUREMENT),
        id_keys=(bytes(48), KEY),
        author_keys=(KEY,),
        host_data=b"\3" * 32,
        family_id=b"\4" * 16,
        image_id=bytes(16),
    )
    verdict = appraise(claims, policy, REPORT_DATA)
    assert verdict.ok, verdict


def test_claims_of_one_kind_never_meet_a_policy_of_the_other(milan: Bench) -> None:
    claims = genuine(milan)
    assert "simulation" in appraise(replace(claims, simulated=False), milan.policy(), REPORT_DATA).failed
    other = replace(claims, ark_sha256=bytes(32))
    assert appraise(other, milan.policy(), REPORT_DATA).failed == ("accepted_root",)
    elsewhere = replace(claims, product="Genoa")
    assert appraise(elsewhere, milan.policy(), REPORT_DATA).failed == ("accepted_root",)


def test_verdict_is_a_checklist(milan: Bench) -> None:
    verdict = milan.judge(milan.report(vmpl=2))
    lines = str(verdict).splitlines()
    assert len(lines) == len(verdict.checks)
    assert "✗ vmpl: expected one of 0, got 2" in lines
    assert sum(line.startswith("✓") for line in lines) == len(lines) - 1
    assert not verdict


def test_nothing_checked_is_no_success() -> None:
    empty = Verdict(())
    assert not empty.ok
    assert not empty
    with pytest.raises(VerificationError):
        empty.raise_for_failure()


def test_both_stages_failed_is_a_verification_error() -> None:
    checks = (Check("verify", "chain", False, "a", "b"), Check("appraise", "vmpl", False, "0", "1"))
    with pytest.raises(VerificationError, match="chain"):
        Verdict(checks).raise_for_failure()
