"""``casemate attestation fetch`` against a key distribution service on this machine: what it writes serves offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from casemate.cli.attestation import attestation
from casemate_attestation.kds import KdsClient, roots_of
from casemate_schemas.codec import encode
from casemate_schemas.errors import SetupError, UnavailableError
from click.testing import CliRunner
from support.kds import SimulatedKds, serve
from support.key_brokers import Bench, authority, chip


def test_fetch_then_verify_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, report, chain, out = Bench(tmp_path), tmp_path / "report.bin", tmp_path / "chain", tmp_path / "kds"
    component = chip().launch(bytes(48)).attest(bytes(64))
    report.write_bytes(component.report)
    chain.write_bytes(encode(bench.chain))
    with serve(SimulatedKds((authority(), chip())), tmp_path) as served:
        arguments = ["fetch", str(report), "--out", str(out), "--url", served.url, "--interval-s", "0"]
        untrusted = CliRunner().invoke(attestation, [*arguments, "--manifest", str(chain)])
        assert isinstance(untrusted.exception, UnavailableError), untrusted.output
        monkeypatch.setenv("SSL_CERT_FILE", str(served.ca_file))
        assert isinstance(CliRunner().invoke(attestation, arguments).exception, UnavailableError)  # not AMD's roots
        fetched = CliRunner().invoke(attestation, [*arguments, "--manifest", str(chain)])
    assert fetched.exit_code == 0, fetched.output
    command = fetched.stdout.splitlines()[-1].split()
    assert command[:2] == ["casemate", "attestation"]
    verified = CliRunner().invoke(attestation, command[2:])
    assert (verified.exit_code, "✓ revocation" in verified.stdout) == (0, True), verified.output

    roots = roots_of(bench.consortium.manifest.attestation)
    assert KdsClient(out, roots).certificates(component.report) == component.certificates
    assert KdsClient(out, roots).cached_crl("Milan") == (out / "crl_milan.der").read_bytes()
    with pytest.raises(SetupError):
        KdsClient(tmp_path / "empty", roots).certificates(component.report)
