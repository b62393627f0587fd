"""``kill -9`` of a worker at every point of its road: the other one ends the job, with one result and one charge."""

from __future__ import annotations

import os
import signal

import pytest
from casemate_schemas.errors import StateError, TrainingError
from support.faults import CHECKPOINT_EVERY_STEPS, Bench, command, zeroed
from support.stack import OWNERS
from support.waiting import until
from torch import nn

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_nothing_dies(bench: Bench) -> None:
    """The checks themselves, on a road without a fault."""
    run = await bench.submit()
    await bench.check_one_result(run)
    assert (await bench.record(run)).attempt == 1


@pytest.mark.parametrize(
    ("point", "first_step"),
    [
        pytest.param("reserved", 1, id="after-the-reservation"),
        pytest.param("checkpointed", CHECKPOINT_EVERY_STEPS + 1, id="after-a-checkpoint"),
        pytest.param("uploaded", 2 * CHECKPOINT_EVERY_STEPS + 1, id="after-the-upload"),
        pytest.param("receipt", None, id="between-first-and-second-receipt"),
        pytest.param("receipts", None, id="after-the-commit-before-the-release"),
    ],
)
async def test_the_other_worker_ends_the_job(bench: Bench, point: str, first_step: int | None) -> None:
    """It trains on from the newest checkpoint; once a result is committed it trains no more, and publishes that one."""
    bench.orders.die(point)
    run = await bench.submit()
    dead = await bench.orders.died()
    upload = (await bench.record(run)).upload
    await bench.check_one_result(run)
    record = await bench.record(run)
    assert record.attempt == 2 and record.worker != dead
    if first_step is not None:
        assert bench.first_step(run, attempt=2) == first_step
    else:
        assert upload is not None and bench.released(record) == upload


async def test_after_the_first_step_and_the_training_process_dies_too(bench: Bench) -> None:
    with bench.orders.hold("first-step"):
        run = await bench.submit()
        worker = await bench.orders.held("first-step")
        child = bench.training_process(worker)
        bench.orders.keep_away(worker)
        os.kill(bench.pid(worker), signal.SIGKILL)
        await until(lambda: not command(child))
    await bench.check_one_result(run)
    record = await bench.record(run)
    assert record.attempt == 2 and record.worker != worker and bench.first_step(run, attempt=2) == 1


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("released", id="after-the-release-before-its-event"),
        pytest.param("told", id="after-the-release-before-the-ack"),
    ],
)
async def test_the_other_worker_only_tells_and_acknowledges(bench: Bench, point: str) -> None:
    bench.orders.die(point)
    run = await bench.submit()
    dead = await bench.orders.died()
    await bench.check_one_result(run)
    record = await bench.record(run)
    assert (record.attempt, record.worker) == (1, dead)


async def test_a_training_process_that_is_killed_fails_the_job_once_and_for_all(bench: Bench) -> None:
    """Data was opened: the charge stands, one reason is told, nobody tries again."""
    with bench.orders.hold("first-step"):
        # Too large for the pipes: the child cannot be done with its first checkpoint while the worker does not read.
        net = zeroed(nn.Sequential(nn.Linear(3, 1 << 15), nn.Tanh(), nn.Linear(1 << 15, 1)))
        run = await bench.submit(net=net)
        worker = await bench.orders.held("first-step")
        os.kill(bench.training_process(worker), signal.SIGKILL)
    assert await run.ended() == "failed"
    assert run.events[-1].reason == TrainingError.reason
    await bench.queue_is_empty()
    with pytest.raises(TrainingError):
        await run.job.result()
    again = await bench.submit(net=net, dataset=run.dataset, job_id=run.job.id)
    assert await again.ended() == "failed"
    record = await bench.record(run)
    assert (record.state, record.attempt, record.release) == ("failed", 1, None)
    with pytest.raises(StateError):
        await run.job.cancel()
    for owner in OWNERS:
        budget = await bench.budget(run, owner)
        assert [(line.job_id, line.committed) for line in budget.lines] == [(run.job.id, None)]
        assert budget.epsilon_spent == budget.lines[0].epsilon > 0
        assert bench.books(owner, budget.lines[0].terms)[0] == ["reserve"]
