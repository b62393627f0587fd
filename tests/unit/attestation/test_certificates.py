"""The facts of a certificate, where parsers differ."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from casemate_attestation.certificates import parse_certificate, parse_crl, vek_profile
from casemate_schemas.errors import MalformedError, VerificationError
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from .conftest import Bench

CN, ORG = NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME


def certificate(*rdns: list[tuple[x509.ObjectIdentifier, str]], serial_number: int = 7) -> bytes:
    name = x509.Name([x509.RelativeDistinguishedName([x509.NameAttribute(*a) for a in rdn]) for rdn in rdns])
    key = ec.generate_private_key(ec.SECP384R1())
    builder = x509.CertificateBuilder(name, name, key.public_key(), serial_number)
    builder = builder.not_valid_before(datetime(2026, 1, 1, tzinfo=UTC)).not_valid_after(
        datetime(2027, 1, 1, tzinfo=UTC)
    )
    return builder.sign(key, SHA384()).public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    ("rdns", "common_name"),
    [
        ([[(CN, "SEV-VCEK")]], "SEV-VCEK"),
        ([[(ORG, "x" * 60)], [(CN, "SEV-VCEK")], [(ORG, "SEV-VLEK")]], "SEV-VCEK"),
        ([[(ORG, "SEV-VLEK"), (CN, "SEV-VCEK")]], "SEV-VCEK"),
        ([[(CN, "ÆÖ")]], "ÆÖ"),
        ([[(ORG, "\x06\x03\x55\x04\x03\x0c\x08SEV-VCEK")]], None),
        ([[(CN, "SEV-VCEK")], [(CN, "SEV-VLEK")]], None),
        ([[(CN, "SEV-VCEK"), (CN, "SEV-VLEK")]], None),
        ([], None),
    ],
)
def test_one_common_name(rdns: list[list[tuple[x509.ObjectIdentifier, str]]], common_name: str | None) -> None:
    der = certificate(*rdns)
    parsed = parse_certificate(der)
    assert parsed.common_name == common_name
    assert parsed.subject == parsed.issuer == x509.load_der_x509_certificate(der).subject.public_bytes()


@pytest.mark.parametrize("serial_number", [1, 127, 128, 0xFFFF, (1 << 159) - 1])
def test_slices_are_the_librarys(serial_number: int) -> None:
    der = certificate([(CN, "a")], serial_number=serial_number)
    parsed, theirs = parse_certificate(der), x509.load_der_x509_certificate(der)
    assert parsed.serial_number == theirs.serial_number == serial_number
    assert parsed.tbs == theirs.tbs_certificate_bytes
    assert parsed.algorithm == parsed.outer_algorithm
    assert parsed.signature == theirs.signature


def test_a_text_that_is_none() -> None:
    der = certificate([(ORG, "Casemate")], [(CN, "SEV-VCEK")])
    for old in (b"Casemate", b"SEV-VCEK"):
        with pytest.raises(MalformedError):
            parse_certificate(der.replace(old, b"\xff" + old[1:]))


def test_a_certificate_of_the_first_version(milan: Bench) -> None:
    """Its fields stand one place earlier; no profile takes it."""
    vek = milan.chip.certificates[0]
    version = bytes.fromhex("a003020102")
    at = vek.index(version)
    assert (vek[:2], vek[4:6], at) == (b"\x30\x82", b"\x30\x82", 8)
    outer, tbs = (int.from_bytes(vek[start : start + 2], "big") - len(version) for start in (2, 6))
    first = b"\x30\x82" + outer.to_bytes(2, "big") + b"\x30\x82" + tbs.to_bytes(2, "big") + vek[at + len(version) :]
    assert parse_certificate(first).serial_number == 1
    with pytest.raises(VerificationError, match="version 3"):
        vek_profile(parse_certificate(first))


def with_bits_left_out(der: bytes) -> bytes:
    """The same certificate or list, whose RSA signature ends four zero bits earlier: it must end with them."""
    assert der[-514:-512] == b"\x01\x00" and not der[-1] & 0x0F  # the length's last byte, and no bits left out
    return der[:-513] + b"\x04" + der[-512:]


def ending_with_zero_bits(issue: Callable[[], bytes]) -> bytes:
    """One in sixteen does: signatures are salted."""
    return next(der for der in iter(issue, None) if not der[-1] & 0x0F)


def test_a_signature_is_of_whole_bytes(milan: Bench) -> None:
    """Nobody signs how many bits of a signature count, and the library does not ask."""
    vek = ending_with_zero_bits(lambda: milan.authority.issue_chip().certificates[0])
    assert x509.load_der_x509_certificate(with_bits_left_out(vek)).signature == parse_certificate(vek).signature
    with pytest.raises(MalformedError, match="whole bytes"):
        parse_certificate(with_bits_left_out(vek))
    crl = ending_with_zero_bits(milan.authority.issue_crl)
    assert parse_crl(crl).signature == x509.load_der_x509_crl(with_bits_left_out(crl)).signature
    with pytest.raises(MalformedError, match="whole bytes"):
        parse_crl(with_bits_left_out(crl))
