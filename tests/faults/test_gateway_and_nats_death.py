"""``kill -9`` of the gateway and of nats-server mid-job: after their restart the job ends, with one result and one charge."""

from __future__ import annotations

import secrets

import pytest
from support.faults import Bench

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("program", ["gateway", "nats"])
@pytest.mark.parametrize("point", ["first-step", "receipt"])
async def test_while_a_worker_is_at_it(bench: Bench, program: str, point: str) -> None:
    with bench.orders.hold(point):
        run = await bench.submit()
        await bench.orders.held(point)
        await bench.kill(program)
    await bench.check_one_result(run)


@pytest.mark.parametrize("program", ["gateway", "nats"])
async def test_while_key_brokers_are_asked(bench: Bench, program: str) -> None:
    """And whoever posts the same submission again, not knowing what became of it, has the same job."""
    dataset, job_id = await bench.new_dataset(), secrets.token_hex(16)
    with bench.orders.hold("before-precheck", "key-broker-south"):
        run = await bench.submit(dataset=dataset, job_id=job_id)
        await bench.orders.held("before-precheck", "key-broker-south")
        await bench.kill(program)
        again = await bench.submit(dataset=dataset, job_id=job_id)
    await bench.check_one_result(run)
    await bench.check_one_result(again)
    assert [job.job_id for job in await bench.scientist.jobs()].count(job_id) == 1
    assert (await bench.record(run)).attempt == 1
