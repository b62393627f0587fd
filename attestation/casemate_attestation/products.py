"""Which processor generation a report is of, and how that generation lays out its TCB version and chip id.

Sources: AMD 56860, "TCB_VERSION" (the layout up to Genoa, and the one from Turin on) and CPUID_FAM_ID,
CPUID_MOD_ID; AMD 57230 (KDS: the 8-byte hwID of Turin). Bergamo and Siena use Genoa's keys.
"""

from __future__ import annotations

from functools import lru_cache

from casemate_schemas.attestation_policy import AMD_ARK_SHA256, AMD_ROOTS, FirmwareVersion, Product, TcbVersion

__all__ = ["AMD_ARK_SHA256", "AMD_ROOTS", "Product", "TcbVersion"]

PRODUCTS: tuple[Product, ...] = ("Milan", "Genoa", "Turin")

_TCB_BYTES: dict[Product, dict[str, int]] = {
    "Milan": {"bl": 0, "tee": 1, "snp": 6, "ucode": 7},
    "Genoa": {"bl": 0, "tee": 1, "snp": 6, "ucode": 7},
    "Turin": {"fmc": 0, "bl": 1, "tee": 2, "snp": 3, "ucode": 7},
}

_TCB_RESERVED = {name: [n for n in range(8) if n not in used.values()] for name, used in _TCB_BYTES.items()}

CHIP_ID_BYTES: dict[Product, int] = {"Milan": 64, "Genoa": 64, "Turin": 8}

CPUID: dict[Product, tuple[int, int]] = {"Milan": (0x19, 0x01), "Genoa": (0x19, 0x11), "Turin": (0x1A, 0x02)}
"""One (family, model) of each product, for reports made in simulation."""


def product_of_cpuid(family: int, model: int) -> Product | None:
    """The product whose keys sign reports of this CPUID family and model, or None for one this release does not know."""
    if family == 0x19 and model <= 0x0F:
        return "Milan"
    if family == 0x19 and (0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF):
        return "Genoa"
    if family == 0x1A and model <= 0x11:
        return "Turin"
    return None


@lru_cache(maxsize=256)
def decode_tcb(raw: bytes, product: Product) -> TcbVersion:
    """The components of the 8-byte TCB_VERSION ``raw``."""
    return TcbVersion(**{name: raw[position] for name, position in _TCB_BYTES[product].items()})


def encode_tcb(tcb: TcbVersion, product: Product) -> bytes:
    """The 8 bytes of TCB_VERSION; reserved ones are zero."""
    raw = bytearray(8)
    for name, position in _TCB_BYTES[product].items():
        raw[position] = getattr(tcb, name)
    return bytes(raw)


def tcb_reserved_is_zero(raw: bytes, product: Product) -> bool:
    """Whether the bytes of TCB_VERSION that ``product`` does not use are zero."""
    return not any(raw[position] for position in _TCB_RESERVED[product])


def dotted(version: FirmwareVersion) -> str:
    """A firmware version for people: major.minor.build."""
    return ".".join(map(str, version))
