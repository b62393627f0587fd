"""``/v1/workers``: which workers announced themselves, and telling one to take no more jobs."""

from __future__ import annotations

from typing import Final

from aiohttp import web
from casemate_messaging.presence import Presence, PresenceStore
from casemate_schemas.api import PresentWorker, PresentWorkers
from casemate_schemas.codec import Name
from casemate_schemas.errors import AuthorisationError, NotFoundError
from pydantic import TypeAdapter, ValidationError

from casemate_gateway.gateway import gateway_of

SILENT_MS: Final = 30_000
"""Workers speak up every ten seconds at least."""

_NAME = TypeAdapter[str](Name)


async def listing(request: web.Request) -> web.Response:
    """``GET /v1/workers``: the workers that announced themselves within a day, on their own word."""
    gateway = gateway_of(request)
    await gateway.authenticate_empty(request)
    found = await PresenceStore(gateway.client).all()
    now = gateway.clock()
    shown = sorted((_shown(presence, heard, now) for presence, heard in found), key=lambda worker: worker.worker)
    return web.json_response(text=PresentWorkers(workers=tuple(shown)).model_dump_json())


async def drain(request: web.Request) -> web.Response:
    """``POST /v1/workers/{worker}/drain``: has a worker end its job, take no other, and end itself.

    1. An admin asks, of any member: workers are the consortium's.
    2. The worker is there. The order is for its present run; the program takes jobs again when it is started again.
    3. It hears of it within ten seconds.
    """
    gateway = gateway_of(request)
    person = await gateway.authenticate_empty(request)
    if "admin" not in person.delegation.roles:  # 1
        raise AuthorisationError("only an admin may drain a worker")
    store = PresenceStore(gateway.client)
    try:
        presence, heard = await store.find(_NAME.validate_python(request.match_info["worker"]))  # 2
    except ValidationError as error:
        raise NotFoundError("no worker of that name announced itself") from error
    await store.drain(presence)  # 3
    gateway.log.info("drain", worker=presence.worker, member=person.member)
    shown = _shown(presence, heard, gateway.clock())
    return web.json_response(text=shown.model_dump_json(), status=202)


def _shown(presence: Presence, heard: int, now: int) -> PresentWorker:
    return PresentWorker(
        worker=presence.worker,
        state="silent" if now - heard > SILENT_MS else presence.state,
        since=presence.since,
        heard=heard,
        manifest_number=presence.manifest_number,
    )
