"""Every route about a job, by everyone who could ask, and every route there is, by those who only seem to be somebody."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest
from casemate_gateway.description import ROUTES
from casemate_schemas.api import TUS_VERSION, UPLOAD_MEDIA_TYPE, UPLOADS_PATH
from casemate_schemas.envelope import PREFIX_BYTES, open_head, split_envelope
from casemate_schemas.signatures import SigningKey
from support.gateway import Caller, House, Reply
from support.sealed_jobs import sealed_job

ASKED: Final = {
    "status": ("GET", ""),
    "events": ("GET", "/events"),
    "release": ("GET", "/release"),
    "result": ("GET", "/result"),
    "part": ("GET", "/result", {"Range": "bytes=-100"}),
    "known": ("GET", "/result", {"If-None-Match": "*"}),
    "cancel": ("POST", "/cancel"),
}

TUS: Final = {"Tus-Resumable": TUS_VERSION}

UNKNOWN, FORBIDDEN = (404, "not_found"), (403, "not_allowed")
KNOWS: Final = {"status": 200, "events": 200}
OPENS: Final = {"release": 200, "result": 200, "part": 206, "known": 304}

EXPECTED: Final = {
    "the submitter, a recipient": {**KNOWS, **OPENS, "cancel": 409},
    "a recipient elsewhere": {**KNOWS, **OPENS, "cancel": FORBIDDEN},
    "the submitter's colleague": {**KNOWS, **dict.fromkeys(OPENS, FORBIDDEN), "cancel": 409},
    "a key broker's member": {**KNOWS, **dict.fromkeys(OPENS, FORBIDDEN), "cancel": FORBIDDEN},
    "a member not concerned": dict.fromkeys(ASKED, UNKNOWN),
}


async def asked(caller: Caller, path: str) -> dict[str, Reply]:
    """What each route answers, the one that changes something last."""
    return {
        name: await caller.request(method, path + suffix, headers=(more or [{}])[0])
        for name, (method, suffix, *more) in ASKED.items()
    }


async def begun(house: House, caller: Caller) -> str:
    """The path of an upload under way."""
    envelope = house.envelope(caller, "dataset", bytes(5 << 20))
    signed_head, _ = split_envelope(envelope, max_bytes=len(envelope))
    headers = {**TUS, "Content-Type": UPLOAD_MEDIA_TYPE, "Upload-Length": str(len(envelope))}
    reply = await caller.post(UPLOADS_PATH, envelope[: PREFIX_BYTES + len(signed_head)], headers=headers)
    assert reply.status == 201
    return f"{UPLOADS_PATH}/{open_head(signed_head).header.digest.hex()}"


def told(reply: Reply) -> int | tuple[int, str]:
    return (reply.status, reply.json["reason"]) if reply.status in (401, 403, 404) else reply.status


async def test_each_party_gets_what_is_its_own(running_house: House) -> None:
    """The secret bytes appear in no answer but the recipients', and nobody's question changes the job."""
    clara, east = running_house.caller("clara"), running_house.caller("east")
    recipients = (clara.person.signing.public, east.person.signing.public)
    path, release, result = await sealed_job(running_house, clara, size=1000, recipients=recipients)
    parties = {
        "the submitter, a recipient": clara,
        "a recipient elsewhere": east,
        "the submitter's colleague": running_house.caller("clara", person="another"),
        "a key broker's member": running_house.caller("north"),
        "a member not concerned": running_house.caller("south"),
    }
    for party, caller in parties.items():
        replies = await asked(caller, path)
        assert {name: told(reply) for name, reply in replies.items()} == EXPECTED[party], party
        holders = {name for name, reply in replies.items() if any(s in reply.body for s in (release, result[-100:]))}
        opens = {"release", "result", "part"} if party.endswith(("a recipient", "elsewhere")) else set()
        assert holders == opens, party
    assert (await clara.get(path)).json["state"] == "sealed"


@pytest.mark.parametrize("who", ["without a member's word", "of another consortium", "by another key", "unsigned"])
async def test_who_only_seems_to_be_somebody_gets_nothing(running_house: House, who: str) -> None:
    """Of all that is signed: a job, its result, an upload under way, a dataset, key brokers, workers, the consortium."""
    clara = running_house.caller("clara")
    path, release, result = await sealed_job(running_house, clara, size=1000)
    upload = await begun(running_house, clara)
    north = await running_house.key_broker("north")
    own = {"person": "clara", "keys": clara.person.keys}
    if who == "without a member's word":
        caller = running_house.caller("clara", **own, signed_by=SigningKey.generate())
    elif who == "of another consortium":
        caller = running_house.caller("clara", **own, consortium=bytes(32))
    else:
        stranger = running_house.caller("south")
        caller = replace(stranger, person=replace(stranger.person, delegation=clara.person.delegation))
    names = {
        "job_id": path.rpartition("/")[2],
        "digest": upload.rpartition("/")[2],
        "key_broker": "north",
        "worker": "worker-1",
    }
    for route in (route for route in ROUTES if route.is_signed):
        where, headers = route.path.format(**names), dict.fromkeys(route.wanted, TUS_VERSION)
        if who == "unsigned":
            url = running_house.origin + where
            async with running_house.session.request(route.method, url, headers=headers) as response:
                reply = Reply(response.status, response.headers, await response.read())
        else:
            reply = await caller.request(route.method, where, headers=headers)
        assert reply.status == 401, (route.method, route.path)
        assert release not in reply.body and result[-100:] not in reply.body
    assert (await clara.get(path)).json["state"] == "sealed"
    assert (await clara.request("HEAD", upload, headers=TUS)).status == 200
    assert set(north.asked) <= {names["job_id"]}  # clara's own, if the gateway still wants to know whether it may run
