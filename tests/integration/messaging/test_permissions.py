"""A real nats-server enforces who may do what."""

from __future__ import annotations

import asyncio
import json

import nats.errors
import pytest
from casemate_messaging import rpc
from casemate_messaging.blobs import BlobStore
from casemate_messaging.connection import connect, settle
from casemate_messaging.jobs import JobStore
from casemate_messaging.server import create_user_key
from casemate_schemas.errors import AuthenticationError, UnavailableError
from nats.aio.client import Client
from support.nats import NatsStack


async def refused(stack: NatsStack, client: Client, user: str, kind: str, subject: str) -> bool:
    """Whether the server told ``user`` that it may not ``kind`` (publish, subscription) ``subject``."""
    await settle(client)
    said = [str(error).lower() for error in stack.errors[user]]
    return any("permissions violation" in text and kind in text and f'"{subject.lower()}"' in text for text in said)


@pytest.mark.parametrize(
    "subject",
    [
        "casemate.kb.south.grant",
        "casemate.kb.>",
        ">",
        "_INBOX_gateway.>",
        "_INBOX.>",
        "casemate.event.*",
        "$JS.EVENT.>",
    ],
)
async def test_a_key_broker_hears_nothing_but_its_own(nats_stack: NatsStack, subject: str) -> None:
    north = await nats_stack.connect("north")
    await north.subscribe(subject)
    assert await refused(nats_stack, north, "north", "subscription", subject)


@pytest.mark.parametrize(
    "subject",
    [
        "casemate.kb.south.grant",
        "casemate.kb.north.grant",
        "casemate.event.aa",
        "$JS.API.INFO",
        "$JS.API.STREAM.INFO.BLOBS",
        "$JS.API.DIRECT.GET.BLOBS",
        "$KV.jobs-0.aa",
        "_INBOX_gateway.x",
    ],
)
async def test_a_key_broker_says_nothing_unasked(nats_stack: NatsStack, subject: str) -> None:
    north = await nats_stack.connect("north")
    await north.publish(subject, b"{}")
    assert await refused(nats_stack, north, "north", "publish", subject)


@pytest.mark.parametrize("subject", ["casemate.kb.north.*", "_INBOX_gateway.>", "_INBOX_worker-2.>", "_INBOX.>", ">"])
async def test_a_worker_reads_no_other_partys_replies(nats_stack: NatsStack, subject: str) -> None:
    worker = await nats_stack.connect("worker-1")
    await worker.subscribe(subject)
    assert await refused(nats_stack, worker, "worker-1", "subscription", subject)


async def test_a_reply_reaches_the_caller_alone(nats_stack: NatsStack) -> None:
    """Even one who may listen to its own inbox sees no other user's replies there."""
    north, worker, spy = [await nats_stack.connect(user) for user in ("north", "worker-1", "worker-2")]
    overheard: list[bytes] = []

    async def listen(message) -> None:
        overheard.append(message.data)

    await spy.subscribe("_INBOX_worker-2.>", cb=listen)
    await settle(spy)

    async def grant(payload: bytes) -> bytes:
        return b"secret " + payload

    async with await rpc.serve(north, "casemate.kb.north", {"grant": grant}):
        assert await rpc.call(worker, "casemate.kb.north.grant", b"w1", 5) == b"secret w1"
    await settle(spy)
    assert overheard == []


async def test_each_role_calls_only_its_own_ops(nats_stack: NatsStack) -> None:
    north, gateway, worker = [await nats_stack.connect(user) for user in ("north", "gateway", "worker-1")]
    called: list[str] = []

    def handler(op: str):
        async def handle(_: bytes) -> bytes:
            called.append(op)
            return op.encode()

        return handle

    ops = {op: handler(op) for op in ("precheck", "message", "nonce", "grant", "commit")}
    async with await rpc.serve(north, "casemate.kb.north", ops):
        assert await rpc.call(gateway, "casemate.kb.north.precheck", b"", 5) == b"precheck"
        assert await rpc.call(worker, "casemate.kb.north.grant", b"", 5) == b"grant"
        for client, user, op in ((gateway, "gateway", "grant"), (worker, "worker-1", "precheck")):
            await client.publish(f"casemate.kb.north.{op}", b"")
            assert await refused(nats_stack, client, user, "publish", f"casemate.kb.north.{op}")
    assert called == ["precheck", "grant"]


@pytest.mark.parametrize(
    "subject",
    [
        "$JS.API.STREAM.DELETE.KV_jobs-0",
        "$JS.API.STREAM.CREATE.MINE",
        "$JS.API.STREAM.PURGE.BLOBS",
        "$JS.API.CONSUMER.CREATE.BLOBS",
        "$JS.API.CONSUMER.DELETE.WORK_cpu.workers",
        "casemate.work.cpu.aa",
        "$KV.nonces.aa",
    ],
)
async def test_a_worker_manages_nothing(nats_stack: NatsStack, subject: str) -> None:
    worker = await nats_stack.connect("worker-1")
    await worker.publish(subject, b"")
    assert await refused(nats_stack, worker, "worker-1", "publish", subject)


@pytest.mark.parametrize("target", ["$JS.API.STREAM.DELETE.KV_jobs-0", "_INBOX_gateway.stolen", "casemate.work.cpu.aa"])
async def test_a_reply_subject_does_not_carry_a_worker_past_its_permissions(nats_stack: NatsStack, target: str) -> None:
    """NATS checks no reply subjects, so JetStream could be made to send a worker's own bytes anywhere in its account."""
    gateway, worker = await nats_stack.connect("gateway"), await nats_stack.connect("worker-1")
    arrived: list[bytes] = []

    async def listen(message) -> None:
        arrived.append(message.data)

    await gateway.subscribe("_INBOX_gateway.stolen", cb=listen)
    await settle(gateway)
    stored = await worker.jetstream().publish("casemate.blob.chunk.aa.bb", b"{}")
    await worker.publish("$JS.API.DIRECT.GET.BLOBS", json.dumps({"seq": stored.seq}).encode(), reply=target)
    await settle(worker)
    await settle(gateway)
    assert arrived == []
    assert (await gateway.jetstream().stream_info("KV_jobs-0")).config.name == "KV_jobs-0"
    assert (await gateway.jetstream().stream_info("WORK_cpu")).state.messages == 0


async def test_a_marker_cannot_be_replaced(nats_stack: NatsStack) -> None:
    """Not even by one who may publish it."""
    worker = await nats_stack.connect("worker-1")
    js = worker.jetstream()
    await js.publish("casemate.blob.marker.aa", b"first")
    with pytest.raises(nats.errors.Error, match="per subject"):
        await js.publish("casemate.blob.marker.aa", b"second")
    with pytest.raises(nats.errors.Error):
        await js.publish("casemate.blob.marker.aa", b"third", headers={"Nats-Rollup": "sub"})


async def test_a_stranger_and_a_key_in_the_wrong_role_get_nowhere(nats_stack: NatsStack, tmp_path) -> None:
    create_user_key(tmp_path / "stranger.nk")
    with pytest.raises(AuthenticationError):
        await connect(nats_stack.url, tmp_path / "stranger.nk", user="gateway")
    # A worker's key does not make a gateway of whoever claims the name: its inboxes are still the worker's.
    impostor = await connect(nats_stack.url, nats_stack.seeds["worker-1"], user="gateway")
    try:
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(rpc.call(impostor, "casemate.kb.north.precheck", b"", 0.2), 5)
        await impostor.publish("$JS.API.STREAM.DELETE.KV_jobs-0")
        await settle(impostor)
    finally:
        await impostor.close()
    gateway = await nats_stack.connect("gateway")
    assert [job async for job in JobStore(gateway).list()] == []


async def test_no_server_is_unavailable(nats_stack: NatsStack) -> None:
    with pytest.raises(UnavailableError):
        await connect("nats://127.0.0.1:1", nats_stack.seeds["gateway"], user="gateway", timeout_s=0.2)


async def test_honest_work_breaks_no_permission(nats_stack: NatsStack, blob) -> None:
    """What the stores do for gateway and worker is within their permissions: the server complained of nothing."""
    gateway, worker = await nats_stack.connect("gateway"), await nats_stack.connect("worker-1")
    data, digest = blob(100_000)
    await BlobStore(worker).put(digest, len(data), pieces(data))
    assert b"".join([chunk async for chunk in BlobStore(gateway).get(digest)]) == data
    await BlobStore(gateway, may_purge=True).delete(digest)
    await settle(gateway)
    await settle(worker)
    assert nats_stack.errors == {"gateway": [], "worker-1": []}


async def pieces(data: bytes):
    yield data
