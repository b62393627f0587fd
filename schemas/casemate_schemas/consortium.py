"""Who belongs, and what they all accept: the consortium manifest and its chain of versions.

The consortium's id is the digest of its first manifest. Every later version names the digest of the one before it and is
signed by a quorum of that one's members; the first is signed by all of its own. Whoever has seen a version never goes
back behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from .attestation_policy import AttestationPolicy
from .codec import Digest, Name, Text, UnixMs, WireModel, decode, domain_digest, encode
from .errors import AuthenticationError, ManifestError, SignatureError
from .identity import Delegation
from .keys import PublicSigningKey, SealingPublicKey
from .signatures import Signature, Signed, SigningKey, sign

MAX_MANIFEST_BYTES: Final = 256 << 10
MAX_CLOCK_SKEW_MS: Final = 5 * 60 * 1000


class Member(WireModel):
    """A party: its name and its two public keys."""

    id: Name
    name: Text
    signing_key: PublicSigningKey
    sealing_key: SealingPublicKey


class KeyBroker(WireModel):
    """A key broker and the members whose keys and ledgers it holds."""

    id: Name
    serves: Annotated[tuple[Name, ...], Field(min_length=1, max_length=256)]
    hosted: Literal["member", "enclave"] = "member"
    signing_key: PublicSigningKey
    sealing_key: SealingPublicKey


class ConsortiumManifest(WireModel):
    """One version of what the members agreed on."""

    KIND: ClassVar[str] = "consortium-manifest"

    version: Literal[1] = 1
    number: Annotated[int, Field(ge=1, lt=1 << 32)]
    previous: Digest | None
    name: Text
    members: Annotated[tuple[Member, ...], Field(min_length=1, max_length=256)]
    key_brokers: Annotated[tuple[KeyBroker, ...], Field(min_length=1, max_length=256)]
    attestation: AttestationPolicy
    quorum: Annotated[int, Field(ge=1, le=256)]
    created: UnixMs

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        members = [member.id for member in self.members]
        served = [member for broker in self.key_brokers for member in broker.serves]
        keys = [m.signing_key for m in self.members] + [broker.signing_key for broker in self.key_brokers]
        if len(set(members)) != len(members) or len({broker.id for broker in self.key_brokers}) != len(
            self.key_brokers
        ):
            raise ValueError("ids must be unique")
        if len(set(keys)) != len(keys):
            raise ValueError("signing keys must be unique")
        if sorted(served) != sorted(members):
            raise ValueError("each member is served by exactly one key broker")
        if not self.quorum <= len(members):
            raise ValueError("quorum must not exceed the number of members")
        if (self.previous is None) != (self.number == 1):
            raise ValueError("exactly the first version has no previous one")
        return self

    @property
    def simulation(self) -> bool:
        """Whether this consortium accepts only the simulated chip (and no real one)."""
        return self.attestation.simulation

    def member(self, member_id: str) -> Member:
        """The member of that id. Raises :class:`AuthenticationError`."""
        for member in self.members:
            if member.id == member_id:
                return member
        raise AuthenticationError(f"no member {member_id!r} in this consortium")

    def key_broker(self, key_broker_id: str) -> KeyBroker:
        """The key broker of that id. Raises :class:`ManifestError`."""
        for broker in self.key_brokers:
            if broker.id == key_broker_id:
                return broker
        raise ManifestError(f"no key broker {key_broker_id!r} in this consortium")

    def key_broker_of(self, member_id: str) -> KeyBroker:
        """The key broker that serves a member. Raises :class:`ManifestError`."""
        for broker in self.key_brokers:
            if member_id in broker.serves:
                return broker
        raise ManifestError(f"no key broker serves member {member_id!r}")


class MemberSignature(WireModel):
    """One member's signature under a manifest."""

    member: Name
    signature: Signature


class SignedManifest(WireModel):
    """A manifest's canonical bytes and the signatures that carry it."""

    KIND: ClassVar[str] = "signed-manifest"

    payload: Annotated[bytes, Field(max_length=MAX_MANIFEST_BYTES)]
    signatures: Annotated[tuple[MemberSignature, ...], Field(min_length=1, max_length=256)]

    @property
    def digest(self) -> bytes:
        """Digest of the manifest itself, independent of who signed."""
        return domain_digest(ConsortiumManifest.KIND, self.payload)

    def signers(self, members: tuple[Member, ...]) -> set[str]:
        """Ids of those ``members`` whose signature verifies. Raises :class:`SignatureError` for one that does not."""
        keys = {member.id: member.signing_key for member in members}
        verified = set()
        for item in self.signatures:
            if (key := keys.get(item.member)) is None:
                continue
            signed = Signed(kind=ConsortiumManifest.KIND, payload=self.payload, signer=key, signature=item.signature)
            signed.verify(ConsortiumManifest, key)
            verified.add(item.member)
        return verified


class ManifestChain(WireModel):
    """All versions so far, first to newest."""

    KIND: ClassVar[str] = "manifest-chain"

    manifests: Annotated[tuple[SignedManifest, ...], Field(min_length=1, max_length=1024)]


@dataclass(frozen=True)
class Consortium:
    """A verified consortium at its newest known version: what every check below starts from."""

    id: bytes
    digest: bytes
    manifest: ConsortiumManifest


def sign_manifest(manifest: ConsortiumManifest, keys: dict[str, SigningKey]) -> SignedManifest:
    """The manifest with the signatures of the members whose ``keys`` (by member id) are given."""
    signatures = tuple(
        MemberSignature(member=member, signature=sign(manifest, key).signature) for member, key in sorted(keys.items())
    )
    return SignedManifest(payload=encode(manifest), signatures=signatures)


def verify_chain(
    chain: ManifestChain, *, consortium: bytes | None = None, pinned: tuple[int, bytes] | None = None
) -> Consortium:
    """The consortium a chain describes.

    1. The first manifest is signed by all its members, and has the expected ``consortium`` id if one is given.
    2. Each later one follows the one before it (number, digest) and is signed by a quorum of *its* members.
    3. The chain contains the ``pinned`` (number, digest), so it is not older than what was seen and no fork of it.

    Raises :class:`ManifestError`.
    """
    first = chain.manifests[0]
    if consortium is not None and first.digest != consortium:
        raise ManifestError("the chain starts with another consortium's manifest")
    current = _opened(first)
    if current.number != 1 or _signers(first, current) != {member.id for member in current.members}:
        raise ManifestError("the first manifest must have number 1 and the signature of every member")
    for before, after in zip(chain.manifests, chain.manifests[1:], strict=False):
        following = _opened(after)
        if following.number != current.number + 1 or following.previous != before.digest:
            raise ManifestError(f"manifest {following.number} does not follow manifest {current.number}")
        if following.simulation != current.simulation:
            raise ManifestError("a consortium is simulated from its first manifest to its last, or never")
        if len(_signers(after, current)) < current.quorum:
            raise ManifestError(f"manifest {following.number} lacks a quorum of {current.quorum} members")
        current = following
    if pinned is not None and not _contains(chain, pinned):
        raise ManifestError(f"the chain does not contain manifest {pinned[0]}, which was seen before")
    return Consortium(id=first.digest, digest=chain.manifests[-1].digest, manifest=current)


def verify_delegation(signed: Signed, consortium: Consortium, *, at: int) -> Delegation:
    """The person's delegation, if their member signed it for this consortium and it is valid ``at`` that time.

    Raises :class:`AuthenticationError`.
    """
    try:
        claimed = signed.peek(Delegation)
        delegation = signed.verify(Delegation, consortium.manifest.member(claimed.member).signing_key)
    except SignatureError as error:
        raise AuthenticationError("the delegation is not signed by its member") from error
    if delegation.consortium != consortium.id:
        raise AuthenticationError("the delegation is for another consortium")
    if not delegation.not_before - MAX_CLOCK_SKEW_MS <= at < delegation.expires:
        raise AuthenticationError("the delegation is not valid at this time: ask the member for a new one")
    return delegation


def _opened(signed: SignedManifest) -> ConsortiumManifest:
    return decode(ConsortiumManifest, signed.payload, max_bytes=MAX_MANIFEST_BYTES)


def _signers(signed: SignedManifest, manifest: ConsortiumManifest) -> set[str]:
    try:
        return signed.signers(manifest.members)
    except SignatureError as error:
        raise ManifestError("a member's signature under the manifest does not verify") from error


def _contains(chain: ManifestChain, pinned: tuple[int, bytes]) -> bool:
    number, digest = pinned
    return number <= len(chain.manifests) and chain.manifests[number - 1].digest == digest
