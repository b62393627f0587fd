"""``casemate attestation verify``: what it prints and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from casemate.cli.attestation import attestation
from casemate_attestation.report import SIGNED_BYTES
from click.testing import CliRunner, Result

from .conftest import MEASUREMENT, REPORT_DATA, Bench

VECTORS = Path(__file__).parents[2] / "vectors" / "snp"


@pytest.fixture
def evidence(milan: Bench, tmp_path: Path) -> Path:
    """A folder with a report, its certificates, a good policy and one that it does not meet."""
    vek, ask, ark = milan.chip.certificates
    (tmp_path / "roots").mkdir()
    policy = {"measurements": [MEASUREMENT.hex()], "report_data": REPORT_DATA.hex()}
    files: dict[str, bytes] = {
        "report.bin": milan.report(),
        "vek.der": vek,
        "roots/ark_milan.der": ark,
        "roots/ask_milan.der": ask,
        "crl.der": milan.authority.issue_crl(),
        "policy.json": json.dumps(policy).encode(),
        "other.json": json.dumps(policy | {"measurements": ["00" * 48], "min_guest_svn": 1}).encode(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(attestation, ["verify", *map(str, arguments)])


def basic(folder: Path) -> tuple[Path | str, ...]:
    return folder / "report.bin", "--vek", folder / "vek.der", "--roots", folder / "roots"


def test_accepted(evidence: Path) -> None:
    result = run(*basic(evidence), "--policy", evidence / "policy.json", "--crl", evidence / "crl.der", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"verdict": "accepted", "failed": []}
    assert "NOT AMD'S ROOTS" in result.stderr


def test_rejected(evidence: Path) -> None:
    result = run(*basic(evidence), "--policy", evidence / "other.json", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"verdict": "rejected", "failed": ["measurement", "guest_svn"]}


def test_checklist(evidence: Path) -> None:
    result = run(*basic(evidence), "--policy", evidence / "other.json")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith("NOT AMD'S ROOTS")
    assert "✓ vmpl: 0" in lines
    assert "✗ guest_svn: expected at least 1, got 0" in lines
    assert "· revocation: no list given, not checked" in lines
    assert lines[-1] == "rejected"


def test_authenticity_only(evidence: Path) -> None:
    result = run(*basic(evidence))
    assert result.exit_code == 0
    assert "· policy: none given, authenticity only" in result.stdout
    assert "measurement" not in result.stdout


def test_real_report() -> None:
    report, vek = VECTORS / "genoa-v3-azure.bin", VECTORS / "genoa-v3-azure.vek.der"
    result = run(report, "--vek", vek, "--roots", VECTORS / "roots", "--now", "2026-11-21T00:00:00Z")
    assert result.exit_code == 0
    assert "NOT AMD'S ROOTS" not in result.output
    late = run(report, "--vek", vek, "--roots", VECTORS / "roots", "--now", "2040-01-01", "--json")
    assert (late.exit_code, json.loads(late.stdout)["failed"]) == (1, ["validity"])


def test_real_roots_refuse_a_simulated_chip(evidence: Path) -> None:
    result = run(evidence / "report.bin", "--vek", evidence / "vek.der", "--roots", VECTORS / "roots", "--json")
    assert result.exit_code == 1
    assert "chain" in json.loads(result.stdout)["failed"]


def test_hostile_input_is_rejected_not_misused(evidence: Path) -> None:
    (evidence / "report.bin").write_bytes(b"\0" * 5_000)
    assert run(*basic(evidence)).exit_code == 1
    (evidence / "vek.der").write_bytes(b"no certificate")
    assert run(*basic(evidence)).exit_code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--json",),
        ("report.bin",),
        ("absent.bin", "--vek", "vek.der", "--roots", "roots"),
        ("report.bin", "--vek", "vek.der", "--roots", "."),
        ("report.bin", "--vek", "vek.der", "--roots", "roots", "--now", "yesterday"),
        ("report.bin", "--vek", "vek.der", "--roots", "roots", "--policy", "vek.der"),
        ("report.bin", "--manifest", "policy.json"),
        ("--manifest", "policy.json"),
    ],
)
def test_wrong_usage(evidence: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evidence)
    assert run(*arguments).exit_code == 2


def case(name: str, expect: str, **changed: Any) -> dict[str, Any]:
    plain = {"report": "report.bin", "vek": "vek.der", "roots": "roots", "now": "2099-01-01T00:00:00+00:00"}
    return plain | {"id": name, "expect": expect, "policy": {}, "crl": None, "how": "ignored"} | changed


def test_manifest(evidence: Path, milan: Bench) -> None:
    now = milan.now.isoformat()
    manifest = evidence / "manifest.json"
    cases = [case("fresh", "pass", now=now), case("expired", "fail"), case("crl", "pass", now=now, crl="crl.der")]
    manifest.write_text(json.dumps(cases))
    result = run("--manifest", manifest, "--json")
    assert result.exit_code == 0
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"id": "fresh", "verdict": "accepted", "failed": []},
        {"id": "expired", "verdict": "rejected", "failed": ["validity"]},
        {"id": "crl", "verdict": "accepted", "failed": []},
    ]
    manifest.write_text(json.dumps([case("expired", "pass"), case("fresh", "pass", now=now)]))
    result = run("--manifest", manifest)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["✗ expired: rejected validity", "✓ fresh: accepted"]


def test_a_manifest_without_assert_statements(evidence: Path, milan: Bench) -> None:
    """``python -O`` drops them: genuine evidence is accepted still, and everything else refused by its check."""
    now = milan.now.isoformat()
    files = {
        "signature": milan.body() + milan.report(vmpl=1)[SIGNED_BYTES:],
        "reserved": milan.patched(0x4C, 1),
        "vmpl": milan.report(vmpl=1),
        "chip_id": milan.report(chip_id=bytes(64)),
        "format": milan.report() + b"\0",
    }
    for name, report in files.items():
        (evidence / f"{name}.bin").write_bytes(report)
    (evidence / "revoked.der").write_bytes(milan.authority.issue_crl([0x10001]))
    cases = [case(name, "fail", now=now, report=f"{name}.bin", policy={"vmpl": [0]}) for name in files]
    cases += [case("validity", "fail"), case("revocation", "fail", now=now, crl="revoked.der")]
    cases += [case("measurement", "fail", now=now, policy={"measurements": ["00" * 48]})]
    manifest = evidence / "manifest.json"
    manifest.write_text(json.dumps([case("genuine", "pass", now=now), *cases]))
    program = "assert False; from casemate.cli.attestation import attestation; attestation()"
    command = [sys.executable, "-O", "-c", program, "verify", "--manifest", str(manifest), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    verdicts = [json.loads(line) for line in result.stdout.splitlines()]
    assert verdicts[0] == {"id": "genuine", "verdict": "accepted", "failed": []}
    assert [verdict["failed"] for verdict in verdicts[1:]] == [[verdict["id"]] for verdict in verdicts[1:]]
    assert len(verdicts) == 9
