"""``/v1/key-brokers``: sealed requests of people to key brokers, carried both ways and opened by neither hand in between."""

from __future__ import annotations

from typing import Final

from aiohttp import web
from casemate_messaging.rpc import MAX_RPC_BYTES, call
from casemate_schemas import subjects
from casemate_schemas.api import JOB_HEADER, MEDIA_TYPE
from casemate_schemas.consortium import KeyBroker
from casemate_schemas.envelope import open_head, split_envelope
from casemate_schemas.errors import AuthorisationError, ManifestError, NotFoundError, UnavailableError
from casemate_schemas.keys import sealing_key_id
from nats.errors import NoRespondersError

from casemate_gateway.authentication import Person
from casemate_gateway.gateway import Gateway, gateway_of

MAX_EVIDENCE_REQUEST_BYTES: Final = 1024


async def message(request: web.Request) -> web.Response:
    """``POST /v1/key-brokers/{id}/messages``: the key broker's answer to a request envelope.

    1. The key broker is one of the consortium's.
    2. The envelope is a request, from the person who posts it, and addressed to that key broker.
    3. Its answer is handed back as it came; the job that it may have to do with, if it waits, is asked about again.
    """
    gateway = gateway_of(request)
    person, body = await gateway.authenticate(request)
    key_broker = _key_broker(gateway, request.match_info["key_broker"])
    envelope = await body.whole(MAX_RPC_BYTES)
    _check_request(gateway, person, key_broker, envelope)
    subject = subjects.key_broker_op(key_broker.id, "message")
    answer = await call(gateway.client, subject, envelope, gateway.settings.key_broker_timeout_s)
    gateway.admission.wake(request.headers.get(JOB_HEADER, ""))
    return web.Response(body=answer, content_type=MEDIA_TYPE)


async def evidence(request: web.Request) -> web.Response:
    """``POST /v1/key-brokers/{id}/evidence``: a hosted key broker's evidence over the nonce of whoever asks.

    Also of one that no manifest lists yet: its evidence comes first. It speaks for itself, so it is handed back as it came.
    """
    gateway = gateway_of(request)
    _, body = await gateway.authenticate(request)
    payload = await body.whole(MAX_EVIDENCE_REQUEST_BYTES)
    subject = subjects.key_broker_op(request.match_info["key_broker"], "evidence")
    try:
        answer = await call(gateway.client, subject, payload, gateway.settings.key_broker_timeout_s)
    except UnavailableError as error:
        listed = {key_broker.id for key_broker in gateway.consortium.manifest.key_brokers}
        if isinstance(error.__cause__, NoRespondersError) and request.match_info["key_broker"] not in listed:
            raise NotFoundError("no key broker of that name answers, and the consortium lists none") from error
        raise
    return web.Response(body=answer, content_type=MEDIA_TYPE)


def _key_broker(gateway: Gateway, key_broker_id: str) -> KeyBroker:
    try:
        return gateway.consortium.manifest.key_broker(key_broker_id)
    except ManifestError as error:
        raise NotFoundError("no such key broker in this consortium") from error


def _check_request(gateway: Gateway, person: Person, key_broker: KeyBroker, envelope: bytes) -> None:
    signed_head, _ = split_envelope(envelope, max_bytes=MAX_RPC_BYTES)
    head = open_head(signed_head, kind="request")
    if head.header.preamble.sender != person.signing_key:
        raise AuthorisationError("the envelope is from another sender than the one who posts it")
    if head.header.preamble.consortium != gateway.consortium.id:
        raise AuthorisationError("the envelope belongs to another consortium")
    head.sealed_key_for(sealing_key_id(key_broker.sealing_key))
