"""The next manifest: proposed, signed member by member, and put together. Nothing here needs a network.

What counts is in the manifest's own bytes: whoever signs sees what would change against the newest one that *they* have
verified, so a proposal can come from anyone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

from casemate_schemas.attestation_policy import AttestationPolicy, Product, TcbVersion
from casemate_schemas.codec import WireModel, decode, encode
from casemate_schemas.consortium import (
    MAX_MANIFEST_BYTES,
    Consortium,
    ConsortiumManifest,
    Member,
    MemberSignature,
    SignedManifest,
    sign_manifest,
    verify_next,
)
from casemate_schemas.errors import ManifestError, ParameterError
from casemate_schemas.keyring import KeyRing
from pydantic import Field

from .parameters import parameter_errors


class Proposal(WireModel):
    """A manifest on its way to a quorum: its canonical bytes, and the signatures so far."""

    KIND: ClassVar[str] = "manifest-proposal"

    payload: Annotated[bytes, Field(max_length=MAX_MANIFEST_BYTES)]
    signatures: Annotated[tuple[MemberSignature, ...], Field(max_length=256)] = ()

    def open(self, consortium: Consortium) -> ConsortiumManifest:
        """The manifest, if it would be the one after ``consortium``'s. Raises :class:`ManifestError` or
        :class:`~casemate_schemas.errors.MalformedError`."""
        manifest = decode(ConsortiumManifest, self.payload, max_bytes=MAX_MANIFEST_BYTES)
        newest = consortium.manifest
        if (manifest.number, manifest.previous) != (newest.number + 1, consortium.digest):
            raise ManifestError(f"the proposal does not follow manifest {newest.number}: amend the newest one")
        if manifest.simulation != newest.simulation:
            raise ManifestError("a consortium is simulated from its first manifest to its last, or never")
        return manifest


def propose(consortium: Consortium, *, created: int, **changed: Any) -> Proposal:
    """The manifest after ``consortium``'s, with the ``changed`` fields. Raises :class:`ParameterError`."""
    fields = dict(consortium.manifest) | changed
    fields |= {"number": consortium.manifest.number + 1, "previous": consortium.digest, "created": created}
    with parameter_errors("manifest"):
        return Proposal(payload=encode(ConsortiumManifest(**fields)))


def sign_proposal(proposal: Proposal, consortium: Consortium, keys: KeyRing) -> tuple[Proposal, str]:
    """The proposal with the signature of the member whose ``keys`` these are, and that member's id.

    Raises :class:`ManifestError` if it does not follow, :class:`ParameterError` for keys of no present member.
    """
    manifest = proposal.open(consortium)
    found = [member.id for member in consortium.manifest.members if member.signing_key == keys.signing.public]
    if not found:
        raise ParameterError("these are no present member's keys: expected a member's own key file, not a person's")
    signed = sign_manifest(manifest, {found[0]: keys.signing})
    return combine([proposal, Proposal(payload=signed.payload, signatures=signed.signatures)]), found[0]


def combine(proposals: Sequence[Proposal]) -> Proposal:
    """One proposal with all signatures. Raises :class:`ParameterError` if they are not copies of the same one."""
    if len({proposal.payload for proposal in proposals}) != 1:
        raise ParameterError("expected copies of one proposal, got different manifests")
    by_member = {item.member: item for proposal in proposals for item in proposal.signatures}
    signatures = tuple(by_member[name] for name in sorted(by_member))
    return Proposal(payload=proposals[0].payload, signatures=signatures)


def complete(proposal: Proposal, consortium: Consortium) -> SignedManifest:
    """The signed manifest, ready to be published. Raises :class:`ManifestError` if the quorum is not complete."""
    if not proposal.signatures:
        raise ManifestError(f"nobody has signed the proposal: it needs {consortium.manifest.quorum} members")
    signed = SignedManifest(payload=proposal.payload, signatures=proposal.signatures)
    verify_next(consortium, signed)
    return signed


def with_measurements(
    policy: AttestationPolicy, *, added: Iterable[bytes] = (), removed: Iterable[bytes] = ()
) -> AttestationPolicy:
    """The policy with other reference measurements (48 bytes each). Raises :class:`ParameterError`."""
    gone = set(removed)
    if missing := gone - set(policy.measurements):
        raise ParameterError(f"the manifest lists no measurement {min(missing).hex()}")
    kept = [measurement for measurement in policy.measurements if measurement not in gone]
    with parameter_errors("measurements"):
        return AttestationPolicy(**dict(policy) | {"measurements": tuple(dict.fromkeys([*kept, *added]))})


def with_floor(policy: AttestationPolicy, product: Product, floor: TcbVersion) -> AttestationPolicy:
    """The policy with another least TCB for a product that it accepts. Raises :class:`ParameterError`."""
    if product not in (accepted.product for accepted in policy.products):
        raise ParameterError(f"the manifest does not accept {product}")
    products = tuple(
        accepted.model_copy(update={"min_tcb": floor}) if accepted.product == product else accepted
        for accepted in policy.products
    )
    return policy.model_copy(update={"products": products})


def with_member(manifest: ConsortiumManifest, member: Member, *, served_by: str) -> dict[str, Any]:
    """The changed fields that let ``member`` in, served by a key broker that is there already.

    Raises :class:`ManifestError` if there is no such key broker.
    """
    serving = manifest.key_broker(served_by)
    grown = serving.model_copy(update={"serves": tuple(sorted({*serving.serves, member.id}))})
    brokers = tuple(grown if broker.id == served_by else broker for broker in manifest.key_brokers)
    return {"members": (*manifest.members, member), "key_brokers": brokers}


def differences(before: ConsortiumManifest, after: ConsortiumManifest) -> list[str]:
    """Every change, one line each (``+`` new, ``-`` gone), but number, previous and time, which always change."""
    told = {"number", "previous", "created"}
    old, new = (list(_leaves("", m.model_dump(exclude=told))) for m in (before, after))
    return [f"- {line}" for line in old if line not in new] + [f"+ {line}" for line in new if line not in old]


def _leaves(path: str, value: Any) -> Iterator[str]:
    """Paths and values; things with an id go by it, so that a new one moves no other."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(f"{path}.{name}".lstrip("."), item)
    elif isinstance(value, tuple) and value and isinstance(value[0], dict):
        for number, item in enumerate(value):
            name = item.get("id", item.get("product", number))
            yield from _leaves(f"{path}[{name}]", item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _leaves(path, item)
    else:
        yield f"{path}: {value.hex() if isinstance(value, bytes) else value}"
