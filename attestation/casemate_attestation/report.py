"""What are the bytes: the 1184-byte SEV-SNP attestation report, versions 2 to 5.

Source: AMD 56860, table "ATTESTATION_REPORT structure"; all integers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from casemate_schemas.errors import MalformedError, UnsupportedVersionError

REPORT_BYTES: Final = 1184
SIGNED_BYTES: Final = 0x2A0
VERSIONS: Final = range(2, 6)
ECDSA_P384_SHA384: Final = 1

_BODY = struct.Struct("<IIQ16s16sII8sQI4s64s48s32s48s48s32s32s8s3B21s64s8s3BB3BB8sQQ152s")
_SIGNATURE = struct.Struct("<72s72s368s")

_POLICY_RESERVED_ONE = 1 << 17
_POLICY_RESERVED_ZERO = ~((1 << 26) - 1)
_PLATFORM_RESERVED_ZERO = ~((1 << 8) - 1)
_SIGNER_RESERVED_ZERO = ~((1 << 5) - 1)

SigningKey = Literal["vcek", "vlek"]
_SIGNING_KEYS: dict[int, SigningKey] = {0: "vcek", 1: "vlek"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationReport:
    """One parsed report. Every field has its length by construction; nothing here says that it is genuine.

    TCB versions stay 8 raw bytes, since their layout depends on the product. Firmware versions are
    (major, minor, build). ``reserved`` names each reserved field that is not as the specification demands.
    """

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algorithm: int
    current_tcb: bytes
    platform_info: int
    signer_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid_family: int
    cpuid_model: int
    cpuid_stepping: int
    chip_id: bytes
    committed_tcb: bytes
    current_firmware: tuple[int, int, int]
    committed_firmware: tuple[int, int, int]
    launch_tcb: bytes
    launch_mitigations: int
    current_mitigations: int
    reserved: tuple[str, ...] = ()
    signed: bytes = b""
    signature_r: bytes = bytes(72)
    signature_s: bytes = bytes(72)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The report in ``data``.

        Raises :class:`MalformedError` unless it has exactly 1184 bytes, and :class:`UnsupportedVersionError` for a
        version outside 2 to 5, whose layout is unknown here.
        """
        if len(data) != REPORT_BYTES:
            raise MalformedError(f"expected a report of {REPORT_BYTES} bytes, got {len(data)}")
        version = int.from_bytes(data[:4], "little")
        if version not in VERSIONS:
            raise UnsupportedVersionError(f"expected report version 2 to 5, got {version}")
        return cls._from_bytes(bytes(data))

    @classmethod
    def _from_bytes(cls, data: bytes) -> Self:
        body = _BODY.unpack(data[:SIGNED_BYTES])
        r, s, tail = _SIGNATURE.unpack(data[SIGNED_BYTES:])
        return cls(
            version=body[0],
            guest_svn=body[1],
            policy=body[2],
            family_id=body[3],
            image_id=body[4],
            vmpl=body[5],
            signature_algorithm=body[6],
            current_tcb=body[7],
            platform_info=body[8],
            signer_info=body[9],
            report_data=body[11],
            measurement=body[12],
            host_data=body[13],
            id_key_digest=body[14],
            author_key_digest=body[15],
            report_id=body[16],
            report_id_ma=body[17],
            reported_tcb=body[18],
            cpuid_family=body[19],
            cpuid_model=body[20],
            cpuid_stepping=body[21],
            chip_id=body[23],
            committed_tcb=body[24],
            current_firmware=(body[27], body[26], body[25]),
            committed_firmware=(body[31], body[30], body[29]),
            launch_tcb=body[33],
            launch_mitigations=body[34],
            current_mitigations=body[35],
            reserved=_reserved_violations(body, tail),
            signed=data[:SIGNED_BYTES],
            signature_r=r,
            signature_s=s,
        )

    def body(self) -> bytes:
        """The 0x2A0 bytes that a chip signs for these fields, reserved ones zero: what :meth:`parse` reads back."""
        current, committed = self.current_firmware, self.committed_firmware
        return _BODY.pack(
            self.version,
            self.guest_svn,
            self.policy,
            self.family_id,
            self.image_id,
            self.vmpl,
            self.signature_algorithm,
            self.current_tcb,
            self.platform_info,
            self.signer_info,
            bytes(4),
            self.report_data,
            self.measurement,
            self.host_data,
            self.id_key_digest,
            self.author_key_digest,
            self.report_id,
            self.report_id_ma,
            self.reported_tcb,
            self.cpuid_family,
            self.cpuid_model,
            self.cpuid_stepping,
            bytes(21),
            self.chip_id,
            self.committed_tcb,
            *reversed(current),
            0,
            *reversed(committed),
            0,
            self.launch_tcb,
            self.launch_mitigations,
            self.current_mitigations,
            bytes(152),
        )

    @property
    def signing_key(self) -> SigningKey | None:
        """Which kind of key signed, by SIGNING_KEY; None for "none" and for encodings without a meaning."""
        return _SIGNING_KEYS.get(self.signer_info >> 2 & 0b111)

    @property
    def author_key_enabled(self) -> bool:
        """AUTHOR_KEY_EN: whether AUTHOR_KEY_DIGEST says anything."""
        return bool(self.signer_info & 1)

    @property
    def chip_key_masked(self) -> bool:
        """MASK_CHIP_KEY: whether the host turned signing by the chip's own key off."""
        return bool(self.signer_info & 2)

    @property
    def policy_abi(self) -> tuple[int, int]:
        """The least firmware ABI, (major, minor), that the guest's policy demands."""
        return self.policy >> 8 & 0xFF, self.policy & 0xFF


def join_signature(body: bytes, r: int, s: int) -> bytes:
    """A whole report: ``body`` (0x2A0 bytes), then R and S as 72-byte little-endian numbers, then zeros."""
    return body + _SIGNATURE.pack(r.to_bytes(72, "little"), s.to_bytes(72, "little"), bytes(368))


def _reserved_violations(body: tuple[Any, ...], tail: bytes) -> tuple[str, ...]:
    """The reserved fields of the unpacked ``body`` and of the signature that do not hold what they must."""
    version, policy, platform, signer = body[0], body[2], body[8], body[9]
    rules = (
        ("policy bit 17", policy & _POLICY_RESERVED_ONE),
        ("policy bits 63:26", not policy & _POLICY_RESERVED_ZERO),
        ("platform info bits 63:8", not platform & _PLATFORM_RESERVED_ZERO),
        ("signer info bits 31:5", not signer & _SIGNER_RESERVED_ZERO),
        ("0x4C", not any(body[10])),
        ("CPUID at 0x188 of a version 2 report", version >= 3 or not any(body[19:22])),
        ("0x18B", not any(body[22])),
        ("0x1EB", not body[28]),
        ("0x1EF", not body[32]),
        ("mitigation vectors before version 5", version >= 5 or not (body[34] or body[35])),
        ("0x208", not any(body[36])),
        ("0x330", not any(tail)),
    )
    return tuple(name for name, holds in rules if not holds)
