"""Spans at a real collector's door: which there are, what they say, and what they never say."""

from __future__ import annotations

import asyncio
import builtins
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from casemate_gateway.tracing import ATTRIBUTES, INSTALL, SPANS
from casemate_schemas.api import JOBS_PATH
from casemate_schemas.codec import encode
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from support.gateway import House
from support.http import served

TRACEPARENT = f"00-{'c0' * 16}-{'c1' * 8}-01"
"""What a client says about traces is its own affair."""


@dataclass
class Collector:
    """What came in, span by span."""

    url: str = ""
    spans: list[Any] = field(default_factory=list)
    resources: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.read())
        for one in ExportTraceServiceRequest.FromString(self.bodies[-1]).resource_spans:
            self.resources.append({a.key: a.value.string_value for a in one.resource.attributes})
            for scope in one.scope_spans:
                self.spans += scope.spans
        return web.Response(body=b"", content_type="application/x-protobuf")

    def told(self) -> list[tuple[Any, ...]]:
        """(name, trace, attributes) of each, in order."""
        return [(span.name, span.trace_id.hex(), said(span)) for span in sorted(self.spans, key=by_start)]


def by_start(span: Any) -> tuple[int, str]:
    return span.start_time_unix_nano, span.name


def said(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    found, app = Collector(), web.Application()
    app.router.add_post("/v1/traces", found.take)
    async with served(app) as address:
        found.url = f"{address}/v1/traces"
        yield found


def request_span(method: str, route: str, status: int, **more: str) -> dict[str, Any]:
    shown = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
    return {**shown, **more}


async def test_a_jobs_road_is_one_trace_and_says_nothing_else(a_house: House) -> None:
    clara = a_house.caller("clara")
    await a_house.key_broker("clara")
    async with collector() as seen, a_house.gateway_running(otlp_traces_url=seen.url) as gateway:
        clara.origin = a_house.origin
        submission, reply = await a_house.submitted(clara, key_brokers=("clara",))
        assert reply.status == 202
        job_id = reply.json["job_id"]
        async with asyncio.timeout(30):
            while (await clara.get(f"{JOBS_PATH}/{job_id}")).json["state"] != "queued":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            while gateway.dispatcher._schedules["cpu"].next(gateway.clock()) is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        missing = await clara.get(f"{JOBS_PATH}/{'ab' * 16}")
        odd = await a_house.session.request("PROPFIND", a_house.origin + "/livez", headers={"traceparent": TRACEPARENT})
        assert (missing.status, odd.status) == (404, 405)
    told = seen.told()
    road = [(name, attributes) for name, trace, attributes in told if trace == job_id]
    polls = [item for item in road if item == ("request", request_span("GET", f"{JOBS_PATH}/{{job_id}}", 200))]
    assert polls
    assert sorted((item for item in road if item not in polls), key=str) == sorted(
        [
            ("request", request_span("POST", JOBS_PATH, 202)),
            ("precheck", {"casemate.key_broker": "clara", "casemate.verdict": "yes"}),
            ("dispatch", {}),
        ],
        key=str,
    )
    others = [(name, attributes) for name, trace, attributes in told if trace != job_id]
    assert others == [
        ("request", request_span("POST", "/v1/envelopes", 201)),
        (
            "request",
            request_span("GET", f"{JOBS_PATH}/{{job_id}}", 404, **{"casemate.reason": "not_found"}),
        ),
        ("request", {**request_span("?", "none", 405)}),
    ]
    assert {name for name, *_ in told} <= SPANS and {key for *_, said in told for key in said} <= set(
        ATTRIBUTES.values()
    )
    assert all(set(resource) == {"service.name", "service.version"} for resource in seen.resources)
    whole = b"".join(seen.bodies)
    for secret in (
        b"PROPFIND",
        bytes.fromhex("c0" * 16),
        b"three hospitals",
        clara.person.signing.public,
        encode(submission.routing)[:40],
    ):
        assert secret not in whole


async def test_a_collector_that_is_away_holds_up_nothing(a_house: House) -> None:
    async with collector() as seen:
        gone = seen.url
    clara = a_house.caller("clara")
    async with a_house.gateway_running(otlp_traces_url=gone):
        clara.origin = a_house.origin
        assert (await clara.get(JOBS_PATH)).status == 200


async def test_without_the_extra_the_gateway_runs_and_says_what_to_install(
    a_house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    clara = a_house.caller("clara")
    async with a_house.gateway_running(otlp_traces_url="http://127.0.0.1:9/v1/traces"):
        clara.origin = a_house.origin
        assert (await clara.get(JOBS_PATH)).status == 200
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["op"] for line in lines if line["event"] == "tracing_not_installed"] == [INSTALL]
