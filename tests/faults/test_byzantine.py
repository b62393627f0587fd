"""Between NATS and the programs something replays, reorders, doubles, drops, cuts, garbles and swaps messages."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from casemate.local_stack.layout import Layout
from casemate_schemas.errors import CasemateError
from support.byzantine import DEEDS, ByzantineProxy
from support.faults import Bench, Orders, Run, running_bench, through
from support.stack import copy_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

JOBS = 3
TRIES = 4
HOSTILE_S = 8.0
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


async def _submitted(bench: Bench, dataset: str, job_id: str) -> Run | None:
    """The job, if the gateway ever says that it has it. The id is one for all tries."""
    for _ in range(TRIES):
        with contextlib.suppress(CasemateError, TimeoutError):
            async with asyncio.timeout(HOSTILE_S):
                return await bench.submit(dataset=dataset, job_id=job_id, deadline_s=DEADLINE_S)
    return None
