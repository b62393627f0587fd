from __future__ import annotations

import pytest
from casemate_schemas.codec import encode
from casemate_schemas.consortium import (
    ConsortiumManifest,
    ManifestChain,
    MemberSignature,
    SignedManifest,
    sign_manifest,
    verify_chain,
    verify_delegation,
)
from casemate_schemas.errors import AuthenticationError, ManifestError
from casemate_schemas.keyring import KeyRing
from casemate_schemas.signatures import sign
from pydantic import ValidationError

from .conftest import NOW, Parties, make_manifest


def successor(parties: Parties, signers: tuple[str, ...] = ("north", "south"), **changes: object) -> ManifestChain:
    first = parties.chain.manifests[0]
    fields: dict[str, object] = {"number": 2, "previous": first.digest, "name": "second", **changes}
    manifest = make_manifest(parties.members, parties.key_brokers, **fields)
    signed = sign_manifest(manifest, {name: parties.members[name].signing for name in signers})
    return ManifestChain(manifests=(first, signed))


def test_the_id_is_the_first_manifests_digest_and_stays(parties: Parties) -> None:
    first = verify_chain(parties.chain)
    second = verify_chain(successor(parties))
    assert first.id == first.digest == parties.chain.manifests[0].digest
    assert second.id == first.id
    assert second.digest != first.digest
    assert second.manifest.name == "second"


def test_the_first_needs_every_members_signature(parties: Parties) -> None:
    two = {name: parties.members[name].signing for name in ("north", "south")}
    with pytest.raises(ManifestError, match="every member"):
        verify_chain(ManifestChain(manifests=(sign_manifest(parties.manifest, two),)))


@pytest.mark.parametrize("signers", [("north",), ("north", "north")])
def test_a_successor_needs_a_quorum_of_distinct_members(parties: Parties, signers: tuple[str, ...]) -> None:
    with pytest.raises(ManifestError, match="quorum"):
        verify_chain(successor(parties, signers))


def test_strangers_do_not_count_and_forgeries_refuse(parties: Parties) -> None:
    chain = successor(parties, ("north",))
    stranger = sign(parties.manifest, KeyRing.generate().signing).signature
    signed = chain.manifests[1]
    for member, message in (("mallory", "quorum"), ("south", "does not verify")):
        forged = SignedManifest(
            payload=signed.payload, signatures=(*signed.signatures, MemberSignature(member=member, signature=stranger))
        )
        with pytest.raises(ManifestError, match=message):
            verify_chain(ManifestChain(manifests=(chain.manifests[0], forged)))


def test_new_members_cannot_vote_themselves_in(parties: Parties) -> None:
    new = {name: KeyRing.generate() for name in ("eve", "mallory")}
    manifest = make_manifest(
        {**parties.members, **new},
        {**parties.key_brokers, **{name: KeyRing.generate() for name in new}},
        number=2,
        previous=parties.chain.manifests[0].digest,
    )
    signed = sign_manifest(manifest, {name: ring.signing for name, ring in new.items()})
    with pytest.raises(ManifestError, match="quorum"):
        verify_chain(ManifestChain(manifests=(parties.chain.manifests[0], signed)))


@pytest.mark.parametrize("changes", [{"number": 3}, {"previous": bytes(32)}])
def test_the_chain_has_no_gap_and_no_fork(parties: Parties, changes: dict[str, object]) -> None:
    with pytest.raises(ManifestError, match="does not follow"):
        verify_chain(successor(parties, **changes))


def test_nobody_goes_back_behind_what_was_seen(parties: Parties) -> None:
    chain = successor(parties)
    second = verify_chain(chain)
    pinned = (2, second.digest)
    assert verify_chain(chain, pinned=pinned).digest == second.digest
    with pytest.raises(ManifestError, match="seen before"):
        verify_chain(parties.chain, pinned=pinned)
    with pytest.raises(ManifestError, match="seen before"):
        verify_chain(successor(parties, name="a fork"), pinned=pinned)
    with pytest.raises(ManifestError, match="another consortium"):
        verify_chain(chain, consortium=bytes(32))


@pytest.mark.parametrize(
    "changes",
    [
        {"quorum": 4},
        {"number": 2},
        {"previous": bytes(32)},
        {"members": ()},
        {"key_brokers": ()},
    ],
)
def test_inconsistent_manifests_cannot_be_made(parties: Parties, changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ConsortiumManifest.model_validate({**dict(parties.manifest), **changes})


def test_one_key_cannot_be_two_parties(parties: Parties) -> None:
    with pytest.raises(ValidationError, match="signing keys"):
        make_manifest(parties.members, {**parties.key_brokers, "north": parties.members["north"]})


def test_a_delegation_holds_for_its_time_member_and_consortium(parties: Parties) -> None:
    keys, signed = parties.person("north", lasts=1000)
    delegation = verify_delegation(signed, parties.consortium, at=NOW)
    assert delegation.signing_key == keys.signing.public
    with pytest.raises(AuthenticationError, match="not valid at this time"):
        verify_delegation(signed, parties.consortium, at=NOW + 1000)
    with pytest.raises(AuthenticationError, match="not valid at this time"):
        verify_delegation(signed, parties.consortium, at=NOW - 3_600_000)
    _, by_south = parties.person("south")
    forged = sign(delegation, parties.members["south"].signing)
    with pytest.raises(AuthenticationError, match="not signed by its member"):
        verify_delegation(forged, parties.consortium, at=NOW)
    elsewhere = delegation.model_copy(update={"consortium": bytes(32)})
    with pytest.raises(AuthenticationError, match="another consortium"):
        verify_delegation(sign(elsewhere, parties.members["north"].signing), parties.consortium, at=NOW)
    assert verify_delegation(by_south, parties.consortium, at=NOW).member == "south"


def test_a_delegation_is_short_lived(parties: Parties) -> None:
    with pytest.raises(ValidationError, match="92 days"):
        parties.person("north", lasts=93 * 24 * 3600 * 1000)
    with pytest.raises(ValidationError, match="92 days"):
        parties.person("north", lasts=0)


def test_a_manifest_survives_the_wire(parties: Parties) -> None:
    signed = parties.chain.manifests[0]
    assert signed.payload == encode(parties.manifest)
    assert isinstance(verify_chain(parties.chain).manifest, ConsortiumManifest)
