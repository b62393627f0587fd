"""Reports that real chips signed, and 406 labelled cases around them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from casemate_attestation.certificates import parse_certificate, vek_profile
from casemate_attestation.chain import ChainCache
from casemate_attestation.policy_file import PolicyFile, TrustedRoots, inspect_report
from casemate_attestation.verify import verify
from casemate_schemas.attestation_policy import AMD_ARK_SHA256

VECTORS = Path(__file__).parents[2] / "vectors" / "snp"
LABELLED = Path(__file__).parents[4] / "shared" / "snp-reports"
NOW = datetime(2026, 11, 21, tzinfo=UTC)

ADVICE = {
    "FORMAT": {"format"},
    "VERSION": {"version"},
    "SIG_ALGO": {"signature_algorithm"},
    "RESERVED": {"reserved", "tcb_layout"},
    "SIGNER": {"signer", "signer_certificate", "certificate_profile"},
    "CERT_PARSE": {"certificate_format", "certificate_profile"},
    "CERT_PROFILE": {"certificate_profile"},
    "CERT_TIME": {"validity"},
    "CHAIN": {"chain", "certificate_format"},
    "CRL": {"revocation"},
    "REVOKED": {"revocation"},
    "PRODUCT": {"product"},
    "SIGNATURE": {"signature", "reserved"},
    "CHIP_ID": {"chip_id"},
    "TCB_CERT": {"tcb_certificate"},
    "TCB_ORDER": {"tcb_order", "provisional"},
    "TCB_MIN": {"min_tcb"},
    "FIRMWARE": {"min_firmware"},
    "MEASUREMENT": {"measurement"},
    "REPORT_DATA": {"report_data"},
    "HOST_DATA": {"host_data"},
    "POLICY": {"guest_policy", "measurement", "report_data"},
    "VMPL": {"vmpl", "signature"},
    "GUEST_SVN": {"guest_svn"},
    "ID": {"family_id", "image_id"},
    "ID_KEY": {"id_key", "author_key"},
    "PLATFORM": {"platform"},
    "MITVEC": {"launch_mitigations", "current_mitigations"},
}
"""The manifest's advice on the first failing check, and what it is called here."""


def labelled_cases() -> list[Any]:
    manifest = LABELLED / "manifest.json"
    if not manifest.exists():
        skip = pytest.mark.skip(reason="the labelled reports are not beside this checkout (../shared/snp-reports)")
        return [pytest.param({}, marks=skip, id="labelled-reports")]
    return [pytest.param(case, id=case["id"]) for case in json.loads(manifest.read_text())]


@cache
def roots_in(folder: Path) -> TrustedRoots:
    return TrustedRoots.load(folder)


@pytest.mark.parametrize("case", labelled_cases())
def test_labelled_case(case: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """``pytest -rP`` shows the first failing check of every case beside the manifest's advice."""
    verdict = inspect_report(
        (LABELLED / case["report"]).read_bytes(),
        (LABELLED / case["vek"]).read_bytes(),
        roots_in(LABELLED / case["roots"]),
        PolicyFile.parse(json.dumps(case["policy"])),
        datetime.fromisoformat(case["now"]),
        (LABELLED / case["crl"]).read_bytes() if "crl" in case else None,
    )
    first = next(iter(verdict.failed), None)
    shown = f"{first} (advice {case['expect_error']})"
    request.node.add_report_section("call", "first failing check", shown)
    assert verdict.ok == (case["expect"] == "pass"), f"{shown}\n{verdict}"
    if first is not None:
        assert first in ADVICE[case["expect_error"]], shown


@pytest.mark.skipif(not LABELLED.exists(), reason="the labelled reports are not beside this checkout")
def test_remembered_chains_change_no_verdict() -> None:
    """Every labelled case twice, beside all chains that were good in any of them."""
    chains = ChainCache()
    remembered = []
    for case in json.loads((LABELLED / "manifest.json").read_text()) * 2:
        roots = roots_in(LABELLED / case["roots"])
        arguments = (
            (LABELLED / case["report"]).read_bytes(),
            roots.certificates_for((LABELLED / case["vek"]).read_bytes()),
            PolicyFile.parse(json.dumps(case["policy"])).under(roots),
            datetime.fromisoformat(case["now"]),
            (LABELLED / case["crl"]).read_bytes() if "crl" in case else None,
        )
        remembered.append(chains.find(arguments[1]) is not None)
        assert verify(*arguments, chains) == verify(*arguments), case["id"]
    assert sum(remembered) > 406  # nearly all of the second round, and some of the first


@pytest.mark.skipif(not LABELLED.exists(), reason="the labelled reports are not beside this checkout")
def test_labelled_cases_without_assertions() -> None:
    """``python -O`` drops assert statements: every verdict stays as it is."""
    program = "from casemate.cli.attestation import attestation; attestation()"
    arguments = ["verify", "--manifest", str(LABELLED / "manifest.json"), "--json"]
    run = subprocess.run(
        [sys.executable, "-O", "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    verdicts = [json.loads(line)["verdict"] for line in run.stdout.splitlines()]
    assert (verdicts.count("accepted"), verdicts.count("rejected")) == (21, 385)


REAL = {
    "milan-v2-sev": "7a1e5c266c0108dbc9bb94fa926951320940915d0aafb42464bd88b579ea158d3e1a0dc39b2c60bd95b9c480cd81841f",
    "milan-v3-azure-v0": (
        "6a063be9dd79f6371c842e480f8dc3b5c725961344e57130e88c5adf49e8f7f6c79b75a5eb77fc769959f4aeb2f9401e"
    ),
    "genoa-v3-azure": "f57dc09a507c6ecd82369bffb600f0003792f4d99bc26e985ec0c266fc34faf3706faf814c9e61065768a6ff917c89ae",
}


@pytest.mark.parametrize("name", REAL)
def test_real_report(name: str) -> None:
    report, vek = (VECTORS / f"{name}.bin").read_bytes(), (VECTORS / f"{name}.vek.der").read_bytes()
    policy = PolicyFile.parse(json.dumps({"measurements": [REAL[name]]}))
    verdict = inspect_report(report, vek, roots_in(VECTORS / "roots"), policy, NOW)
    assert verdict.ok, verdict
    assert verdict.claims is not None and not verdict.claims.simulated
    other = PolicyFile.parse(json.dumps({"measurements": ["00" * 48]}))
    assert inspect_report(report, vek, roots_in(VECTORS / "roots"), other, NOW).failed == ("measurement",)
    late = NOW.replace(year=2033)
    assert inspect_report(report, vek, roots_in(VECTORS / "roots"), policy, late).failed == ("validity",)
    flipped = report[:0x90] + bytes((report[0x90] ^ 1,)) + report[0x91:]
    assert inspect_report(flipped, vek, roots_in(VECTORS / "roots"), PolicyFile(), NOW).failed == ("signature",)


@pytest.mark.parametrize("product", AMD_ARK_SHA256)
def test_amds_roots_are_pinned(product: Any) -> None:
    ark = (VECTORS / "roots" / f"ark_{product.lower()}.der").read_bytes()
    assert hashlib.sha256(ark).digest() == AMD_ARK_SHA256[product]


def test_real_turin_vcek() -> None:
    facts = vek_profile(parse_certificate((VECTORS / "turin-sev.vek.der").read_bytes()))
    assert (facts.kind, facts.product, facts.tcb.ucode, facts.tcb.fmc) == ("vcek", "Turin", 9, 0)
    assert facts.hardware_id is not None and len(facts.hardware_id) == 8
