"""Guest drivers against a fake configfs tree and hostile certificate tables."""

from __future__ import annotations

import os
import shutil
import ssl
import struct
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from casemate_attestation.appraise import verify_and_appraise
from casemate_attestation.guest import ConfigfsGuest, certificates_of_table
from casemate_schemas.errors import MalformedError, ParameterError, SetupError, UnavailableError

from .conftest import REPORT_DATA, Bench

VCEK = "63da758d-e664-4564-adc5-f4b93be8accd"
VLEK = "a8074bc2-a25a-483e-aae6-39c045a0b8a1"
ASK = "4ab7b379-bbac-4fe4-a02f-05aef327c782"
ARK = "c0b406a4-a803-4952-9743-3fb6014cd0ae"


def table_of(certificates: dict[str, bytes]) -> bytes:
    """A certificate table as the GHCB specification lays it out."""
    offset = 24 * (len(certificates) + 1)
    head, tail = b"", b""
    for guid, certificate in certificates.items():
        head += UUID(guid).bytes + struct.pack("<II", offset + len(tail), len(certificate))
        tail += certificate
    return head + bytes(24) + tail


@pytest.fixture
def configfs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """A folder in which each new directory appears with these files, and vanishes whole, as configfs does."""

    def prepare(files: dict[str, bytes]) -> Path:
        mkdir = Path.mkdir

        def appear(path: Path) -> None:
            mkdir(path)
            for name, content in files.items():
                (path / name).write_bytes(content)

        monkeypatch.setattr(Path, "mkdir", appear)
        monkeypatch.setattr(Path, "rmdir", lambda path: shutil.rmtree(path))
        return tmp_path

    return prepare


def entry(bench: Bench) -> dict[str, bytes]:
    vek, ask, ark = bench.chip.certificates
    return {
        "provider": b"sev_guest\n",
        "generation": b"1\n",
        "outblob": bench.report(),
        "auxblob": table_of({VCEK: vek, ASK: ask, ARK: ark}),
    }


def test_configfs_evidence_is_accepted(milan: Bench, configfs: Callable[[dict[str, bytes]], Path]) -> None:
    folder = configfs(entry(milan))
    attested = ConfigfsGuest(folder).attest(REPORT_DATA)
    policy = milan.policy()
    assert verify_and_appraise(attested.report, attested.certificates, policy, REPORT_DATA, milan.now).ok
    assert list(folder.iterdir()) == []


def test_a_source_of_certificates_goes_before_the_hosts(
    milan: Bench, configfs: Callable[[dict[str, bytes]], Path]
) -> None:
    asked: list[bytes] = []

    def source(report: bytes) -> tuple[bytes, bytes, bytes]:
        asked.append(report)
        return milan.chip.certificates

    files = entry(milan) | {"auxblob": b""}
    attested = ConfigfsGuest(configfs(files), source).attest(REPORT_DATA)
    assert (asked, attested.certificates) == ([files["outblob"]], milan.chip.certificates)


def test_a_source_that_gives_no_certificates(milan: Bench, configfs: Callable[[dict[str, bytes]], Path]) -> None:
    with pytest.raises(MalformedError):
        ConfigfsGuest(configfs(entry(milan)), lambda _: (b"", b"", b"")).attest(REPORT_DATA)


def test_configfs_gets_the_report_data(
    milan: Bench, configfs: Callable[[dict[str, bytes]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    folder = configfs(entry(milan))
    monkeypatch.setattr(
        Path, "rmdir", lambda path: (written.append((path / "inblob").read_bytes()), shutil.rmtree(path))
    )
    ConfigfsGuest(folder).attest(REPORT_DATA)
    assert written == [REPORT_DATA]


def test_another_provider_is_refused(milan: Bench, configfs: Callable[[dict[str, bytes]], Path]) -> None:
    folder = configfs(entry(milan) | {"provider": b"tdx_guest\n"})
    with pytest.raises(SetupError, match="tdx_guest"):
        ConfigfsGuest(folder).attest(REPORT_DATA)
    assert list(folder.iterdir()) == []


def test_a_machine_without_a_chip(tmp_path: Path) -> None:
    with pytest.raises(SetupError):
        ConfigfsGuest(tmp_path / "absent").attest(REPORT_DATA)
    with pytest.raises(ParameterError):
        ConfigfsGuest(tmp_path / "absent").attest(b"")


def test_a_chip_that_gives_no_report_is_unavailable(milan: Bench, configfs: Callable[[dict[str, bytes]], Path]) -> None:
    files = entry(milan)
    del files["outblob"]
    folder = configfs(files)
    with pytest.raises(UnavailableError):
        ConfigfsGuest(folder).attest(REPORT_DATA)
    assert list(folder.iterdir()) == []


def test_certificate_table(milan: Bench) -> None:
    vek, ask, ark = milan.chip.certificates
    assert certificates_of_table(table_of({ARK: ark, VCEK: vek, ASK: ask})) == (vek, ask, ark)
    assert certificates_of_table(table_of({VLEK: vek, ASK: ask, ARK: ark})) == (vek, ask, ark)
    pem = ssl.DER_cert_to_PEM_cert(ask).encode()
    assert certificates_of_table(table_of({VCEK: vek, ASK: pem, ARK: ark})) == (vek, ask, ark)


def test_a_table_that_lacks_a_certificate(milan: Bench) -> None:
    vek, ask, _ = milan.chip.certificates
    for table in (table_of({VCEK: vek, ASK: ask}), bytes(24)):
        with pytest.raises(SetupError):
            certificates_of_table(table)


@pytest.mark.parametrize(
    "table",
    [
        b"",
        bytes(23),
        UUID(VCEK).bytes + struct.pack("<II", 24, 1),
        UUID(VCEK).bytes + struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF) + bytes(24),
        UUID(VCEK).bytes * 2000,
        table_of({VCEK: b"\0", ASK: b"-----BEGIN nothing", ARK: b"\0"}),
    ],
)
def test_hostile_tables_are_malformed(table: bytes) -> None:
    with pytest.raises(MalformedError):
        certificates_of_table(table)


def test_tables_at_random_raise_nothing_else() -> None:
    for size in range(0, 400, 7):
        with pytest.raises((MalformedError, SetupError)):
            certificates_of_table(os.urandom(size))
