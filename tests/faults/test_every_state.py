"""``kill -9`` of the gateway, of nats-server and of all key brokers, each in every state of a job."""

from __future__ import annotations

import os
import secrets
import signal

import pytest
from support.faults import Bench
from support.stack import MEMBERS, WORKERS
from support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="session")

KEY_BROKERS = tuple(f"key-broker-{name}" for name in MEMBERS)
ASKED = "key-broker-south"
STATES = {
    "queued": ("pull", WORKERS),
    "claimed": ("reserved", ()),
    "running": ("first-step", ()),
    "committing": ("receipt", ()),
    "sealed": ("told", ()),
}
"""Where a job is held in each state: by whom, if not by whichever worker gets there."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "programs", [("gateway",), ("nats",), KEY_BROKERS], ids=["the-gateway", "nats-server", "key-brokers"]
)
async def test_in_every_state_of_one_job(bench: Bench, programs: tuple[str, ...]) -> None:
    """It ends all the same, with one result and one charge; whoever posts it again, not knowing what became of it, has it."""
    dataset, job_id = await bench.new_dataset(), secrets.token_hex(16)
    for point, who in STATES.values():
        bench.orders.hold_at(point)
        for name in who:
            await bench.orders.held(point, name)
    bench.orders.hold_at("before-precheck", ASKED)
    run = await bench.submit(dataset=dataset, job_id=job_id)
    await bench.orders.held("before-precheck", ASKED)
    await _killed(bench, programs, "awaiting_approval", job_id)
    bench.orders.let_go("before-precheck", ASKED)
    again = await bench.submit(dataset=dataset, job_id=job_id)
    for state, (point, who) in STATES.items():
        if who:
            await run.reached(state)
        else:
            await bench.orders.held(point)
        await _killed(bench, programs, state, job_id)
        bench.orders.let_go(point)
    await bench.check_one_result(run)
    await bench.check_one_result(again)
    assert [job.job_id for job in await bench.scientist.jobs()].count(job_id) == 1


async def _killed(bench: Bench, programs: tuple[str, ...], state: str, job_id: str) -> None:
    """Kills them all at once, while the job's record says ``state``."""
    assert (await bench.records.get(job_id))[0].state == state
    pids = {name: bench.pid(name) for name in programs}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    for name, pid in pids.items():
        await bench.replaced(name, pid)
        if name in bench.stack.programs:
            await until(lambda name=name: bench.stack.programs[name].is_ready)
