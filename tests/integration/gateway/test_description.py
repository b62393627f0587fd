"""The description of the HTTP API: it is what the gateway does, also when it is asked what nobody would ask.

``make api`` asks longer (``CASEMATE_API_EXAMPLES``).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from casemate_gateway.description import ENCODED, ROUTES
from casemate_schemas.api import (
    ENVELOPES_PATH,
    JOBS_PATH,
    KEY_BROKERS_PATH,
    OPENAPI_PATH,
    UPLOAD_MEDIA_TYPE,
    UPLOADS_PATH,
)
from casemate_schemas.codec import encode
from casemate_schemas.keyring import KeyRing
from support.gateway import House
from support.gateway_process import program, settings_file

EXAMPLES = int(os.environ.get("CASEMATE_API_EXAMPLES", "1"))
MIB = 1 << 20
SHORT = """
[phases.coverage]
unexpected-methods = ["PUT"]
"""
"""Of methods that a path does not have, the short form asks for one: which it is makes no difference to the gateway."""


async def test_the_description_is_public_and_has_every_route(running_house: House) -> None:
    async with running_house.session.get(running_house.origin + OPENAPI_PATH) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert await response.read() == ENCODED
    described = json.loads(ENCODED)
    assert described["openapi"].startswith("3.1")
    found = {(method, path) for path, operations in described["paths"].items() for method in operations}
    assert found >= {(route.method.lower(), route.path) for route in ROUTES}
    for route in ROUTES:
        operation = described["paths"][route.path][route.method.lower()]
        assert bool(operation["security"]) == route.path.startswith("/v1/") - (route.path == "/v1/consortium")
        assert operation["summary"]


async def test_a_key_broker_that_nobody_lists_is_not_there_and_a_listed_one_is_away(running_house: House) -> None:
    clara = running_house.caller("clara")
    asked = [await clara.post(f"{KEY_BROKERS_PATH}/{name}/evidence") for name in ("nowhere", "east")]
    assert [(reply.status, reply.json["reason"]) for reply in asked] == [(404, "not_found"), (503, "unavailable")]
    assert [reply.headers.get("Retry-After") for reply in asked] == [None, "5"]


async def test_no_request_gets_an_answer_that_is_not_described(a_house: House, tmp_path: Path) -> None:
    settings = settings_file(
        tmp_path,
        a_house,
        requests_per_s_per_member=1e6,
        request_burst_per_member=10**6,
        key_broker_timeout_s=0.5,
        body_idle_s=1.0,
    )
    async with program(settings) as gateway:
        a_house.origin = gateway.ready["address"]
        await a_house.key_broker("clara")
        await a_house.key_broker("north")
        folder = tmp_path / "person"
        folder.mkdir()
        await furnish(a_house, folder)
        status, told = await schemathesis(a_house.origin, folder)
    assert status == 0, told


async def schemathesis(origin: str, person: Path) -> tuple[int, str]:
    """Exit status and report of a run against the gateway at ``origin``, as the person in that folder."""
    tests = Path(__file__).resolve().parents[2]
    config = person / "schemathesis.toml"
    config.write_text(Path(__file__).with_name("schemathesis.toml").read_text() + ("" if EXAMPLES > 1 else SHORT))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "schemathesis.cli",
        f"--config-file={config}",
        "run",
        origin + OPENAPI_PATH,
        f"--max-examples={EXAMPLES}",
        "--seed=1",
        "--no-shrink",
        cwd=person,
        env={
            **os.environ,
            "SCHEMATHESIS_HOOKS": "support.schemathesis_hooks",
            "CASEMATE_TEST_PERSON": str(person),
            "PYTHONPATH": os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    told, _ = await process.communicate()
    return process.returncode or 0, told.decode()


async def furnish(house: House, folder: Path) -> None:
    """Leaves there a person's keys, names of things that this person has, and bodies that are what they should be."""
    clara = house.caller("clara", roles=("scientist", "steward", "admin"))
    keys = clara.person.keys
    person = folder / "person.pem"
    person.touch(0o600)
    person.write_text(KeyRing(keys.signing, keys.sealing, clara.person.delegation).to_text())
    submission, reply = await house.submitted(clara)
    ended, cancelled = await house.submitted(clara)
    assert (reply.status, cancelled.status) == (202, 202)
    job_ids = [answer.json["job_id"] for answer in (reply, cancelled)]
    assert (await clara.post(f"{JOBS_PATH}/{job_ids[1]}/cancel")).status == 202
    dataset, unfinished = (house.envelope(clara, "dataset", bytes(size)) for size in (1000, 9 * MIB))
    stored = await clara.post(ENVELOPES_PATH, dataset)
    framing = unfinished[: 12 + int.from_bytes(unfinished[8:12], "big")]
    tus = {"Tus-Resumable": "1.0.0", "Upload-Length": str(len(unfinished)), "Content-Type": UPLOAD_MEDIA_TYPE}
    begun = await clara.post(UPLOADS_PATH, framing, headers=tus)
    assert (stored.status, begun.status) == (201, 201)
    names = {
        "job_id": job_ids[1:],
        "digest": [stored.json["envelope"], begun.headers["Location"].rpartition("/")[2]],
        "key_broker": ["clara", "north"],
    }
    (folder / "names.json").write_text(json.dumps(names))
    request = house.envelope(clara, "request", b"hello")
    for number, body in enumerate((dataset, encode(submission), encode(ended), request, framing, b"")):
        (folder / f"{number}.body").write_bytes(body)
