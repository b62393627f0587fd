"""Every route about a job, by everyone who could ask: who is concerned, who is not, and who only seems to be somebody."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest
from casemate_schemas.signatures import SigningKey
from support.gateway import Caller, House, Reply
from support.sealed_jobs import sealed_job

ROUTES: Final = {
    "status": ("GET", ""),
    "events": ("GET", "/events"),
    "release": ("GET", "/release"),
    "result": ("GET", "/result"),
    "cancel": ("POST", "/cancel"),
}

UNKNOWN, FORBIDDEN = (404, "not_found"), (403, "not_allowed")

EXPECTED: Final = {
    "the submitter, a recipient": {"status": 200, "events": 200, "release": 200, "result": 200, "cancel": 409},
    "a recipient elsewhere": {
        "status": 200,
        "events": 200,
        "release": 200,
        "result": 200,
        "cancel": FORBIDDEN,
    },
    "the submitter's colleague": {
        "status": 200,
        "events": 200,
        "release": FORBIDDEN,
        "result": FORBIDDEN,
        "cancel": 409,
    },
    "a key broker's member": {
        "status": 200,
        "events": 200,
        "release": FORBIDDEN,
        "result": FORBIDDEN,
        "cancel": FORBIDDEN,
    },
    "a member not concerned": dict.fromkeys(ROUTES, UNKNOWN),
}


async def asked(caller: Caller, path: str, **options: object) -> dict[str, Reply]:
    """What each route answers, the one that changes something last."""
    return {
        name: await caller.request(method, path + suffix, **options)  # type: ignore[arg-type]
        for name, (method, suffix) in ROUTES.items()
    }


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
        holders = {name for name, reply in replies.items() if release in reply.body or result in reply.body}
        assert holders == ({"release", "result"} if party.endswith(("a recipient", "elsewhere")) else set()), party
    assert (await clara.get(path)).json["state"] == "sealed"


@pytest.mark.parametrize("who", ["without a member's word", "of another consortium", "by another key", "unsigned"])
async def test_who_only_seems_to_be_somebody_gets_nothing(running_house: House, who: str) -> None:
    clara = running_house.caller("clara")
    path, release, result = await sealed_job(running_house, clara, size=1000)
    own = {"person": "clara", "keys": clara.person.keys}
    if who == "without a member's word":
        caller = running_house.caller("clara", **own, signed_by=SigningKey.generate())
    elif who == "of another consortium":
        caller = running_house.caller("clara", **own, consortium=bytes(32))
    else:
        stranger = running_house.caller("south")
        caller = replace(stranger, person=replace(stranger.person, delegation=clara.person.delegation))
    if who == "unsigned":
        replies = {}
        for name, (method, suffix) in ROUTES.items():
            async with running_house.session.request(method, running_house.origin + path + suffix) as response:
                replies[name] = Reply(response.status, response.headers, await response.read())
    else:
        replies = await asked(caller, path)
    assert {reply.status for reply in replies.values()} == {401}
    assert not any(release in reply.body or result in reply.body for reply in replies.values())
    assert (await clara.get(path)).json["state"] == "sealed"
