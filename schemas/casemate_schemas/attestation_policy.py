"""What a consortium accepts as evidence: SEV-SNP roots, products, reference values, floors and bits.

Field names follow AMD's *SEV Secure Nested Paging Firmware ABI Specification* (document 56860,), tables
"ATTESTATION_REPORT", "GUEST_POLICY" and "PLATFORM_INFO"; roles follow RFC 9334.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from .codec import Digest, WireModel

Product = Literal["Milan", "Genoa", "Turin"]
EvidenceType = Literal["sev-snp", "sev-snp-vtpm"]
"""Kinds of evidence: a report over the claims; a paravisor's report, and a quote by its virtual TPM over the claims."""
PROCESSOR_TYPES: Final[frozenset[EvidenceType]] = frozenset({"sev-snp", "sev-snp-vtpm"})
"""The kinds that vouch for the processor: all evidence holds exactly one, whatever stands beside it."""

AMD_ARK_SHA256: Final = MappingProxyType[Product, bytes](
    {
        "Milan": bytes.fromhex("69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"),
        "Genoa": bytes.fromhex("4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1"),
        "Turin": bytes.fromhex("1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a"),
    }
)
"""SHA-256 of each AMD root key certificate (ARK) in DER, as AMD's key distribution service hands them out."""

AMD_ROOTS: Final = frozenset(AMD_ARK_SHA256.values())

Byte = Annotated[int, Field(ge=0, le=255)]
Word = Annotated[int, Field(ge=0, lt=1 << 64)]
Measurement = Annotated[bytes, Field(min_length=48, max_length=48)]
"""A launch measurement: SHA-384."""
KeyDigest = Annotated[bytes, Field(min_length=48, max_length=48)]
"""The SHA-384 of an id key or author key."""
GuestId = Annotated[bytes, Field(min_length=16, max_length=16)]
ChipId = Annotated[bytes, Field(min_length=8, max_length=64)]
"""A VCEK's hwID: 64 bytes, or 8 for Turin."""
CspId = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[\x20-\x7e]+$")]
"""A VLEK's cloud service provider."""
FirmwareVersion = tuple[Byte, Byte, Byte]
"""(major, minor, build), compared in that order."""


class TcbVersion(WireModel):
    """The security patch levels of one trusted computing base. Compared component by component, never as one number."""

    fmc: Byte = 0
    bl: Byte = 0
    tee: Byte = 0
    snp: Byte = 0
    ucode: Byte = 0

    def __str__(self) -> str:
        return f"fmc={self.fmc} bl={self.bl} tee={self.tee} snp={self.snp} ucode={self.ucode}"

    def covers(self, floor: TcbVersion) -> bool:
        """Whether every component is at least ``floor``'s."""
        return (
            self.fmc >= floor.fmc
            and self.bl >= floor.bl
            and self.tee >= floor.tee
            and self.snp >= floor.snp
            and self.ucode >= floor.ucode
        )


class AcceptedProduct(WireModel):
    """One processor generation: whose roots are trusted, and the oldest TCB and firmware that are good enough."""

    product: Product
    ark_sha256: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=4)]
    min_tcb: TcbVersion = TcbVersion()
    min_firmware: FirmwareVersion = (0, 0, 0)


class GuestPolicyRules(WireModel):
    """What a guest's launch policy may permit, and what it must demand."""

    debug: bool = False
    """Whether DEBUG is permitted: the host could read the guest's memory."""
    migrate_ma: bool = False
    """Whether a migration agent is permitted."""
    smt: bool = True
    """Whether the guest may run where simultaneous multithreading is on."""
    cxl: bool = False
    """Whether CXL devices may be populated."""
    single_socket: bool = False
    """Whether SINGLE_SOCKET is demanded."""
    mem_aes_256_xts: bool = False
    """Whether MEM_AES_256_XTS is demanded."""
    rapl_dis: bool = False
    """Whether RAPL_DIS is demanded."""
    ciphertext_hiding: bool = False
    """Whether CIPHERTEXT_HIDING_DRAM is demanded."""
    page_swap_disable: bool = False
    """Whether PAGE_SWAP_DISABLE is demanded."""
    min_abi: tuple[Byte, Byte] = (0, 0)
    """The least (major, minor) of the firmware ABI that the guest must demand."""


class PlatformRules(WireModel):
    """Which PLATFORM_INFO bits must be set (true), must be clear (false) or do not matter (none)."""

    smt: bool | None = None
    tsme: bool | None = None
    ecc: bool | None = None
    rapl_dis: bool | None = None
    ciphertext_hiding: bool | None = None
    alias_check: bool | None = None
    iommu_write_safe: bool | None = None
    """Bit 6, which platforms with the mitigation of AMD-SB-3016 (CVE-2023-20585) set."""
    tio: bool | None = None


class PcrRule(WireModel):
    """The values that one platform configuration register (SHA-256 bank) may have.

    Registers 0 to 15 keep their history until a restart; software can reset some of those above, so no rule rests on one.
    """

    index: Annotated[int, Field(ge=0, le=15)]
    digests: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=64)]


class VtpmRules(WireModel):
    """What a virtual TPM must have measured. Registers without a rule may hold anything."""

    pcrs: Annotated[tuple[PcrRule, ...], Field(max_length=16)] = ()

    @model_validator(mode="after")
    def _one_rule_each(self) -> Self:
        indices = [rule.index for rule in self.pcrs]
        if indices != sorted(set(indices)):
            raise ValueError("rules must be sorted by register, one each")
        return self


Combination = Annotated[tuple[EvidenceType, ...], Field(min_length=1, max_length=8)]
"""Types of evidence that must come together: all of them, and no other."""


class AppraisalPolicy(WireModel):
    """What evidence is appraised against. An empty tuple or a ``None`` asks for nothing."""

    KIND: ClassVar[str] = "appraisal-policy"

    simulation: bool
    """True accepts simulated chips only, false accepts AMD's only; nothing accepts both."""
    products: Annotated[tuple[AcceptedProduct, ...], Field(min_length=1, max_length=3)]
    evidence_types: Annotated[tuple[Combination, ...], Field(min_length=1, max_length=8)] = (("sev-snp",),)
    """The accepted combinations: evidence holds exactly the types of one of them."""
    vtpm: VtpmRules = VtpmRules()
    min_report_version: Annotated[int, Field(ge=2, le=5)] = 2
    measurements: Annotated[tuple[Measurement, ...], Field(max_length=64)] = ()
    host_data: Digest | None = None
    id_keys: Annotated[tuple[KeyDigest, ...], Field(max_length=64)] = ()
    author_keys: Annotated[tuple[KeyDigest, ...], Field(max_length=64)] = ()
    family_id: GuestId | None = None
    image_id: GuestId | None = None
    min_guest_svn: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    vmpl: Annotated[tuple[Annotated[int, Field(ge=0, le=3)], ...], Field(min_length=1, max_length=4)] = (0,)
    guest_policy: GuestPolicyRules = GuestPolicyRules()
    platform: PlatformRules = PlatformRules()
    provisional: bool = False
    """Whether committed TCB and firmware may lag the current ones, so that the host could roll back."""
    launch_mitigations: Word = 0
    """Bits that LAUNCH_MIT_VECTOR must contain."""
    current_mitigations: Word = 0
    """Bits that CURRENT_MIT_VECTOR must contain."""
    chip_ids: Annotated[tuple[ChipId, ...], Field(max_length=4096)] = ()
    """The chips whose VCEKs are accepted. With this or ``csp_ids`` given, everything outside both is refused."""
    csp_ids: Annotated[tuple[CspId, ...], Field(max_length=16)] = ()
    """The providers whose VLEKs are accepted."""
    crl_required: bool = False
    """Whether evidence without a current revocation list is refused."""
    max_crl_age_s: Annotated[int, Field(ge=1, lt=1 << 32)] | None = None
    """The oldest list that is good enough, by the time since it was issued. With it, a list is required."""

    @model_validator(mode="after")
    def _combinations_have_one_processor(self) -> Self:
        for types in self.evidence_types:
            if list(types) != sorted(set(types)):
                raise ValueError("the types of a combination must be sorted, one each")
            if len(PROCESSOR_TYPES.intersection(types)) != 1:
                raise ValueError("each combination must hold exactly one type for the processor")
        return self

    @model_validator(mode="after")
    def _roots_are_of_one_kind(self) -> Self:
        names = [accepted.product for accepted in self.products]
        if len(set(names)) != len(names):
            raise ValueError("each product may be listed once")
        for accepted in self.products:
            for digest in accepted.ark_sha256:
                if self.simulation and digest in AMD_ROOTS:
                    raise ValueError("a simulation never accepts AMD's roots")
                if not self.simulation and digest != AMD_ARK_SHA256[accepted.product]:
                    raise ValueError(f"outside simulation only AMD's own root for {accepted.product} is accepted")
        return self


class AttestationPolicy(AppraisalPolicy):
    """A consortium's attestation policy, part of its manifest: it always names the programs it trusts."""

    KIND: ClassVar[str] = "attestation-policy"

    min_report_version: Annotated[int, Field(ge=2, le=5)] = 3
    measurements: Annotated[tuple[Measurement, ...], Field(min_length=1, max_length=64)]
    key_broker_measurements: Annotated[tuple[Measurement, ...], Field(max_length=64)] = ()
    """The images of enclave-hosted key brokers; without any, none is accepted."""

    @model_validator(mode="after")
    def _images_have_one_part(self) -> Self:
        if set(self.measurements) & set(self.key_broker_measurements):
            raise ValueError("one image cannot be a worker's and a key broker's")
        return self

    @model_validator(mode="after")
    def _virtual_tpms_have_reference_values(self) -> Self:
        """The launch measurement covers the paravisor alone: what it started is known by the registers only."""
        if any("sev-snp-vtpm" in types for types in self.evidence_types) and not self.vtpm.pcrs:
            raise ValueError("evidence by a virtual TPM needs reference values for its registers")
        return self
