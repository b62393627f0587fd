"""Uploads in pieces: broken off anywhere, gone on with by anyone's gateway, and what hostile clients try."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import random
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import aiohttp
import pytest
from casemate import _transfers
from casemate._http import MAX_WAIT_S
from casemate._http import Gateway as Client
from casemate.identity import Identity
from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.uploads import UploadStore
from casemate_schemas import subjects
from casemate_schemas.api import MIN_PIECE_BYTES, TUS_VERSION, UPLOAD_MEDIA_TYPE, UPLOADS_PATH
from casemate_schemas.envelope import PREFIX_BYTES, open_head, split_envelope
from casemate_schemas.errors import NotFoundError, SealError, UnavailableError
from support.gateway import Caller, House, Reply, now_ms
from support.gateway_process import balancer, program, settings_file

CHUNK = 512 << 10
MIB = 1 << 20
TUS = {"Tus-Resumable": TUS_VERSION}
TYPED = {**TUS, "Content-Type": UPLOAD_MEDIA_TYPE}


class Upload:
    """One envelope to be uploaded by ``caller``, by hand or with the SDK."""

    def __init__(self, house: House, caller: Caller, size: int, kind: Any = "dataset") -> None:
        self.house, self.caller = house, caller
        self.envelope = house.envelope(caller, kind, random.Random(size).randbytes(size))
        signed_head, ciphertext = split_envelope(self.envelope, max_bytes=1 << 30)
        self.digest = open_head(signed_head).header.digest
        self.framing, self.ciphertext = self.envelope[: PREFIX_BYTES + len(signed_head)], bytes(ciphertext)
        self.total = len(self.envelope)
        self.path = f"{UPLOADS_PATH}/{self.digest.hex()}"

    async def begin(self, **changes: str) -> Reply:
        headers = {**TYPED, "Upload-Length": str(self.total), **changes}
        return await self.caller.post(UPLOADS_PATH, self.framing, headers=headers)

    async def piece(self, start: int, stop: int, caller: Caller | None = None, **changes: Any) -> Reply:
        """Bytes ``start`` to ``stop`` of the ciphertext, said to be there."""
        sent = changes.pop("body", self.ciphertext[start:stop])
        options = {name: changes.pop(name) for name in ("sent", "digest") if name in changes}
        headers = {
            **TYPED,
            "Upload-Offset": str(len(self.framing) + start),
            "Content-Length": str(len(sent)),
            **changes,
        }
        headers = {name: value for name, value in headers.items() if value is not None}
        return await (caller or self.caller).request("PATCH", self.path, sent, headers=headers, **options)

    async def offset(self) -> int:
        """How much of the ciphertext the gateway says is there."""
        reply = await self.caller.request("HEAD", self.path, headers=TUS)
        assert (reply.status, reply.headers["Upload-Length"]) == (200, str(self.total))
        return int(reply.headers["Upload-Offset"]) - len(self.framing)

    async def stored(self) -> bytes | None:
        client = await self.house.client("worker-1")
        store = EnvelopeStore(client, BlobStore(client))
        try:
            head = await store.head(self.digest)
        except NotFoundError:
            return None
        return head.framing + b"".join([piece async for piece in store.ciphertext(head)])

    @contextmanager
    def file(self) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as file:
            file.write(self.ciphertext)
            yield file

    async def by_sdk(self, origin: str | None = None, max_wait_s: float = MAX_WAIT_S) -> None:
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(auto_decompress=False, connector=connector) as session:
            me = Identity.of(keys_of(self.caller))
            client = Client(origin or self.caller.origin, me, session, sleep=briefly, max_wait_s=max_wait_s)
            with self.file() as file:
                await _transfers.upload(client, self.framing, file, self.digest)


def keys_of(caller: Caller) -> Any:
    keys = caller.person.keys
    return type(keys)(keys.signing, keys.sealing, caller.person.delegation)


async def briefly(_: float) -> None:
    await asyncio.sleep(0.01)


async def chunks_stored(house: House) -> int:
    gateway = await house.stack.gateway()
    return (await gateway.jetstream().stream_info(subjects.BLOB_STREAM)).state.messages


async def until_stored(house: House, count: int) -> None:
    async with asyncio.timeout(30):
        while await chunks_stored(house) < count:
            pass


def refused(reply: Reply, status: int, reason: str) -> None:
    assert (reply.status, reply.json["reason"]) == (status, reason), reply.body
    assert reply.headers["Tus-Resumable"] == TUS_VERSION


async def test_in_pieces_by_hand(running_house: House) -> None:
    """What tus says of each answer; and that there is nothing to be read before the end, and everything after it."""
    upload = Upload(running_house, running_house.caller("clara"), 9 * MIB + 77)
    options = await upload.caller.request("OPTIONS", UPLOADS_PATH)
    assert (options.status, options.headers["Tus-Version"], options.headers["Tus-Max-Size"]) == (
        204,
        "1.0.0",
        str(4 << 30),
    )
    assert options.headers["Tus-Checksum-Algorithm"] == "sha256"
    begun = await upload.begin()
    assert (begun.status, begun.headers["Location"]) == (201, upload.path)
    assert begun.headers["Upload-Offset"] == str(len(upload.framing)) and begun.headers["Upload-Expires"].endswith(
        "GMT"
    )
    checksum = base64.b64encode(hashlib.sha256(upload.ciphertext[: 4 * MIB]).digest()).decode()
    first = await upload.piece(0, 4 * MIB, **{"Upload-Checksum": f"sha256 {checksum}"})
    assert (first.status, first.headers["Upload-Offset"]) == (204, str(len(upload.framing) + 4 * MIB))
    assert await upload.offset() == 4 * MIB
    assert (await upload.begin()).headers["Upload-Offset"] == first.headers["Upload-Offset"]
    assert await upload.stored() is None
    last = await upload.piece(4 * MIB, upload.total)
    assert (last.status, last.headers["Upload-Offset"]) == (204, str(upload.total))
    assert await upload.stored() == upload.envelope
    gone = await upload.caller.request("HEAD", upload.path, headers=TUS)
    again = await upload.begin()
    assert (gone.status, again.status) == (404, 200)
    assert again.json == {"envelope": upload.digest.hex(), "bytes": upload.total}


OFFSETS = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1]
OFFSETS += sorted(random.Random(6).sample(range(9 * MIB), 5))


async def test_a_client_that_dies_at_any_byte(running_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client dies after so many bytes of ciphertext; another one, that knows nothing of it, sends what is missing."""
    blocks = _transfers.PartBody.blocks
    budget, sent = 0, 0

    async def dying(body: _transfers.PartBody) -> AsyncIterator[bytes]:
        nonlocal sent
        async for block in blocks(body):
            left = budget - sent
            sent += min(left, len(block))
            yield block[:left]
            if left < len(block):
                raise ConnectionError

    monkeypatch.setattr(_transfers.PartBody, "blocks", dying)
    clara = running_house.caller("clara")
    for budget in OFFSETS:
        sent = 0
        upload = Upload(running_house, clara, 9 * MIB + 5)
        with pytest.raises(UnavailableError):
            await upload.by_sdk(max_wait_s=0.0)
        assert (sent, await upload.stored()) == (budget, None)
        kept = await upload.offset()
        assert kept == (4 * MIB if budget >= 4 * MIB else 0)
        budget, sent = len(upload.ciphertext), kept
        await upload.by_sdk()
        assert sent == len(upload.ciphertext)
        assert await upload.stored() == upload.envelope
    assert await chunks_stored(running_house) == len(OFFSETS) * 19


async def test_a_gateway_that_dies_and_another_that_goes_on(a_house: House, tmp_path: Path) -> None:
    """kill -9 in the middle of the second piece: the same client goes on with another gateway, and only what was stored by
    the dead one without being counted is left over."""
    async with balancer() as address:
        settings = settings_file(tmp_path, a_house, public_url=address.origin)
        async with program(settings) as first, program(settings) as second:
            a_house.origin = address.origin
            address.gateways = [first.ready["address"]]
            upload = Upload(a_house, a_house.caller("clara"), 30 * MIB)
            sending = asyncio.create_task(upload.by_sdk())
            await until_stored(a_house, 12)
            os.kill(first.process.pid, signal.SIGKILL)
            await first.process.wait()
            address.gateways = [second.ready["address"]]
            address.cut()
            await sending
            assert await upload.stored() == upload.envelope
    gateway = await a_house.client("gateway")
    store = BlobStore(gateway, may_purge=True)
    whole = -(-len(upload.ciphertext) // CHUNK)
    assert await store.sweep(now_ms=now_ms() + 13 * 3600_000) <= 1
    assert await chunks_stored(a_house) == whole


async def test_two_gateways_behind_one_upload(a_house: House) -> None:
    """Every request goes to the other one: neither has seen the whole, and the digest is right all the same."""
    async with balancer() as address, a_house.gateway_running(public_url=address.origin):
        one = a_house.origin
        async with a_house.gateway_running(public_url=address.origin):
            address.gateways, a_house.origin = [one, a_house.origin], address.origin
            upload = Upload(a_house, a_house.caller("clara"), 30 * MIB)
            await upload.by_sdk()
            assert len(set(address.connections)) == 2 and len(address.connections) == 5
            assert await upload.stored() == upload.envelope


async def test_of_two_who_send_the_same_piece_one_wins(a_house: House) -> None:
    """Both are let in, both are written; one counts, and nothing of the other is left."""
    async with a_house.gateway_running() as gateway:
        upload = Upload(a_house, a_house.caller("clara"), 9 * MIB)
        assert (await upload.begin()).status == 201

        async def in_step() -> AsyncIterator[bytes]:
            yield upload.ciphertext[: 2 * MIB]
            async with asyncio.timeout(20):
                while gateway.uploads.free > a_house.settings.max_uploads - 2:  # noqa: ASYNC110 - nothing tells of it but the gateway
                    await asyncio.sleep(0.001)
            yield upload.ciphertext[2 * MIB : 4 * MIB]

        replies = await asyncio.gather(*(upload.piece(0, 4 * MIB, sent=in_step) for _ in range(2)))
        assert sorted(reply.status for reply in replies) == [204, 409]
        assert (await upload.offset(), await chunks_stored(a_house)) == (4 * MIB, 8)
        assert (await upload.piece(4 * MIB, upload.total)).status == 204
        assert await upload.stored() == upload.envelope


async def test_pieces_that_do_not_count(running_house: House) -> None:
    upload = Upload(running_house, running_house.caller("clara"), 9 * MIB)
    assert (await upload.begin()).status == 201
    assert (await upload.piece(0, 4 * MIB)).status == 204
    right, left = upload.ciphertext[4 * MIB : 8 * MIB], len(upload.ciphertext) - 4 * MIB
    wrong = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    good = base64.b64encode(hashlib.sha256(right).digest()).decode()
    tipped = bytes([right[0] ^ 1]) + right[1:]
    at = len(upload.framing)
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"Upload-Offset": str(at)}, 409, "conflict"),
        ({"Upload-Offset": str(at + 8 * MIB)}, 409, "conflict"),
        ({"Upload-Offset": "0"}, 409, "conflict"),
        ({"Upload-Offset": str(10**17)}, 409, "conflict"),
        ({"Upload-Offset": "-1"}, 400, "malformed"),
        ({"Upload-Offset": "9" * 30}, 400, "malformed"),
        ({"Upload-Offset": None}, 400, "malformed"),
        ({"Upload-Checksum": f"sha256 {wrong}"}, 460, "checksum_mismatch"),
        ({"Upload-Checksum": f"sha256 {good}", "sent": tipped}, 460, "checksum_mismatch"),
        ({"Upload-Checksum": f"md5 {good}"}, 400, "malformed"),
        ({"Upload-Checksum": "sha256 !"}, 400, "malformed"),
        ({"sent": tipped}, 401, "not_authenticated"),
        ({"Tus-Resumable": "0.2.2"}, 412, "malformed"),
        ({"Tus-Resumable": None}, 412, "malformed"),
        ({"Content-Type": "text/plain"}, 415, "malformed"),
        ({"body": right + upload.ciphertext[8 * MIB :] + b"x"}, 413, "too_large"),
        ({"body": bytes(left + 1)}, 413, "too_large"),
        ({"body": right[:-1]}, 400, "malformed"),
        ({"body": right[:CHUNK]}, 400, "malformed"),
        ({"body": b""}, 400, "malformed"),
    ]
    for changes, status, reason in cases:
        refused(await upload.piece(4 * MIB, 8 * MIB, **changes), status, reason)
    unmeasured = await upload.caller.request(
        "PATCH", upload.path, right, headers={**TYPED, "Upload-Offset": str(at + 4 * MIB)}, sent=lambda: once(right)
    )
    refused(unmeasured, 411, "malformed")
    assert (await upload.offset(), await chunks_stored(running_house)) == (4 * MIB, 8)
    assert (await upload.piece(4 * MIB, upload.total)).status == 204
    assert await upload.stored() == upload.envelope


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_beginnings_that_are_refused(a_house: House) -> None:
    async with a_house.gateway_running(max_envelope_bytes=20 * MIB):
        clara, north = a_house.caller("clara"), a_house.caller("north")
        upload, theirs = Upload(a_house, clara, 9 * MIB), Upload(a_house, north, 9 * MIB)
        large = Upload(a_house, clara, 20 * MIB)
        terms = Upload(a_house, clara, 5 * MIB, kind="terms")
        steward = a_house.caller("clara", roles=("steward",))
        for reply, status, reason in (
            (await upload.begin(**{"Upload-Length": str(upload.total + 1)}), 400, "malformed"),
            (await upload.begin(**{"Upload-Length": "-5"}), 400, "malformed"),
            (await upload.begin(**{"Upload-Length": "1e3"}), 400, "malformed"),
            (await upload.begin(**{"Upload-Length": "9" * 18}), 413, "too_large"),
            (await upload.begin(**{"Tus-Resumable": "2.0.0"}), 412, "malformed"),
            (await large.begin(), 413, "too_large"),
            (await terms.begin(), 400, "malformed"),
            (await clara.post(UPLOADS_PATH, upload.envelope[: 1 << 19], headers=_length(upload)), 413, "too_large"),
            (await clara.post(UPLOADS_PATH, upload.framing + b"x", headers=_length(upload)), 400, "malformed"),
            (await clara.post(UPLOADS_PATH, upload.framing[:-1], headers=_length(upload)), 400, "malformed"),
            (await clara.post(UPLOADS_PATH, theirs.framing, headers=_length(theirs)), 403, "not_allowed"),
            (await Upload(a_house, steward, 5 * MIB, kind="job").begin(), 403, "not_allowed"),
        ):
            refused(reply, status, reason)
        store = UploadStore(await a_house.client("gateway"), BlobStore(await a_house.client("gateway")))
        assert [state async for state, _ in store.list()] == []


def _length(upload: Upload) -> dict[str, str]:
    return {**TYPED, "Upload-Length": str(upload.total)}


async def test_somebody_elses_upload_does_not_exist(running_house: House) -> None:
    clara = running_house.caller("clara")
    upload = Upload(running_house, clara, 9 * MIB)
    assert (await upload.begin()).status == 201
    for other in (running_house.caller("north"), running_house.caller("clara")):
        assert (await other.request("HEAD", upload.path, headers=TUS)).status == 404
        refused(await upload.piece(0, 4 * MIB, other), 404, "not_found")
        refused(await other.request("DELETE", upload.path, headers=TUS), 404, "not_found")
    for name in ("0" * 64, "*", "..", "a" * 65):
        assert (await clara.request("HEAD", f"{UPLOADS_PATH}/{name}", headers=TUS)).status == 404
    assert (await upload.piece(0, 4 * MIB)).status == 204
    assert (await clara.request("DELETE", upload.path, headers=TUS)).status == 204
    assert (await chunks_stored(running_house), (await upload.begin()).status) == (0, 201)
    assert await upload.offset() == 0


async def test_a_member_has_so_much_under_way_and_no_more(a_house: House) -> None:
    async with a_house.gateway_running(max_unfinished_bytes=20 * MIB):
        clara, north = a_house.caller("clara"), a_house.caller("north")
        first, second, tiny = (Upload(a_house, clara, size) for size in (9 * MIB, 10 * MIB, 1000))
        assert [(await upload.begin()).status for upload in (first, second)] == [201, 201]
        reply = await tiny.begin()
        assert (reply.status, reply.json["reason"], reply.headers["Retry-After"]) == (429, "throttled", "60")
        assert (await Upload(a_house, north, 9 * MIB).begin()).status == 201
        assert (await clara.request("DELETE", second.path, headers=TUS)).status == 204
        assert (await tiny.begin()).status == 201


async def test_an_upload_that_stood_still_too_long(a_house: House) -> None:
    async with a_house.gateway_running() as gateway:
        upload = Upload(a_house, a_house.caller("clara"), 9 * MIB)
        assert (await upload.begin()).status == 201
        state, revision = await gateway.unfinished.get("clara", upload.digest.hex())
        expired, _ = await gateway.unfinished.append(state, revision, once(b""), 0, expires=now_ms() - 1)
        assert expired.expires < now_ms()
        refused(await upload.piece(0, 4 * MIB), 410, "not_found")
        assert (await upload.caller.request("HEAD", upload.path, headers=TUS)).status == 410


async def test_ciphertext_that_its_head_does_not_describe(running_house: House) -> None:
    """Each piece is what its sender signed; the whole is not what the head says. Nothing of it is left."""
    upload = Upload(running_house, running_house.caller("clara"), 9 * MIB)
    upload.ciphertext = upload.ciphertext[:-1] + bytes([upload.ciphertext[-1] ^ 1])
    with pytest.raises(SealError):
        await upload.by_sdk()
    assert (await upload.stored(), await chunks_stored(running_house)) == (None, 0)
    assert (await upload.caller.request("HEAD", upload.path, headers=TUS)).status == 404


async def test_an_end_that_nobody_heard_of(running_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the ciphertext was committed, and again after the head was: an empty piece makes up for it each time."""
    upload = Upload(running_house, running_house.caller("clara"), 5 * MIB)
    assert (await upload.begin()).status == 201

    async def killed(*_: Any, **__: Any) -> None:
        raise UnavailableError("killed")

    for where in (
        "casemate_messaging.envelopes.EnvelopeStore.put_head",
        "casemate_messaging.uploads.UploadStore.forget",
    ):
        with monkeypatch.context() as broken:
            broken.setattr(where, killed)
            offset = await upload.offset()
            assert (await upload.piece(offset, len(upload.ciphertext))).status == 503
            assert await upload.offset() == len(upload.ciphertext)
    assert await upload.stored() == upload.envelope
    await upload.by_sdk()
    assert await upload.stored() == upload.envelope


async def test_a_piece_is_no_larger_than_it_may_be(running_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casemate_gateway.routes.uploads.MAX_PIECE_BYTES", MIN_PIECE_BYTES)
    upload = Upload(running_house, running_house.caller("clara"), 9 * MIB)
    assert (await upload.begin()).status == 201
    refused(await upload.piece(0, MIN_PIECE_BYTES + CHUNK), 413, "too_large")
    assert (await upload.piece(0, MIN_PIECE_BYTES)).status == 204


async def test_the_same_ciphertext_by_two_ways_at_once(running_house: House) -> None:
    """In one request and in pieces: one blob, and nothing beside it."""
    upload = Upload(running_house, running_house.caller("clara"), 9 * MIB)
    assert (await upload.begin()).status == 201
    assert (await upload.piece(0, 4 * MIB)).status == 204
    assert (await upload.caller.post("/v1/envelopes", upload.envelope)).status == 201
    assert (await upload.piece(4 * MIB, upload.total)).status == 204
    assert await chunks_stored(running_house) == 19
    assert await upload.stored() == upload.envelope
