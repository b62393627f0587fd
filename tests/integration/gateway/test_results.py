"""Results: for recipients, once sealed, byte for byte; and messages to key brokers, health and the consortium."""

from __future__ import annotations

import aiohttp
import pytest
from casemate_schemas.api import MEDIA_TYPE
from casemate_schemas.codec import decode
from casemate_schemas.consortium import ManifestChain, verify_chain
from casemate_schemas.envelope import open_head, split_envelope
from casemate_schemas.sealing import open_envelope
from support.gateway import House
from support.sealed_jobs import sealed_job


async def test_recipients_get_release_and_result(running_house: House) -> None:
    clara, east = running_house.caller("clara"), running_house.caller("east")
    recipients = (clara.person.signing.public, east.person.signing.public)
    path, release, result = await sealed_job(running_house, clara, recipients=recipients)
    for recipient in (clara, east):
        answers = [await recipient.get(f"{path}/{what}") for what in ("release", "result")]
        assert [(answer.status, answer.headers["Content-Type"]) for answer in answers] == [(200, MEDIA_TYPE)] * 2
        assert [answer.body for answer in answers] == [release, result]


@pytest.mark.parametrize("what", ["release", "result"])
async def test_nobody_else_does(running_house: House, what: str) -> None:
    clara = running_house.caller("clara")
    path, _, _ = await sealed_job(running_house, clara)
    seen = {}
    for name in ("clara", "north", "east", "south"):
        reply = await running_house.caller(name).get(f"{path}/{what}")
        seen[name] = (reply.status, reply.json["reason"])
    forbidden, unknown = (403, "not_allowed"), (404, "not_found")
    assert seen == {"clara": forbidden, "north": forbidden, "east": unknown, "south": unknown}


@pytest.mark.parametrize("what", ["release", "result"])
async def test_nor_anybody_before_the_job_is_sealed(running_house: House, what: str) -> None:
    clara = running_house.caller("clara")
    path, _, _ = await sealed_job(running_house, clara, state="committing")
    reply = await clara.get(f"{path}/{what}")
    assert (reply.status, reply.json["reason"]) == (409, "wrong_state")


async def test_a_result_that_the_store_has_lost_is_never_taken_for_whole(running_house: House) -> None:
    clara = running_house.caller("clara")
    path, _, result = await sealed_job(running_house, clara)
    gateway = await running_house.client("gateway")
    header = open_head(split_envelope(result, max_bytes=1 << 30)[0]).header
    chunks = f"casemate.blob.chunk.{header.ciphertext_digest.hex()}.*"
    await gateway.jetstream().purge_stream("BLOBS", subject=chunks, keep=1)
    with pytest.raises(aiohttp.ClientError):
        await clara.get(f"{path}/result")
    assert (await clara.get(path)).status == 200


# --- messages to key brokers --------------------------------------------------------------------------------------


async def test_a_message_and_its_answer_pass_unopened(running_house: House) -> None:
    await running_house.key_broker("north")
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "request", b"which datasets may I list?", ("north",))
    reply = await clara.post("/v1/key-brokers/north/messages", envelope)
    assert (reply.status, reply.headers["Content-Type"]) == (200, MEDIA_TYPE)
    north = running_house.keys.key_brokers["north"].signing.public
    consortium = running_house.keys.consortium.id
    _, text = open_envelope(
        reply.body, clara.person.keys.sealing, kind="response", consortium=consortium, sender=north, max_bytes=1 << 20
    )
    assert text == b"which datasets may I list?"[::-1]


async def test_messages_that_are_refused(running_house: House) -> None:
    north = await running_house.key_broker("north")
    clara, other = running_house.caller("clara"), running_house.caller("clara")
    good = running_house.envelope(clara, "request", b"x", ("north",))
    cases = [
        ("/v1/key-brokers/west/messages", good, 404),
        ("/v1/key-brokers/south/messages", good, 400),  # sealed to another key broker
        ("/v1/key-brokers/north/messages", running_house.envelope(clara, "terms", b"x", ("north",)), 400),
        ("/v1/key-brokers/north/messages", running_house.envelope(other, "request", b"x", ("north",)), 403),
        ("/v1/key-brokers/north/messages", b"noise", 400),
        ("/v1/key-brokers/north/messages", bytes((1 << 20) + 1), 413),
    ]
    for path, envelope, status in cases:
        assert (await clara.post(path, envelope)).status == status, path
    assert north.asked == []


async def test_a_key_broker_that_is_away(running_house: House) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "request", b"x", ("south",))
    reply = await clara.post("/v1/key-brokers/south/messages", envelope)
    assert (reply.status, reply.json["reason"]) == (503, "unavailable")
    assert "casemate.kb" not in reply.body.decode()
    assert reply.headers["Retry-After"]


# --- what needs no signature --------------------------------------------------------------------------------------


async def test_the_consortium_proves_itself(running_house: House) -> None:
    async with running_house.session.get(running_house.origin + "/v1/consortium") as response:
        body = await response.read()
        assert (response.status, response.headers["Cache-Control"]) == (200, "no-store")
        assert response.headers["Server"] == "casemate"
    found = verify_chain(decode(ManifestChain, body), consortium=running_house.keys.consortium.id)
    assert found == running_house.keys.consortium


@pytest.mark.parametrize(("nats", "live", "ready"), [(True, 200, 200), (False, 200, 503)])
async def test_health_follows_nats(a_house: House, nats: bool, live: int, ready: int) -> None:
    async with a_house.gateway_running():
        if not nats:
            await a_house.stack.server.stop()
        for path, status in (("/livez", live), ("/readyz", ready)):
            async with a_house.session.get(a_house.origin + path) as response:
                assert response.status == status
