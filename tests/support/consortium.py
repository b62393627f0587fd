"""A small consortium for tests: north, south, east and clara's lab, each a member with a key broker and one person."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from casemate_schemas.attestation_policy import AcceptedProduct, AttestationPolicy, TcbVersion
from casemate_schemas.consortium import (
    Consortium,
    ConsortiumManifest,
    KeyBroker,
    ManifestChain,
    Member,
    sign_manifest,
    verify_chain,
)
from casemate_schemas.identity import Delegation, Role
from casemate_schemas.keyring import KeyRing
from casemate_schemas.signatures import Signed, SigningKey, sign

MEMBERS = ("clara", "east", "north", "south")
NOW_MS = 1_790_000_000_000
"""When the delegations of :func:`consortium_for_tests` begin, unless the test says otherwise."""
DAY_MS = 24 * 3600 * 1000


@dataclass(frozen=True)
class PersonKeys:
    """A person with their keys and their member's word for it."""

    keys: KeyRing
    delegation: Signed

    @property
    def signing(self) -> SigningKey:
        return self.keys.signing


@dataclass(frozen=True)
class ConsortiumKeys:
    """A verified consortium and everybody's private keys."""

    consortium: Consortium
    chain: ManifestChain
    members: dict[str, KeyRing]
    key_brokers: dict[str, KeyRing]

    def person(
        self,
        member: str,
        person: str = "someone",
        *,
        roles: tuple[Role, ...] = ("scientist", "steward"),
        not_before: int = NOW_MS,
        days: int = 30,
        keys: KeyRing | None = None,
        signed_by: SigningKey | None = None,
        consortium: bytes | None = None,
    ) -> PersonKeys:
        """A person of ``member``; every part of the delegation can be chosen wrongly."""
        keys = keys or KeyRing.generate()
        delegation = Delegation(
            consortium=consortium or self.consortium.id,
            member=member,
            person=person,
            signing_key=keys.signing.public,
            sealing_key=keys.sealing.public,
            roles=roles,
            not_before=not_before,
            expires=not_before + days * DAY_MS,
        )
        return PersonKeys(keys, sign(delegation, signed_by or self.members[member].signing))


def amended(keys: ConsortiumKeys, *, signers: tuple[str, ...] = MEMBERS, **changed: Any) -> ConsortiumKeys:
    """The consortium after one more manifest with the ``changed`` fields. It is not verified: it may lack signatures."""
    before = keys.consortium
    fields = {**dict(before.manifest), "number": before.manifest.number + 1, "previous": before.digest, **changed}
    manifest = ConsortiumManifest.model_validate(fields)
    signed = sign_manifest(manifest, {name: keys.members[name].signing for name in signers})
    after = Consortium(before.id, signed.digest, manifest, (*before.earlier, before.digest))
    return replace(keys, consortium=after, chain=ManifestChain(manifests=(*keys.chain.manifests, signed)))


@functools.cache
def consortium_for_tests() -> ConsortiumKeys:
    """Made once: keys take a moment."""
    members = {name: KeyRing.generate() for name in MEMBERS}
    key_brokers = {name: KeyRing.generate() for name in MEMBERS}
    manifest = ConsortiumManifest(
        number=1,
        previous=None,
        name="three hospitals and a lab",
        members=tuple(
            Member(id=name, name=name, signing_key=keys.signing.public, sealing_key=keys.sealing.public)
            for name, keys in members.items()
        ),
        key_brokers=tuple(
            KeyBroker(id=name, serves=(name,), signing_key=keys.signing.public, sealing_key=keys.sealing.public)
            for name, keys in key_brokers.items()
        ),
        attestation=AttestationPolicy(
            simulation=True,
            products=(AcceptedProduct(product="Milan", ark_sha256=(b"\x01" * 32,), min_tcb=TcbVersion()),),
            measurements=(b"\x02" * 48,),
        ),
        quorum=3,
        created=NOW_MS,
    )
    signed = sign_manifest(manifest, {name: keys.signing for name, keys in members.items()})
    chain = ManifestChain(manifests=(signed,))
    return ConsortiumKeys(verify_chain(chain), chain, members, key_brokers)
