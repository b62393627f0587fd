"""A paravisor and its virtual TPM made by hand, byte by byte, so that each test can break one thing."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from casemate_schemas.attestation_policy import PcrRule, VtpmRules
from casemate_schemas.evidence import PcrValue, SevSnpVtpm
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

PCRS = tuple(bytes([index]) * 32 for index in range(16))
RULES = VtpmRules(pcrs=(PcrRule(index=4, digests=(b"\xee" * 32, PCRS[4])), PcrRule(index=9, digests=(PCRS[9],))))

Attest = Callable[[bytes], tuple[bytes, tuple[bytes, bytes, bytes]]]
"""Given REPORT_DATA: a report and its certificates."""


@cache
def attestation_key() -> rsa.RSAPrivateKey:
    """Made once: it takes a while."""
    return rsa.generate_private_key(65537, 2048)


def base64url(number: int) -> str:
    """A number as JSON Web Keys write it."""
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwk(public: rsa.RSAPublicKey, **changed: Any) -> dict[str, Any]:
    """The paravisor's entry for its attestation key."""
    numbers = public.public_numbers()
    return {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": "AQAB", "n": base64url(numbers.n)} | changed


def runtime_data(*keys: dict[str, Any]) -> bytes:
    """The paravisor's JSON."""
    ours = keys or (jwk(attestation_key().public_key()), {"kid": "HCLEkPub", "kty": "RSA", "e": "AQAB", "n": "AQAB"})
    return json.dumps({"keys": list(ours), "vm-configuration": {"secure-boot": True}}).encode()


def hcl_report(report: bytes, runtime: bytes, *, report_type: int = 2, hash_type: int = 1) -> bytes:
    """What stands in the NV index, with a tail of zeros as Azure has it."""
    header = b"HCLA" + struct.pack("<7I", 2, 1184 + 20 + len(runtime), 2, 0, 0, 0, 0)
    request = struct.pack("<5I", 20 + len(runtime), 1, report_type, hash_type, len(runtime))
    return header + report + request + runtime + bytes(100)


@dataclass
class Quoted:
    """The fields of a quote, which :meth:`attest` marshals."""

    nonce: bytes
    values: tuple[bytes, ...] = PCRS
    magic: int = 0xFF544347
    kind: int = 0x8018
    banks: tuple[tuple[int, tuple[int, ...]], ...] = ((0x0B, tuple(range(16))),)
    digest: bytes | None = None
    tail: bytes = b""

    def attest(self) -> bytes:
        """TPMS_ATTEST."""
        digest = hashlib.sha256(b"".join(self.values)).digest() if self.digest is None else self.digest
        data = struct.pack(">IH", self.magic, self.kind) + _sized(b"\x00\x0b" + bytes(32)) + _sized(self.nonce)
        data += struct.pack(">QIIBQ", 1, 2, 3, 1, 4) + struct.pack(">I", len(self.banks))
        for algorithm, indices in self.banks:
            data += struct.pack(">HB", algorithm, 3) + sum(1 << index for index in indices).to_bytes(3, "little")
        return data + _sized(digest) + self.tail


def tpmt_signature(data: bytes, *, pss: bool = False, hash_algorithm: int = 0x0B) -> bytes:
    """TPMT_SIGNATURE by the attestation key."""
    scheme = padding.PSS(padding.MGF1(SHA256()), 32) if pss else padding.PKCS1v15()
    value = attestation_key().sign(data, scheme, SHA256())
    return struct.pack(">HH", 0x16 if pss else 0x14, hash_algorithm) + _sized(value)


@dataclass
class Paravisor:
    """A guest whose evidence is right."""

    attest: Attest
    runtime: bytes = field(default_factory=runtime_data)

    def component(self, report_data: bytes, quoted: Quoted | None = None, **changed: Any) -> SevSnpVtpm:
        """Evidence over ``report_data``, from a quote with other fields perhaps, with some fields of its own changed."""
        quote = (quoted or Quoted(hashlib.sha256(report_data).digest())).attest()
        report, certificates = self.attest(hashlib.sha256(self.runtime).digest() + bytes(32))
        fields: dict[str, Any] = {
            "report": report,
            "certificates": certificates,
            "runtime_data": self.runtime,
            "quote": quote,
            "signature": tpmt_signature(quote),
            "pcrs": pcr_values(PCRS),
        }
        return SevSnpVtpm(**(fields | changed))


def pcr_values(values: tuple[bytes, ...]) -> tuple[PcrValue, ...]:
    """Registers from 0 on."""
    return tuple(PcrValue(index=index, digest=value) for index, value in enumerate(values))


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data
