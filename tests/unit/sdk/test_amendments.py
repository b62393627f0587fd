"""The next manifest: what a proposal changes, who may sign it, and when it is complete."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from casemate.amendments import (
    Proposal,
    combine,
    complete,
    differences,
    propose,
    sign_proposal,
    with_floor,
    with_measurements,
    with_member,
)
from casemate_schemas.attestation_policy import AMD_ARK_SHA256, AcceptedProduct, AttestationPolicy, TcbVersion
from casemate_schemas.codec import decode
from casemate_schemas.consortium import ConsortiumManifest, Member, verify_chain, verify_next
from casemate_schemas.errors import ManifestError, ParameterError
from casemate_schemas.keyring import KeyRing
from support.command_line import casemate
from support.consortium import amended, consortium_for_tests

KEYS = consortium_for_tests()
NOW_MS = 1_790_000_000_001
OTHER = b"\x03" * 48
LISTED = KEYS.consortium.manifest.attestation.measurements[0]


def a_proposal(**changed: object) -> Proposal:
    return propose(KEYS.consortium, created=NOW_MS, **changed)


def signed_by(proposal: Proposal, *members: str) -> Proposal:
    return combine([sign_proposal(proposal, KEYS.consortium, KEYS.members[name])[0] for name in members])


def a_member(name: str) -> Member:
    keys = KeyRing.generate()
    return Member(id=name, name=name, signing_key=keys.signing.public, sealing_key=keys.sealing.public)


def test_a_quorum_of_present_members_completes_it_in_any_order() -> None:
    proposal = a_proposal(name="renamed")
    for members in (("north", "south"), ()):
        with pytest.raises(ManifestError, match=r"quorum|needs 3"):
            complete(signed_by(proposal, *members) if members else proposal, KEYS.consortium)
    in_turn = proposal
    for name in ("south", "north", "south", "clara"):
        in_turn, member = sign_proposal(in_turn, KEYS.consortium, KEYS.members[name])
        assert member == name
    copies = signed_by(proposal, "clara", "north", "south")
    assert in_turn == copies
    after = verify_next(KEYS.consortium, complete(copies, KEYS.consortium))
    assert (after.manifest.number, after.manifest.name, after.manifest.created) == (2, "renamed", NOW_MS)


def test_only_members_sign_and_only_what_follows() -> None:
    proposal = a_proposal()
    for stranger in (KeyRing.generate(), KEYS.key_brokers["north"]):
        with pytest.raises(ParameterError, match="no present member"):
            sign_proposal(proposal, KEYS.consortium, stranger)
    newer = amended(KEYS, name="published meanwhile")
    with pytest.raises(ManifestError, match="amend the newest"):
        sign_proposal(proposal, newer.consortium, KEYS.members["north"])
    real = AcceptedProduct(product="Milan", ark_sha256=(AMD_ARK_SHA256["Milan"],))
    policy = AttestationPolicy(simulation=False, products=(real,), measurements=(OTHER,))
    with pytest.raises(ManifestError, match="simulated from its first"):
        sign_proposal(a_proposal(attestation=policy), KEYS.consortium, KEYS.members["north"])
    with pytest.raises(ParameterError, match="copies of one proposal"):
        combine([a_proposal(), a_proposal(name="another")])


def test_every_change_is_shown_and_nothing_else() -> None:
    before = KEYS.consortium.manifest
    policy = with_measurements(before.attestation, added=[OTHER, OTHER], removed=[LISTED])
    policy = with_floor(policy, "Milan", TcbVersion(snp=24))
    west = a_member("west")
    after = a_proposal(attestation=policy, **with_member(before, west, served_by="north")).open(KEYS.consortium)
    assert differences(before, after) == [
        "- attestation.products[Milan].min_tcb.snp: 0",
        f"- attestation.measurements: {LISTED.hex()}",
        "+ members[west].id: west",
        "+ members[west].name: west",
        f"+ members[west].signing_key: {west.signing_key.hex()}",
        *(f"+ members[west].sealing_key{line}" for line in _sealing_lines(west)),
        "+ key_brokers[north].serves: west",
        "+ attestation.products[Milan].min_tcb.snp: 24",
        f"+ attestation.measurements: {OTHER.hex()}",
    ]
    assert differences(before, a_proposal().open(KEYS.consortium)) == []


def test_a_version_is_one_value_and_so_is_a_combination() -> None:
    """Or a lower floor of the same numbers, in another order, would be no change to whoever is asked to sign it."""
    policy = KEYS.consortium.manifest.attestation
    product, *others = policy.products

    def with_firmware(*version: int) -> AttestationPolicy:
        floor = product.model_copy(update={"min_firmware": version})
        return policy.model_copy(update={"products": (floor, *others)})

    before = KEYS.consortium.manifest.model_copy(update={"attestation": with_firmware(1, 55, 0)})
    after = before.model_copy(update={"attestation": with_firmware(0, 1, 55)})
    path = f"attestation.products[{product.product}].min_firmware"
    assert differences(before, after) == [f"- {path}: 1 55 0", f"+ {path}: 0 1 55"]

    def together(*types: tuple[str, ...]) -> ConsortiumManifest:
        return before.model_copy(update={"attestation": policy.model_copy(update={"evidence_types": types})})

    both, either = together(("sev-snp", "sev-snp-vtpm")), together(("sev-snp",), ("sev-snp-vtpm",))
    assert differences(both, either) == [
        "- attestation.evidence_types: sev-snp sev-snp-vtpm",
        "+ attestation.evidence_types: sev-snp",
        "+ attestation.evidence_types: sev-snp-vtpm",
    ]


def _sealing_lines(member: Member) -> list[str]:
    value = member.model_dump()["sealing_key"]
    if isinstance(value, dict):
        return [f".{name}: {item.hex() if isinstance(item, bytes) else item}" for name, item in value.items()]
    return [f": {value.hex()}"]


def test_what_cannot_be_proposed() -> None:
    manifest = KEYS.consortium.manifest
    with pytest.raises(ParameterError, match="lists no measurement"):
        with_measurements(manifest.attestation, removed=[OTHER])
    for measurements in ({"removed": [LISTED]}, {"added": [b"short"]}):
        with pytest.raises(ParameterError):
            with_measurements(manifest.attestation, **measurements)
    with pytest.raises(ParameterError, match="does not accept Turin"):
        with_floor(manifest.attestation, "Turin", TcbVersion(snp=1))
    with pytest.raises(ManifestError, match="no key broker"):
        with_member(manifest, a_member("west"), served_by="west")
    with pytest.raises(ParameterError, match="unique"):
        a_proposal(**with_member(manifest, a_member("south"), served_by="north"))
    with pytest.raises(ParameterError, match="quorum"):
        a_proposal(quorum=5)


def test_a_members_private_keys_stay_private(tmp_path: Path) -> None:
    key, out = tmp_path / "west.key", tmp_path / "west.member"
    arguments = ["consortium", "new-member", "west", "--key", str(key), "--out", str(out)]
    assert casemate(*arguments) == 0
    keys, member = KeyRing.from_text(key.read_text()), decode(Member, out.read_bytes())
    assert key.stat().st_mode & 0o077 == 0
    assert (member.id, member.signing_key) == ("west", keys.signing.public)
    assert casemate(*arguments) == 2, "neither file is ever replaced"


def test_a_published_chain_is_what_verify_chain_accepts() -> None:
    signed = complete(signed_by(a_proposal(name="renamed"), "north", "south", "east"), KEYS.consortium)
    chain = replace(KEYS).chain.model_copy(update={"manifests": (*KEYS.chain.manifests, signed)})
    assert verify_chain(chain, consortium=KEYS.consortium.id).manifest.name == "renamed"
