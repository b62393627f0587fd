"""A key broker's answers to a worker: the Grant (here is the key) and the receipt (this result, and no other)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .codec import Digest, Name, UnixMs, WireModel, digest_of
from .evidence import Attempt, Evidence
from .job import MAX_DATASETS, JobId
from .keys import PublicSigningKey
from .licence import Obligation
from .merkle import check_inclusion, leaf_hash
from .signatures import Signed

ContentKeyBytes = Annotated[bytes, Field(min_length=32, max_length=32)]


class GrantHeader(WireModel):
    """What a Grant says in clear. Its digest is the ``info`` of the seal."""

    KIND: ClassVar[str] = "grant-header"

    version: Literal[1] = 1
    consortium: Digest
    manifest: Digest
    manifest_number: int
    key_broker: Name
    job_id: JobId
    terms: Digest
    attempt: Attempt
    envelopes: Annotated[tuple[Digest, ...], Field(max_length=MAX_DATASETS + 1)]
    """The envelopes whose content keys are inside, sorted. Of datasets there is none once a result is ``committed``: to
    release that, nobody needs them."""
    licences: Annotated[tuple[Digest, ...], Field(max_length=MAX_DATASETS)]
    evidence: Digest
    worker_key: PublicSigningKey
    reservation: Digest
    """Hash of the ledger entry that made the reservation (or, for the job's own key, that recorded the release)."""
    ledger_head: Digest
    committed: Digest | None
    """The result digest that holds this key broker's commit for these terms, if one does."""
    issued: UnixMs
    expires: UnixMs
    obligations: Annotated[tuple[Obligation, ...], Field(max_length=MAX_DATASETS)] = ()
    """What the licences in force oblige to, one for each dataset, sorted by it."""


class GrantSecrets(WireModel):
    """What the seal holds: content keys in the order of ``envelopes``, and the seed share of these terms."""

    KIND: ClassVar[str] = "grant-secrets"

    content_keys: Annotated[tuple[ContentKeyBytes, ...], Field(max_length=MAX_DATASETS + 1)]
    seed_share: ContentKeyBytes

    def __repr__(self) -> str:
        return "GrantSecrets(…)"

    __str__ = __repr__


class Grant(WireModel):
    """Header and one HPKE seal (to the worker's attested sealing key) over :class:`GrantSecrets`; signed by the key broker."""

    KIND: ClassVar[str] = "grant"

    header: GrantHeader
    sealed_secrets: Annotated[bytes, Field(max_length=16384)]


def grant_info(header: GrantHeader) -> bytes:
    """The HPKE ``info`` of a Grant's seal."""
    return b"casemate/v1/grant\x00" + digest_of(header)


class InclusionProof(WireModel):
    """That ``entry`` is leaf ``index`` of the key broker's audit log of ``size`` entries with that ``root`` (RFC 6962)."""

    KIND: ClassVar[str] = "inclusion-proof"

    entry: Annotated[bytes, Field(max_length=65536)]
    index: Annotated[int, Field(ge=0, lt=1 << 48)]
    size: Annotated[int, Field(ge=1, lt=1 << 48)]
    path: Annotated[tuple[Digest, ...], Field(max_length=64)]
    root: Digest

    def check(self) -> None:
        """Raises :class:`~.errors.ReleaseError` unless the path leads to the root."""
        check_inclusion(leaf_hash(self.entry), self.index, self.size, self.path, self.root)


class AuditEntry(WireModel):
    """One entry of a key broker's audit log."""

    KIND: ClassVar[str] = "audit-entry"

    version: Literal[1] = 1
    key_broker: Name
    event: Literal[
        "registered",
        "prechecked",
        "approved",
        "denied",
        "granted",
        "refused",
        "committed",
        "manifest",
        "person_revoked",
        "budget_renewed",
        "state_endorsed",
        "amended",
        "erased",
        "seeds_rotated",
        "backed_up",
        "state_handed_over",
    ]
    at: UnixMs
    subject: Annotated[str, Field(max_length=200)]
    """What it is about: a dataset id or a job id."""
    terms: Digest | None = None
    evidence: Digest | None = None
    result: Digest | None = None
    reason: Annotated[str, Field(max_length=64)] | None = None
    person: Annotated[str, Field(max_length=200)] | None = None
    """``person@member`` who asked, where a person did."""
    envelope: Digest | None = None
    """The dataset version that was registered (in force from then on) or erased."""
    licence: Digest | None = None
    """The licence that a registration or an amendment put in force."""


class CommitReceipt(WireModel):
    """The key broker holds this result digest for these terms, for ever. Signed by the key broker."""

    KIND: ClassVar[str] = "commit-receipt"

    version: Literal[1] = 1
    consortium: Digest
    key_broker: Name
    job_id: JobId
    terms: Digest
    result: Digest
    ledger_head: Digest
    proof: InclusionProof
    """That the commit stands in the audit log."""
    at: UnixMs


class NonceRequest(WireModel):
    """A worker asks for a nonce for one attempt at one job."""

    KIND: ClassVar[str] = "nonce-request"

    job_id: JobId
    terms: Digest
    attempt: Attempt


class NonceReply(WireModel):
    """A single-use nonce, and until when it is good."""

    KIND: ClassVar[str] = "nonce-reply"

    nonce: Annotated[bytes, Field(min_length=32, max_length=32)]
    expires: UnixMs


class GrantRequest(WireModel):
    """A worker asks for its keys. Signed by the attested signing key."""

    KIND: ClassVar[str] = "grant-request"

    evidence: Evidence


class CommitRequest(WireModel):
    """A worker asks a key broker to hold a result digest. Signed by a signing key that holds a Grant of these terms."""

    KIND: ClassVar[str] = "commit-request"

    job_id: JobId
    terms: Digest
    attempt: Attempt
    result: Digest
    first_receipt: Signed | None
    """The first key broker's receipt; absent only in the request to that one."""
