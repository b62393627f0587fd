"""``/v1/jobs/{id}/release`` and ``/result``: for recipients only, and only once all key brokers hold the commit."""

from __future__ import annotations

from aiohttp import web
from casemate_messaging.envelopes import StoredHead
from casemate_schemas.api import MEDIA_TYPE
from casemate_schemas.codec import decode
from casemate_schemas.errors import CasemateError, IntegrityError, MalformedError, NotFoundError
from casemate_schemas.result import Release
from casemate_schemas.signatures import Signed

from casemate_gateway.gateway import Gateway, gateway_of


async def release(request: web.Request) -> web.Response:
    """``GET /v1/jobs/{job_id}/release``: the signed release."""
    return web.Response(body=await _release(request), content_type=MEDIA_TYPE)


async def result(request: web.Request) -> web.StreamResponse:
    """``GET /v1/jobs/{job_id}/result``: the envelope that the release names, in constant memory."""
    gateway = gateway_of(request)
    signed_release = await _release(request)
    try:
        digest = decode(Signed, signed_release).peek(Release).result
        stored = await gateway.envelopes.head(digest)
    except (MalformedError, NotFoundError) as error:
        raise IntegrityError("the job's release names no stored result") from error
    with gateway.downloads.one():
        return await _send(gateway, request, stored)


async def _release(request: web.Request) -> bytes:
    """The job's release, if the asker is a recipient. Raises as the checks below, in their order."""
    gateway = gateway_of(request)
    person = await gateway.authenticate_empty(request)
    job, _ = await gateway.visible_job(request.match_info["job_id"], person)
    job.check_recipient(person)
    return job.release()


async def _send(gateway: Gateway, request: web.Request, stored: StoredHead) -> web.StreamResponse:
    """Streams an envelope. If the store fails midway the connection is cut, so nobody takes a part for the whole."""
    response = web.StreamResponse()
    response.content_type = MEDIA_TYPE
    response.content_length = len(stored.framing) + stored.head.header.ciphertext_bytes
    await response.prepare(request)
    try:
        await response.write(stored.framing)
        async for piece in gateway.envelopes.ciphertext(stored):
            await response.write(piece)
        await response.write_eof()
    except (CasemateError, ConnectionError) as error:
        gateway.log.warning("download_cut", envelope=stored.head.header.digest.hex(), error=type(error).__name__)
        if request.transport is not None:
            request.transport.abort()
    return response
