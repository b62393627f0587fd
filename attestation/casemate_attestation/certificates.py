"""Certificates and revocation lists: what AMD's ARK, ASK, ASVK, VCEK and VLEK look like, and who signed whom.

Sources: AMD 57230, "VCEK Certificate and KDS Interface" (profiles and extensions);
AMD 58369 (VLEK); RFC 5280 (equal AlgorithmIdentifiers: 4.1.1.2; revocation lists: 5); RFC 4055 (RSASSA-PSS).

Bytes become facts in :func:`parse_certificate` and :func:`parse_crl`, which raise :class:`MalformedError` and nothing
else; the ``*_profile`` functions judge facts and raise :class:`VerificationError`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, NamedTuple

from casemate_schemas.errors import MalformedError, TooLargeError, VerificationError
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.utils import CryptographyDeprecationWarning

from .products import CHIP_ID_BYTES, PRODUCTS, Product, TcbVersion

MAX_CERTIFICATE_BYTES: Final = 16 << 10
MAX_CRL_BYTES: Final = 256 << 10

_PSS_SHA384: Final = bytes.fromhex(
    "304106092a864886f70d01010a3034a00f300d06096086480165030402020500a11c301a06092a864886f70d010108"
    "300d06096086480165030402020500a203020130"
)
"""RSASSA-PSS with SHA-384, MGF1 with SHA-384 and a salt of 48 bytes."""
_PSS_SHA384_TRAILER: Final = bytes.fromhex(
    "304606092a864886f70d01010a3039a00f300d06096086480165030402020500a11c301a06092a864886f70d010108"
    "300d06096086480165030402020500a203020130a303020101"
)
"""The same with the default trailer field written out, as in the certificates that AMD issued up to 2023."""

_INTEGER: Final = 0x02
_VERSION: Final = 0xA0
_TEXT: Final = (0x0C, 0x13)
"""UTF8String, PrintableString."""
_COMMON_NAME_OID: Final = bytes.fromhex("0603550403")

_AMD: Final = "1.3.6.1.4.1.3704.1"
STRUCT_VERSION: Final = f"{_AMD}.1"
PRODUCT_NAME: Final = f"{_AMD}.2"
HARDWARE_ID: Final = f"{_AMD}.4"
CSP_ID: Final = f"{_AMD}.5"
SPL: Final = {"bl": f"{_AMD}.3.1", "tee": f"{_AMD}.3.2", "snp": f"{_AMD}.3.3", "ucode": f"{_AMD}.3.8"}
SPL_FMC: Final = f"{_AMD}.3.9"
SPL_RESERVED: Final = tuple(f"{_AMD}.3.{number}" for number in (4, 5, 6, 7))

_SMALL_INTEGERS: Final = {bytes((2, 1, n) if n < 0x80 else (2, 2, 0, n)): n for n in range(256)}
"""The numbers from 0 to 255 by their DER INTEGER, of which there is one each."""

VekKind = Literal["vcek", "vlek"]
VEK_NAMES: Final[dict[str, VekKind]] = {"SEV-VCEK": "vcek", "SEV-VLEK": "vlek"}
INTERMEDIATE_PREFIX: Final[dict[VekKind, str]] = {"vcek": "SEV-", "vlek": "SEV-VLEK-"}

_SHA384: Final = SHA384()
_PSS: Final = padding.PSS(padding.MGF1(_SHA384), 48)

_warning_filters = threading.Lock()


class Certificate(NamedTuple):
    """The facts of one certificate, nothing judged yet. ``extensions`` maps a dotted OID to its raw value."""

    der: bytes
    version: x509.Version
    serial_number: int
    algorithm: bytes
    outer_algorithm: bytes
    tbs: bytes
    signature: bytes
    common_name: str | None
    subject: bytes
    issuer: bytes
    not_before: datetime
    not_after: datetime
    key: object
    basic_constraints: x509.BasicConstraints | None
    key_usage: x509.KeyUsage | None
    extensions: Mapping[str, bytes]
    unknown_critical: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VekFacts:
    """What a VEK certificate of the right profile says about its chip."""

    kind: VekKind
    product: Product
    tcb: TcbVersion
    hardware_id: bytes | None
    csp_id: str | None


@dataclass(frozen=True, slots=True)
class RevocationList:
    """The facts of one revocation list, nothing judged yet."""

    algorithm: bytes
    outer_algorithm: bytes
    tbs: bytes
    signature: bytes
    issuer: bytes
    last_update: datetime
    next_update: datetime | None
    revoked: frozenset[int]
    unknown_critical: tuple[str, ...]


# --- bytes to facts ---------------------------------------------------------------------------------------------------


def parse_certificate(der: bytes) -> Certificate:
    """The facts of one DER certificate.

    Raises :class:`TooLargeError` over 16 KiB and :class:`MalformedError` for whatever is not one X.509 certificate.
    """
    _bound(der, MAX_CERTIFICATE_BYTES)
    try:
        return _certificate_facts(der)
    except MalformedError:
        raise
    except Exception as error:  # the library's parser is lazy and raises many classes
        raise MalformedError(f"expected a DER certificate: {type(error).__name__}") from error


def parse_crl(der: bytes) -> RevocationList:
    """The facts of one DER revocation list. Raises as :func:`parse_certificate`, over 256 KiB."""
    _bound(der, MAX_CRL_BYTES)
    try:
        return _crl_facts(der)
    except MalformedError:
        raise
    except Exception as error:  # as above
        raise MalformedError(f"expected a DER revocation list: {type(error).__name__}") from error


def _certificate_facts(der: bytes) -> Certificate:
    parts = _certificate_parts(der)
    certificate = _load(der, parts.serial_number)
    basic: x509.BasicConstraints | None = None
    usage: x509.KeyUsage | None = None
    raw: dict[str, bytes] = {}
    unknown_critical: list[str] = []
    for extension in certificate.extensions:
        value = extension.value
        if type(value) is x509.UnrecognizedExtension:
            raw[extension.oid.dotted_string] = value.value
        elif type(value) is x509.BasicConstraints:
            basic = value
            continue
        elif type(value) is x509.KeyUsage:
            usage = value
            continue
        if extension.critical:
            unknown_critical.append(extension.oid.dotted_string)
    return Certificate(
        der=der,
        version=certificate.version,
        serial_number=parts.serial_number,
        algorithm=parts.algorithm,
        outer_algorithm=parts.outer_algorithm,
        tbs=parts.tbs,
        signature=certificate.signature,
        common_name=_common_name(parts.subject),
        subject=parts.subject,
        issuer=parts.issuer,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        key=certificate.public_key(),
        basic_constraints=basic,
        key_usage=usage,
        extensions=raw,
        unknown_critical=tuple(unknown_critical),
    )


def _crl_facts(der: bytes) -> RevocationList:
    crl = x509.load_der_x509_crl(der)
    parts = _crl_parts(der)
    return RevocationList(
        algorithm=parts.algorithm,
        outer_algorithm=parts.outer_algorithm,
        tbs=parts.tbs,
        signature=crl.signature,
        issuer=parts.issuer,
        last_update=crl.last_update_utc,
        next_update=crl.next_update_utc,
        revoked=frozenset(entry.serial_number for entry in crl),
        unknown_critical=tuple(ext.oid.dotted_string for ext in crl.extensions if ext.critical),
    )


def _load(der: bytes, serial_number: int) -> x509.Certificate:
    if serial_number > 0:
        return x509.load_der_x509_certificate(der)
    # Every VEK that AMD issues has serial number 0, which the library warns of.
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        return x509.load_der_x509_certificate(der)


def _bound(der: bytes, max_bytes: int) -> None:
    if len(der) > max_bytes:
        raise TooLargeError(f"expected at most {max_bytes} bytes, got {len(der)}")


class _Parts(NamedTuple):
    """Slices of a signed DER structure, as they stand in its file: a parser's view of them may hide a difference."""

    tbs: bytes
    algorithm: bytes
    outer_algorithm: bytes
    issuer: bytes
    subject: bytes
    serial_number: int


def _certificate_parts(der: bytes) -> _Parts:
    """RFC 5280, 4.1: version (which the first lacks), serial number, algorithm, issuer, validity, subject."""
    _, tbs, _ = _element(der, 0)
    _, number, outer = _element(der, tbs)
    tag, _, after = _element(der, number)
    if tag == _VERSION:
        number = after
    _, digits, algorithm = _element(der, number)
    _, _, issuer = _element(der, algorithm)
    _, _, validity = _element(der, issuer)
    _, _, subject = _element(der, validity)
    _, _, end = _element(der, subject)
    signature = _before_whole_bytes(der, outer)
    return _Parts(
        tbs=der[tbs:outer],
        algorithm=der[algorithm:issuer],
        outer_algorithm=der[outer:signature],
        issuer=der[issuer:validity],
        subject=der[subject:end],
        serial_number=int.from_bytes(der[digits:algorithm], "big", signed=True),
    )


def _crl_parts(der: bytes) -> _Parts:
    """RFC 5280, 5.1: version (the second has it), algorithm, issuer. A list has no subject and no number."""
    _, tbs, _ = _element(der, 0)
    _, algorithm, outer = _element(der, tbs)
    tag, _, after = _element(der, algorithm)
    if tag == _INTEGER:
        algorithm = after
    _, _, issuer = _element(der, algorithm)
    _, _, end = _element(der, issuer)
    signature = _before_whole_bytes(der, outer)
    return _Parts(der[tbs:outer], der[algorithm:issuer], der[outer:signature], der[issuer:end], b"", 0)


def _before_whole_bytes(der: bytes, algorithm: int) -> int:
    """Where the signature begins that follows the element at ``algorithm``: a BIT STRING of which no bit is left out.

    The library passes over the count of bits left out, which nobody signed: the same certificate would have several files.
    """
    _, _, start = _element(der, algorithm)
    _, bits, _ = _element(der, start)
    if der[bits] != 0:
        raise MalformedError("a signature that is not of whole bytes")
    return start


def _common_name(name: bytes) -> str | None:
    """The one common name in a DER ``Name``; None if there is none, or more than one. All its texts have to be texts."""
    found: list[str] = []
    _, rdn, end = _element(name, 0)
    while rdn < end:
        _, attribute, rdn = _element(name, rdn)
        while attribute < rdn:
            _, oid, attribute = _element(name, attribute)
            value = oid + 2 + name[oid + 1]  # the library reads no OID whose length is not short
            tag, start, stop = _element(name, value)
            text = name[start:stop].decode("utf-8") if tag in _TEXT else ""
            if name[oid:value] == _COMMON_NAME_OID:
                found.append(text)
    return found[0] if len(found) == 1 else None


def _element(der: bytes, offset: int) -> tuple[int, int, int]:
    """Tag, start and end of the contents of the DER element at ``offset``."""
    start = offset + 2
    length = der[offset + 1]
    if length >= 0x80:
        start += length & 0x7F
        length = int.from_bytes(der[offset + 2 : start], "big")
    end = start + length
    if end > len(der):
        raise MalformedError("a DER element ends outside its file")
    return der[offset], start, end


# --- facts judged -----------------------------------------------------------------------------------------------------


def vek_profile(vek: Certificate) -> VekFacts:
    """What a VCEK or VLEK certificate says. Raises :class:`VerificationError` where it departs from AMD's profile."""
    _signature_profile(vek)
    if not isinstance(vek.key, ec.EllipticCurvePublicKey) or not isinstance(vek.key.curve, ec.SECP384R1):
        raise VerificationError("expected a P-384 key in the VEK certificate")
    if vek.basic_constraints is not None and vek.basic_constraints.ca:
        raise VerificationError("expected a VEK certificate that signs no others")
    kind = VEK_NAMES.get(vek.common_name or "")
    if kind is None:
        raise VerificationError(f"expected common name SEV-VCEK or SEV-VLEK, got {vek.common_name!r}")
    product = _product_name(vek)
    return VekFacts(kind, product, _tcb(vek, product), _hardware_id(vek, kind, product), _csp_id(vek, kind))


def authority_profile(authority: Certificate, *, may_issue_crls: bool) -> None:
    """Raises :class:`VerificationError` unless ``authority`` has the profile of an ARK, ASK or ASVK."""
    _signature_profile(authority)
    key = authority.key
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != 4096 or key.public_numbers().e != 65537:
        raise VerificationError("expected an RSA key of 4096 bits with exponent 65537 in the authority's certificate")
    if authority.basic_constraints is None or not authority.basic_constraints.ca:
        raise VerificationError("expected a certificate that may sign others")
    usage = authority.key_usage
    if usage is not None and not (usage.key_cert_sign and (usage.crl_sign or not may_issue_crls)):
        raise VerificationError("expected key usage that covers signing certificates (and an ARK's lists)")


def crl_profile(crl: RevocationList) -> None:
    """Raises :class:`VerificationError` unless ``crl`` is a complete list, signed as AMD signs."""
    if crl.algorithm != crl.outer_algorithm or crl.algorithm not in (_PSS_SHA384, _PSS_SHA384_TRAILER):
        raise VerificationError("expected the list to name RSASSA-PSS with SHA-384, twice alike")
    if crl.unknown_critical:
        raise VerificationError(f"expected no critical extension in the list, got {', '.join(crl.unknown_critical)}")


def signed_by(tbs: bytes, signature: bytes, authority: Certificate) -> bool:
    """Whether ``authority``'s RSA key signed ``tbs``, by RSASSA-PSS with SHA-384 and a salt of 48 bytes."""
    if not isinstance(authority.key, rsa.RSAPublicKey):
        return False
    try:
        authority.key.verify(signature, tbs, _PSS, _SHA384)
    except InvalidSignature:
        return False
    return True


def _signature_profile(certificate: Certificate) -> None:
    if certificate.version is not x509.Version.v3:
        raise VerificationError("expected an X.509 version 3 certificate")
    if certificate.algorithm != certificate.outer_algorithm:
        raise VerificationError("expected the same AlgorithmIdentifier inside and outside the signed part")
    if certificate.algorithm not in (_PSS_SHA384, _PSS_SHA384_TRAILER):
        raise VerificationError("expected RSASSA-PSS with SHA-384 and a salt of 48 bytes")
    if certificate.unknown_critical:
        raise VerificationError(f"unknown critical extension {', '.join(certificate.unknown_critical)}")


def _extension(vek: Certificate, oid: str) -> bytes:
    value = vek.extensions.get(oid)
    if value is None:
        raise VerificationError(f"expected extension {oid} in the VEK certificate, got none")
    return value


def _small_integer(vek: Certificate, oid: str) -> int:
    """A DER INTEGER from 0 to 255, in its only encoding."""
    number = _SMALL_INTEGERS.get(vek.extensions.get(oid, b""))
    if number is None:
        raise VerificationError(f"expected a number from 0 to 255 in extension {oid} of the VEK certificate")
    return number


def _ia5(vek: Certificate, oid: str) -> str:
    value = _extension(vek, oid)
    text = value[2:]
    if (
        not 0 < len(text) < 0x80
        or value[:2] != bytes((0x16, len(text)))
        or not text.isascii()
        or not text.decode().isprintable()
    ):
        raise VerificationError(f"expected a printable IA5String in extension {oid}")
    return text.decode("ascii")


def _product_name(vek: Certificate) -> Product:
    if _small_integer(vek, STRUCT_VERSION) > 1:
        raise VerificationError("expected structure version 0 or 1 in the VEK certificate")
    name = _ia5(vek, PRODUCT_NAME)
    for product in PRODUCTS:
        if name.split("-", 1)[0] == product:  # "Milan" and "Milan-B0", the stepping, are the same product
            return product
    raise VerificationError(f"expected a product name of {', '.join(PRODUCTS)}, got {name!r}")


def _tcb(vek: Certificate, product: Product) -> TcbVersion:
    levels = {name: _small_integer(vek, oid) for name, oid in SPL.items()}
    if product == "Turin":
        levels["fmc"] = _small_integer(vek, SPL_FMC)
    elif SPL_FMC in vek.extensions:
        raise VerificationError(f"expected no FMC level in a certificate for {product}")
    if any(_small_integer(vek, oid) for oid in SPL_RESERVED if oid in vek.extensions):
        raise VerificationError("expected reserved security patch levels of 0")
    return TcbVersion(**levels)


def _hardware_id(vek: Certificate, kind: VekKind, product: Product) -> bytes | None:
    if kind == "vlek":
        if HARDWARE_ID in vek.extensions:
            raise VerificationError("expected no hwID in a VLEK certificate")
        return None
    value, size = _extension(vek, HARDWARE_ID), CHIP_ID_BYTES[product]
    if len(value) == size + 2 and value[:2] == bytes((4, size)):
        value = value[2:]  # some are wrapped in an OCTET STRING, most are bare
    if len(value) != size:
        raise VerificationError(f"expected a hwID of {size} bytes for {product}, got {len(value)}")
    return value


def _csp_id(vek: Certificate, kind: VekKind) -> str | None:
    if kind == "vlek":
        return _ia5(vek, CSP_ID)
    if CSP_ID in vek.extensions:
        raise VerificationError("expected no cloud provider in a VCEK certificate")
    return None
