"""The HTTP API in one table: what the application routes, and what ``GET /openapi.json`` says of it.

The two are made from the same rows, so neither has what the other lacks. What is in a body of
:data:`~casemate_schemas.api.MEDIA_TYPE` OpenAPI has no words for; docs/protocol.md names the message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler
from casemate_messaging.revocations import MAX_REVOCATION_BYTES
from casemate_messaging.rpc import MAX_RPC_BYTES
from casemate_schemas.api import (
    CONSORTIUM_PATH,
    DELEGATION_HEADER,
    ENVELOPES_PATH,
    JOB_HEADER,
    JOBS_PATH,
    KEY_BROKERS_PATH,
    MANIFEST_PATH,
    MAX_PIECE_BYTES,
    MEDIA_TYPE,
    OPENAPI_PATH,
    PROBLEM_MEDIA_TYPE,
    REVOCATIONS_PATH,
    UPLOAD_MEDIA_TYPE,
    UPLOADS_PATH,
    WORKERS_PATH,
    EnvelopeStored,
    JobList,
    JobStatus,
    ManifestPublished,
    PresentWorker,
    PresentWorkers,
    ProblemDetails,
    RevocationPublished,
)
from casemate_schemas.codec import Name
from casemate_schemas.errors import PROBLEMS
from casemate_schemas.job import JobId
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from .admission import MAX_SUBMISSION_BYTES
from .routes import consortium, envelopes, health, jobs, key_brokers, results, uploads, workers

OPENAPI_VERSION: Final = "3.1.1"
API_VERSION: Final = "1"

_EVENTS: Final = "text/event-stream"
_SIGNED: Final = (400, 401, 408, 413, 429, 500, 503, 507)
"""What may become of any signed request before its handler comes to the point."""
_ANY: Final = tuple(sorted({problem.status for problem in PROBLEMS.values()}))
_AFTER: Final = frozenset({429, 503, 507})
_DIGEST: Final[dict[str, Any]] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_COUNT: Final[dict[str, Any]] = {"type": "string", "pattern": "^[0-9]{1,18}$"}
_PATH: Final[dict[str, dict[str, Any]]] = {
    "digest": _DIGEST,
    "job_id": TypeAdapter(JobId).json_schema(),
    "key_broker": TypeAdapter(Name).json_schema(),
    "worker": TypeAdapter(Name).json_schema(),
}
_TUS: Final = ("Tus-Resumable",)
_HEADERS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "Casemate-Job": ("The job that the message may have to do with: a hint.", {"type": "string", "maxLength": 64}),
    "Content-Range": ("Which bytes these are.", {"type": "string"}),
    "ETag": ("What is shown, by revision or digest.", {"type": "string"}),
    "If-None-Match": ("ETags that the asker has.", {"type": "string"}),
    "If-Range": ("The whole, unless its ETag is this one.", {"type": "string"}),
    "Last-Event-ID": ("The last event that was seen.", _COUNT),
    "Location": ("Where it is.", {"type": "string"}),
    "Range": ("One range of bytes.", {"type": "string", "pattern": "^bytes=([0-9]{1,18}-[0-9]{0,18}|-[0-9]{1,18})$"}),
    "Retry-After": ("Seconds to wait.", _COUNT),
    "Tus-Checksum-Algorithm": ("tus 1.0", {"type": "string"}),
    "Tus-Extension": ("tus 1.0", {"type": "string"}),
    "Tus-Max-Size": ("Of an envelope, in bytes.", _COUNT),
    "Tus-Resumable": ("Which tus is spoken.", {"type": "string", "const": "1.0.0"}),
    "Tus-Version": ("tus 1.0", {"type": "string"}),
    "Upload-Checksum": ("sha256 and the piece's digest in base64.", {"type": "string", "pattern": "^sha256 .{44}$"}),
    "Upload-Expires": ("When it is given up.", {"type": "string"}),
    "Upload-Length": ("The whole envelope, in bytes.", _COUNT),
    "Upload-Offset": ("How far it has got, in bytes.", _COUNT),
}
"""Every header with a meaning of its own, beside those of the signature."""
_SIGNATURE_HEADERS: Final = ("Signature", "Signature-Input", "Content-Digest", DELEGATION_HEADER)
"""Who asks, and for what: also of a request without a body."""


@dataclass(frozen=True)
class Answer:
    """An answer when all is well: its JSON model or media type, and headers that it always has."""

    status: int
    content: type[BaseModel] | str | None = None
    headers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Body:
    """What a request carries: opaque bytes, ``max_bytes`` at most where that is the same for every gateway."""

    text: str
    max_bytes: int | None = None
    media_type: str = MEDIA_TYPE


@dataclass(frozen=True)
class Route:
    """One thing that can be asked. ``problems`` beside those of any signed request; ``wanted`` headers must be there."""

    method: str
    path: str
    handler: Handler
    answers: tuple[Answer, ...]
    problems: tuple[int, ...] = ()
    body: Body | None = None
    wanted: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    is_signed: bool = True

    @property
    def summary(self) -> str:
        """The first line of what the handler says of itself, after its method and path."""
        text = (self.handler.__doc__ or "").partition("\n")[0]
        return text.partition("``: ")[2].replace("`", "").rstrip(".")

    @property
    def statuses(self) -> tuple[int, ...]:
        """Every status that an answer can have."""
        answers = {answer.status for answer in self.answers}
        return tuple(sorted(answers | set(self.problems) | set(_SIGNED if self.is_signed else ())))


async def openapi(_: web.Request) -> web.Response:
    """``GET /openapi.json``: this API's description, the same for every gateway of a release."""
    return web.Response(body=ENCODED, content_type="application/json")


_JOB: Final = JOBS_PATH + "/{job_id}"
_ENVELOPE: Final = ENVELOPES_PATH + "/{digest}"
_UPLOAD: Final = UPLOADS_PATH + "/{digest}"
_KEY_BROKER: Final = KEY_BROKERS_PATH + "/{key_broker}"
_SHOWN: Final = ("ETag", "Location")
_REACHED: Final = ("Upload-Offset", "Upload-Expires", *_TUS)

ROUTES: Final = (
    Route("GET", "/livez", health.live, (Answer(200, "text/plain"),), is_signed=False),
    Route("GET", "/readyz", health.ready, (Answer(200, "text/plain"),), (503,), is_signed=False),
    Route("GET", OPENAPI_PATH, openapi, (Answer(200, "application/json"),), is_signed=False),
    Route("GET", CONSORTIUM_PATH, consortium.show, (Answer(200, MEDIA_TYPE),), is_signed=False),
    Route(
        "POST",
        MANIFEST_PATH,
        consortium.publish,
        (Answer(201, ManifestPublished), Answer(200, ManifestPublished)),
        (403, 409),
        Body("The next SignedManifest.", consortium.MAX_SIGNED_MANIFEST_BYTES),
    ),
    Route(
        "POST",
        REVOCATIONS_PATH,
        consortium.revoke,
        (Answer(201, RevocationPublished),),
        (403,),
        Body("A Revocation, signed by the member.", MAX_REVOCATION_BYTES),
    ),
    Route(
        "POST",
        ENVELOPES_PATH,
        envelopes.store,
        (Answer(201, EnvelopeStored), Answer(200, EnvelopeStored)),
        (403,),
        Body("An envelope."),
    ),
    Route("DELETE", _ENVELOPE, envelopes.remove, (Answer(204),), (403, 404)),
    Route(
        "OPTIONS",
        UPLOADS_PATH,
        uploads.options,
        (Answer(204, None, ("Tus-Version", "Tus-Extension", "Tus-Checksum-Algorithm", "Tus-Max-Size", *_TUS)),),
    ),
    Route(
        "POST",
        UPLOADS_PATH,
        uploads.create,
        (Answer(201, None, ("Location", *_REACHED)), Answer(200, EnvelopeStored, _TUS)),
        (403, 412, 415),
        Body("All that precedes an envelope's ciphertext.", uploads.FRAMING_BYTES, UPLOAD_MEDIA_TYPE),
        wanted=("Tus-Resumable", "Upload-Length"),
    ),
    Route(
        "HEAD",
        _UPLOAD,
        uploads.show,
        (Answer(200, None, ("Upload-Length", *_REACHED)),),
        (404, 410, 412),
        wanted=_TUS,
    ),
    Route(
        "PATCH",
        _UPLOAD,
        uploads.append,
        (Answer(204, None, _REACHED),),
        (404, 409, 410, 411, 412, 415, 460),
        Body("What comes at Upload-Offset.", MAX_PIECE_BYTES, UPLOAD_MEDIA_TYPE),
        wanted=("Tus-Resumable", "Upload-Offset"),
        headers=("Upload-Checksum",),
    ),
    Route("DELETE", _UPLOAD, uploads.remove, (Answer(204, None, _TUS),), (404, 409, 410, 412), wanted=_TUS),
    Route(
        "POST",
        _KEY_BROKER + "/messages",
        key_brokers.message,
        (Answer(200, MEDIA_TYPE),),
        _ANY,
        Body("A request envelope.", MAX_RPC_BYTES),
        headers=(JOB_HEADER,),
    ),
    Route(
        "POST",
        _KEY_BROKER + "/evidence",
        key_brokers.evidence,
        (Answer(200, MEDIA_TYPE),),
        _ANY,
        Body("An EvidenceRequest.", key_brokers.MAX_EVIDENCE_REQUEST_BYTES),
    ),
    Route(
        "POST",
        JOBS_PATH,
        jobs.submit,
        (Answer(202, JobStatus, _SHOWN), Answer(200, JobStatus, _SHOWN)),
        (403, 404, 409, 422),
        Body("A Submission.", MAX_SUBMISSION_BYTES),
    ),
    Route("GET", JOBS_PATH, jobs.listing, (Answer(200, JobList),)),
    Route(
        "GET",
        _JOB,
        jobs.show,
        (Answer(200, JobStatus, _SHOWN), Answer(304, None, _SHOWN)),
        (404,),
        headers=("If-None-Match",),
    ),
    Route(
        "GET", _JOB + "/events", jobs.events, (Answer(200, _EVENTS), Answer(204)), (404,), headers=("Last-Event-ID",)
    ),
    Route("POST", _JOB + "/cancel", jobs.cancel, (Answer(202, JobStatus, _SHOWN),), (403, 404, 409)),
    Route("GET", _JOB + "/release", results.release, (Answer(200, MEDIA_TYPE),), (403, 404, 409)),
    Route(
        "GET",
        _JOB + "/result",
        results.result,
        (Answer(200, MEDIA_TYPE, ("ETag",)), Answer(206, MEDIA_TYPE, ("ETag", "Content-Range")), Answer(304, None)),
        (403, 404, 409, 410, 416),
        headers=("If-None-Match", "Range", "If-Range"),
    ),
    Route("GET", WORKERS_PATH, workers.listing, (Answer(200, PresentWorkers),)),
    Route("POST", WORKERS_PATH + "/{worker}/drain", workers.drain, (Answer(202, PresentWorker),), (403, 404)),
)
"""All there is."""


def route_definitions() -> list[web.RouteDef]:
    """The rows as aiohttp takes them. What is not signed may be asked for with HEAD too."""
    return [
        web.RouteDef(
            route.method,
            route.path,
            route.handler,
            {
                "expect_handler": _waits,
                **({"allow_head": not route.is_signed} if route.method == "GET" else {}),
            },
        )
        for route in ROUTES
    ]


async def _waits(_: web.Request) -> None:
    """Of ``Expect: 100-continue``: whoever reads the body says when it may come, once it is known to be wanted."""


def description(routes: Sequence[Route] = ROUTES) -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operations = paths.setdefault(route.path, {})
        operations[route.method.lower()] = _operation(route, route.method)
        if route.method == "GET" and not route.is_signed:
            operations["head"] = _operation(route, "HEAD")
    return {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": "Casemate gateway",
            "version": API_VERSION,
            "description": "Sealed and signed things go through here and are opened elsewhere. Requests are signed as RFC 9421"
            " has it; see docs/protocol.md.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(routes),
            "responses": {
                f"Problem{status}": _problem(status)
                for status in sorted({status for route in routes for status in _problems(route)})
            },
            "securitySchemes": {
                name: {"type": "apiKey", "in": "header", "name": name, "description": "RFC 9421; docs/protocol.md."}
                for name in _SIGNATURE_HEADERS
            },
        },
    }


def _operation(route: Route, method: str) -> dict[str, Any]:
    said: dict[str, Any] = {
        "operationId": _operation_id(route, method),
        "summary": route.summary,
        "security": [{name: [] for name in _SIGNATURE_HEADERS}] if route.is_signed else [],
        "responses": {
            **{str(answer.status): _answer(answer, method) for answer in route.answers},
            **{str(status): {"$ref": f"#/components/responses/Problem{status}"} for status in _problems(route)},
        },
    }
    if parameters := _parameters(route):
        said["parameters"] = parameters
    if route.body is not None:
        schema: dict[str, Any] = {} if route.body.max_bytes is None else {"maxLength": route.body.max_bytes}
        said["requestBody"] = {
            "required": True,
            "description": route.body.text,
            "content": {route.body.media_type: {"schema": schema}},
        }
    return said


def _operation_id(route: Route, method: str) -> str:
    name = f"{route.handler.__module__.rpartition('.')[2]}_{route.handler.__name__}"
    return name if method == route.method else f"{name}_head"


def _problems(route: Route) -> tuple[int, ...]:
    answers = {answer.status for answer in route.answers}
    return tuple(status for status in route.statuses if status not in answers)


def _parameters(route: Route) -> list[dict[str, Any]]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": _PATH[name]}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    in_head = [
        {
            "name": name,
            "in": "header",
            "required": name in route.wanted,
            "description": _HEADERS[name][0],
            "schema": _HEADERS[name][1],
        }
        for name in (*route.wanted, *route.headers)
    ]
    return [*in_path, *in_head]


def _answer(answer: Answer, method: str) -> dict[str, Any]:
    said: dict[str, Any] = {"description": HTTPStatus(answer.status).phrase}
    if answer.headers:
        said["headers"] = {name: _header(name) for name in answer.headers}
    if answer.content is None or method == "HEAD":
        return said
    if isinstance(answer.content, str):
        return {**said, "content": {answer.content: {}}}
    schema = {"$ref": f"#/components/schemas/{answer.content.__name__}"}
    return {**said, "content": {"application/json": {"schema": schema}}}


def _header(name: str) -> dict[str, Any]:
    text, schema = _HEADERS[name]
    return {"description": text, "required": True, "schema": schema}


def _problem(status: int) -> dict[str, Any]:
    """One answer that is an RFC 9457 problem; 460 is tus' and has no name in Python."""
    text = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Checksum Mismatch"
    schema = {"$ref": f"#/components/schemas/{ProblemDetails.__name__}"}
    said: dict[str, Any] = {"description": text, "content": {PROBLEM_MEDIA_TYPE: {"schema": schema}}}
    return {**said, "headers": {"Retry-After": _header("Retry-After")}} if status in _AFTER else said


def _schemas(routes: Sequence[Route]) -> dict[str, Any]:
    models: dict[type[BaseModel], None] = {ProblemDetails: None}
    for route in routes:
        models |= {a.content: None for a in route.answers if a.content is not None and not isinstance(a.content, str)}
    _, found = models_json_schema(
        [(model, "serialization") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Any] = found["$defs"]
    return schemas


ENCODED: Final = json.dumps(description(), indent=1, ensure_ascii=False).encode()
"""The document as it is served."""
