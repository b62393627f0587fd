"""How the members of a local stack put their hosted key brokers into the manifest: attested first, then signed for."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import ManifestChain, SignedManifest
from casemate_schemas.errors import SetupError, UnavailableError

from casemate.amendments import complete, propose, sign_proposal
from casemate.client import Consortium, connect
from casemate.hosting import with_hosted_key_broker
from casemate.identity import load_keys, now_ms

from .layout import Layout

_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.05


async def list_hosted(layout: Layout, url: str) -> None:
    """Puts the hosted key brokers that are not in the manifest yet into the next one. Returns when they serve.

    1. Each is attested: the next manifest lists the keys that its evidence vouches for.
    2. All members sign that manifest, and every program gets to see it.

    Raises :class:`~casemate_schemas.errors.AttestationError` for one that is not what the manifest accepts.
    """
    facts, chain = layout.read_facts(), decode(ManifestChain, layout.manifest.read_bytes())
    listed = {broker.id: broker for broker in chain.manifests[-1].open().key_brokers}
    waiting = [name for name in facts.hosted if listed[name].hosted == "member"]
    if not waiting:
        return
    if not facts.people:
        raise SetupError("hosted key brokers need a person who attests them, and this stack has none")
    async with _connected(layout, url) as consortium:
        signed = await _next_manifest(layout, consortium, waiting)  # 1
    draft = layout.manifest.with_suffix(".new")  # 2
    draft.write_bytes(encode(ManifestChain(manifests=(*chain.manifests, signed))))
    draft.replace(layout.manifest)
    await asyncio.wait_for(_until_served(layout, url, waiting), _TIMEOUT_S)


@asynccontextmanager
async def _connected(layout: Layout, url: str) -> AsyncIterator[Consortium]:
    facts = layout.read_facts()
    with tempfile.TemporaryDirectory() as pins:
        person = layout.person_keys(facts.people[0])
        async with connect(url, identity=person, consortium=facts.consortium, state_dir=pins) as consortium:
            yield consortium


async def _next_manifest(layout: Layout, consortium: Consortium, waiting: Sequence[str]) -> SignedManifest:
    verified, changed = consortium.verified, dict[str, Any]()
    manifest = verified.manifest
    for name in waiting:
        attested = await consortium.attest_key_broker(name)
        manifest = manifest.model_copy(update=with_hosted_key_broker(manifest, attested.claims))
        changed["key_brokers"] = manifest.key_brokers
    proposal = propose(verified, created=now_ms(), **changed)
    for member in layout.read_facts().members:
        proposal, _ = sign_proposal(proposal, verified, load_keys(layout.member_keys(member)))
    return complete(proposal, verified)


async def _until_served(layout: Layout, url: str, waiting: Sequence[str]) -> None:
    """Programs look at the manifest file every other second: the gateway has, and these key brokers, once they say so."""
    while True:
        async with _connected(layout, url) as consortium:
            if all(consortium.manifest.key_broker(name).hosted == "enclave" for name in waiting):
                with contextlib.suppress(UnavailableError):
                    await asyncio.gather(*map(consortium.attest_key_broker, waiting))
                    return
        await asyncio.sleep(_POLL_S)
