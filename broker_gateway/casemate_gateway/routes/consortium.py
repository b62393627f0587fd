"""``/v1/consortium``: the manifest's chain, which proves itself to whoever knows the consortium's id."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web
from casemate_messaging.revocations import MAX_REVOCATION_BYTES
from casemate_schemas.api import MEDIA_TYPE, ManifestPublished, RevocationPublished
from casemate_schemas.codec import decode
from casemate_schemas.consortium import MAX_MANIFEST_BYTES, SignedManifest, verify_next, verify_revocation
from casemate_schemas.errors import AuthorisationError
from casemate_schemas.signatures import Signed

from casemate_gateway.gateway import gateway_of

MAX_SIGNED_MANIFEST_BYTES: Final = MAX_MANIFEST_BYTES + (64 << 10)
"""Room for the signatures of 256 members."""


async def show(request: web.Request) -> web.Response:
    """``GET /v1/consortium``: all manifests there are, for anyone."""
    return web.Response(body=gateway_of(request).manifests.encoded, content_type=MEDIA_TYPE)


async def publish(request: web.Request) -> web.Response:
    """``POST /v1/consortium/manifest``: the next manifest, for everyone to take up.

    1. An admin posts it. (That keeps noise away; what counts is the next step.)
    2. It follows the newest manifest, by a quorum of that one's members.
    3. It is stored under its number, where nobody can replace it: of two rivals the first one counts.
    4. This gateway acts on it from here on; the other programs find it within ``manifest_poll_s`` of theirs.
    """
    gateway = gateway_of(request)
    person, body = await gateway.authenticate(request)
    if "admin" not in person.delegation.roles:  # 1
        raise AuthorisationError("only an admin may publish a manifest")
    signed = decode(SignedManifest, await body.whole(MAX_SIGNED_MANIFEST_BYTES))
    number = signed.open().number
    is_news = number > gateway.consortium.manifest.number
    if is_news:
        verify_next(gateway.consortium, signed)  # 2
        await gateway.manifest_store.put(number, signed)  # 3
    await asyncio.to_thread(gateway.manifests.offer, signed)  # 4
    gateway.log.info("manifest", number=number, member=person.member)
    published = ManifestPublished(number=number, digest=signed.digest.hex())
    return web.json_response(text=published.model_dump_json(), status=201 if is_news else 200)


async def revoke(request: web.Request) -> web.Response:
    """``POST /v1/consortium/revocations``: that a person's delegations count no longer, for everyone to take up.

    1. Someone of the member posts it. (That keeps noise away; what counts is the next step.)
    2. The member's own key signed it.
    3. It is stored; storing it again changes nothing.
    4. This gateway acts on it from here on; key brokers find it within ``manifest_poll_s`` of theirs.
    """
    gateway = gateway_of(request)
    person, body = await gateway.authenticate(request)
    signed = decode(Signed, await body.whole(MAX_REVOCATION_BYTES))
    revocation = verify_revocation(signed, gateway.consortium)  # 2
    if person.member != revocation.member:  # 1
        raise AuthorisationError("only a person of the member may publish its revocations")
    await gateway.revocation_store.put(signed)  # 3
    gateway.revocations.offer(signed)  # 4
    gateway.log.info("revocation", member=person.member)
    published = RevocationPublished(member=revocation.member, person=revocation.person, before=revocation.before)
    return web.json_response(text=published.model_dump_json(), status=201)
