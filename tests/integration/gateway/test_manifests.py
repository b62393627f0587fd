"""A manifest is published by those who may, if the quorum signed it, once; and is in force without a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from casemate_gateway.gateway import Gateway
from casemate_messaging.manifests import ManifestStore
from casemate_schemas import subjects
from casemate_schemas.api import CONSORTIUM_PATH, JOBS_PATH, MANIFEST_PATH
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import ManifestChain, Member
from casemate_schemas.errors import ManifestError
from casemate_schemas.keyring import KeyRing
from support.consortium import ConsortiumKeys, PersonKeys, amended
from support.gateway import Caller, House, now_ms


def next_manifest(keys: ConsortiumKeys, **changed: object) -> bytes:
    return encode(amended(keys, **changed).chain.manifests[-1])  # type: ignore[arg-type]


async def published_chain(house: House) -> ManifestChain:
    async with house.session.get(house.origin + CONSORTIUM_PATH) as response:
        return decode(ManifestChain, await response.read())


@pytest.fixture
async def gateway(a_house: House) -> AsyncIterator[Gateway]:
    async with a_house.gateway_running() as running:
        yield running


@pytest.fixture
def admin(a_house: House, gateway: Gateway) -> Caller:
    return a_house.caller("north", roles=("admin",))


async def test_the_next_manifest_is_in_force_at_once(a_house: House, gateway: Gateway, admin: Caller) -> None:
    """Twice is once. A new member's people are known from then on, and a restart does not forget them."""
    west, north = KeyRing.generate(), a_house.keys.consortium.manifest.key_broker("north")
    newcomer = Member(id="west", name="west", signing_key=west.signing.public, sealing_key=west.sealing.public)
    manifest = a_house.keys.consortium.manifest
    grown = north.model_copy(update={"serves": ("north", "west")})
    keys = amended(
        a_house.keys,
        members=(*manifest.members, newcomer),
        key_brokers=tuple(grown if b.id == "north" else b for b in manifest.key_brokers),
        signers=("north", "south", "clara"),
    )
    person = replace(keys, members={**keys.members, "west": west}).person("west", not_before=now_ms() - 3600_000)
    stranger = Caller(PersonKeys(person.keys, person.delegation), a_house.origin, a_house.session)
    assert (await stranger.get(JOBS_PATH)).status == 401
    signed = encode(keys.chain.manifests[-1])
    for status in (201, 200):
        reply = await admin.post(MANIFEST_PATH, signed)
        assert (reply.status, reply.json) == (status, {"number": 2, "digest": keys.consortium.digest.hex()})
    assert (await stranger.get(JOBS_PATH)).status == 200
    assert await published_chain(a_house) == keys.chain
    async with a_house.gateway_running() as again:
        assert again.consortium == keys.consortium


@pytest.mark.parametrize(
    ("changed", "status", "reason"),
    [
        ({"signers": ("north", "south")}, 409, "manifest_refused"),
        ({"number": 3}, 409, "manifest_refused"),
        ({"previous": b"\x07" * 32}, 409, "manifest_refused"),
    ],
)
async def test_what_does_not_follow_is_refused(
    a_house: House, admin: Caller, changed: dict[str, object], status: int, reason: str
) -> None:
    reply = await admin.post(MANIFEST_PATH, next_manifest(a_house.keys, **changed))
    assert (reply.status, reply.json["reason"]) == (status, reason)
    assert await published_chain(a_house) == a_house.keys.chain


async def test_only_an_admin_publishes_and_only_manifests(a_house: House, admin: Caller) -> None:
    signed = next_manifest(a_house.keys, name="second")
    others = a_house.caller("north", roles=("scientist", "steward"))
    assert (await others.post(MANIFEST_PATH, signed)).status == 403
    assert (await admin.post(MANIFEST_PATH, b"rubbish")).status == 400
    assert (await admin.post(MANIFEST_PATH, bytes(1 << 20))).status == 413
    async with a_house.session.post(a_house.origin + MANIFEST_PATH, data=signed) as unsigned:
        assert unsigned.status == 401
    assert await published_chain(a_house) == a_house.keys.chain


async def test_of_two_manifests_of_one_number_the_first_counts(a_house: House, admin: Caller) -> None:
    """Each has its quorum. Also when both come at once, or by gateways that have not heard of each other yet."""
    rivals = [amended(a_house.keys, name=name) for name in ("one", "another")]
    bodies = [encode(rival.chain.manifests[-1]) for rival in rivals]
    replies = await asyncio.gather(*(admin.post(MANIFEST_PATH, body) for body in bodies))
    assert sorted(reply.status for reply in replies) == [201, 409]
    winner = rivals[[reply.status for reply in replies].index(201)]
    assert await published_chain(a_house) == winner.chain
    (again,) = [await admin.post(MANIFEST_PATH, body) for body, r in zip(bodies, rivals, strict=True) if r != winner]
    assert again.status == 409 and "fork" in again.json["detail"]


async def test_a_gateway_that_holds_a_fork_does_not_start(a_house: House, admin: Caller) -> None:
    published, fork = amended(a_house.keys, name="published"), amended(a_house.keys, name="fork")
    assert (await admin.post(MANIFEST_PATH, encode(published.chain.manifests[-1]))).status == 201
    a_house.settings.manifest_file.write_bytes(encode(fork.chain))
    with pytest.raises(ManifestError, match="number 2"):
        async with a_house.gateway_running():
            pass


async def test_manifests_are_read_by_everyone_and_written_by_the_gateway(a_house: House, gateway: Gateway) -> None:
    """Through the permissions of real accounts."""
    for user in ("worker-1", "north", "south"):
        store = ManifestStore(await a_house.client(user))
        assert (await store.get(1)) == a_house.keys.chain.manifests[0]
        await (await a_house.client(user)).publish(subjects.manifest(2), b"rubbish")
    for user in ("worker-1", "north", "south"):
        client = await a_house.client(user)
        await client.flush()
        assert any("permissions violation" in str(e).lower() for e in a_house.stack.errors[user])
    assert await gateway.manifest_store.get(1) == a_house.keys.chain.manifests[0]
    state = (await gateway.client.jetstream().stream_info(subjects.MANIFEST_STREAM)).state
    assert state.messages == 1
