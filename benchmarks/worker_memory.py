"""What the worker's own process holds while datasets come down and results go up: it has no torch, and should stay small.

A nats-server, and in a process of its own all that a worker does with bytes: it opens a job's model, a dataset and a
checkpoint as they come out of the store, hands them to a training process, takes checkpoint and weights from it, and seals
and stores them. The training process is stood in for by one that speaks the same frames, counts what it gets and sends
zeros: what it would hold itself is another matter. 2 GiB each way.

``worker_rss_mib``: the most memory that process held. ``down_mb_per_s``, ``up_mb_per_s``: how fast it went.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from _bench import Metric, arguments, machine, peak_resident_bytes, report
from casemate_messaging.blobs import BlobStore
from casemate_messaging.connection import connect
from casemate_messaging.envelopes import EnvelopeStore
from casemate_schemas.codec import encode
from casemate_schemas.envelope import PREFIX_BYTES, EnvelopeHead, frame_head
from casemate_schemas.sealing import ContentKey, EnvelopeSealer
from casemate_schemas.signatures import SigningKey
from casemate_worker.executor import TrainingProcess
from casemate_worker.frames import PIECE_BYTES, Coming, frame, read_frame
from casemate_worker.sealed_output import SealedOutput, opened

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.nats import NatsStack

MIB, GIB = 1 << 20, 1 << 30
CONSORTIUM, RESUME_KEY = bytes(32), bytes(32)


class Attempt:
    """As much of an attempt as sealing takes."""

    signing = SigningKey.generate()


async def store_dataset(store: EnvelopeStore, size: int, scratch: Path) -> tuple[bytes, bytes]:
    """(envelope, content key) of a dataset of so many bytes."""
    key = SigningKey.generate()
    sealer = EnvelopeSealer("dataset", consortium=CONSORTIUM, sender=key.public, created=1)
    with tempfile.TemporaryFile(dir=scratch) as file:
        for _ in range(size // MIB):
            file.writelines(sealer.update(bytes(MIB)))
        file.write(sealer.finish())
        header = sealer.header()
        sealed = sealer.content_key.wrap_under(RESUME_KEY, header)
        head = frame_head(EnvelopeHead(header=header, sealed_keys=(sealed,)), key)
        file.seek(0)

        async def pieces() -> AsyncIterator[bytes]:
            while piece := file.read(MIB):
                yield piece

        await store.put(head[PREFIX_BYTES:], pieces())
    return header.digest, sealer.content_key.to_bytes()


def child(size: int) -> None:
    """The other end of the frames: takes a dataset, then sends as much as a checkpoint."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while read_frame(source)[0] != b"d":
        pass
    sink.write(frame(b"C", encode(Coming(bytes=size))))
    for _ in range(size // PIECE_BYTES):
        sink.write(frame(b"c", bytes(PIECE_BYTES)))
    sink.flush()
    sys.stdin.buffer.read()


async def worker(plan: dict[str, Any]) -> dict[str, float]:
    """A dataset down and a checkpoint up, by the worker's own code."""
    importlib.import_module("casemate_worker.__main__")  # all that the program has in memory before its first job
    client = await connect(plan["url"], Path(plan["seed"]), user="worker-1")
    store = EnvelopeStore(client, BlobStore(client))
    output = SealedOutput(store, CONSORTIUM, Path(plan["scratch"]))
    command = (sys.executable, __file__, "--child", str(plan["size"]))
    pipe = asyncio.subprocess.PIPE
    process = TrainingProcess(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))
    stored = await store.head(bytes.fromhex(plan["dataset"]))
    key = ContentKey(bytes.fromhex(plan["key"]))
    began = time.perf_counter()
    await process.feed(opened(stored.head.header, key, store.ciphertext(stored)))
    down = time.perf_counter()
    tag, _ = await process._next()
    assert tag == b"C"
    digest = await output.put("checkpoint", process._coming(b"c", plan["size"]), Attempt(), RESUME_KEY, created=1)  # type: ignore[arg-type]
    up = time.perf_counter()
    async for _ in await output.open(digest, "checkpoint", RESUME_KEY):
        pass
    assert "torch" not in sys.modules
    await process.close()
    await client.close()
    return {"rss_bytes": peak_resident_bytes(), "down_s": down - began, "up_s": up - down}


async def run(size: int) -> dict[str, float]:
    """What the worker's process says of itself."""
    with tempfile.TemporaryDirectory(prefix="casemate-worker-") as folder:
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        stack = NatsStack(Path(folder) / "nats")
        await stack.start()
        try:
            client = await stack.gateway()
            dataset, key = await store_dataset(EnvelopeStore(client, BlobStore(client)), size, scratch)
            seed = str(stack.seeds["worker-1"])
            plan = {"url": stack.url, "seed": seed, "scratch": str(scratch), "size": size}
            plan |= {"dataset": dataset.hex(), "key": key.hex()}
            pipe = asyncio.subprocess.PIPE
            command = (sys.executable, __file__, "--worker")
            process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
            told, _ = await process.communicate(json.dumps(plan).encode())
            found: dict[str, float] = json.loads(told)
            return found
        finally:
            await stack.close()


def main() -> None:
    """Measure, print and write."""
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]))
        return
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(asyncio.run(worker(json.load(sys.stdin)))))
        return
    options = arguments(__doc__ or "")
    size = 256 * MIB if options.quick else 2 * GIB
    told = asyncio.run(run(size))
    metrics = (
        Metric("worker_rss_mib", told["rss_bytes"] / MIB, "MiB", 200),
        Metric("down_mb_per_s", size / 1e6 / told["down_s"], "MB/s", None, "higher"),
        Metric("up_mb_per_s", size / 1e6 / told["up_s"], "MB/s", None, "higher"),
    )
    report(metrics, {"bytes": size}, machine("nats-py", "cryptography"), options.json)


if __name__ == "__main__":
    main()
