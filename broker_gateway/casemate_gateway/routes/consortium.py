"""``/v1/consortium``: the manifest's chain, which proves itself to whoever knows the consortium's id."""

from __future__ import annotations

from aiohttp import web
from casemate_schemas.api import MEDIA_TYPE

from casemate_gateway.gateway import gateway_of


async def show(request: web.Request) -> web.Response:
    """``GET /v1/consortium``, unsigned."""
    return web.Response(body=gateway_of(request).manifest_chain, content_type=MEDIA_TYPE)
