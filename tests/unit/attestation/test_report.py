"""What are the bytes: the report's layout against AMD 56860's offsets."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from casemate_attestation.products import decode_tcb, encode_tcb, product_of_cpuid
from casemate_attestation.report import REPORT_BYTES, SIGNED_BYTES, AttestationReport, join_signature
from casemate_schemas.attestation_policy import Product, TcbVersion
from casemate_schemas.errors import MalformedError, UnsupportedVersionError

from .conftest import Bench

OFFSETS = {
    "guest_svn": (0x04, 4),
    "policy": (0x08, 8),
    "family_id": (0x10, 16),
    "image_id": (0x20, 16),
    "vmpl": (0x30, 4),
    "signature_algorithm": (0x34, 4),
    "current_tcb": (0x38, 8),
    "platform_info": (0x40, 8),
    "signer_info": (0x48, 4),
    "report_data": (0x50, 64),
    "measurement": (0x90, 48),
    "host_data": (0xC0, 32),
    "id_key_digest": (0xE0, 48),
    "author_key_digest": (0x110, 48),
    "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32),
    "reported_tcb": (0x180, 8),
    "cpuid_family": (0x188, 1),
    "cpuid_model": (0x189, 1),
    "cpuid_stepping": (0x18A, 1),
    "chip_id": (0x1A0, 64),
    "committed_tcb": (0x1E0, 8),
    "launch_tcb": (0x1F0, 8),
    "launch_mitigations": (0x1F8, 8),
    "current_mitigations": (0x200, 8),
    "signature_r": (0x2A0, 72),
    "signature_s": (0x2E8, 72),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_field_offsets(name: str) -> None:
    offset, size = OFFSETS[name]
    data = bytearray(REPORT_BYTES)
    data[0] = 5
    value = bytes(range(1, size + 1))
    data[offset : offset + size] = value
    parsed = AttestationReport.parse(bytes(data))
    expected = value if isinstance(getattr(parsed, name), bytes) else int.from_bytes(value, "little")
    assert getattr(parsed, name) == expected
    untouched = [getattr(parsed, other) for other in OFFSETS if other != name]
    assert not any(any(value) if isinstance(value, bytes) else value for value in untouched)


def test_firmware_is_stored_build_first() -> None:
    data = bytearray(REPORT_BYTES)
    data[0] = 3
    data[0x1E8:0x1EB] = bytes((40, 55, 1))
    data[0x1EC:0x1EF] = bytes((39, 54, 2))
    parsed = AttestationReport.parse(bytes(data))
    assert parsed.current_firmware == (1, 55, 40)
    assert parsed.committed_firmware == (2, 54, 39)


def test_body_is_parsed_back(milan: Bench) -> None:
    body = milan.body(guest_svn=7, vmpl=3, launch_mitigations=1 << 63, current_firmware=(1, 2, 3))
    parsed = AttestationReport.parse(join_signature(body, 5, 6))
    assert parsed.body() == body == parsed.signed
    assert (parsed.guest_svn, parsed.vmpl, parsed.current_firmware) == (7, 3, (1, 2, 3))
    assert (parsed.signature_r[0], parsed.signature_s[0]) == (5, 6)
    again = replace(parsed, report_data=bytes(64)).body()
    assert len(again) == SIGNED_BYTES
    assert again != body


def test_every_field_is_covered() -> None:
    derived = {"version", "current_firmware", "committed_firmware", "reserved", "signed"}
    assert {field.name for field in fields(AttestationReport)} == set(OFFSETS) | derived


@pytest.mark.parametrize("size", [0, 1, SIGNED_BYTES, REPORT_BYTES - 1, REPORT_BYTES + 1, 2 * REPORT_BYTES])
def test_other_lengths_are_malformed(size: int) -> None:
    with pytest.raises(MalformedError, match=f"1184 bytes, got {size}"):
        AttestationReport.parse(b"\2\0\0\0".ljust(size, b"\0")[:size])


@pytest.mark.parametrize("version", [0, 1, 6, 0x02000000])
def test_other_versions_are_unsupported(version: int) -> None:
    with pytest.raises(UnsupportedVersionError):
        AttestationReport.parse(version.to_bytes(4, "little").ljust(REPORT_BYTES, b"\0"))


@pytest.mark.parametrize(
    ("product", "raw"),
    [("Milan", "0403000000000201"), ("Genoa", "0403000000000201"), ("Turin", "0504030200000001")],
)
def test_tcb_layouts(product: Product, raw: str) -> None:
    tcb = TcbVersion(fmc=5 if product == "Turin" else 0, bl=4, tee=3, snp=2, ucode=1)
    assert decode_tcb(bytes.fromhex(raw), product) == tcb
    assert encode_tcb(tcb, product) == bytes.fromhex(raw)


def test_cpuid() -> None:
    known = {(0x19, 0x01): "Milan", (0x19, 0x11): "Genoa", (0x19, 0xA0): "Genoa", (0x1A, 0x02): "Turin"}
    for cpuid, product in known.items():
        assert product_of_cpuid(*cpuid) == product
    for cpuid in [(0x17, 0x31), (0x19, 0x21), (0x1A, 0x44), (0, 0)]:
        assert product_of_cpuid(*cpuid) is None
