"""``/v1/jobs/{id}/release`` and ``/result``: for recipients only, and only once all key brokers hold the commit."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from aiohttp import web
from casemate_messaging.envelopes import StoredHead
from casemate_schemas.api import MEDIA_TYPE
from casemate_schemas.codec import decode
from casemate_schemas.errors import CasemateError, IntegrityError, MalformedError, NotFoundError
from casemate_schemas.result import Release
from casemate_schemas.signatures import Signed

from casemate_gateway.gateway import Gateway, gateway_of
from casemate_gateway.records import Job

_RANGE: Final = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


async def release(request: web.Request) -> web.Response:
    """``GET /v1/jobs/{job_id}/release``: the signed release."""
    return web.Response(body=(await _sealed_job(request)).release(), content_type=MEDIA_TYPE)


async def result(request: web.Request) -> web.StreamResponse:
    """``GET /v1/jobs/{job_id}/result``: the envelope that the release names, or one range of it, in constant memory.

    Its ``ETag`` is the envelope's digest: 304 for whoever has it, and ``If-Range`` with another one gets the whole.
    """
    gateway = gateway_of(request)
    job = await _sealed_job(request)
    stored = await _stored(gateway, job)
    name = stored.head.header.digest.hex()
    response = web.StreamResponse(headers={"Accept-Ranges": "bytes", "ETag": f'"{name}"'})
    if {tag.value for tag in request.if_none_match or ()} & {name, "*"}:
        return web.Response(status=304, headers=response.headers)
    start, stop = 0, len(stored.framing) + stored.head.header.ciphertext_bytes
    wanted, if_range = request.headers.get("Range"), request.headers.get("If-Range")
    if wanted is not None and if_range in (None, response.headers["ETag"]):
        size = stop
        if (found := _range(wanted, size)) is None:
            raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size}"})
        start, stop = found
        response.set_status(206)
        response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    response.content_type, response.content_length = MEDIA_TYPE, stop - start
    with gateway.downloads.one():
        return await _send(gateway, request, response, stored, range(start, stop))


async def _sealed_job(request: web.Request) -> Job:
    """The job, which has a release, if the asker is a recipient. Raises as the checks below, in their order."""
    gateway = gateway_of(request)
    person = await gateway.authenticate_empty(request)
    job, _ = await gateway.visible_job(request.match_info["job_id"], person)
    job.check_recipient(person)
    job.release()
    return job


async def _stored(gateway: Gateway, job: Job) -> StoredHead:
    """The result that the release names. 410 once its time is over; :class:`IntegrityError` if it is lost before."""
    try:
        digest = decode(Signed, job.release()).peek(Release).result
        return await gateway.envelopes.head(digest)
    except (MalformedError, NotFoundError) as error:
        if job.record.updated + 1000 * gateway.settings.retention_s <= gateway.clock():
            raise web.HTTPGone from error
        raise IntegrityError("the job's release names no stored result") from error


def _range(text: str, size: int) -> tuple[int, int] | None:
    """The one range asked for, as (start, stop); None if there is no byte in it, or it is no single range."""
    found = _RANGE.fullmatch(text)
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":
        start, stop = max(0, size - int(found[2])), size
    else:
        start, stop = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
    return (start, stop) if start < stop else None


async def _send(
    gateway: Gateway, request: web.Request, response: web.StreamResponse, stored: StoredHead, wanted: range
) -> web.StreamResponse:
    """Streams a part. If the store fails midway the connection is cut, so nobody takes a part for the whole."""
    await response.prepare(request)
    try:
        async with aclosing(_part(gateway, stored, wanted)) as pieces:
            async for piece in pieces:
                await response.write(piece)
        await response.write_eof()
    except (CasemateError, ConnectionError) as error:
        gateway.log.warning("download_cut", envelope=stored.head.header.digest.hex(), error=type(error).__name__)
        if request.transport is not None:
            request.transport.abort()
    return response


async def _part(gateway: Gateway, stored: StoredHead, wanted: range) -> AsyncGenerator[bytes]:
    """Those bytes of the envelope; of a whole one the digest is checked before its end."""
    framing, size = stored.framing, stored.head.header.ciphertext_bytes
    if wanted.start < len(framing):
        yield framing[wanted.start : wanted.stop]
    start, stop = max(0, wanted.start - len(framing)), wanted.stop - len(framing)
    if stop <= start:
        return
    pieces = gateway.envelopes.ciphertext(stored)
    if (start, stop) != (0, size):
        pieces = gateway.envelopes.part(stored, start, stop)
    async with aclosing(pieces):
        async for piece in pieces:
            yield piece
