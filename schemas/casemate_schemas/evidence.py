"""What a worker claims about itself, and the report that carries the claims' hash (RFC 9334: evidence)."""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from .codec import Digest, Name, WireModel, encode
from .job import MAX_DATASETS, JobId
from .keys import PublicSigningKey, SealingPublicKey

REPORT_DATA_DOMAIN: Final = b"casemate/v1/report-data\x00"
NONCE_BYTES: Final = 32
MAX_ATTEMPTS: Final = 1 << 16

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


class Evidence(WireModel):
    """Claims, the attestation report over them, and the certificates that lead to a pinned root.

    ``type`` leaves room for other kinds of evidence beside SEV-SNP.
    """

    KIND: ClassVar[str] = "evidence"

    type: Literal["sev-snp"] = "sev-snp"
    claims: WorkerClaims
    report: Annotated[bytes, Field(min_length=1184, max_length=1184)]
    certificates: Annotated[tuple[Certificate, ...], Field(min_length=3, max_length=3)]
    """VCEK or VLEK, ASK or ASVK, ARK."""
