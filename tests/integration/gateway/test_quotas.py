"""What one member may have at once, and what a gateway says when there is no more room for anybody."""

from __future__ import annotations

import asyncio
import re
import secrets

from casemate_gateway.description import ROUTES, Route
from casemate_messaging.setup import StreamSettings, ensure_streams
from casemate_messaging.stored import StoredSizes
from casemate_schemas import subjects
from casemate_schemas.api import ENVELOPES_PATH, JOBS_PATH, UPLOAD_MEDIA_TYPE, UPLOADS_PATH
from casemate_schemas.codec import encode
from support.gateway import Caller, House, Reply
from support.http import content_digest, signed_request

KIB, MIB = 1 << 10, 1 << 20


def refused(reply: Reply, status: int, reason: str, retry_after_s: int) -> bool:
    return (reply.status, reply.json["reason"], reply.headers["Retry-After"]) == (status, reason, str(retry_after_s))


async def test_a_member_has_so_many_jobs_and_no_more(a_house: House) -> None:
    async with a_house.gateway_running(max_jobs_per_member=2):
        clara, north = a_house.caller("clara"), a_house.caller("north")
        first, reply = await a_house.submitted(clara)
        assert (await a_house.submitted(a_house.caller("clara")))[1].status == 202
        third, full = await a_house.submitted(clara)
        assert refused(full, 429, "throttled", 60)
        routing = {"job_key_broker": "north", "key_brokers": ("north",)}
        assert (await a_house.submitted(north, **routing))[1].status == 202
        async with a_house.gateway_running(max_jobs_per_member=2):
            clara_elsewhere = Caller(clara.person, a_house.origin, a_house.session)
            assert refused(await clara_elsewhere.post(JOBS_PATH, encode(third)), 429, "throttled", 60)
            assert (await clara_elsewhere.post(JOBS_PATH, encode(first))).status == 200
        assert (await clara.post(f"{JOBS_PATH}/{reply.json['job_id']}/cancel")).status == 202
        assert (await clara.post(JOBS_PATH, encode(third))).status == 202


async def test_of_many_jobs_at_once_as_many_as_there_is_room_for(a_house: House) -> None:
    async with a_house.gateway_running(max_jobs_per_member=3):
        clara = a_house.caller("clara")
        replies = await asyncio.gather(*(a_house.submitted(clara) for _ in range(8)))
        assert sorted(reply.status for _, reply in replies) == [202] * 3 + [429] * 5


async def begin(caller: Caller, envelope: bytes) -> Reply:
    framing = envelope[: 12 + int.from_bytes(envelope[8:12], "big")]
    headers = {"Tus-Resumable": "1.0.0", "Upload-Length": str(len(envelope)), "Content-Type": UPLOAD_MEDIA_TYPE}
    return await caller.post(UPLOADS_PATH, framing, headers=headers)


async def test_a_member_stores_so_much_and_no_more(a_house: House) -> None:
    async with a_house.gateway_running(max_stored_bytes_per_member=MIB):
        clara, north = a_house.caller("clara"), a_house.caller("north")
        first, second = (a_house.envelope(clara, "dataset", secrets.token_bytes(600 * KIB)) for _ in range(2))
        stored = await clara.post(ENVELOPES_PATH, first)
        assert stored.status == 201
        assert refused(await clara.post(ENVELOPES_PATH, second), 507, "quota_exceeded", 60)
        assert refused(await begin(clara, second), 507, "quota_exceeded", 60)
        assert (await clara.post(ENVELOPES_PATH, first)).status == 200
        assert (await north.post(ENVELOPES_PATH, a_house.envelope(north, "dataset", bytes(600 * KIB)))).status == 201
        async with a_house.gateway_running(max_stored_bytes_per_member=MIB):
            clara_elsewhere = Caller(clara.person, a_house.origin, a_house.session)
            assert refused(await clara_elsewhere.post(ENVELOPES_PATH, second), 507, "quota_exceeded", 60)
            removed = await clara_elsewhere.request("DELETE", f"{ENVELOPES_PATH}/{stored.json['envelope']}")
            assert removed.status == 204
        assert (await clara.post(ENVELOPES_PATH, second)).status == 201


async def test_what_is_begun_counts_until_it_is_given_up(a_house: House) -> None:
    async with a_house.gateway_running(max_stored_bytes_per_member=MIB):
        clara = a_house.caller("clara")
        first, second = (a_house.envelope(clara, "dataset", secrets.token_bytes(600 * KIB)) for _ in range(2))
        begun = await begin(clara, first)
        assert (begun.status, (await begin(clara, first)).status) == (201, 201)
        assert refused(await clara.post(ENVELOPES_PATH, second), 507, "quota_exceeded", 60)
        tus = {"Tus-Resumable": "1.0.0"}
        assert (await clara.request("DELETE", begun.headers["Location"], headers=tus)).status == 204
        broken = second[:-1] + bytes([second[-1] ^ 1])
        assert (await clara.post(ENVELOPES_PATH, broken)).status == 400
        assert (await clara.post(ENVELOPES_PATH, first)).status == 201


async def test_of_several_gateways_at_once_none_lets_too_much_in(a_house: House) -> None:
    clara = a_house.caller("clara")
    envelopes = [a_house.envelope(clara, "dataset", secrets.token_bytes(300 * KIB)) for _ in range(8)]
    limit = {"max_stored_bytes_per_member": MIB}
    async with a_house.gateway_running(**limit):
        one = Caller(clara.person, a_house.origin, a_house.session)
        async with a_house.gateway_running(**limit):
            other = Caller(clara.person, a_house.origin, a_house.session)
            posts = [(one, other)[n % 2].post(ENVELOPES_PATH, envelope) for n, envelope in enumerate(envelopes)]
            replies = await asyncio.gather(*posts)
    stored = [reply.json["bytes"] for reply in replies if reply.status == 201]
    assert sum(stored) <= MIB
    assert {reply.status for reply in replies} <= {201, 507}
    total = await StoredSizes(await a_house.client("gateway")).total("clara")
    assert total.size == sum(stored)


async def test_what_nats_garbled_of_a_members_uploads_holds_up_none_of_its_next(a_house: House) -> None:
    """A note of what is stored and the state of an upload, neither to be read any more."""
    async with a_house.gateway_running(max_stored_bytes_per_member=MIB):
        clara = a_house.caller("clara")
        stored = await clara.post(ENVELOPES_PATH, a_house.envelope(clara, "dataset", secrets.token_bytes(1000)))
        js = (await a_house.client("gateway")).jetstream()
        for bucket in (subjects.STORED_BUCKET, subjects.UPLOAD_BUCKET):
            await js.publish(f"$KV.{bucket}.clara.{'0' * 64}", b"\xc1 nonsense")
        again = await clara.post(ENVELOPES_PATH, a_house.envelope(clara, "dataset", secrets.token_bytes(1000)))
        assert (stored.status, again.status) == (201, 201)


async def test_a_full_store_says_so_and_takes_what_still_fits(a_house: House) -> None:
    client = await a_house.client("gateway")
    await ensure_streams(client.jetstream(), StreamSettings(max_blob_store_bytes=2 * MIB))
    async with a_house.gateway_running():
        clara = a_house.caller("clara")
        large = a_house.envelope(clara, "dataset", secrets.token_bytes(4 * MIB))
        assert refused(await clara.post(ENVELOPES_PATH, large), 507, "storage_full", 5)
        small = a_house.envelope(clara, "dataset", secrets.token_bytes(600 * KIB))
        assert (await clara.post(ENVELOPES_PATH, small)).status == 201


async def test_too_much_is_refused_before_it_is_sent(a_house: House) -> None:
    """Of every route: a body that is announced too long, to a client that waits for leave, and one that is not announced."""
    async with a_house.gateway_running(max_envelope_bytes=MIB):
        clara = a_house.caller("clara", roles=("scientist", "steward", "admin"))
        envelope = a_house.envelope(clara, "dataset", bytes(600 * KIB))
        upload = (await begin(clara, envelope)).headers["Location"]
        offset = 12 + int.from_bytes(envelope[8:12], "big")
        for route in ROUTES:
            if not route.is_signed:
                continue
            path = re.sub(r"{\w+}", upload.rpartition("/")[2], route.path.replace("{key_broker}", "clara"))
            told = {"Content-Type": UPLOAD_MEDIA_TYPE, "Tus-Resumable": "1.0.0", "Upload-Offset": str(offset)}
            told["Upload-Length"] = str(MIB)
            bound = limit(route)
            announced = {**told, "Content-Length": str(bound + 1), "Expect": "100-continue"}
            assert await said(clara, route.method, path, announced, b"") == 413, route
            chunked = f"{bound + 1:x}\r\n".encode() + bytes(bound + 1) + b"\r\n0\r\n\r\n"
            unannounced = {**told, "Transfer-Encoding": "chunked"}
            answer = await said(clara, route.method, path, unannounced, chunked)
            assert answer in ((400, 411, 413) if route.path in (ENVELOPES_PATH,) or route.method == "PATCH" else (413,))


def limit(route: Route) -> int:
    if route.body is None:
        return 0
    return MIB if route.body.max_bytes is None or route.method == "PATCH" else route.body.max_bytes


async def said(caller: Caller, method: str, path: str, headers: dict[str, str], body: bytes) -> int:
    """The status of the first line that comes back."""
    signed = signed_request(
        caller.person.signing, caller.person.delegation, method, caller.origin + path, digest=content_digest(body)
    )
    host = caller.origin.removeprefix("http://")
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in {**signed.headers, **headers}.items()]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(host.rpartition(":")[2]))
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    line = await reader.readline()
    writer.transport.abort()
    return int(line.split()[1])
