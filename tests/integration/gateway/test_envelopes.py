"""Uploads over loopback into a real store: what is kept, what is refused, and that refusing keeps nothing."""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections.abc import AsyncIterator

import pytest
from casemate_gateway.gateway import Gateway
from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_schemas.api import ENVELOPES_PATH
from casemate_schemas.codec import decode, domain_digest, encode, pack, unpack
from casemate_schemas.envelope import MAGIC, PREFIX_BYTES, EnvelopeHead, frame_head, open_head, split_envelope
from casemate_schemas.errors import NotFoundError
from casemate_schemas.sealing import seal_envelope
from casemate_schemas.signatures import Signed, SigningKey
from support.gateway import House, Reply, now_ms
from support.http import signed_request


def head_of(envelope: bytes) -> EnvelopeHead:
    return open_head(split_envelope(envelope, max_bytes=1 << 30)[0])


async def stored(house: House, envelope: bytes) -> bytes | None:
    """The envelope as a worker finds it, if it does."""
    client = await house.client("worker-1")
    store = EnvelopeStore(client, BlobStore(client))
    try:
        head = await store.head(head_of(envelope).header.digest)
    except NotFoundError:
        return None
    return head.framing + b"".join([piece async for piece in store.ciphertext(head)])


async def refused(house: House, envelope: bytes, reply: Reply, status: int, reason: str) -> None:
    assert (reply.status, reply.json["reason"]) == (status, reason), reply.body
    assert await stored(house, envelope) is None


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def test_what_was_uploaded_is_what_a_worker_reads(running_house: House) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "dataset", secrets.token_bytes(3 << 20))
    first = await clara.post(ENVELOPES_PATH, envelope)
    again = await clara.post(ENVELOPES_PATH, envelope)
    assert (first.status, again.status) == (201, 200)
    assert first.json == again.json == {"envelope": head_of(envelope).header.digest.hex(), "bytes": len(envelope)}
    assert await stored(running_house, envelope) == envelope


async def test_a_dataset_goes_at_the_wish_of_whoever_uploaded_it(running_house: House) -> None:
    clara, north = running_house.caller("clara"), running_house.caller("north")
    dataset, job = (running_house.envelope(clara, kind, secrets.token_bytes(1 << 20)) for kind in ("dataset", "job"))
    paths = [f"{ENVELOPES_PATH}/{head_of(envelope).header.digest.hex()}" for envelope in (dataset, job)]
    for envelope in (dataset, job):
        assert (await clara.post(ENVELOPES_PATH, envelope)).status == 201
    for caller, path in ((north, paths[0]), (clara, paths[1])):
        reply = await caller.request("DELETE", path)
        assert (reply.status, reply.json["reason"]) == (403, "not_allowed")
    assert await stored(running_house, dataset) == dataset
    assert (await clara.request("DELETE", paths[0])).status == 204
    assert await stored(running_house, dataset) is None and await stored(running_house, job) == job
    blobs = BlobStore(await running_house.client("gateway"))
    with pytest.raises(NotFoundError):
        await blobs.stat(head_of(dataset).header.ciphertext_digest)
    for path in (paths[0], f"{ENVELOPES_PATH}/{'g' * 64}", f"{ENVELOPES_PATH}/00"):
        assert (await clara.request("DELETE", path)).status == 404
    assert (await clara.post(ENVELOPES_PATH, dataset)).status == 201


async def test_a_chunked_upload(running_house: House) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "job", secrets.token_bytes(1 << 20))
    reply = await clara.post(ENVELOPES_PATH, envelope, sent=lambda: pieces(envelope))
    assert reply.status == 201
    assert await stored(running_house, envelope) == envelope


async def test_ciphertext_that_its_head_does_not_describe(running_house: House) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "job", secrets.token_bytes(1 << 20))
    changed = envelope[:-1] + bytes([envelope[-1] ^ 1])
    await refused(running_house, envelope, await clara.post(ENVELOPES_PATH, changed), 400, "seal_does_not_open")
    assert (await clara.post(ENVELOPES_PATH, envelope)).status == 201


async def test_a_body_that_was_not_signed(running_house: House) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "job", secrets.token_bytes(1 << 20))
    reply = await clara.post(ENVELOPES_PATH, b"another body", sent=envelope)
    await refused(running_house, envelope, reply, 401, "not_authenticated")


async def test_a_body_that_was_not_signed_though_its_ciphertext_is_there(running_house: House) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "job", secrets.token_bytes(1 << 20))
    assert (await clara.post(ENVELOPES_PATH, envelope)).status == 201
    assert (await clara.post(ENVELOPES_PATH, b"another body", sent=envelope)).status == 401


@pytest.mark.parametrize("missing", [1, 200_000, -1], ids=["a byte", "much", "a byte too many"])
@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_of_another_size(running_house: House, missing: int, chunked: bool) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "job", secrets.token_bytes(1 << 20))
    body = envelope + b"\x00" if missing < 0 else envelope[:-missing]
    reply = await clara.post(ENVELOPES_PATH, body, sent=(lambda: pieces(body)) if chunked else None)
    assert reply.status == (413 if chunked and missing < 0 else 400)
    assert await stored(running_house, envelope) is None


async def test_a_connection_that_ends_midway(running_house: House) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "job", secrets.token_bytes(1 << 20))
    request = signed_request(
        clara.person.signing, clara.person.delegation, "POST", clara.origin + ENVELOPES_PATH, envelope
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", int(clara.origin.rpartition(":")[2]))
    headers = {**request.headers, "Host": "x", "Content-Length": str(len(envelope))}
    lines = [f"POST {ENVELOPES_PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode() + envelope[: len(envelope) // 2])
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert await stored(running_house, envelope) is None
    assert (await clara.get("/v1/jobs")).status == 200


@pytest.mark.parametrize("size", [0, 5, PREFIX_BYTES, PREFIX_BYTES + 100])
async def test_a_body_that_ends_in_its_head(running_house: House, size: int) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "job", b"x")
    reply = await clara.post(ENVELOPES_PATH, envelope[:size])
    await refused(running_house, envelope, reply, 400, "malformed")


async def test_too_large_by_content_length_or_by_its_head(a_house: House) -> None:
    async with a_house.gateway_running(max_envelope_bytes=100_000):
        clara = a_house.caller("clara")
        envelope = a_house.envelope(clara, "job", bytes(100_000))
        await refused(a_house, envelope, await clara.post(ENVELOPES_PATH, envelope), 413, "too_large")
        never_ending = await clara.post(ENVELOPES_PATH, envelope, sent=lambda: stops_after_head(envelope))
        await refused(a_house, envelope, never_ending, 413, "too_large")
        fits = a_house.envelope(clara, "job", bytes(90_000))
        assert (await clara.post(ENVELOPES_PATH, fits)).status == 201


async def stops_after_head(envelope: bytes) -> AsyncIterator[bytes]:
    """The head and not one byte of ciphertext: whoever refuses this has not waited for more."""
    signed_head, _ = split_envelope(envelope, max_bytes=1 << 30)
    yield envelope[: PREFIX_BYTES + len(signed_head)]


async def test_a_head_that_is_too_large(running_house: House) -> None:
    clara = running_house.caller("clara")
    body = MAGIC + struct.pack(">I", (256 << 10) + 1) + bytes(100)
    reply = await clara.post(ENVELOPES_PATH, body)
    assert (reply.status, reply.json["reason"]) == (413, "too_large")


def of_version(envelope: bytes, version: int, key: SigningKey) -> bytes:
    """The envelope with another version in its preamble, properly signed."""
    signed_head, ciphertext = split_envelope(envelope, max_bytes=1 << 30)
    value = unpack(decode(Signed, signed_head).payload)
    value["header"]["preamble"]["version"] = version
    payload = pack(value)
    to_sign = b"casemate-signature-v1\x00" + domain_digest(EnvelopeHead.KIND, payload)
    body = encode(Signed(kind=EnvelopeHead.KIND, payload=payload, signer=key.public, signature=key.sign_bytes(to_sign)))
    return MAGIC + struct.pack(">I", len(body)) + body + bytes(ciphertext)


async def test_an_unknown_version(running_house: House) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "job", b"x")
    reply = await clara.post(ENVELOPES_PATH, of_version(envelope, 2, clara.person.signing))
    await refused(running_house, envelope, reply, 400, "unsupported_version")
    assert (await clara.post(ENVELOPES_PATH, of_version(envelope, 1, clara.person.signing))).status == 201


async def test_a_head_that_its_sender_did_not_sign(running_house: House) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "job", b"x")
    _, ciphertext = split_envelope(envelope, max_bytes=1 << 30)
    forged = frame_head(head_of(envelope), SigningKey.generate()) + bytes(ciphertext)
    await refused(running_house, envelope, await clara.post(ENVELOPES_PATH, forged), 401, "bad_signature")


async def test_somebody_elses_envelope(running_house: House) -> None:
    clara, north = running_house.caller("clara"), running_house.caller("north")
    envelope = running_house.envelope(clara, "job", b"x")
    await refused(running_house, envelope, await north.post(ENVELOPES_PATH, envelope), 403, "not_allowed")


@pytest.mark.parametrize("kind", ["terms", "checkpoint", "result", "request", "response"])
async def test_kinds_that_people_do_not_upload(running_house: House, kind: str) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, kind, b"x")  # type: ignore[arg-type]
    await refused(running_house, envelope, await clara.post(ENVELOPES_PATH, envelope), 400, "malformed")


@pytest.mark.parametrize(("kind", "role"), [("dataset", "scientist"), ("job", "steward")])
async def test_kinds_that_another_role_uploads(running_house: House, kind: str, role: str) -> None:
    person = running_house.caller("clara", roles=(role,))
    envelope = running_house.envelope(person, kind, b"x")  # type: ignore[arg-type]
    await refused(running_house, envelope, await person.post(ENVELOPES_PATH, envelope), 403, "not_allowed")


async def test_another_consortiums_envelope(running_house: House) -> None:
    clara = running_house.caller("clara")
    envelope = seal_envelope("job", b"x", [], consortium=b"o" * 32, key=clara.person.signing, created=now_ms())
    await refused(running_house, envelope, await clara.post(ENVELOPES_PATH, envelope), 403, "not_allowed")


async def test_a_compressed_body(running_house: House) -> None:
    clara = running_house.caller("clara")
    envelope = running_house.envelope(clara, "job", b"x")
    reply = await clara.post(ENVELOPES_PATH, envelope, headers={"Content-Encoding": "gzip"})
    await refused(running_house, envelope, reply, 400, "malformed")


async def test_more_uploads_than_there_is_room_for(a_house: House) -> None:
    async with a_house.gateway_running(max_uploads=1) as gateway:
        clara = a_house.caller("clara")
        slow, other = (a_house.envelope(clara, "job", bytes(100_000)) for _ in range(2))
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def waits() -> AsyncIterator[bytes]:
            yield slow[:50_000]
            await until_busy(gateway, begun)
            await go_on.wait()
            yield slow[50_000:]

        uploading = asyncio.create_task(clara.post(ENVELOPES_PATH, slow, sent=waits))
        await begun.wait()
        reply = await clara.post(ENVELOPES_PATH, other)
        assert (reply.status, reply.json["reason"], reply.headers["Retry-After"]) == (503, "unavailable", "5")
        go_on.set()
        assert (await uploading).status == 201
        assert (await clara.post(ENVELOPES_PATH, other)).status == 201


async def until_busy(gateway: Gateway, begun: asyncio.Event) -> None:
    while gateway.uploads.free:  # noqa: ASYNC110 - nothing tells of a request's arrival but the request
        await asyncio.sleep(0.001)
    begun.set()


@pytest.mark.parametrize(
    ("settings", "drips"),
    [({"body_idle_s": 0.1}, 0), ({"body_idle_s": 0.3, "min_upload_bytes_per_s": 1 << 40}, 500)],
    ids=["stops", "drips"],
)
async def test_a_body_that_does_not_come(a_house: House, settings: dict[str, float], drips: int) -> None:
    async with a_house.gateway_running(**settings):
        clara = a_house.caller("clara")
        envelope = a_house.envelope(clara, "job", bytes(100_000))
        answered = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield envelope[:10_000]
            for byte in envelope[10_000 : 10_000 + drips]:
                yield bytes([byte])
                await asyncio.sleep(0.01)
            if not drips:
                await answered.wait()

        await refused(a_house, envelope, await clara.post(ENVELOPES_PATH, envelope, sent=slowly), 408, "unavailable")
        answered.set()
