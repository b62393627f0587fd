"""Three nats-servers: each in turn is killed while a job is under way, and stays away until the job has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from casemate.local_stack.layout import Layout
from casemate.local_stack.supervisor import LocalStack
from support.clustered import Cluster
from support.faults import OVERRIDES, Bench, Orders, running_bench
from support.nats_cluster import NAMES
from support.stack import WORKERS, copy_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clustered(founded: Layout, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Bench, Cluster]]:
    """A stack whose streams have three replicas each, and whose programs know all three servers."""
    folder = tmp_path_factory.mktemp("cluster")
    layout, orders = copy_of(founded, folder / "stack"), Orders(folder / "orders")
    cluster = Cluster(layout)
    patient = {**OVERRIDES["gateway"], "stream_replicas": len(NAMES), "nats_connect_s": 30.0}
    stack = LocalStack(layout, overrides={**OVERRIDES, "gateway": patient}, commands=orders.commands())
    stack.nats = cluster  # type: ignore[assignment]
    async with running_bench(stack, orders) as bench:
        yield bench, cluster
        await bench.cleared()


@pytest.mark.timeout(180)
async def test_any_one_server_may_be_lost_while_a_job_is_under_way(clustered: tuple[Bench, Cluster]) -> None:
    """One while key brokers are asked, one while a worker trains, one between the first and the second receipt."""
    bench, cluster = clustered
    held = (("before-precheck", "key-broker-south"), ("first-step", *WORKERS), ("receipt", *WORKERS))
    for name, (point, *who) in zip(NAMES, held, strict=True):
        with bench.orders.hold(point):
            run = await bench.submit()
            await bench.orders.held(point, *who)
            await cluster.kill(name)
        await bench.check_one_result(run)
        await cluster.start()
