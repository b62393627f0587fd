"""How refusals look, and what they never say."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from casemate_gateway.metrics import Metrics
from casemate_gateway.problems import error_boundary, problem
from casemate_gateway.tracing import OFF
from casemate_messaging.logs import ProgramLog
from casemate_schemas import errors
from casemate_schemas.errors import CasemateError

CANARY = "canary-7f3a"


def every_class(root: type[CasemateError] = CasemateError) -> list[type[CasemateError]]:
    return [root, *(found for child in root.__subclasses__() for found in every_class(child))]


@pytest.mark.parametrize("cls", every_class(), ids=lambda cls: cls.__name__)
def test_every_error_has_its_problem(cls: type[CasemateError]) -> None:
    answer = problem(cls(CANARY))
    body = json.loads(answer.text or "")
    assert answer.content_type == "application/problem+json"
    assert answer.status == body["status"] == errors.problem_of(cls()).status
    assert body["type"] == f"https://casemate.dev/problems/{cls.reason}"
    assert body["reason"] == cls.reason
    assert (CANARY in body["detail"]) == (answer.status < 500)
    assert ("Retry-After" in answer.headers) == issubclass(cls, errors.UnavailableError)


async def raises(request: web.Request) -> web.Response:
    kind = request.query["kind"]
    if kind == "unexpected":
        raise RuntimeError(CANARY)
    if kind == "http":
        raise web.HTTPRequestTimeout(text=CANARY)
    raise errors.BudgetError("the budget is spent")


@pytest.fixture
async def client() -> AsyncIterator[TestClient[web.Request, web.Application]]:
    app = web.Application(middlewares=[error_boundary(ProgramLog("gateway"), Metrics(), OFF)])
    app.add_routes([web.get("/raises/{secret}", raises)])
    async with TestClient(TestServer(app)) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/raises/x?kind=unexpected", 500, "internal"),
        ("/raises/x?kind=http", 408, "unavailable"),
        ("/raises/x?kind=ours", 403, "budget_exceeded"),
        ("/nowhere", 404, "not_found"),
    ],
)
async def test_the_boundary_answers_everything_with_a_problem(
    client: TestClient[web.Request, web.Application], path: str, status: int, reason: str
) -> None:
    async with client.get(path) as response:
        body = json.loads(await response.text())
    assert (response.status, response.content_type) == (status, "application/problem+json")
    assert (body["status"], body["reason"]) == (status, reason)
    assert CANARY not in json.dumps(body)


async def test_a_wrong_method_says_which_are_right(client: TestClient[web.Request, web.Application]) -> None:
    async with client.delete("/raises/x") as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET,HEAD")


async def test_the_log_names_class_and_route_and_nothing_else(
    client: TestClient[web.Request, web.Application], capfd: pytest.CaptureFixture[str]
) -> None:
    async with client.get(f"/raises/{CANARY}?kind=unexpected"):
        pass
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["unexpected", "request"]
    assert lines[0]["error"] == "RuntimeError"
    assert (lines[1]["route"], lines[1]["status"], lines[1]["level"]) == ("/raises/{secret}", 500, "warning")
    assert CANARY not in json.dumps(lines)
