"""Parts of a result, and downloads that break off: gone on with by the same client, another process, or another gateway."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from casemate import _transfers
from casemate._http import MAX_WAIT_S
from casemate._http import Gateway as Client
from casemate.identity import Identity
from casemate_schemas.envelope import open_head, split_envelope
from casemate_schemas.errors import NotFoundError, TooLargeError, UnavailableError
from support.gateway import Caller, House, now_ms
from support.sealed_jobs import sealed_job

CHUNK = 512 << 10


def digest_of(envelope: bytes) -> bytes:
    return open_head(split_envelope(envelope, max_bytes=1 << 30)[0]).header.digest


def ranges(size: int, framing: int) -> list[tuple[str, int, int]]:
    """(header, start, stop): around the head's end and the chunks', from the end, and past it."""
    edges = sorted({0, 1, *(framing + n * CHUNK + d for n in (0, 1, 6) for d in (-1, 0, 1)), size - 1})
    found = [(f"bytes={start}-", start, size) for start in edges]
    found += [(f"bytes={start}-{start + 700_000}", start, min(size, start + 700_001)) for start in edges]
    return [*found, ("bytes=-5", size - 5, size), (f"bytes=-{size + 9}", 0, size), ("bytes=0-0", 0, 1)]


async def test_any_part_of_a_result(running_house: House) -> None:
    clara = running_house.caller("clara")
    path, _, result = await sealed_job(running_house, clara)
    etag, framing = f'"{digest_of(result).hex()}"', len(head_of(result))
    whole = await clara.get(f"{path}/result")
    assert (whole.status, whole.headers["ETag"], whole.headers["Accept-Ranges"]) == (200, etag, "bytes")
    assert whole.body == result
    for wanted, start, stop in ranges(len(result), framing):
        part = await clara.get(f"{path}/result", headers={"Range": wanted, "If-Range": etag})
        assert (part.status, part.headers["ETag"]) == (206, etag), wanted
        assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(result)}"
        assert part.body == result[start:stop], wanted


def head_of(envelope: bytes) -> bytes:
    return envelope[: len(envelope) - len(split_envelope(envelope, max_bytes=1 << 30)[1])]


async def test_parts_that_there_are_not_and_what_is_known_already(running_house: House) -> None:
    clara = running_house.caller("clara")
    path, _, result = await sealed_job(running_house, clara)
    etag = f'"{digest_of(result).hex()}"'
    for wanted in (
        f"bytes={len(result)}-",
        "bytes=5-4",
        "bytes=-0",
        "bytes=-",
        "bytes=0-1,4-5",
        "lines=1-2",
        "bytes=a-",
    ):
        reply = await clara.get(f"{path}/result", headers={"Range": wanted})
        assert (reply.status, reply.headers["Content-Range"]) == (416, f"bytes */{len(result)}"), wanted
    other = await clara.get(f"{path}/result", headers={"Range": "bytes=5-", "If-Range": '"another"'})
    assert (other.status, other.body) == (200, result)
    for known in (etag, f'"x", {etag}', "*"):
        reply = await clara.get(f"{path}/result", headers={"If-None-Match": known})
        assert (reply.status, reply.headers["ETag"], reply.body) == (304, etag, b"")
    assert (await clara.get(f"{path}/result", headers={"If-None-Match": '"x"'})).status == 200


async def test_a_result_whose_time_is_over(a_house: House) -> None:
    async with a_house.gateway_running(retention_s=3600.0) as gateway:
        clara = a_house.caller("clara")
        path, _, _ = await sealed_job(a_house, clara)
        object.__setattr__(gateway.housekeeping, "_clock", lambda: now_ms() + 49 * 3600_000)
        assert await gateway.housekeeping.collect() is not None
        reply = await clara.get(f"{path}/result")
        assert (reply.status, reply.json["reason"]) == (500, "state_broken")
        object.__setattr__(gateway, "clock", lambda: now_ms() + 49 * 3600_000)
        reply = await clara.get(f"{path}/result")
        assert (reply.status, reply.json["reason"]) == (410, "not_found")
        assert (await clara.get(f"{path}/release")).status == 200


class Downloads:
    """The SDK's downloads of one result into ``partial``; each request's range, and where to break off."""

    def __init__(self, caller: Caller, path: str, result: bytes, partial: Path) -> None:
        self.caller, self.path, self.result, self.partial = caller, f"{path}/result", result, partial
        self.asked: list[str | None] = []
        self.cuts: list[int] = []
        self.max_wait_s = MAX_WAIT_S

    async def fetch(self, **options: Any) -> bytes:
        keys = self.caller.person.keys
        identity = Identity.of(type(keys)(keys.signing, keys.sealing, self.caller.person.delegation))
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            client = Asking(self, self.caller.origin, identity, session)
            options = {"max_bytes": 1 << 30, **options}
            return await _transfers.download(client, self.path, digest_of(self.result), self.partial, **options)


class Asking(Client):
    """A client that tells which ranges it asks for."""

    def __init__(self, of: Downloads, *args: Any) -> None:
        super().__init__(*args, sleep=briefly, max_wait_s=of.max_wait_s)
        self._of = of

    def open(self, method: str, path: str, **options: Any) -> Any:
        self._of.asked.append((options.get("headers") or {}).get("Range"))
        return super().open(method, path, **options)


async def briefly(_: float) -> None:
    await asyncio.sleep(0)


@pytest.fixture
async def downloads(running_house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    """Each answer breaks off after as many bytes as the next of ``cuts`` says."""
    clara = running_house.caller("clara")
    path, _, result = await sealed_job(running_house, clara)
    found = Downloads(clara, path, result, tmp_path / "state" / "partial")
    blocks = aiohttp.StreamReader.iter_chunked

    async def cut(content: aiohttp.StreamReader, size: int) -> AsyncIterator[bytes]:
        left = found.cuts.pop(0) if found.cuts else 2 * len(result)
        async for block in blocks(content, min(size, 99_991)):
            yield block[:left]
            left -= len(block)
            if left <= 0 and block:
                raise aiohttp.ClientPayloadError("cut")

    monkeypatch.setattr(aiohttp.StreamReader, "iter_chunked", cut)
    return found


async def test_a_download_that_breaks_anywhere_goes_on_there(downloads: Downloads) -> None:
    size, framing = len(downloads.result), len(head_of(downloads.result))
    stops = [
        0,
        1,
        framing - 1,
        framing,
        framing + CHUNK,
        *sorted(random.Random(6).sample(range(framing + CHUNK, size), 5)),
    ]
    stops = sorted(stops)
    downloads.cuts = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
    assert await downloads.fetch() == downloads.result
    assert downloads.asked == [None, *(f"bytes={stop}-" if stop else None for stop in stops)]
    assert not downloads.partial.exists()


async def test_another_process_goes_on(downloads: Downloads) -> None:
    """What the first one got stays on the disk, its owner's alone; only the rest is asked for."""
    downloads.max_wait_s, downloads.cuts = 0.0, [1_000_000]
    with pytest.raises(UnavailableError):
        await downloads.fetch()
    assert downloads.partial.read_bytes() == downloads.result[:1_000_000]
    assert downloads.partial.stat().st_mode & 0o777 == 0o600
    downloads.asked.clear()
    assert await downloads.fetch() == downloads.result
    assert downloads.asked == ["bytes=1000000-"]


@pytest.mark.parametrize("spoilt", ["a byte", "longer", "whole"])
async def test_a_beginning_that_is_none(downloads: Downloads, spoilt: str) -> None:
    """The disk spoilt it: the whole is found not to have the digest, and fetched from its start. A whole one is taken."""
    begun = bytearray(downloads.result[: 2 << 20] if spoilt == "a byte" else downloads.result)
    if spoilt == "a byte":
        begun[1 << 20] ^= 1
    elif spoilt == "longer":
        begun += b"x"
    downloads.partial.parent.mkdir()
    downloads.partial.write_bytes(begun)
    assert await downloads.fetch() == downloads.result
    asked = {"a byte": ["bytes=2097152-", None], "longer": [f"bytes={len(begun)}-", None], "whole": []}
    assert downloads.asked == asked[spoilt]


async def test_more_than_was_to_be_expected(downloads: Downloads) -> None:
    with pytest.raises(TooLargeError):
        await downloads.fetch(max_bytes=1 << 20)
    assert downloads.partial.stat().st_size <= 1 << 20


async def test_nothing_is_there(downloads: Downloads) -> None:
    downloads.path = f"/v1/jobs/{'0' * 32}/result"
    with pytest.raises(NotFoundError):
        await downloads.fetch()
