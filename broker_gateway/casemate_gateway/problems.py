"""How a refusal looks: RFC 9457 problem details, one for each class of the error tree, and never more than its asker may know."""

from __future__ import annotations

import math
from http import HTTPStatus
from time import monotonic, time_ns
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from casemate_messaging.logs import ProgramLog
from casemate_schemas.api import PROBLEM_MEDIA_TYPE, PROBLEM_TYPE_PREFIX, ProblemDetails
from casemate_schemas.errors import (
    CasemateError,
    MalformedError,
    NotFoundError,
    QuotaError,
    ThrottledError,
    TooLargeError,
    UnavailableError,
    problem_of,
)

from .metrics import METHODS, Metrics
from .tracing import Tracing

JOB_ID: Final = web.RequestKey("job_id", str)
"""Which job a submission turned out to be about."""

RETRY_AFTER_S = 5
QUOTA_RETRY_AFTER_S = 60

_HTTP_REASONS = {
    404: NotFoundError.reason,
    408: UnavailableError.reason,
    410: NotFoundError.reason,
    413: TooLargeError.reason,
}


def problem(error: CasemateError) -> web.Response:
    """The answer to a request that raised ``error``: below 500 with its text, which speaks of the request alone."""
    status = problem_of(error).status
    told = str(error) if status < 500 else HTTPStatus(status).description
    headers = {"Retry-After": str(_retry_after_s(error))} if isinstance(error, UnavailableError) else None
    return problem_response(status, error.reason, told, headers)


def _retry_after_s(error: UnavailableError) -> int:
    if isinstance(error, ThrottledError):
        return max(1, math.ceil(error.retry_after_s))
    return QUOTA_RETRY_AFTER_S if isinstance(error, QuotaError) else RETRY_AFTER_S


def problem_response(status: int, reason: str, detail: str, headers: dict[str, str] | None = None) -> web.Response:
    """An RFC 9457 problem."""
    details = ProblemDetails(
        type=PROBLEM_TYPE_PREFIX + reason,
        title=reason.replace("_", " "),
        status=status,
        detail=detail,
        reason=reason,
    )
    return web.Response(status=status, text=details.model_dump_json(), content_type=PROBLEM_MEDIA_TYPE, headers=headers)


def http_problem(error: web.HTTPException) -> web.Response:
    """What aiohttp itself refuses (no such path, no such method), in the same form."""
    reason = _HTTP_REASONS.get(error.status, MalformedError.reason)
    headers = {name: error.headers[name] for name in ("Allow", "Content-Range") if name in error.headers}
    return problem_response(error.status, reason, HTTPStatus(error.status).description or error.reason, headers)


def error_boundary(log: ProgramLog, metrics: Metrics, tracing: Tracing) -> Middleware:
    """The outermost layer: whatever a handler raises becomes a problem, and every request one line in the log, and one span.

    Of an error that nobody foresaw the class is logged, and nothing of it is told.
    """

    @web.middleware
    async def boundary(request: web.Request, handler: Handler) -> web.StreamResponse:
        started, started_ns = monotonic(), time_ns()
        reason: str | None = None
        try:
            response = await handler(request)
        except CasemateError as error:
            reason, response = error.reason, problem(error)
        except web.HTTPException as error:
            response = http_problem(error)
        except Exception as error:
            reason = CasemateError.reason
            log.error("unexpected", error=type(error).__name__, route=_route(request))
            response = problem_response(500, reason, HTTPStatus(500).description)
        metrics.request(_route(request), request.method, response.status, monotonic() - started)
        tracing.request(
            _job_id(request) if response.status < 400 else None,
            started_ns,
            method=_method(request),
            route=_route(request),
            status=response.status,
            reason=reason or "",
        )
        _log(log, request, response, reason, started)
        return response

    return boundary


def _log(
    log: ProgramLog, request: web.Request, response: web.StreamResponse, reason: str | None, started: float
) -> None:
    duration_ms = round((monotonic() - started) * 1000, 1)
    write = log.warning if response.status >= 500 else log.info
    write(
        "request",
        method=_method(request),
        route=_route(request),
        status=response.status,
        duration_ms=duration_ms,
        reason=reason or "",
    )


def _job_id(request: web.Request) -> str | None:
    """The job in the path, or in what was submitted. Of an answered request only: else its asker may have no part in it."""
    return request.match_info.get("job_id") or request.get(JOB_ID)


def _method(request: web.Request) -> str:
    """One that there is, or a question mark: a client may send any word."""
    return request.method if request.method in METHODS else "?"


def _route(request: web.Request) -> str:
    """The route's pattern, never the path itself."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "none"
