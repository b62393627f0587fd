"""Between NATS and the programs something replays, reorders, doubles, drops, cuts, garbles and swaps messages."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from casemate.local_stack.layout import Layout
from casemate_messaging.blobs import CHUNK_BYTES, BlobStore
from casemate_messaging.connection import connect
from casemate_schemas import subjects
from casemate_schemas.errors import CasemateError
from casemate_schemas.subjects import inbox_prefix
from nats.aio.client import Client
from support.byzantine import DEEDS, ByzantineProxy
from support.faults import Bench, Orders, running_bench, through
from support.invariants import Run
from support.stack import copy_of
from support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

JOBS = 3
TRIES = 4
HOSTILE_S = 8.0
PENDING_BYTES = 64 << 20
"""So much unread makes nats-server drop a client (its default ``max_pending``)."""
BLOB_CHUNKS = 16
DEADLINE_S = 25.0
"""What NATS destroyed of a job's submission never comes back: then its deadline ends it."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def besieged(
    founded: Layout, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Bench, ByzantineProxy]]:
    """A stack whose programs know NATS by the proxy's address only."""
    folder = tmp_path_factory.mktemp("byzantine")
    orders = Orders(folder / "orders")
    async with (
        through("1", copy_of(founded, folder / "stack"), orders) as (stack, proxy),
        running_bench(stack, orders) as bench,
    ):
        yield bench, proxy
        await bench.cleared()


@pytest.mark.timeout(300)
async def test_nothing_is_charged_twice_opened_or_taken_for_something_else(
    besieged: tuple[Bench, ByzantineProxy],
) -> None:
    """And once it is honest again, what was submitted ends, and new work is done."""
    bench, proxy = besieged
    dataset, ids = await bench.new_dataset(), [secrets.token_hex(16) for _ in range(JOBS)]
    proxy.is_hostile = True
    runs = await asyncio.gather(*(_submitted(bench, dataset, job_id) for job_id in ids))
    with contextlib.suppress(TimeoutError):
        await bench.settled([run for run in runs if run is not None], HOSTILE_S)
    proxy.is_hostile = False
    proxy.cut()
    assert sum(proxy.deeds.values()) > 2 * len(DEEDS)
    last = await bench.submit(dataset=dataset)
    acknowledged = [run for run in runs if run is not None]
    await bench.settled([*acknowledged, last])
    await bench.check_invariants(acknowledged, hostile=True)
    assert await bench.check_invariants([last]) == Counter(sealed=1)


@pytest.mark.parametrize("which", ["gateway", "worker"])
async def test_a_program_that_does_not_read_is_dropped_by_nats_and_comes_back(
    besieged: tuple[Bench, ByzantineProxy], which: str
) -> None:
    """Somebody with the same key asks for a blob again and again, the answers to go to the program, which sleeps."""
    bench, proxy = besieged
    log = bench.stack.layout.nats / "nats-server.log"
    with bench.orders.hold("first-step"):
        run = await bench.submit()
        worker = await bench.orders.held("first-step")
        name = worker if which == "worker" else "gateway"
        inboxes = [s for s in proxy.subscribed if s.startswith(f"{inbox_prefix(name)}.") and s.endswith(".*")]
        dropped = log.read_text().count("Slow Consumer")
        seed = bench.stack.layout.program(name) / "nats.seed"
        client = await connect(bench.stack.nats.url, seed, user=name)
        try:
            with bench.paused(name):
                blob = await _flood(client, bench, inboxes[-1].replace("*", "flood"))
                await until(lambda: log.read_text().count("Slow Consumer") > dropped)
            await bench.lose_blob(blob)
        finally:
            await client.close()
    await bench.check_one_result(run)


async def _flood(client: Client, bench: Bench, inbox: str) -> bytes:
    """Has NATS send more to ``inbox`` than it keeps for one who does not read; the digest of the blob that it sends."""
    data = bytes(BLOB_CHUNKS * CHUNK_BYTES)
    digest = hashlib.sha256(data).digest()

    async def once() -> AsyncIterator[bytes]:
        yield data

    await BlobStore(bench.host).put(digest, len(data), once())
    wanted = {"seq": 1, "next_by_subj": f"casemate.blob.chunk.{digest.hex()}.*", "batch": BLOB_CHUNKS}
    for _ in range(2 * PENDING_BYTES // len(data)):
        await client.publish(f"$JS.API.DIRECT.GET.{subjects.BLOB_STREAM}", json.dumps(wanted).encode(), reply=inbox)
    await client.flush()
    return digest


async def _submitted(bench: Bench, dataset: str, job_id: str) -> Run | None:
    """The job, if the gateway ever says that it has it. The id is one for all tries."""
    for _ in range(TRIES):
        with contextlib.suppress(CasemateError, TimeoutError):
            async with asyncio.timeout(HOSTILE_S):
                return await bench.submit(dataset=dataset, job_id=job_id, deadline_s=DEADLINE_S)
    return None
