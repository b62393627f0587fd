"""The Azure driver against TPMs that answer by script; a software TPM is asked in tests/integration/attestation."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from casemate_attestation.evidence import verify_evidence
from casemate_attestation.guest_vtpm import AzureGuest
from casemate_schemas.errors import (
    CasemateError,
    MalformedError,
    ParameterError,
    SetupError,
    TooLargeError,
    UnavailableError,
)
from casemate_schemas.evidence import Evidence
from support.vtpm import PCRS, RULES, Quoted, hcl_report, runtime_data, tpmt_signature

from .conftest import MEASUREMENT, REPORT_DATA, Bench
from .test_evidence import CLAIMS

PASSWORD = bytes.fromhex("00000009400000090000000000")


@dataclass
class ScriptedTpm:
    """A TPM that knows four commands, byte by byte."""

    blob: bytes
    values: tuple[bytes, ...] = PCRS
    quoted_values: tuple[bytes, ...] = PCRS
    registers_at_once: int = 8
    failures: dict[int, list[bytes]] = field(default_factory=dict)
    commands: list[int] = field(default_factory=list)

    def __call__(self, request: bytes) -> bytes:
        tag, size, command = struct.unpack_from(">HII", request)
        assert size == len(request)
        self.commands.append(command)
        if self.failures.get(command):
            return self.failures[command].pop(0)
        answer = {0x169: self.read_public, 0x14E: self.nv_read, 0x17E: self.pcr_read, 0x158: self.quote}[command]
        body = answer(request[10:])
        if tag == 0x8002:
            body = struct.pack(">I", len(body)) + body + bytes(5)
        return struct.pack(">HII", tag, 10 + len(body), 0) + body

    def read_public(self, body: bytes) -> bytes:
        assert body == struct.pack(">I", 0x01400001)
        public = body + struct.pack(">HIHH", 0x0B, 0x20002, 0, len(self.blob))
        return struct.pack(">H", len(public)) + public + bytes(2)

    def nv_read(self, body: bytes) -> bytes:
        assert body[:8] == struct.pack(">II", 0x40000001, 0x01400001) and body[8:21] == PASSWORD
        size, offset = struct.unpack(">HH", body[21:])
        assert size <= 512
        return struct.pack(">H", size) + self.blob[offset : offset + size]

    def pcr_read(self, body: bytes) -> bytes:
        assert body[:7] == struct.pack(">IHB", 1, 0x0B, 3)
        wanted = [index for index in range(24) if int.from_bytes(body[7:], "little") >> index & 1]
        given = wanted[: self.registers_at_once]
        bitmap = sum(1 << index for index in given).to_bytes(3, "little")
        values = b"".join(b"\0\x20" + self.values[index] for index in given)
        return bytes(4) + struct.pack(">IHB", 1, 0x0B, 3) + bitmap + struct.pack(">I", len(given)) + values

    def quote(self, body: bytes) -> bytes:
        assert body[:4] == struct.pack(">I", 0x81000003) and body[4:17] == PASSWORD
        size = struct.unpack_from(">H", body, 17)[0]
        assert body[19 + size :] == struct.pack(">HIHB", 0x0010, 1, 0x0B, 3) + b"\xff\xff\0"
        quote = Quoted(body[19 : 19 + size], values=self.quoted_values).attest()
        return struct.pack(">H", len(quote)) + quote + tpmt_signature(quote)


@pytest.fixture
def tpm(milan: Bench) -> ScriptedTpm:
    runtime = runtime_data()
    report_data = hashlib.sha256(runtime).digest() + bytes(32)
    return ScriptedTpm(hcl_report(milan.chip.launch(MEASUREMENT).attest(report_data).report, runtime))


@pytest.fixture
def guest(milan: Bench, tpm: ScriptedTpm) -> AzureGuest:
    return AzureGuest(lambda _: milan.chip.certificates, transport=tpm)


def test_evidence_is_accepted(milan: Bench, guest: AzureGuest) -> None:
    evidence = Evidence(claims=CLAIMS, components=(guest.attest(CLAIMS.report_data),))
    policy = milan.policy(evidence_types=(("sev-snp-vtpm",),), vtpm=RULES)
    verdict = verify_evidence(evidence, policy, milan.now)
    assert verdict.ok, str(verdict)


def test_the_certificates_are_those_of_the_report(milan: Bench, tpm: ScriptedTpm) -> None:
    asked: list[bytes] = []

    def source(report: bytes) -> tuple[bytes, bytes, bytes]:
        asked.append(report)
        return milan.chip.certificates

    component = AzureGuest(source, transport=tpm).attest(REPORT_DATA)
    assert asked == [component.report] == [tpm.blob[32:1216]]


def test_fewer_registers_at_once(guest: AzureGuest, tpm: ScriptedTpm) -> None:
    tpm.registers_at_once = 5
    assert tuple(value.digest for value in guest.attest(REPORT_DATA).pcrs) == PCRS
    assert tpm.commands.count(0x17E) == 4


def test_a_register_that_changes_meanwhile(guest: AzureGuest, tpm: ScriptedTpm) -> None:
    tpm.quoted_values = (b"\x77" * 32, *PCRS[1:])
    with pytest.raises(UnavailableError, match="changed"):
        guest.attest(REPORT_DATA)


def test_a_tpm_that_wants_the_command_again(guest: AzureGuest, tpm: ScriptedTpm) -> None:
    retry = struct.pack(">HII", 0x8001, 10, 0x922)
    tpm.failures = {0x158: [retry] * 2}
    guest.attest(REPORT_DATA)
    assert tpm.commands.count(0x158) == 3
    tpm.failures = {0x158: [retry] * 100}
    with pytest.raises(UnavailableError, match="0x922"):
        guest.attest(REPORT_DATA)


def raising(error: OSError) -> Callable[[bytes], bytes]:
    def transport(_: bytes) -> bytes:
        raise error

    return transport


@pytest.mark.parametrize(
    ("command", "answer", "error"),
    [
        (0x169, struct.pack(">HII", 0x8001, 10, 0x18B), SetupError),
        (0x158, struct.pack(">HII", 0x8001, 10, 0x18B), SetupError),
        (0x158, struct.pack(">HII", 0x8001, 10, 0x98E), UnavailableError),
        (0x169, b"", MalformedError),
        (0x169, struct.pack(">HII", 0x8001, 11, 0), MalformedError),
        (0x14E, struct.pack(">HII", 0x8001, 10, 0), MalformedError),
        (0x14E, struct.pack(">HIIIH", 0x8002, 16, 0, 2, 0), MalformedError),
        (0x14E, struct.pack(">HIII", 0x8002, 14, 0, 1 << 31), MalformedError),
        (0x169, struct.pack(">HII", 0x8001, 5000, 0) + bytes(4990), MalformedError),
        (0x169, struct.pack(">HIIHIHIHH", 0x8001, 26, 0, 14, 0x01400001, 0x0B, 0, 0, 65535), TooLargeError),
        (0x17E, struct.pack(">HIIIII", 0x8001, 22, 0, 0, 0, 0), UnavailableError),
        (0x17E, struct.pack(">HIIII", 0x8001, 18, 0, 0, 17), MalformedError),
        (0x17E, struct.pack(">HIIIIHB3sI", 0x8001, 28, 0, 0, 1, 0x0B, 3, b"\x03\0\0", 0), UnavailableError),
    ],
)
def test_answers_that_are_none(
    guest: AzureGuest, tpm: ScriptedTpm, command: int, answer: bytes, error: type[CasemateError]
) -> None:
    tpm.failures = {command: [answer]}
    with pytest.raises(error):
        guest.attest(REPORT_DATA)


def test_a_quote_that_is_none_and_a_value_that_is_none(guest: AzureGuest, tpm: ScriptedTpm) -> None:
    tpm.failures = {0x158: [struct.pack(">HIIIHs", 0x8002, 17, 0, 3, 1, b"x")]}
    with pytest.raises(MalformedError):
        guest.attest(REPORT_DATA)
    tpm.values = tpm.quoted_values = (bytes(32), b"\0" * 32, *PCRS[2:])
    tpm.blob = b"HCLA" + bytes(2000)
    with pytest.raises(MalformedError):
        guest.attest(REPORT_DATA)


def test_wrong_set_ups(milan: Bench, tmp_path: Path) -> None:
    def source(_: bytes) -> tuple[bytes, bytes, bytes]:
        return milan.chip.certificates

    with pytest.raises(SetupError, match="virtual TPM"):
        AzureGuest(source, tmp_path / "absent").attest(REPORT_DATA)
    with pytest.raises(ParameterError):
        AzureGuest(source, transport=raising(OSError())).attest(b"")
    with pytest.raises(UnavailableError):
        AzureGuest(source, transport=raising(OSError(5, "gone"))).attest(REPORT_DATA)


def test_a_source_of_certificates_that_gives_none(tpm: ScriptedTpm) -> None:
    with pytest.raises(MalformedError):
        AzureGuest(lambda _: (b"", b"", b""), transport=tpm).attest(REPORT_DATA)


def test_the_device_is_asked_command_by_command(tmp_path: Path, milan: Bench) -> None:
    """A file that is no TPM: it swallows the first command and answers nothing."""
    device = tmp_path / "tpmrm0"
    device.touch()
    with pytest.raises(MalformedError):
        AzureGuest(lambda _: milan.chip.certificates, device).attest(REPORT_DATA)
    assert device.read_bytes() == bytes.fromhex("80010000000e0000016901400001")
