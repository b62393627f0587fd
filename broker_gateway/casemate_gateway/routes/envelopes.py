"""``/v1/envelopes``: ciphertext in, with bounded memory and under its sender's name; a dataset's out again, by its sender."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Final

from aiohttp import web
from casemate_schemas.api import EnvelopeStored
from casemate_schemas.envelope import PREFIX_BYTES, EnvelopeHead, head_bytes, open_head
from casemate_schemas.errors import AuthorisationError, CasemateError, MalformedError, NotFoundError, TooLargeError
from casemate_schemas.identity import Role

from casemate_gateway.authentication import Person
from casemate_gateway.bodies import Body
from casemate_gateway.gateway import Gateway, gateway_of

_SENDERS: Final[dict[str, Role]] = {"dataset": "steward", "job": "scientist"}
"""Kinds that people upload, and the role it takes."""


async def store(request: web.Request) -> web.Response:
    """``POST /v1/envelopes``: an envelope in one request.

    1. The sender is a person of the consortium; the size is within bounds before anything is read.
    2. The head is whole, signed by that very person, of a kind that people upload and of this consortium.
    3. The size announced in HTTP, the size in the header and the bytes that come agree.
    4. The member may store that much more.
    5. The ciphertext streams into the store, which shows it only if it has the header's digest; the last piece reaches
       the store only if the whole body has the signed content digest.
    """
    gateway = gateway_of(request)
    person, body = await gateway.authenticate(request)
    _check_announced(gateway, body)
    with gateway.uploads.one():
        head_length = head_bytes(await body.take(PREFIX_BYTES))
        signed_head = await body.take(head_length)
        head = check_head(gateway, person, signed_head)
        total = _check_size(gateway, body, head, PREFIX_BYTES + head_length)
        rest = body.rest(head.header.ciphertext_bytes)
        async with _counted(gateway, person, head, total):
            new = await gateway.envelopes.put(signed_head, rest)
        await gateway.check_kept(head.header.digest, head.header.ciphertext_digest)
        async for _ in rest:  # the ciphertext was there already, but the request must be what was signed
            pass
    gateway.log.info("stored", envelope=head.header.digest.hex(), bytes=total, member=person.member)
    stored = EnvelopeStored(envelope=head.header.digest.hex(), bytes=total)
    return web.json_response(text=stored.model_dump_json(), status=201 if new else 200)


@contextlib.asynccontextmanager
async def _counted(gateway: Gateway, person: Person, head: EnvelopeHead, size: int) -> AsyncGenerator[None]:
    """An envelope counts as the member's from before it is stored, and no longer if it is not."""
    name = head.header.digest.hex()
    await gateway.quotas.envelope(person.member, name, size)
    try:
        yield
    except BaseException:
        with contextlib.suppress(CasemateError):
            await gateway.quotas.given_up(person.member, name)
        raise
    await gateway.quotas.kept(person.member, name, size)


async def remove(request: web.Request) -> web.Response:
    """``DELETE /v1/envelopes/{digest}``: a dataset's ciphertext, at the wish of whoever uploaded it.

    1. The digest is one, and a dataset's envelope is stored under it. 2. The person who asks is its sender.
    3. The head goes first, so that nobody finds what is being removed.
    """
    gateway = gateway_of(request)
    person = await gateway.authenticate_empty(request)
    stored = await gateway.envelopes.head(_digest(request.match_info["digest"]))  # 1
    preamble = stored.head.header.preamble
    if preamble.kind != "dataset" or preamble.sender != person.signing_key:  # 2
        raise AuthorisationError("only whoever uploaded a dataset may remove it")
    await gateway.envelopes.delete(stored)  # 3
    await gateway.quotas.given_up(person.member, stored.head.header.digest.hex())
    gateway.log.info("removed", envelope=stored.head.header.digest.hex(), member=person.member)
    return web.Response(status=204)


def _digest(text: str) -> bytes:
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise NotFoundError("no such envelope")
    return bytes.fromhex(text)


def _check_announced(gateway: Gateway, body: Body) -> None:
    limit = gateway.settings.max_envelope_bytes
    if body.content_length is not None and body.content_length > limit:
        raise TooLargeError(f"expected an envelope of at most {limit} bytes, got {body.content_length}")


def check_head(gateway: Gateway, person: Person, signed_head: bytes) -> EnvelopeHead:
    """The head, signed by that very person, of a kind that people of that role upload, and of this consortium."""
    head = open_head(signed_head)
    preamble = head.header.preamble
    role = _SENDERS.get(preamble.kind)
    if role is None:
        raise MalformedError(f"expected an envelope of kind {' or '.join(_SENDERS)}, got {preamble.kind}")
    if preamble.sender != person.signing_key:
        raise AuthorisationError("the envelope is from another sender than the one who uploads it")
    if role not in person.delegation.roles:
        raise AuthorisationError(f"a {preamble.kind} envelope is a {role}'s to upload")
    if preamble.consortium != gateway.consortium.id:
        raise AuthorisationError("the envelope belongs to another consortium")
    return head


def _check_size(gateway: Gateway, body: Body, head: EnvelopeHead, before: int) -> int:
    """The envelope's size in bytes, if it is within bounds and what HTTP announced."""
    total = before + head.header.ciphertext_bytes
    if total > gateway.settings.max_envelope_bytes:
        raise TooLargeError(f"expected an envelope of at most {gateway.settings.max_envelope_bytes} bytes, got {total}")
    if body.content_length is not None and body.content_length != total:
        raise MalformedError(f"expected {total} bytes as the envelope's header says, got {body.content_length}")
    return total
