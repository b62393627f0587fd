"""A small consortium with all its private keys at hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from casemate_schemas.attestation_policy import AcceptedProduct, AttestationPolicy
from casemate_schemas.consortium import (
    Consortium,
    ConsortiumManifest,
    KeyBroker,
    ManifestChain,
    Member,
    sign_manifest,
    verify_chain,
    verify_next,
)
from casemate_schemas.identity import Delegation, Role
from casemate_schemas.keyring import KeyRing
from casemate_schemas.signatures import Signed, sign

NOW = 1_790_000_000_000
MEMBERS = ("north", "south", "university")


@dataclass(frozen=True)
class Parties:
    """Keys of members and key brokers, and the manifest they signed."""

    members: dict[str, KeyRing]
    key_brokers: dict[str, KeyRing]
    manifest: ConsortiumManifest
    chain: ManifestChain
    consortium: Consortium

    def person(
        self, member: str, *, roles: tuple[Role, ...] = ("scientist",), start: int = NOW, lasts: int = 3_600_000
    ) -> tuple[KeyRing, Signed]:
        """Fresh keys of a person and their delegation by ``member``."""
        keys = KeyRing.generate()
        delegation = Delegation(
            consortium=self.consortium.id,
            member=member,
            person="clara",
            signing_key=keys.signing.public,
            sealing_key=keys.sealing.public,
            roles=roles,
            not_before=start,
            expires=start + lasts,
        )
        return keys, sign(delegation, self.members[member].signing)


def make_manifest(
    members: dict[str, KeyRing], key_brokers: dict[str, KeyRing], **changes: object
) -> ConsortiumManifest:
    fields: dict[str, object] = {
        "number": 1,
        "previous": None,
        "name": "test",
        "members": tuple(
            Member(id=name, name=name, signing_key=ring.signing.public, sealing_key=ring.sealing.public)
            for name, ring in members.items()
        ),
        "key_brokers": tuple(
            KeyBroker(id=name, serves=(name,), signing_key=ring.signing.public, sealing_key=ring.sealing.public)
            for name, ring in key_brokers.items()
        ),
        "attestation": AttestationPolicy(
            simulation=True,
            products=(AcceptedProduct(product="Milan", ark_sha256=(bytes(32),)),),
            measurements=(bytes(48),),
        ),
        "quorum": 2,
        "created": NOW,
    }
    return ConsortiumManifest.model_validate({**fields, **changes})


def amended(parties: Parties, **changes: object) -> Consortium:
    """The consortium after a second manifest, which all its members signed."""
    fields = {**dict(parties.manifest), "number": 2, "previous": parties.consortium.digest, **changes}
    manifest = ConsortiumManifest.model_validate(fields)
    signed = sign_manifest(manifest, {name: ring.signing for name, ring in parties.members.items()})
    return verify_next(parties.consortium, signed)


@pytest.fixture(scope="session")
def parties() -> Parties:
    members = {name: KeyRing.generate() for name in MEMBERS}
    key_brokers = {name: KeyRing.generate() for name in MEMBERS}
    manifest = make_manifest(members, key_brokers)
    chain = ManifestChain(manifests=(sign_manifest(manifest, {n: r.signing for n, r in members.items()}),))
    return Parties(members, key_brokers, manifest, chain, verify_chain(chain))
