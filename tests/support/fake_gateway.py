"""The gateway's HTTP surface in memory, for tests of its clients: it verifies every signature and keeps what it is sent."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from aiohttp import web
from casemate_schemas import api
from casemate_schemas.admission import Submission
from casemate_schemas.codec import decode, encode
from casemate_schemas.envelope import open_head, split_envelope
from casemate_schemas.errors import CasemateError, problem_of
from casemate_schemas.identity import Delegation
from casemate_schemas.job_state import JobEvent
from casemate_schemas.requests import PersonRequest, PersonResponse
from casemate_schemas.sealing import open_envelope, seal_envelope
from casemate_schemas.signatures import Signed
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from http_message_signatures import HTTPMessageVerifier, MappingKeyResolver
from http_message_signatures.algorithms import ED25519
from support.http import served
from support.results import World

Answerer = Callable[[str, PersonRequest], Any]


@dataclass
class FakeGateway:
    """What tests set and look at. ``fail`` is raised, once each, before anything else is done."""

    world: World
    answer: Answerer
    chain: bytes = b""
    evidence: Callable[[bytes], bytes] | None = None
    """Of the one hosted key broker there may be."""
    fail: list[CasemateError] = field(default_factory=list)
    nonces: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    envelopes: dict[str, bytes] = field(default_factory=dict)
    submissions: list[Submission] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    events: list[JobEvent] = field(default_factory=list)
    event_starts: list[str] = field(default_factory=list)
    drop_after: int | None = None
    release: bytes = b""
    result: bytes = b""
    url: str = ""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        routes: list[tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]] = [
            ("GET", "/v1/consortium", self._consortium),
            ("POST", "/v1/envelopes", self._upload),
            ("POST", "/v1/key-brokers/{name}/messages", self._message),
            ("POST", "/v1/key-brokers/{name}/evidence", self._evidence),
            ("POST", "/v1/jobs", self._submit),
            ("GET", "/v1/jobs", self._list),
            ("GET", "/v1/jobs/{id}", self._show),
            ("POST", "/v1/jobs/{id}/cancel", self._show),
            ("GET", "/v1/jobs/{id}/events", self._events),
            ("GET", "/v1/jobs/{id}/release", self._release),
            ("GET", "/v1/jobs/{id}/result", self._result),
        ]
        for method, path, handler in routes:
            app.router.add_route(method, path, self._checked(handler))
        return app

    def _checked(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def checked(request: web.Request) -> web.StreamResponse:
            self.requests.append(f"{request.method} {request.path}")
            self._authenticate(request, await request.read())
            if self.fail:
                return problem(self.fail.pop(0))
            return await handler(request)

        return checked

    def _authenticate(self, request: web.Request, body: bytes) -> None:
        """Everything docs/protocol.md asks of a request's signature."""
        delegation = decode(Signed, base64.b64decode(request.headers[api.DELEGATION_HEADER])).peek(Delegation)
        key = Ed25519PublicKey.from_public_bytes(delegation.signing_key)
        keys = MappingKeyResolver(public_keys={delegation.signing_key.hex(): key}, private_keys={})

        class Message:
            method, url, headers = request.method, self.url + request.raw_path, request.headers

        (found,) = HTTPMessageVerifier(signature_algorithm=ED25519, key_resolver=keys).verify(
            Message,
            expect_tag=api.SIGNATURE_TAG,
            expect_label=api.SIGNATURE_LABEL,
            require_components=api.SIGNED_COMPONENTS,
            max_age=timedelta(seconds=api.SIGNATURE_WINDOW_S),
            body=body,
        )
        assert found.nonce is not None and found.nonce not in self.nonces
        self.nonces.add(found.nonce)

    async def _consortium(self, request: web.Request) -> web.Response:
        return web.Response(body=self.chain or encode(self.world.chain), content_type=api.MEDIA_TYPE)

    async def _upload(self, request: web.Request) -> web.Response:
        body = await request.read()
        signed_head, ciphertext = split_envelope(body, max_bytes=1 << 26)
        head = open_head(signed_head)
        assert hashlib.sha256(ciphertext).digest() == head.header.ciphertext_digest
        name = head.header.digest.hex()
        self.envelopes[name] = body
        return web.json_response(text=api.EnvelopeStored(envelope=name, bytes=len(body)).model_dump_json(), status=201)

    async def _message(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        broker = self.world.brokers[name]
        _, plaintext = open_envelope(
            await request.read(),
            broker.sealing,
            kind="request",
            consortium=self.world.consortium.id,
            max_bytes=1 << 20,
        )
        asked = decode(PersonRequest, plaintext)
        try:
            body = self.answer(name, asked)
        except CasemateError as error:
            return problem(error)
        sealed = seal_envelope(
            "response",
            encode(PersonResponse(id=asked.id, body=body)),
            [asked.delegation.peek(Delegation).sealing_key],
            consortium=self.world.consortium.id,
            key=broker.signing,
            created=asked.created,
        )
        return web.Response(body=sealed, content_type=api.MEDIA_TYPE)

    async def _evidence(self, request: web.Request) -> web.Response:
        assert self.evidence is not None
        return web.Response(body=self.evidence(await request.read()), content_type=api.MEDIA_TYPE)

    async def _submit(self, request: web.Request) -> web.Response:
        self.submissions.append(decode(Submission, await request.read()))
        return self._status(self.submissions[-1].routing.payload, 202)

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response({"jobs": [self.status]})

    async def _show(self, request: web.Request) -> web.Response:
        etag = f'"{self.status["state"]}"'
        if request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers={"ETag": etag})
        return web.json_response(self.status, headers={"ETag": etag, "Retry-After": "1"})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        start = request.headers.get("Last-Event-ID", "0")
        self.event_starts.append(start)
        if not self.events:
            return web.Response(status=204)
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        await response.write(b": still here\n\n")
        for number, event in enumerate(self.events, start=1):
            if number <= int(start):
                continue
            await response.write(f"id: {number}\nevent: job\ndata: {event.model_dump_json()}\n\n".encode())
            if self.drop_after == number:
                self.drop_after = None
                await asyncio.sleep(0)
                assert request.transport is not None
                request.transport.close()
                break
        return response

    async def _release(self, request: web.Request) -> web.Response:
        return web.Response(body=self.release)

    async def _result(self, request: web.Request) -> web.Response:
        return web.Response(body=self.result)

    def _status(self, routing: bytes, status: int) -> web.Response:
        from casemate_schemas.admission import Routing

        job_id = decode(Routing, routing).job_id
        self.status = job_status(job_id)
        return web.json_response(self.status, status=status, headers={"Location": f"/v1/jobs/{job_id}"})


def job_status(job_id: str, state: str = "awaiting_approval", **changes: Any) -> dict[str, Any]:
    """A status as JSON."""
    fields: dict[str, Any] = {
        "job_id": job_id,
        "state": state,
        "attempt": 0,
        "step": None,
        "steps": None,
        "epsilon": None,
        "reason": None,
        "approvals": [],
        "created": 1,
        "updated": 1,
        "deadline": None,
        "simulation": True,
    }
    return {**fields, **changes}


def problem(error: CasemateError) -> web.Response:
    """An RFC 9457 answer."""
    status = problem_of(error).status
    details = api.ProblemDetails(
        type=api.PROBLEM_TYPE_PREFIX + error.reason,
        title=error.reason,
        status=status,
        detail=str(error),
        reason=error.reason,
    )
    return web.Response(status=status, text=details.model_dump_json(), content_type=api.PROBLEM_MEDIA_TYPE)


@asynccontextmanager
async def serving(gateway: FakeGateway) -> AsyncIterator[FakeGateway]:
    """The fake gateway on a free port of this machine."""
    async with served(gateway.app()) as gateway.url:
        yield gateway
