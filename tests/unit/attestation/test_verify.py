"""Is it genuine: every check of ``verify``, broken alone, is named alone."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Any

import pytest
from casemate_attestation.certificates import CSP_ID, HARDWARE_ID, PRODUCT_NAME, SPL, SPL_FMC, STRUCT_VERSION
from casemate_attestation.products import encode_tcb
from casemate_attestation.report import SIGNED_BYTES
from casemate_attestation.simulated_chip import SimulatedAuthority, SimulatedKeys, simulated_name
from casemate_attestation.verify import verify
from casemate_schemas.attestation_policy import AMD_ARK_SHA256, AcceptedProduct, TcbVersion
from casemate_schemas.errors import ParameterError, VerificationError
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384

from .conftest import TCB, Bench, MakeBench

P384_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
MILAN_TCB = TCB.model_copy(update={"fmc": 0})


@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_right_evidence_is_accepted(make_bench: MakeBench, product: Any, version: int, kind: Any) -> None:
    bench = make_bench(product, version, kind)
    verdict = bench.judge()
    assert verdict.ok, verdict
    assert verdict.claims is not None
    assert verdict.claims.product == product
    assert (verdict.claims.hardware_id is None) == (kind == "vlek")
    assert (verdict.claims.csp_id is None) == (kind == "vcek")
    verdict.raise_for_failure()


@pytest.mark.parametrize("change", [lambda r: r[:-1], lambda r: r + b"\0", lambda r: r * 2, lambda r: b""])
def test_format(milan: Bench, change: Any) -> None:
    assert milan.judge(change(milan.report())).failed == ("format",)


@pytest.mark.parametrize("version", [0, 1, 6, 0xFFFFFFFF])
def test_version(milan: Bench, version: int) -> None:
    assert milan.judge(milan.report(version=version)).failed == ("version",)


@pytest.mark.parametrize("algorithm", [0, 2, 1 << 24])
def test_signature_algorithm(milan: Bench, algorithm: int) -> None:
    assert milan.judge(milan.report(signature_algorithm=algorithm)).failed == ("signature_algorithm",)


@pytest.mark.parametrize("offset", [0x4C, 0x4F, 0x18B, 0x19F, 0x1EB, 0x1EF, 0x208, 0x29F])
def test_reserved_bytes(milan: Bench, offset: int) -> None:
    assert milan.judge(milan.patched(offset, 1)).failed == ("reserved",)


@pytest.mark.parametrize(
    "changed",
    [
        {"policy": 0x10133},  # bit 17 clear
        {"policy": 0x30133 | 1 << 26},
        {"policy": 0x30133 | 1 << 63},
        {"platform_info": 0x25 | 1 << 8},
        {"signer_info": 1 << 5},
        {"launch_mitigations": 1},
        {"current_mitigations": 1 << 63},
    ],
)
def test_reserved_bits(milan: Bench, changed: dict[str, int]) -> None:
    assert milan.judge(milan.report(**changed)).failed == ("reserved",)


def test_version_2_has_no_cpuid(make_bench: MakeBench) -> None:
    bench = make_bench("Milan", 2)
    assert bench.judge(bench.report(cpuid_family=0x19, cpuid_model=1)).failed == ("reserved",)


def test_bytes_after_the_signature_are_reserved(milan: Bench) -> None:
    report = milan.report()
    for offset in (0x330, 1183):
        assert milan.judge(report[:offset] + b"\1" + report[offset + 1 :]).failed == ("reserved",)


@pytest.mark.parametrize("key", range(2, 8))
def test_signer(milan: Bench, key: int) -> None:
    assert milan.judge(milan.report(signer_info=key << 2)).failed == ("signer",)


def test_certificate_format(milan: Bench) -> None:
    vek, ask, ark = milan.chip.certificates
    chains = [(vek, ask), (vek[:-1], ask, ark), (vek + b"\0", ask, ark), (vek, b"", ark), (vek, ask, b"\x30" * 20_000)]
    for certificates in chains:
        verdict = verify(milan.report(), certificates, milan.policy(), milan.now)
        assert verdict.failed == ("certificate_format",)
        assert verdict.claims is None


PROFILE_BREAKS: dict[str, dict[str, Any]] = {
    "a P-256 key": {"key": ec.generate_private_key(ec.SECP256R1()).public_key()},
    "an RSA key": {"key": rsa.generate_private_key(65537, 2048).public_key()},
    "PKCS #1 v1.5": {"padding": padding.PKCS1v15()},
    "PSS with SHA-256": {"digest": SHA256(), "padding": padding.PSS(padding.MGF1(SHA256()), 32)},
    "a salt of 32 bytes": {"padding": padding.PSS(padding.MGF1(SHA384()), 32)},
    "another name": {"common_name": "SEV-VCEKX"},
    "no hwID": {"extensions": {HARDWARE_ID: None}},
    "a short hwID": {"extensions": {HARDWARE_ID: bytes(8)}},
    "hwID and provider": {"extensions": {CSP_ID: b"\x16\x04test"}},
    "no product name": {"extensions": {PRODUCT_NAME: None}},
    "an unknown product": {"extensions": {PRODUCT_NAME: b"\x16\x05Roman"}},
    "a product name that overruns": {"extensions": {PRODUCT_NAME: b"\x16\x06Milan"}},
    "no TCB level": {"extensions": {SPL["snp"]: None}},
    "a TCB level over 255": {"extensions": {SPL["snp"]: b"\x02\x02\x01\x00"}},
    "a negative TCB level": {"extensions": {SPL["snp"]: b"\x02\x01\x80"}},
    "a TCB level in a longer form": {"extensions": {SPL["snp"]: b"\x02\x02\x00\x18"}},
    "an FMC level before Turin": {"extensions": {SPL_FMC: b"\x02\x01\x00"}},
    "a reserved TCB level": {"extensions": {"1.3.6.1.4.1.3704.1.3.4": b"\x02\x01\x01"}},
    "another structure version": {"extensions": {STRUCT_VERSION: b"\x02\x01\x02"}},
}


@pytest.mark.parametrize("change", PROFILE_BREAKS.values(), ids=PROFILE_BREAKS.keys())
def test_certificate_profile(milan: Bench, change: dict[str, Any]) -> None:
    assert milan.with_vek(**change).judge().failed == ("certificate_profile",)


@pytest.mark.parametrize("change", [{HARDWARE_ID: bytes(64)}, {CSP_ID: None}, {CSP_ID: b"\x16\x02\x1b["}])
def test_vlek_profile(vlek: Bench, change: dict[str, bytes | None]) -> None:
    assert vlek.with_vek(change).judge().failed == ("certificate_profile",)


def test_turin_needs_its_fmc_level(turin: Bench) -> None:
    assert turin.with_vek({SPL_FMC: None}).judge().failed == ("certificate_profile",)


def test_both_algorithm_identifiers_are_equal(milan: Bench) -> None:
    vek = milan.chip.certificates[0]
    inner = vek.index(bytes.fromhex("06092a864886f70d01010a"))
    outer = vek.index(bytes.fromhex("06092a864886f70d01010a"), inner + 1)
    salt = vek.index(bytes.fromhex("a203020130"), outer) + 4
    other = vek[:salt] + b"\x31" + vek[salt + 1 :]
    assert vek[salt] == 48
    certificates = (other, *milan.chip.certificates[1:])
    assert verify(milan.report(), certificates, milan.policy(), milan.now).failed == ("certificate_profile",)


def test_authorities_have_rsa_4096_keys(milan: Bench, simulated_keys: SimulatedKeys) -> None:
    small = SimulatedKeys(simulated_keys.ark, rsa.generate_private_key(65537, 3072))
    chip = SimulatedAuthority(small).issue_chip(MILAN_TCB)
    bench = Bench(milan.authority, chip)
    accepted = AcceptedProduct(product="Milan", ark_sha256=(chip.root.ark_sha256,))
    assert bench.judge(policy=bench.policy(products=(accepted,))).failed == ("certificate_profile",)


def test_signer_certificate(milan: Bench, vlek: Bench) -> None:
    assert milan.judge(milan.report(signer_info=1 << 2)).failed == ("signer_certificate",)
    assert vlek.judge(vlek.report(signer_info=0)).failed == ("signer_certificate",)


def test_root_is_pinned(milan: Bench) -> None:
    other = AcceptedProduct(product="Milan", ark_sha256=(b"\1" * 32,))
    elsewhere = AcceptedProduct(product="Genoa", ark_sha256=(milan.chip.root.ark_sha256,))
    assert milan.judge(policy=milan.policy(products=(other,))).failed == ("root",)
    assert milan.judge(policy=milan.policy(products=(elsewhere,))).failed == ("root",)


def test_policy_for_real_chips_refuses_simulated_ones(milan: Bench) -> None:
    amd = AcceptedProduct(product="Milan", ark_sha256=(AMD_ARK_SHA256["Milan"],))
    assert milan.judge(policy=milan.policy(simulation=False, products=(amd,))).failed == ("root",)


def test_kind_of_root_is_checked_even_against_a_policy_that_skipped_validation(milan: Bench) -> None:
    forged = milan.policy().model_copy(update={"simulation": False})
    assert "root" in verify(milan.report(), milan.chip.certificates, forged, milan.now).failed


def test_chain_signature(milan: Bench) -> None:
    assert milan.with_vek(signer=milan.authority.keys.ark).judge().failed == ("chain",)


def test_chain_issuer(milan: Bench) -> None:
    assert milan.with_vek(issuer=simulated_name("SEV-Genoa")).judge().failed == ("chain",)
    assert milan.with_vek(issuer=milan.authority.ark_name, signer=milan.authority.keys.ark).judge().failed == ("chain",)


def test_vlek_needs_the_asvk(make_bench: MakeBench, simulated_keys: SimulatedKeys) -> None:
    """A VLEK right in itself, but issued under the name of the ASK."""
    vlek = make_bench("Milan", 3, "vlek")
    under_ask = SimulatedAuthority(simulated_keys, "Milan", "vcek")
    vek = vlek.with_vek(issuer=under_ask.ask_name).chip.certificates[0]
    accepted = AcceptedProduct(product="Milan", ark_sha256=(hashlib.sha256(under_ask.ark).digest(),))
    chain = (vek, under_ask.ask, under_ask.ark)
    failed = verify(vlek.report(), chain, vlek.policy(products=(accepted,)), vlek.now).failed
    assert "chain" in failed
    assert "certificate_profile" not in failed


def test_chain_of_another_hierarchy_with_equal_names(milan: Bench) -> None:
    forged = SimulatedAuthority(SimulatedKeys(milan.authority.keys.ask, milan.authority.keys.ark))
    chain = (milan.chip.certificates[0], forged.ask, milan.chip.certificates[2])
    assert verify(milan.report(), chain, milan.policy(), milan.now).failed == ("chain",)


@pytest.mark.parametrize("days", [-2, 7 * 365 + 2])
def test_validity(milan: Bench, days: int) -> None:
    later = Bench(milan.authority, milan.chip, milan.now + timedelta(days=days))
    assert later.judge().failed == ("validity",)


def test_validity_of_the_vek_alone(milan: Bench) -> None:
    expired = milan.with_vek(not_before=milan.now - timedelta(days=9), not_after=milan.now - timedelta(seconds=1))
    assert expired.judge().failed == ("validity",)


def test_revocation_list_is_accepted(milan: Bench) -> None:
    verdict = milan.judge(crl=milan.authority.issue_crl([77]))
    assert verdict.ok
    assert verdict.claims is not None and verdict.claims.crl_age_s is not None
    assert "revocation" in [check.name for check in verdict.checks]


def test_revocation(milan: Bench) -> None:
    authority = milan.authority
    lists = {
        "names the ASK": authority.issue_crl([0x10001]),
        "names the ARK": authority.issue_crl([1, 0x10000]),
        "is the ASK's": authority.issue_crl(signer=authority.keys.ask),
        "is stale": authority.issue_crl(expires_in=timedelta(days=-1)),
        "is another product's": SimulatedAuthority(authority.keys, "Genoa").issue_crl(),
        "is empty": b"",
        "is too long": b"\0" * (1 << 20),
        "is a certificate": milan.chip.certificates[2],
    }
    for crl in lists.values():
        assert milan.judge(crl=crl).failed == ("revocation",)


def test_revocation_list_of_the_future(milan: Bench) -> None:
    early = Bench(milan.authority, milan.chip, milan.now - timedelta(hours=1))
    crl = milan.authority.issue_crl()
    assert early.judge(crl=crl).ok
    tampered = bytearray(crl)
    tampered[-1] ^= 1
    assert early.judge(crl=bytes(tampered)).failed == ("revocation",)


@pytest.mark.parametrize("cpuid", [(0x19, 0x11), (0x1A, 0x02), (0x17, 0x31), (0, 0), (0x19, 0x20)])
def test_product_by_cpuid(milan: Bench, cpuid: tuple[int, int]) -> None:
    report = milan.report(cpuid_family=cpuid[0], cpuid_model=cpuid[1])
    assert milan.judge(report).failed == ("product",)


def test_product_by_name(milan: Bench) -> None:
    assert milan.with_vek({PRODUCT_NAME: b"\x16\x05Genoa"}).judge().failed == ("product",)


def test_version_2_product_is_the_certificates(make_bench: MakeBench) -> None:
    bench = make_bench("Milan", 2)
    assert bench.with_vek({PRODUCT_NAME: b"\x16\x05Genoa"}).judge().failed == ("product",)


@pytest.mark.parametrize("offset", [0x04, 0x50, 0x90, 0x1A0, 0x29F])
def test_signature_covers_the_body(milan: Bench, offset: int) -> None:
    report = bytearray(milan.report())
    report[offset] ^= 0x80
    assert "signature" in milan.judge(bytes(report)).failed


def signature_of(report: bytes) -> tuple[int, int]:
    r = int.from_bytes(report[SIGNED_BYTES : SIGNED_BYTES + 72], "little")
    return r, int.from_bytes(report[SIGNED_BYTES + 72 : SIGNED_BYTES + 144], "little")


def with_signature(report: bytes, r: int, s: int) -> bytes:
    return report[:SIGNED_BYTES] + r.to_bytes(72, "little") + s.to_bytes(72, "little") + bytes(368)


def test_all_72_bytes_of_r_and_s_count(milan: Bench) -> None:
    report = milan.report()
    r, s = signature_of(report)
    assert milan.judge(with_signature(report, r, s)).ok
    wrong = [(r + (1 << 384), s), (r, s + (1 << 575)), (r + 256 * P384_ORDER, s), (0, s), (r, 0), (P384_ORDER, s)]
    for forged in [*wrong, (r, P384_ORDER), (s, r), (0, 0)]:
        assert milan.judge(with_signature(report, *forged)).failed == ("signature",)


def test_n_minus_s_verifies_too(milan: Bench) -> None:
    """Which is why a report's digest identifies nothing."""
    report = milan.report()
    r, s = signature_of(report)
    twin = with_signature(report, r, P384_ORDER - s)
    assert twin != report
    assert milan.judge(twin).ok


def test_signature_by_another_chip(milan: Bench, make_bench: MakeBench) -> None:
    other = make_bench()
    assert milan.judge(other.chip.sign(milan.body())).failed == ("signature",)


def test_chip_id(milan: Bench) -> None:
    assert milan.judge(milan.report(chip_id=b"\7" * 64)).failed == ("chip_id",)
    assert milan.judge(milan.report(chip_id=bytes(64))).failed == ("chip_id",)
    assert milan.judge(milan.report(signer_info=1 << 1)).failed == ("chip_id",)


def test_turin_chip_id_is_8_bytes(turin: Bench) -> None:
    chip_id = turin.chip.facts.hardware_id
    assert chip_id is not None and len(chip_id) == 8
    assert turin.judge(turin.report(chip_id=chip_id + b"\1" + bytes(55))).failed == ("chip_id",)


def test_hardware_id_in_an_octet_string(milan: Bench) -> None:
    chip_id = milan.chip.facts.hardware_id
    assert chip_id is not None
    assert milan.with_vek({HARDWARE_ID: b"\x04\x40" + chip_id}).judge().ok


@pytest.mark.parametrize("offset", [0x38 + 2, 0x180 + 5, 0x1E0 + 3, 0x1F0 + 4])
def test_tcb_layout(milan: Bench, offset: int) -> None:
    verdict = milan.judge(milan.patched(offset, 1), milan.policy(provisional=True))
    assert verdict.failed == ("tcb_layout",)


def test_turin_tcb_in_milans_layout(turin: Bench) -> None:
    tcb = encode_tcb(turin.chip.facts.tcb, "Milan")
    report = turin.report(current_tcb=tcb, reported_tcb=tcb, committed_tcb=tcb, launch_tcb=tcb)
    assert turin.judge(report).failed == ("tcb_layout", "tcb_certificate")


@pytest.mark.parametrize("component", ["bl", "tee", "snp", "ucode", "fmc"])
def test_tcb_certificate(turin: Bench, component: str) -> None:
    tcb = turin.chip.facts.tcb
    lower = tcb.model_copy(update={component: getattr(tcb, component) - 1})
    assert turin.judge(turin.report(reported_tcb=encode_tcb(lower, "Turin"))).failed == ("tcb_certificate",)


def reissued(bench: Bench, tcb: TcbVersion) -> Bench:
    """The chip with a VEK for another TCB."""
    return bench.with_vek(dict(bench.authority.vek_extensions(tcb, bench.chip.facts.hardware_id or b"")))


def test_tcb_order(milan: Bench) -> None:
    """Component by component: a higher microcode does not make up for a lower boot loader."""
    mixed = MILAN_TCB.model_copy(update={"bl": 5, "ucode": 1})
    raw = encode_tcb(mixed, "Milan")
    assert reissued(milan, mixed).judge(milan.report(reported_tcb=raw)).failed == ("tcb_order",)
    provisional = milan.policy(provisional=True)
    assert milan.judge(milan.report(committed_tcb=raw), provisional).failed == ("tcb_order",)
    assert milan.judge(milan.report(committed_firmware=(1, 55, 30)), provisional).failed == ("tcb_order",)


def test_reported_tcb_may_be_lower(milan: Bench) -> None:
    lower = MILAN_TCB.model_copy(update={"ucode": 100})
    assert reissued(milan, lower).judge(milan.report(reported_tcb=encode_tcb(lower, "Milan"))).ok


def test_failed_verification_is_not_appraised(milan: Bench) -> None:
    verdict = milan.judge(milan.report(measurement=bytes(48))[:-1])
    assert {check.stage for check in verdict.checks} == {"verify"}
    with pytest.raises(VerificationError, match="format"):
        verdict.raise_for_failure()


def test_time_without_zone_is_a_mistake(milan: Bench) -> None:
    with pytest.raises(ParameterError):
        verify(milan.report(), milan.chip.certificates, milan.policy(), datetime(2026, 1, 1))
