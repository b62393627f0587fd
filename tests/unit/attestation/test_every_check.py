"""For every check that there is, evidence in which it alone is broken, on every kind of chip where it can be."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from casemate_attestation.appraise import appraise
from casemate_attestation.certificates import VekKind
from casemate_attestation.evidence import verify_evidence
from casemate_attestation.products import CPUID, Product, encode_tcb
from casemate_attestation.report import SIGNED_BYTES
from casemate_attestation.simulated_chip import SimulatedAuthority
from casemate_attestation.verdict import CheckName, Claims, SnpCheck, Verdict, VtpmCheck
from casemate_attestation.verify import verify
from casemate_schemas.attestation_policy import AcceptedProduct, PcrRule, PlatformRules, TcbVersion, VtpmRules
from casemate_schemas.evidence import Evidence, KeyBrokerNonce, SevSnp, WorkerClaims
from casemate_schemas.keys import SEALING_PUBLIC_BYTES

from .conftest import MEASUREMENT, REPORT_DATA, Bench, MakeBench

Break = Callable[[Bench], Verdict | None]
"""The verdict on evidence with one thing wrong; None where this kind of chip cannot show it."""

PRODUCTS: tuple[Product, ...] = ("Milan", "Genoa", "Turin")
KINDS: tuple[VekKind, ...] = ("vcek", "vlek")
VERSIONS = (2, 3, 5)
DEBUG = 1 << 19
GUEST_POLICY = 1 << 17 | 1 << 16 | 1 << 8 | 51
OTHER_PRODUCT: dict[Product, Product] = {"Milan": "Genoa", "Genoa": "Turin", "Turin": "Milan"}


def reported(**changed: Any) -> Break:
    """A chip signs a report with these fields."""
    return lambda bench: bench.judge(bench.report(**changed))


def asked(**changed: Any) -> Break:
    """A policy with these fields meets good evidence."""
    return lambda bench: bench.judge(policy=bench.policy(**changed))


def floored(**changed: Any) -> Break:
    def judge(bench: Bench) -> Verdict:
        root = bench.chip.root
        accepted = AcceptedProduct(product=root.product, ark_sha256=(root.ark_sha256,), **changed)
        return bench.judge(policy=bench.policy(products=(accepted,)))

    return judge


def claimed(**changed: Any) -> Break:
    """Claims that verification would not have made: appraisal does not rely on that."""

    def judge(bench: Bench) -> Verdict:
        claims = good_claims(bench)
        return appraise(replace(claims, **changed), bench.policy(), REPORT_DATA)

    return judge


def good_claims(bench: Bench) -> Claims:
    claims = bench.judge().claims
    assert claims is not None
    return claims


def shifted(bench: Bench, by: int) -> bytes:
    """The chip's TCB with a boot loader that is ``by`` newer."""
    facts = bench.chip.facts
    return encode_tcb(facts.tcb.model_copy(update={"bl": facts.tcb.bl + by}), facts.product)


def pinned_elsewhere(bench: Bench) -> AcceptedProduct:
    return AcceptedProduct(product=bench.chip.facts.product, ark_sha256=(b"\1" * 32,))


def other_kind(bench: Bench) -> Verdict:
    return bench.judge(bench.report(signer_info=(1 << 2) if bench.chip.facts.kind == "vcek" else 0))


def other_product(bench: Bench) -> Verdict:
    """From version 3 on by CPUID, before by a chain of another product over a VEK that is right in itself."""
    facts = bench.chip.facts
    elsewhere = OTHER_PRODUCT[facts.product]
    if bench.chip.version >= 3:
        family, model = CPUID[elsewhere]
        return bench.judge(bench.report(cpuid_family=family, cpuid_model=model))
    other = SimulatedAuthority(bench.authority.keys, elsewhere, facts.kind)
    extensions = bench.authority.vek_extensions(facts.tcb, facts.hardware_id or b"")
    chain = (other.issue_vek(bench.chip._key.public_key(), extensions), other.ask, other.ark)
    pinned = AcceptedProduct(product=elsewhere, ark_sha256=(hashlib.sha256(other.ark).digest(),))
    return verify(bench.report(), chain, bench.policy(products=(pinned,)), bench.now)


def other_signature(bench: Bench) -> Verdict:
    return bench.judge(bench.body() + bench.report(guest_svn=1)[SIGNED_BYTES:])


def other_chip(bench: Bench) -> Verdict | None:
    return None if bench.chip.facts.kind == "vlek" else bench.judge(bench.report(chip_id=b"\7" * 64))


def newer_report_version(bench: Bench) -> Verdict | None:
    version = bench.chip.version
    return None if version == max(VERSIONS) else bench.judge(policy=bench.policy(min_report_version=version + 1))


def two_certificates(bench: Bench) -> Verdict:
    return verify(bench.report(), bench.chip.certificates[:2], bench.policy(), bench.now)


def unwelcome_type(bench: Bench) -> Verdict:
    """Good evidence of a type that the policy does not take."""
    claims = WorkerClaims(
        consortium=bytes(32),
        manifest=bytes(32),
        job_id="0" * 32,
        terms=bytes(32),
        attempt=1,
        sealing_key=bytes(SEALING_PUBLIC_BYTES),
        signing_key=bytes(32),
        nonces=(KeyBrokerNonce(key_broker="north", nonce=bytes(32)),),
    )
    template = bench.chip.launch(MEASUREMENT).template
    report = bench.chip.sign(replace(template, report_data=claims.report_data).body())
    evidence = Evidence(claims=claims, components=(SevSnp(report=report, certificates=bench.chip.certificates),))
    assert verify_evidence(evidence, bench.policy(), bench.now).ok
    register = VtpmRules(pcrs=(PcrRule(index=4, digests=(bytes(32),)),))
    policy = bench.policy(evidence_types=(("sev-snp-vtpm",),), vtpm=register)
    return verify_evidence(evidence, policy, bench.now)


BREAKS: dict[CheckName, Break] = {
    "format": lambda bench: bench.judge(bench.report()[:-1]),
    "version": reported(version=6),
    "signature_algorithm": reported(signature_algorithm=2),
    "reserved": lambda bench: bench.judge(bench.patched(0x4C, 1)),
    "signer": reported(signer_info=7 << 2),
    "certificate_format": two_certificates,
    "certificate_profile": lambda bench: bench.with_vek(common_name="SEV-VXEK").judge(),
    "signer_certificate": other_kind,
    "root": lambda bench: bench.judge(policy=bench.policy(products=(pinned_elsewhere(bench),))),
    "chain": lambda bench: bench.with_vek(signer=bench.authority.keys.ark).judge(),
    "validity": lambda bench: Bench(bench.authority, bench.chip, bench.now + timedelta(days=8 * 365)).judge(),
    "revocation": lambda bench: bench.judge(crl=bench.authority.issue_crl([0x10001])),
    "product": other_product,
    "signature": other_signature,
    "chip_id": other_chip,
    "tcb_layout": lambda bench: bench.judge(bench.patched(0x1F0 + 4, 1)),
    "tcb_certificate": lambda bench: bench.judge(bench.report(reported_tcb=shifted(bench, -1))),
    "tcb_order": lambda bench: bench.judge(bench.report(committed_tcb=shifted(bench, 1))),
    "simulation": claimed(simulated=False),
    "accepted_root": claimed(ark_sha256=bytes(32)),
    "report_version": newer_report_version,
    "report_data": lambda bench: appraise(good_claims(bench), bench.policy(), bytes(64)),
    "measurement": asked(measurements=(bytes(48),)),
    "host_data": asked(host_data=b"\1" * 32),
    "guest_policy": reported(policy=GUEST_POLICY | DEBUG),
    "vmpl": reported(vmpl=1),
    "guest_svn": asked(min_guest_svn=1),
    "family_id": asked(family_id=b"\1" * 16),
    "image_id": asked(image_id=b"\1" * 16),
    "id_key": asked(id_keys=(b"\1" * 48,)),
    "author_key": asked(author_keys=(bytes(48),)),
    "min_tcb": floored(min_tcb=TcbVersion(snp=25)),
    "min_firmware": floored(min_firmware=(1, 55, 30)),
    "provisional": reported(committed_firmware=(1, 55, 28)),
    "platform": asked(platform=PlatformRules(tsme=True)),
    "launch_mitigations": asked(launch_mitigations=1 << 40),
    "current_mitigations": asked(current_mitigations=1 << 40),
    "chip": asked(chip_ids=(bytes(64),), csp_ids=("another",)),
    "crl": asked(crl_required=True),
    "crl_age": lambda bench: bench.judge(policy=bench.policy(max_crl_age_s=86_400), crl=bench.authority.issue_crl()),
    "evidence_types": unwelcome_type,
}


@pytest.fixture(scope="module")
def benches(make_bench: MakeBench) -> list[Bench]:
    """Every product, report version and kind of key, each with evidence that every check accepts."""
    made = [make_bench(product, version, kind) for product in PRODUCTS for version in VERSIONS for kind in KINDS]
    assert all(bench.judge().ok for bench in made)
    return made


@pytest.mark.parametrize("name", BREAKS)
def test_the_broken_check_is_named_alone(benches: list[Bench], name: CheckName) -> None:
    verdicts = {kind_of(bench): BREAKS[name](bench) for bench in benches}
    shown = {kind: verdict for kind, verdict in verdicts.items() if verdict is not None}
    assert {product for product, _, _ in shown} == set(PRODUCTS)
    for kind, verdict in shown.items():
        assert verdict.failed == (name,), f"{kind}\n{verdict}"
        assert verdict.claims is None
        assert {check.name for check in verdict.checks} <= set(get_args(CheckName))


def kind_of(bench: Bench) -> tuple[Product, int, VekKind]:
    return bench.chip.facts.product, bench.chip.version, bench.chip.facts.kind


def test_no_check_lacks_such_a_test() -> None:
    """The virtual TPM's checks are broken alone in a module of their own."""
    own_module = Path(__file__).with_name("test_vtpm.py")
    assert set(BREAKS) == set(get_args(SnpCheck)) | {"evidence_types"}
    assert set(get_args(CheckName)) - set(BREAKS) == set(get_args(VtpmCheck))
    assert set(get_args(VtpmCheck)) <= failed_alone_in(own_module)


def failed_alone_in(module: Path) -> set[str]:
    """The names x of all comparisons ``….failed == ("x",)`` in a module."""
    compared = [node for node in ast.walk(ast.parse(module.read_text("utf-8"))) if isinstance(node, ast.Compare)]
    return {
        str(right.elts[0].value)
        for node in compared
        for right in node.comparators
        if isinstance(node.left, ast.Attribute) and node.left.attr == "failed"
        if isinstance(right, ast.Tuple) and len(right.elts) == 1 and isinstance(right.elts[0], ast.Constant)
    }
