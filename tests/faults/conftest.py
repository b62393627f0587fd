from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from casemate.local_stack.layout import Layout
from casemate.local_stack.supervisor import LocalStack
from support.faults import OVERRIDES, STORE_BYTES, Bench, Orders, running_bench
from support.stack import copy_of, founded

__all__ = ["founded"]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_bench(founded: Layout, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    """One stack for all tests that leave it as it was: each has a job and datasets of its own, and leaves nothing behind."""
    folder = tmp_path_factory.mktemp("faults")
    orders = Orders(folder / "orders")
    stack = LocalStack(
        copy_of(founded, folder / "stack"),
        overrides=OVERRIDES,
        commands=orders.commands(),
        max_store_bytes=STORE_BYTES,
    )
    async with running_bench(stack, orders) as bench:
        yield bench


@pytest_asyncio.fixture(loop_scope="session")
async def bench(shared_bench: Bench) -> AsyncIterator[Bench]:
    try:
        yield shared_bench
    finally:
        await shared_bench.cleared()
