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
from typing import Final, Literal, cast

from casemate_schemas.errors import MalformedError, TooLargeError, VerificationError
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID

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

_AMD: Final = "1.3.6.1.4.1.3704.1"
STRUCT_VERSION: Final = f"{_AMD}.1"
PRODUCT_NAME: Final = f"{_AMD}.2"
HARDWARE_ID: Final = f"{_AMD}.4"
CSP_ID: Final = f"{_AMD}.5"
SPL: Final = {"bl": f"{_AMD}.3.1", "tee": f"{_AMD}.3.2", "snp": f"{_AMD}.3.3", "ucode": f"{_AMD}.3.8"}
SPL_FMC: Final = f"{_AMD}.3.9"
SPL_RESERVED: Final = tuple(f"{_AMD}.3.{number}" for number in (4, 5, 6, 7))

VekKind = Literal["vcek", "vlek"]
VEK_NAMES: Final[dict[str, VekKind]] = {"SEV-VCEK": "vcek", "SEV-VLEK": "vlek"}
INTERMEDIATE_PREFIX: Final[dict[VekKind, str]] = {"vcek": "SEV-", "vlek": "SEV-VLEK-"}

_warning_filters = threading.Lock()


@dataclass(frozen=True, slots=True)
class Certificate:
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
class Chain:
    """The certificates of one report, leaf first: VEK (VCEK or VLEK), intermediate (ASK or ASVK), ARK."""

    vek: Certificate
    intermediate: Certificate
    ark: Certificate


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
    certificate, serial_number = _load(der)
    algorithm, outer = _algorithm_identifiers(der, version_tag=0xA0, skip=1)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    extensions = {extension.oid.dotted_string: extension for extension in certificate.extensions}
    raw = {
        oid: extension.value.value
        for oid, extension in extensions.items()
        if isinstance(extension.value, x509.UnrecognizedExtension)
    }
    basic = extensions.get(x509.BasicConstraints.oid.dotted_string)
    usage = extensions.get(x509.KeyUsage.oid.dotted_string)
    known = {x509.BasicConstraints.oid.dotted_string, x509.KeyUsage.oid.dotted_string}
    return Certificate(
        der=der,
        version=certificate.version,
        serial_number=serial_number,
        algorithm=algorithm,
        outer_algorithm=outer,
        tbs=certificate.tbs_certificate_bytes,
        signature=certificate.signature,
        common_name=str(names[0].value) if len(names) == 1 else None,
        subject=certificate.subject.public_bytes(),
        issuer=certificate.issuer.public_bytes(),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        key=certificate.public_key(),
        basic_constraints=cast(x509.BasicConstraints, basic.value) if basic else None,
        key_usage=cast(x509.KeyUsage, usage.value) if usage else None,
        extensions=raw,
        unknown_critical=tuple(oid for oid, ext in extensions.items() if ext.critical and oid not in known),
    )


def _crl_facts(der: bytes) -> RevocationList:
    crl = x509.load_der_x509_crl(der)
    algorithm, outer = _algorithm_identifiers(der, version_tag=0x02, skip=0)
    return RevocationList(
        algorithm=algorithm,
        outer_algorithm=outer,
        tbs=crl.tbs_certlist_bytes,
        signature=crl.signature,
        issuer=crl.issuer.public_bytes(),
        last_update=crl.last_update_utc,
        next_update=crl.next_update_utc,
        revoked=frozenset(entry.serial_number for entry in crl),
        unknown_critical=tuple(ext.oid.dotted_string for ext in crl.extensions if ext.critical),
    )


def _load(der: bytes) -> tuple[x509.Certificate, int]:
    # Every VEK that AMD issues has serial number 0, which the library warns of.
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        certificate = x509.load_der_x509_certificate(der)
        return certificate, certificate.serial_number


def _bound(der: bytes, max_bytes: int) -> None:
    if len(der) > max_bytes:
        raise TooLargeError(f"expected at most {max_bytes} bytes, got {len(der)}")


def _algorithm_identifiers(der: bytes, *, version_tag: int, skip: int) -> tuple[bytes, bytes]:
    """The signed (inner) and the unsigned (outer) AlgorithmIdentifier, as bytes: parsers may hide a difference."""
    _, start, _ = _element(der, 0)
    _, position, tbs_end = _element(der, start)
    tag, _, end = _element(der, position)
    if tag == version_tag:
        position = end
    for _ in range(skip):
        position = _element(der, position)[2]
    return der[position : _element(der, position)[2]], der[tbs_end : _element(der, tbs_end)[2]]


def _element(der: bytes, offset: int) -> tuple[int, int, int]:
    """Tag, start and end of the contents of the DER element at ``offset``."""
    tag, first = der[offset], der[offset + 1]
    start = offset + 2
    length = first
    if first >= 0x80:
        start += first & 0x7F
        length = int.from_bytes(der[offset + 2 : start], "big")
    if start + length > len(der):
        raise MalformedError("a DER element ends outside its file")
    return tag, start, start + length


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
        authority.key.verify(signature, tbs, padding.PSS(padding.MGF1(SHA384()), 48), SHA384())
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
    value = _extension(vek, oid)
    number = int.from_bytes(value[2:], "big")
    canonical = bytes((2, 1, number)) if number < 0x80 else bytes((2, 2, 0, number & 0xFF))
    if number > 255 or value != canonical:
        raise VerificationError(f"expected a number from 0 to 255 in extension {oid}")
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
