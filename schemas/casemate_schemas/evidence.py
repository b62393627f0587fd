"""What a worker claims about itself, and the components that vouch for the claims (RFC 9334: composite evidence)."""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from .attestation_policy import EvidenceType
from .codec import Digest, Name, WireModel, encode
from .job import MAX_DATASETS, JobId
from .keys import PublicSigningKey, SealingPublicKey

REPORT_DATA_DOMAIN: Final = b"casemate/v1/report-data\x00"
NONCE_BYTES: Final = 32
MAX_ATTEMPTS: Final = 1 << 16
MAX_COMPONENTS: Final = 8
MAX_RUNTIME_DATA_BYTES: Final = 16 << 10

Attempt = Annotated[int, Field(ge=1, le=MAX_ATTEMPTS)]
"""How many workers have begun the job, this one included."""


class KeyBrokerNonce(WireModel):
    """The nonce one key broker gave for this job and attempt."""

    key_broker: Name
    nonce: Annotated[bytes, Field(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class WorkerClaims(WireModel):
    """What the report vouches for: which worker, with which keys, at work on which attempt at which job."""

    KIND: ClassVar[str] = "worker-claims"

    version: Literal[1] = 1
    consortium: Digest
    manifest: Digest
    job_id: JobId
    terms: Digest
    attempt: Attempt
    sealing_key: SealingPublicKey
    signing_key: PublicSigningKey
    nonces: Annotated[tuple[KeyBrokerNonce, ...], Field(min_length=1, max_length=MAX_DATASETS + 1)]

    @model_validator(mode="after")
    def _nonces_are_sorted(self) -> Self:
        names = [item.key_broker for item in self.nonces]
        if names != sorted(set(names)):
            raise ValueError("nonces must be sorted by key broker, one each")
        return self

    @property
    def report_data(self) -> bytes:
        """The 64 bytes that stand in the report: SHA-512 of domain and canonical claims."""
        return hashlib.sha512(REPORT_DATA_DOMAIN + encode(self)).digest()

    def nonce_of(self, key_broker: str) -> bytes | None:
        """That key broker's nonce, if the claims hold one."""
        return next((item.nonce for item in self.nonces if item.key_broker == key_broker), None)


Certificate = Annotated[bytes, Field(min_length=1, max_length=8192)]
"""An X.509 certificate, DER."""
SnpReport = Annotated[bytes, Field(min_length=1184, max_length=1184)]


class SevSnp(WireModel):
    """An SEV-SNP attestation report whose REPORT_DATA is the claims' own, and the certificates that lead to a root.

    No revocation list: which one is current is for the relying party to know, not for the one that may be revoked.
    """

    type: Literal["sev-snp"] = "sev-snp"
    report: SnpReport
    certificates: tuple[Certificate, Certificate, Certificate]
    """VCEK or VLEK, ASK or ASVK, ARK."""


class PcrValue(WireModel):
    """What one platform configuration register held, in the bank of SHA-256."""

    index: Annotated[int, Field(ge=0, le=23)]
    digest: Digest


class SevSnpVtpm(WireModel):
    """A guest of a paravisor that has a virtual TPM: the paravisor's report, the key it vouches for, and that key's quote.

    The report's REPORT_DATA is SHA-256(``runtime_data``) and zeros; the runtime data hold the TPM's attestation key; a
    quote by that key covers the claims' report data and the registers, which measure what the paravisor started.
    """

    type: Literal["sev-snp-vtpm"] = "sev-snp-vtpm"
    report: SnpReport
    certificates: tuple[Certificate, Certificate, Certificate]
    runtime_data: Annotated[bytes, Field(min_length=1, max_length=MAX_RUNTIME_DATA_BYTES)]
    """The paravisor's JSON, byte for byte as it was hashed."""
    quote: Annotated[bytes, Field(min_length=1, max_length=1024)]
    """TPMS_ATTEST."""
    signature: Annotated[bytes, Field(min_length=1, max_length=1024)]
    """TPMT_SIGNATURE over the quote."""
    pcrs: Annotated[tuple[PcrValue, ...], Field(min_length=1, max_length=24)]

    @model_validator(mode="after")
    def _registers_are_sorted(self) -> Self:
        indices = [value.index for value in self.pcrs]
        if indices != sorted(set(indices)):
            raise ValueError("registers must be sorted by index, one each")
        return self


Component = Annotated[SevSnp | SevSnpVtpm, Field(discriminator="type")]
"""Evidence of one kind. Each kind has one appraisal rule (``casemate_attestation.evidence``)."""


class Evidence(WireModel):
    """Claims, and the components that vouch for them: at most one of each type, sorted by type."""

    KIND: ClassVar[str] = "evidence"

    claims: WorkerClaims
    components: Annotated[tuple[Component, ...], Field(min_length=1, max_length=MAX_COMPONENTS)]

    @model_validator(mode="after")
    def _types_are_sorted(self) -> Self:
        types = list(self.types)
        if types != sorted(set(types)):
            raise ValueError("components must be sorted by type, one each")
        return self

    @property
    def types(self) -> tuple[EvidenceType, ...]:
        """The components' types, in their order."""
        return tuple(component.type for component in self.components)
