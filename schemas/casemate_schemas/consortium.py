"""Who belongs, and what they all accept: the consortium manifest and its chain of versions.

The consortium's id is the digest of its first manifest. Every later version names the digest of the one before it and is
signed by a quorum of that one's members; the first is signed by all of its own. Whoever has seen a version never goes
back behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from .attestation_policy import AttestationPolicy
from .codec import Digest, Name, Text, UnixMs, WireModel, decode, domain_digest, encode
from .errors import AuthenticationError, ManifestError, SignatureError, UnavailableError
from .identity import Delegation, Revocation
from .keys import PublicSigningKey, SealingPublicKey
from .signatures import Signature, Signed, SigningKey, sign

MAX_MANIFEST_BYTES: Final = 256 << 10
MAX_MANIFESTS: Final = 1024
MAX_CHAIN_BYTES: Final = 64 << 20
"""Of an encoded chain: whoever reads or keeps one takes as much, and nobody more."""
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
    """On a machine of its member's, or in an enclave on anyone's: then whoever seals to it attests it first."""
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
        if any(broker.hosted == "enclave" for broker in self.key_brokers):
            if self.number == 1:
                raise ValueError("a hosted key broker makes its keys for a consortium that is there already")
            if not self.attestation.key_broker_measurements:
                raise ValueError("a hosted key broker needs an accepted image")
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

    def open(self) -> ConsortiumManifest:
        """The manifest, whoever signed it. Raises :class:`MalformedError` or :class:`TooLargeError`."""
        return decode(ConsortiumManifest, self.payload, max_bytes=MAX_MANIFEST_BYTES)

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

    manifests: Annotated[tuple[SignedManifest, ...], Field(min_length=1, max_length=MAX_MANIFESTS)]


@dataclass(frozen=True)
class Consortium:
    """A verified consortium at its newest known version: what every check below starts from."""

    id: bytes
    digest: bytes
    manifest: ConsortiumManifest
    earlier: tuple[bytes, ...] = ()
    """Digests of the versions before this one, the first one first."""
    revoked: Mapping[tuple[str, str], int] = field(default_factory=dict, hash=False)
    """Before when delegations of (member, person) must begin no longer (Unix ms), as far as their member said so."""

    def check_seen(self, number: int, digest: bytes) -> None:
        """That manifest ``number``, this one or an earlier one, has that digest.

        Raises :class:`UnavailableError` for a number not seen yet (the sender may have seen a newer version), and
        :class:`ManifestError` for another digest.
        """
        if number > self.manifest.number:
            raise UnavailableError(f"manifest {number} was not seen here yet; the newest is {self.manifest.number}")
        if not number >= 1 or (*self.earlier, self.digest)[number - 1] != digest:
            raise ManifestError(f"another manifest than the one of number {number} that is known here")


def sign_manifest(manifest: ConsortiumManifest, keys: dict[str, SigningKey]) -> SignedManifest:
    """The manifest with the signatures of the members whose ``keys`` (by member id) are given."""
    signatures = tuple(
        MemberSignature(member=member, signature=sign(manifest, key).signature) for member, key in sorted(keys.items())
    )
    return SignedManifest(payload=encode(manifest), signatures=signatures)


def verify_chain(
    chain: ManifestChain, *, consortium: bytes | None = None, pinned: tuple[int, bytes] | None = None
) -> Consortium:
    """The consortium a chain describes, at its newest version.

    1. The first manifest is signed by all its members, and has the expected ``consortium`` id if one is given.
    2. Each later one follows the one before it (:func:`verify_next`).
    3. The chain contains the ``pinned`` (number, digest), so it is not older than what was seen and no fork of it.

    Raises :class:`ManifestError`.
    """
    return verify_versions(chain, consortium=consortium, pinned=pinned)[-1]


def verify_versions(
    chain: ManifestChain, *, consortium: bytes | None = None, pinned: tuple[int, bytes] | None = None
) -> tuple[Consortium, ...]:
    """The consortium as it was at each version of a chain, first to newest. Raises as :func:`verify_chain`."""
    first = chain.manifests[0]
    if consortium is not None and first.digest != consortium:
        raise ManifestError("the chain starts with another consortium's manifest")
    founding = first.open()  # 1
    if founding.number != 1 or _signers(first, founding) != {member.id for member in founding.members}:
        raise ManifestError("the first manifest must have number 1 and the signature of every member")
    versions = [Consortium(id=first.digest, digest=first.digest, manifest=founding)]
    for signed in chain.manifests[1:]:
        versions.append(verify_next(versions[-1], signed))  # 2
    if pinned is not None and not _contains(chain, pinned):  # 3
        raise ManifestError(f"the chain does not contain manifest {pinned[0]}, which was seen before")
    return tuple(versions)


def verify_next(current: Consortium, signed: SignedManifest) -> Consortium:
    """The consortium after ``signed``, which must be the version right after ``current``'s.

    1. It has the next number and names the digest of the one before it.
    2. It is simulated if and only if the one before it is.
    3. A quorum of the members *before* it signed it, and no signature of theirs is wrong.

    Raises :class:`ManifestError`, and :class:`MalformedError` for what is no manifest.
    """
    following = signed.open()
    number = current.manifest.number
    if following.number != number + 1 or following.previous != current.digest:  # 1
        raise ManifestError(f"manifest {following.number} does not follow manifest {number}")
    if following.simulation != current.manifest.simulation:  # 2
        raise ManifestError("a consortium is simulated from its first manifest to its last, or never")
    if len(_signers(signed, current.manifest)) < current.manifest.quorum:  # 3
        raise ManifestError(f"manifest {following.number} lacks a quorum of {current.manifest.quorum} members")
    return Consortium(current.id, signed.digest, following, (*current.earlier, current.digest))


def verify_delegation(signed: Signed, consortium: Consortium, *, at: int) -> Delegation:
    """The person's delegation, if their member signed it for this consortium and it is valid ``at`` that time.

    One that the member has revoked since was never valid. Raises :class:`AuthenticationError`.
    """
    try:
        claimed = signed.peek(Delegation)
        delegation = signed.verify(Delegation, consortium.manifest.member(claimed.member).signing_key)
    except SignatureError as error:
        raise AuthenticationError("the delegation is not signed by its member") from error
    check_delegation(delegation, consortium, at=at)
    return delegation


def check_delegation(delegation: Delegation, consortium: Consortium, *, at: int) -> None:
    """That a delegation, whose signature was verified, is for this consortium, valid ``at`` that time and not revoked.

    Raises :class:`AuthenticationError`.
    """
    if delegation.consortium != consortium.id:
        raise AuthenticationError("the delegation is for another consortium")
    if not delegation.not_before - MAX_CLOCK_SKEW_MS <= at < delegation.expires:
        raise AuthenticationError("the delegation is not valid at this time: ask the member for a new one")
    if delegation.not_before < consortium.revoked.get((delegation.member, delegation.person), 0):
        raise AuthenticationError(f"{delegation.member} has revoked this delegation: ask the member for a new one")


def verify_revocation(signed: Signed, consortium: Consortium) -> Revocation:
    """What a member revokes, if its own key signed that for this consortium.

    Raises :class:`AuthenticationError`, or :class:`MalformedError` for what is no revocation.
    """
    try:
        claimed = signed.peek(Revocation)
        revocation = signed.verify(Revocation, consortium.manifest.member(claimed.member).signing_key)
    except SignatureError as error:
        raise AuthenticationError("the revocation is not signed by its member") from error
    if revocation.consortium != consortium.id:
        raise AuthenticationError("the revocation is for another consortium")
    return revocation


def _signers(signed: SignedManifest, manifest: ConsortiumManifest) -> set[str]:
    try:
        return signed.signers(manifest.members)
    except SignatureError as error:
        raise ManifestError("a member's signature under the manifest does not verify") from error


def _contains(chain: ManifestChain, pinned: tuple[int, bytes]) -> bool:
    number, digest = pinned
    return number <= len(chain.manifests) and chain.manifests[number - 1].digest == digest
