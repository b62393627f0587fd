"""What the bytes of Azure's paravisor are: its report in the virtual TPM, and the runtime data that the report covers.

The paravisor ("HCL", host compatibility layer; since OpenHCL an open-source one) runs at VMPL 0, holds the virtual TPM
and leaves its report at NV index 0x01400001. Sources: Microsoft Learn, *Azure confidential VM guest attestation
design*; OpenHCL, ``openhcl_attestation_protocol`` (``igvm_attest/get.rs``). All integers are little-endian.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
from dataclasses import dataclass
from typing import Any, Final, Self

from casemate_schemas.errors import MalformedError
from casemate_schemas.evidence import MAX_RUNTIME_DATA_BYTES
from cryptography.hazmat.primitives.asymmetric import rsa

from .report import REPORT_BYTES

_HEADER = struct.Struct("<4s7I")
_REQUEST = struct.Struct("<5I")
_REPORT_TYPE_SNP: Final = 2
_HASH_TYPE_SHA256: Final = 1
_AK_KEY_ID: Final = "HCLAkPub"
_KEY_BITS = range(2048, 4097)
_BASE64URL = re.compile(r"[A-Za-z0-9_-]{1,1024}")

MAX_HCL_REPORT_BYTES: Final = _HEADER.size + REPORT_BYTES + _REQUEST.size + MAX_RUNTIME_DATA_BYTES


@dataclass(frozen=True, slots=True)
class HclReport:
    """The SEV-SNP report that the paravisor had made, and the bytes whose SHA-256 is in its REPORT_DATA."""

    report: bytes
    runtime_data: bytes

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The report in an NV index, which may be longer. Raises :class:`MalformedError` for anything else."""
        start = _HEADER.size + REPORT_BYTES
        if len(data) < start + _REQUEST.size or data[:4] != b"HCLA":
            raise MalformedError("expected a paravisor's report, which starts with HCLA")
        _, _, report_type, hash_type, size = _REQUEST.unpack_from(data, start)
        if (report_type, hash_type) != (_REPORT_TYPE_SNP, _HASH_TYPE_SHA256):
            raise MalformedError(f"expected an SEV-SNP report and SHA-256, got types {report_type} and {hash_type}")
        runtime_data = data[start + _REQUEST.size :][:size]
        if not 0 < size <= MAX_RUNTIME_DATA_BYTES or len(runtime_data) != size:
            raise MalformedError(f"expected 1 to {MAX_RUNTIME_DATA_BYTES} bytes of runtime data, got {size} announced")
        return cls(data[_HEADER.size : start], runtime_data)


def expected_report_data(runtime_data: bytes) -> bytes:
    """The REPORT_DATA of a report that covers ``runtime_data``: SHA-256, then 32 zero bytes."""
    return hashlib.sha256(runtime_data).digest() + bytes(32)


def attestation_key(runtime_data: bytes) -> rsa.RSAPublicKey:
    """The virtual TPM's attestation key in the runtime data: the only JSON Web Key with the id "HCLAkPub" (RFC 7517).

    Its ``key_ops`` are not looked at: older paravisors say "encrypt" of this signing key.

    Raises :class:`MalformedError` unless there is exactly one, RSA with 2048 to 4096 bits and the exponent 65537.
    """
    keys = _object(runtime_data).get("keys")
    candidates = [key for key in keys if isinstance(key, dict)] if isinstance(keys, list) else []
    found = [key for key in candidates if key.get("kid") == _AK_KEY_ID]
    if len(found) != 1:
        raise MalformedError(f"expected one key {_AK_KEY_ID}, got {len(found)}")
    if found[0].get("kty") != "RSA":
        raise MalformedError(f"expected an RSA key {_AK_KEY_ID}")
    modulus, exponent = _number(found[0].get("n")), _number(found[0].get("e"))
    bits = modulus.bit_length()
    if bits not in _KEY_BITS or not modulus & 1 or exponent != 65537:
        raise MalformedError(f"expected an odd modulus of 2048 to 4096 bits and 65537, got {bits} bits and {exponent}")
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError as error:
        raise MalformedError("expected an RSA public key") from error


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise MalformedError("expected runtime data in JSON, each name once in its object") from error
    if not isinstance(value, dict):
        raise MalformedError("expected a JSON object of runtime data")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return names


def _number(value: object) -> int:
    if not isinstance(value, str) or not _BASE64URL.fullmatch(value):
        raise MalformedError("expected a number in base64url")
    try:
        return int.from_bytes(base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)), "big")
    except ValueError as error:
        raise MalformedError("expected a number in base64url") from error
