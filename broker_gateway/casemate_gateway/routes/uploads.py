"""``/v1/uploads``: envelopes in pieces, gone on with wherever they broke off (tus 1.0: core, creation-with-upload, checksum,
expiration, termination).

An upload is one envelope. It begins with all that precedes the ciphertext, so everything about it is judged before a byte
of ciphertext is taken; its name is the envelope's digest. A piece counts once the whole of it has come with the digest
that its sender signed. What an upload has got to stands in NATS and nowhere else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Final

from aiohttp import web
from casemate_messaging.uploads import UploadState
from casemate_schemas.api import (
    MAX_PIECE_BYTES,
    MIN_PIECE_BYTES,
    TUS_VERSION,
    UPLOAD_CHUNK_BYTES,
    UPLOAD_MEDIA_TYPE,
    UPLOADS_PATH,
    EnvelopeStored,
)
from casemate_schemas.envelope import MAX_HEAD_BYTES, PREFIX_BYTES, split_envelope
from casemate_schemas.errors import (
    AuthenticationError,
    AuthorisationError,
    ChecksumError,
    ConflictError,
    MalformedError,
    NotFoundError,
    QuotaError,
    SealError,
    ThrottledError,
    TooLargeError,
)

from casemate_gateway.authentication import Person
from casemate_gateway.bodies import Body
from casemate_gateway.gateway import Gateway, gateway_of
from casemate_gateway.routes.envelopes import check_head

EXTENSIONS: Final = "creation,creation-with-upload,expiration,checksum,termination"
_NUMBER: Final = re.compile(r"[0-9]{1,18}")
_RETRY_S: Final = 60.0
FRAMING_BYTES: Final = PREFIX_BYTES + MAX_HEAD_BYTES


async def options(request: web.Request) -> web.Response:
    """``OPTIONS /v1/uploads``: what of tus is spoken here."""
    gateway = gateway_of(request)
    await gateway.authenticate_empty(request)
    headers = {
        "Tus-Version": TUS_VERSION,
        "Tus-Extension": EXTENSIONS,
        "Tus-Checksum-Algorithm": "sha256",
        "Tus-Max-Size": str(gateway.settings.max_envelope_bytes),
    }
    return web.Response(status=204, headers=headers)


async def create(request: web.Request) -> web.Response:
    """``POST /v1/uploads``: begins an upload, or tells how far it has got; 200 if the envelope is stored.

    1. The size is within bounds before anything is read. The body is all that precedes the ciphertext.
    2. The head is signed by that very person, of a kind that people upload and of this consortium; sizes agree.
    3. All that the member's people have begun stays within the member's bound.
    4. So does all that they have stored, this envelope included.
    """
    gateway = gateway_of(request)
    person, body = await _authenticate(request)
    length = _number(request, "Upload-Length")
    if length > gateway.settings.max_envelope_bytes:  # 1
        raise TooLargeError(
            f"expected an envelope of at most {gateway.settings.max_envelope_bytes} bytes, got {length}"
        )
    _check_media_type(request)
    signed_head, ciphertext = split_envelope(await body.whole(FRAMING_BYTES), max_bytes=FRAMING_BYTES)
    head = check_head(gateway, person, bytes(signed_head))  # 2
    if len(ciphertext) or length != PREFIX_BYTES + len(signed_head) + head.header.ciphertext_bytes:
        raise MalformedError("expected all that precedes the ciphertext, and the envelope's size as its header has it")
    name = head.header.digest
    if await gateway.envelopes.has(name):
        stored = EnvelopeStored(envelope=name.hex(), bytes=length)
        return web.json_response(text=stored.model_dump_json())
    now = gateway.clock()
    state = UploadState(
        member=person.member,
        envelope=name.hex(),
        signed_head=bytes(signed_head),
        digest=head.header.ciphertext_digest,
        size=head.header.ciphertext_bytes,
        created=now,
        expires=_expiry(gateway),
    )
    state = await _begun(gateway, state)  # 3
    await _count(gateway, state)  # 4
    headers = {"Location": f"{UPLOADS_PATH}/{state.envelope}", **_progress(state)}
    return web.Response(status=201, headers=headers)


async def show(request: web.Request) -> web.Response:
    """``HEAD /v1/uploads/{digest}``: how far it has got."""
    gateway = gateway_of(request)
    person, body = await _authenticate(request)
    await body.whole(0)
    state, _ = await _mine(gateway, person, request)
    return web.Response(headers={"Upload-Length": str(_framing(state) + state.size), **_progress(state)})


async def append(request: web.Request) -> web.Response:
    """``PATCH /v1/uploads/{digest}``: the next piece.

    1. It begins where the upload has got to, and has a size that a piece may have.
    2. It is streamed to the disk, and counts only if all of it came with the digest that was signed, and nobody else's
       piece came first.
    3. With the last one the whole is checked against the digest in the header, and becomes an envelope as any other.
    """
    gateway = gateway_of(request)
    person, body = await _authenticate(request)
    state, revision = await _mine(gateway, person, request)
    _check_media_type(request)
    checksum = _checksum(request)
    count = _check_piece(state, _number(request, "Upload-Offset") - _framing(state), body)  # 1
    with gateway.uploads.one():
        if count:  # 2
            pieces = _checked(body, count, checksum)
            expires = _expiry(gateway)
            state, revision = await gateway.unfinished.append(state, revision, pieces, count, expires=expires)
        else:
            await body.whole(0)
        if state.offset == state.size:
            await _finish(gateway, person, state, revision)  # 3
    return web.Response(status=204, headers=_progress(state))


async def remove(request: web.Request) -> web.Response:
    """``DELETE /v1/uploads/{digest}``: gives an upload up; what came of it is removed."""
    gateway = gateway_of(request)
    person, body = await _authenticate(request)
    await body.whole(0)
    state, revision = await _mine(gateway, person, request)
    await gateway.unfinished.give_up(state, revision)
    await gateway.quotas.given_up(person.member, state.envelope)
    return web.Response(status=204)


async def label(request: web.Request, response: web.StreamResponse) -> None:
    """Every answer about uploads says which tus it is."""
    if request.path == UPLOADS_PATH or request.path.startswith(UPLOADS_PATH + "/"):
        response.headers["Tus-Resumable"] = TUS_VERSION
        if response.status == 412:
            response.headers["Tus-Version"] = TUS_VERSION


async def _authenticate(request: web.Request) -> tuple[Person, Body]:
    found = await gateway_of(request).authenticate(request)
    if request.headers.getall("Tus-Resumable", []) != [TUS_VERSION]:
        raise web.HTTPPreconditionFailed
    return found


async def _begun(gateway: Gateway, state: UploadState) -> UploadState:
    """The upload, begun now or earlier, if the member's bound allows it. Everyone counts after they began, so of two who
    begin at once one or both are refused, and never none."""
    with suppress(ConflictError):
        revision = await gateway.unfinished.create(state)
        taken = 0
        async for other, _ in gateway.unfinished.list(state.member):
            taken += max(other.size, MIN_PIECE_BYTES)
        if taken > gateway.settings.max_unfinished_bytes:
            await gateway.unfinished.give_up(state, revision)
            raise ThrottledError("the member's unfinished uploads take all they may: end or delete some", _RETRY_S)
        return state
    known, _ = await gateway.unfinished.get(state.member, state.envelope)
    return known


async def _count(gateway: Gateway, state: UploadState) -> None:
    """Counts the envelope as stored. If there is no room for it, the upload has not begun."""
    try:
        await gateway.quotas.envelope(state.member, state.envelope, _framing(state) + state.size)
    except QuotaError:
        with suppress(ConflictError, NotFoundError):
            await gateway.unfinished.give_up(*await gateway.unfinished.get(state.member, state.envelope))
        raise


async def _mine(gateway: Gateway, person: Person, request: web.Request) -> tuple[UploadState, int]:
    """The upload, if this person began it: to others it does not exist."""
    try:
        state, revision = await gateway.unfinished.get(person.member, request.match_info["digest"])
        check_head(gateway, person, state.signed_head)
    except (NotFoundError, MalformedError, AuthorisationError) as error:
        raise NotFoundError("no such upload") from error
    if state.expires <= gateway.clock():
        raise web.HTTPGone
    return state, revision


def _check_piece(state: UploadState, offset: int, body: Body) -> int:
    """The size of the piece in bytes: some chunks, or all that is left. Nothing is read yet."""
    if offset != state.offset:
        raise ConflictError(f"the upload has got to {_framing(state) + state.offset} bytes, not to where this begins")
    if (count := body.content_length) is None:
        raise web.HTTPLengthRequired
    left = state.size - state.offset
    if count > min(left, MAX_PIECE_BYTES):
        raise TooLargeError(f"expected at most {min(left, MAX_PIECE_BYTES)} bytes, got {count}")
    if count < left and (count < MIN_PIECE_BYTES or count % UPLOAD_CHUNK_BYTES):
        raise MalformedError(
            f"expected all that is left, or some times {UPLOAD_CHUNK_BYTES} bytes from {MIN_PIECE_BYTES} on"
        )
    return count


async def _checked(body: Body, count: int, checksum: bytes | None) -> AsyncIterator[bytes]:
    """The body's pieces; if a checksum was sent along and it is not the body's, that is what is said."""
    hasher = hashlib.sha256()
    try:
        async for piece in body.rest(count):
            hasher.update(piece)
            yield piece
    except AuthenticationError as error:
        if checksum is None:
            raise
        raise ChecksumError("the piece does not have the SHA-256 in its Upload-Checksum") from error
    if checksum is not None and hasher.digest() != checksum:
        raise ChecksumError("the piece does not have the SHA-256 in its Upload-Checksum")


async def _finish(gateway: Gateway, person: Person, state: UploadState, revision: int) -> None:
    """Ciphertext, then head, then the end of the upload: whoever is killed in between is made up for by an empty piece."""
    try:
        new = await gateway.unfinished.finish(state)
    except SealError:
        await gateway.unfinished.give_up(state, revision)
        await gateway.quotas.given_up(state.member, state.envelope)
        raise
    await gateway.envelopes.put_head(state.signed_head)
    await gateway.quotas.kept(state.member, state.envelope, _framing(state) + state.size)
    if not new:
        await gateway.check_kept(bytes.fromhex(state.envelope), state.digest)
    with suppress(ConflictError):  # somebody else has sent the same at the same time
        await gateway.unfinished.forget(state, revision)
    gateway.log.info("stored", envelope=state.envelope, bytes=_framing(state) + state.size, member=person.member)


def _framing(state: UploadState) -> int:
    return PREFIX_BYTES + len(state.signed_head)


def _expiry(gateway: Gateway) -> int:
    return gateway.clock() + int(1000 * gateway.settings.upload_expiry_s)


def _progress(state: UploadState) -> dict[str, str]:
    expires = datetime.fromtimestamp(state.expires // 1000, UTC)
    return {
        "Upload-Offset": str(_framing(state) + state.offset),
        "Upload-Expires": format_datetime(expires, usegmt=True),
    }


def _number(request: web.Request, name: str) -> int:
    values = request.headers.getall(name, [])
    if len(values) != 1 or not _NUMBER.fullmatch(values[0]):
        raise MalformedError(f"expected one {name} header, a number of bytes")
    return int(values[0])


def _check_media_type(request: web.Request) -> None:
    if request.headers.get("Content-Type") != UPLOAD_MEDIA_TYPE:
        raise web.HTTPUnsupportedMediaType


def _checksum(request: web.Request) -> bytes | None:
    values = request.headers.getall("Upload-Checksum", [])
    if not values:
        return None
    algorithm, _, text = values[0].partition(" ")
    try:
        digest = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(values) != 1 or algorithm != "sha256" or len(digest) != hashlib.sha256().digest_size:
        raise MalformedError("expected one Upload-Checksum: sha256 and 32 bytes in base64")
    return digest
