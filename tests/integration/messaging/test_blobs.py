from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import nats.errors
import nats.js.errors
import pytest
from casemate_messaging.blobs import CHUNK_BYTES, DIGEST_HEADER, MAX_UPLOAD_S, WINDOW, BlobStore, Segment
from casemate_messaging.connection import TRIES, publish_once
from casemate_messaging.heads import HeadStore
from casemate_messaging.setup import StreamSettings
from casemate_schemas import subjects
from casemate_schemas.codec import encode
from casemate_schemas.errors import (
    IntegrityError,
    MalformedError,
    NotFoundError,
    SealError,
    StorageFullError,
    TooLargeError,
    UnavailableError,
)
from support.nats import NatsStack


async def pieces(data: bytes, size: int = 300_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def read(store: BlobStore, digest: bytes) -> bytes:
    return b"".join([chunk async for chunk in store.get(digest)])


async def chunks_stored(stack: NatsStack) -> int:
    gateway = await stack.gateway()
    return (await gateway.jetstream().stream_info(subjects.BLOB_STREAM)).state.messages


async def until_stored(stack: NatsStack, count: int) -> None:
    async with asyncio.timeout(20):
        while await chunks_stored(stack) < count:
            pass


@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        CHUNK_BYTES - 1,
        CHUNK_BYTES,
        CHUNK_BYTES + 1,
        WINDOW * CHUNK_BYTES,
        5 << 20,
        (WINDOW + 1) * CHUNK_BYTES + 7,
    ],
)
async def test_round_trip(nats_stack: NatsStack, blob, size: int) -> None:
    data, digest = blob(size)
    worker, gateway = BlobStore(await nats_stack.connect("worker-1")), BlobStore(await nats_stack.connect("gateway"))
    assert await worker.put(digest, size, pieces(data))
    assert await gateway.stat(digest) == size
    assert await read(gateway, digest) == data
    assert await chunks_stored(nats_stack) == -(-size // CHUNK_BYTES)


async def test_putting_it_again_reads_nothing_and_stores_nothing(nats_stack: NatsStack, blob) -> None:
    data, digest = blob(5 << 20)
    store = BlobStore(await nats_stack.connect("gateway"), may_purge=True)
    assert await store.put(digest, len(data), pieces(data))
    before = await chunks_stored(nats_stack)

    async def untouched() -> AsyncIterator[bytes]:
        raise AssertionError("the pieces were read")
        yield b""

    assert not await store.put(digest, len(data), untouched())
    assert await chunks_stored(nats_stack) == before == 10


@pytest.mark.parametrize("may_purge", [True, False])
async def test_a_wrong_digest_leaves_nothing_visible(nats_stack: NatsStack, blob, may_purge: bool) -> None:
    data, digest = blob(3 << 20)
    store = BlobStore(await nats_stack.connect("gateway"), may_purge=may_purge)
    with pytest.raises(SealError):
        await store.put(digest, len(data), pieces(data[:-1] + bytes([data[-1] ^ 1])))
    for asked in (digest, hashlib.sha256(data[:-1] + bytes([data[-1] ^ 1])).digest()):
        with pytest.raises(NotFoundError):
            await store.stat(asked)
        with pytest.raises(NotFoundError):
            await read(store, asked)
    assert await chunks_stored(nats_stack) == (0 if may_purge else 6)
    assert await store.put(digest, len(data), pieces(data))
    assert await read(store, digest) == data


async def test_a_wrong_size_is_refused(nats_stack: NatsStack, blob) -> None:
    data, digest = blob(2 << 20)
    store = BlobStore(await nats_stack.connect("gateway"), may_purge=True)
    for declared in (len(data) - 1, len(data) + 1, 0):
        with pytest.raises(MalformedError):
            await store.put(digest, declared, pieces(data))
    with pytest.raises(NotFoundError):
        await store.stat(digest)
    assert await chunks_stored(nats_stack) == 0


async def test_more_than_declared_stops_at_once(nats_stack: NatsStack) -> None:
    """An endless body ends where the declared size does."""
    store, given = BlobStore(await nats_stack.connect("gateway"), may_purge=True), 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 1 << 16
            yield bytes(1 << 16)

    with pytest.raises(MalformedError):
        await store.put(bytes(32), 1 << 20, endless())
    assert given == (1 << 20) + (1 << 16)


@pytest.mark.parametrize("size", [-1, (1 << 20) + 1, 1 << 62])
async def test_a_size_over_the_bound_is_refused_before_reading(nats_stack: NatsStack, size: int) -> None:
    store = BlobStore(await nats_stack.connect("gateway"), max_blob_bytes=1 << 20)

    async def untouched() -> AsyncIterator[bytes]:
        raise AssertionError("the pieces were read")
        yield b""

    with pytest.raises(TooLargeError):
        await store.put(bytes(32), size, untouched())


async def test_an_aborted_upload_leaves_nothing(nats_stack: NatsStack, blob) -> None:
    data, digest = blob(4 << 20)
    store = BlobStore(await nats_stack.connect("gateway"), may_purge=True)

    async def broken() -> AsyncIterator[bytes]:
        yield data[: 3 << 20]
        await until_stored(nats_stack, 6)
        raise ConnectionResetError("the client went away")

    with pytest.raises(ConnectionResetError):
        await store.put(digest, len(data), broken())
    with pytest.raises(NotFoundError):
        await store.stat(digest)
    assert await chunks_stored(nats_stack) == 0


async def test_a_cancelled_upload_leaves_nothing(nats_stack: NatsStack, blob) -> None:
    data, digest = blob(4 << 20)
    store, half_way = BlobStore(await nats_stack.connect("gateway"), may_purge=True), asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield data[: 3 << 20]
        half_way.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(store.put(digest, len(data), stalled()))
    await half_way.wait()
    await until_stored(nats_stack, 6)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(NotFoundError):
        await store.stat(digest)
    assert await chunks_stored(nats_stack) == 0


async def test_concurrent_uploads_of_one_blob_make_one_blob(nats_stack: NatsStack, blob) -> None:
    """Both have read half before either ends, so their chunks lie mixed in the stream."""
    data, digest = blob(3 << 20)
    barrier = asyncio.Barrier(4)

    async def in_step() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 1 << 20):
            await barrier.wait()
            yield data[start : start + (1 << 20)]

    stores = [BlobStore(await nats_stack.connect("gateway"), may_purge=True) for _ in range(4)]
    created = await asyncio.gather(*(store.put(digest, len(data), in_step()) for store in stores))
    assert sorted(created) == [False, False, False, True]
    assert await read(stores[0], digest) == data
    assert await chunks_stored(nats_stack) == 6


@pytest.mark.parametrize("unanswered", [1, TRIES])
async def test_a_commit_whose_answer_was_lost_stands(nats_stack: NatsStack, blob, monkeypatch, unanswered: int) -> None:
    """The marker was stored and nobody said so: the blob is there, and its chunks are not taken for rubbish."""
    data, digest = blob(1 << 20)
    store, left = BlobStore(await nats_stack.connect("gateway"), may_purge=True), unanswered
    publish = store._js.publish

    async def deaf(subject: str, payload: bytes):
        nonlocal left
        with contextlib.suppress(nats.js.errors.APIError):
            await publish(subject, payload)
        left -= 1
        if left >= 0:
            raise nats.errors.TimeoutError
        return await publish(subject, payload)

    monkeypatch.setattr(store._js, "publish", deaf)
    if unanswered == TRIES:
        with pytest.raises(UnavailableError):
            await store.put(digest, len(data), pieces(data))
    else:
        assert await store.put(digest, len(data), pieces(data))
    assert await read(store, digest) == data


async def test_a_lying_rival_does_not_get_in_the_way(nats_stack: NatsStack, blob) -> None:
    """A wrong upload under the same digest, at the same time, ends in an error; the right one is what is read."""
    data, digest = blob(3 << 20)
    store = BlobStore(await nats_stack.connect("worker-1"))
    results = await asyncio.gather(
        store.put(digest, len(data), pieces(bytes(len(data)))),
        store.put(digest, len(data), pieces(data)),
        return_exceptions=True,
    )
    assert isinstance(results[0], SealError)
    assert results[1] is True
    assert await read(store, digest) == data


async def test_altered_chunks_do_not_reach_the_reader_whole(nats_stack: NatsStack, blob) -> None:
    """The store lies in its last chunk: the reader gets an error, and never the last bytes."""
    data, digest = blob(3 * CHUNK_BYTES)
    worker = await nats_stack.connect("worker-1")
    store = BlobStore(worker)
    other, other_digest = blob(3 * CHUNK_BYTES + 1)
    await store.put(other_digest, len(other), pieces(other))
    genuine = await store._marker(other_digest)
    writer = genuine.segments[0].upload_id
    first = None
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES]
        last = start + CHUNK_BYTES == len(data)
        lie = chunk[:-1] + b"!" if last else chunk
        headers = {DIGEST_HEADER: hashlib.sha256(lie).hexdigest()}
        ack = await worker.jetstream().publish(subjects.blob_chunk(digest.hex(), writer), lie, headers=headers)
        first = first or ack.seq
    await store.commit(digest, len(data), (Segment(upload_id=writer, first_sequence=first, chunks=3),))
    reader = store.get(digest)
    assert await anext(reader) + await anext(reader) == data[: 2 * CHUNK_BYTES]
    with pytest.raises(IntegrityError):
        await anext(reader)


@pytest.mark.parametrize(("size", "chunks"), [(5, 5), (1, 1), (2, 2), (3, 2), (2, 3), (4, 3)])
async def test_a_marker_that_promises_otherwise_is_found_out(
    nats_stack: NatsStack, blob, size: int, chunks: int
) -> None:
    data, digest = blob(3 * CHUNK_BYTES)
    store = BlobStore(await nats_stack.connect("gateway"), may_purge=True)
    await store.put(digest, len(data), pieces(data))
    marker = await store._marker(digest)
    segment = marker.segments[0].model_copy(update={"chunks": chunks})
    lie = marker.model_copy(update={"size": size * CHUNK_BYTES, "segments": (segment,)})
    await store._purge(subjects.BLOB_MARKER_STREAM, subjects.blob_marker(digest.hex()))
    await publish_once(store._js, subjects.blob_marker(digest.hex()), encode(lie))
    with pytest.raises(IntegrityError):
        await read(store, digest)


async def test_a_chunk_that_the_disk_spoilt_is_found_wherever_a_reader_begins(nats_stack: NatsStack, blob) -> None:
    """The chunk's own digest says so: nobody need read the whole."""
    data, digest = blob(4 * CHUNK_BYTES)
    store = BlobStore(await nats_stack.connect("worker-1"))
    js = (await nats_stack.gateway()).jetstream()
    first = None
    for index in range(4):
        chunk = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        headers = {DIGEST_HEADER: hashlib.sha256(chunk).hexdigest()} if index != 1 else None
        stored = chunk if index != 2 else chunk[:-1] + b"!"
        ack = await js.publish(subjects.blob_chunk(digest.hex(), "0-a"), stored, headers=headers)
        first = first or ack.seq
    await store.commit(digest, len(data), (Segment(upload_id="0-a", first_sequence=first, chunks=4),))
    for start, sound in ((0, True), (CHUNK_BYTES + 9, False), (2 * CHUNK_BYTES, False), (3 * CHUNK_BYTES + 1, True)):
        found = store.get_range(digest, start, start + 5)
        if sound:
            assert b"".join([piece async for piece in found]) == data[start : start + 5]
        else:
            with pytest.raises(IntegrityError):
                await anext(found)


async def test_any_range_is_that_range(nats_stack: NatsStack, blob, monkeypatch) -> None:
    """Ranges around chunk, batch and segment edges, of a blob whose segments hold five chunks each."""
    monkeypatch.setattr("casemate_messaging.blobs.SEGMENT_CHUNKS", 5)
    data, digest = blob(13 * CHUNK_BYTES + 77)
    store = BlobStore(await nats_stack.connect("worker-1"))
    other, other_digest = blob(6 * CHUNK_BYTES)
    await asyncio.gather(store.put(digest, len(data), pieces(data)), store.put(other_digest, len(other), pieces(other)))
    assert [segment.chunks for segment in (await store._marker(digest)).segments] == [5, 5, 4]
    edges = sorted(
        {0, 1, len(data) - 1, len(data), *(n * CHUNK_BYTES + d for n in (1, 5, 8, 10, 13) for d in (-1, 0, 1))}
    )
    for start in edges[:-1]:
        for stop in {*edges[edges.index(start) + 1 :][:2], edges[-1]}:
            found = b"".join([piece async for piece in store.get_range(digest, start, stop)])
            assert found == data[start:stop], (start, stop)


async def test_a_marker_that_is_none_is_found_out(nats_stack: NatsStack) -> None:
    worker = await nats_stack.connect("worker-1")
    await worker.jetstream().publish(subjects.blob_marker("00" * 32), b"\xff" * 100_000)
    with pytest.raises(IntegrityError):
        await BlobStore(worker).stat(bytes(32))


async def test_delete_removes_marker_and_chunks(nats_stack: NatsStack, blob) -> None:
    data, digest = blob(2 << 20)
    kept, kept_digest = blob(1 << 20)
    store = BlobStore(await nats_stack.connect("gateway"), may_purge=True)
    await store.put(digest, len(data), pieces(data))
    await store.put(kept_digest, len(kept), pieces(kept))
    await store.delete(digest)
    await store.delete(digest)
    with pytest.raises(NotFoundError):
        await store.stat(digest)
    assert await chunks_stored(nats_stack) == 2
    assert await read(store, kept_digest) == kept
    assert await store.put(digest, len(data), pieces(data))


async def test_sweep_removes_old_orphans_and_nothing_else(nats_stack: NatsStack, blob) -> None:
    data, digest = blob(1 << 20)
    orphan, orphan_digest = blob((1 << 20) + 1)
    worker, gateway = BlobStore(await nats_stack.connect("worker-1")), BlobStore(await nats_stack.connect("gateway"))
    await worker.put(digest, len(data), pieces(data))
    with pytest.raises(SealError):
        await worker.put(orphan_digest, len(orphan), pieces(bytes(len(orphan))))
    now = time.time_ns() // 1_000_000
    assert await gateway.sweep(now_ms=now) == 0
    assert await chunks_stored(nats_stack) == 5
    assert await gateway.sweep(now_ms=now + int(2 * MAX_UPLOAD_S * 1000) + 60_000) == 1
    assert await chunks_stored(nats_stack) == 2
    assert await read(gateway, digest) == data


async def test_a_full_store_says_so_and_recovers(tmp_path: Path, blob) -> None:
    stack = NatsStack(tmp_path / "full")
    try:
        await stack.start(StreamSettings(max_blob_store_bytes=2 << 20))
        store = BlobStore(await stack.connect("gateway"), may_purge=True)
        data, digest = blob(4 << 20)
        with pytest.raises(StorageFullError):
            await store.put(digest, len(data), pieces(data))
        small, small_digest = blob(1 << 20)
        assert await store.put(small_digest, len(small), pieces(small))
        assert await read(store, small_digest) == small
    finally:
        await stack.close()


async def test_memory_stays_bounded(nats_stack: NatsStack) -> None:
    """96 MiB up and down: peaks far below it, near the window of 8 MiB and the connection's own buffers."""
    piece, count = os.urandom(1 << 20), 96
    hasher = hashlib.sha256()
    for _ in range(count):
        hasher.update(piece)

    async def many() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield piece

    store, total = BlobStore(await nats_stack.connect("worker-1")), 0
    tracemalloc.start()
    try:
        assert await store.put(hasher.digest(), count << 20, many())
        _, up = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        async for chunk in store.get(hasher.digest()):
            total += len(chunk)
        _, down = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == count << 20
    assert up < 40 << 20
    assert down < 40 << 20


async def test_heads_are_written_once(nats_stack: NatsStack) -> None:
    worker, gateway = HeadStore(await nats_stack.connect("worker-1")), HeadStore(await nats_stack.connect("gateway"))
    digest = os.urandom(32)
    with pytest.raises(NotFoundError):
        await gateway.get(digest)
    assert await worker.put(digest, b"head")
    assert not await worker.put(digest, b"another")
    assert await gateway.get(digest) == b"head"
    with pytest.raises(TooLargeError):
        await worker.put(os.urandom(32), bytes((256 << 10) + 1))
    await gateway.delete(digest)
    with pytest.raises(NotFoundError):
        await worker.get(digest)
