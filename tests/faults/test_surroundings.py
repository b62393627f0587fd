"""No program dies: the disk is full, a reader is slow, a clock is wrong, or a job is poison."""

from __future__ import annotations

import asyncio
from collections import Counter

import casemate as cm
import pytest
from casemate_messaging.server import MAX_PAYLOAD_BYTES
from casemate_schemas import subjects
from casemate_schemas.errors import CasemateError
from support.faults import STEPS, Bench, until, zeroed
from support.road import planned, submit_spec
from support.stack import DELTA, EPSILON_PER_JOB, OWNERS, PURPOSE, TARGET, WORKERS
from torch import nn

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOUR_MS = 3600_000
DEADLINE_S, PAST_DEADLINE_MS = 120.0, 200_000
"""Far enough apart for the one, near enough for key brokers to hear people's requests all the same."""
REFUSED_S = 5.0
PENDING_BYTES = 64 << 20
"""So much unread makes nats-server drop a client (its default ``max_pending``)."""


async def test_the_disk_is_full_while_a_worker_has_results_and_checkpoints(bench: Bench) -> None:
    """Nobody is told a thing is stored that is not. What was under way goes on once there is room."""
    dataset = await bench.new_dataset()
    with bench.orders.hold("first-step"):
        run = await bench.submit(dataset=dataset)
        worker = await bench.orders.held("first-step")
        async with bench.full_disk():
            with pytest.raises((CasemateError, TimeoutError)):
                async with asyncio.timeout(REFUSED_S):
                    await bench.submit(dataset=dataset)
            bench.orders.let_go("first-step")
            assert (await bench.logged(worker, "gave_up", run.job.id))["reason"] == "storage_full"
    later = await bench.submit(dataset=dataset)
    await bench.settled([run, later])
    assert await bench.check_invariants([run, later]) == Counter(sealed=2)


async def test_a_key_broker_that_does_not_read_is_dropped_by_nats_and_comes_back(bench: Bench) -> None:
    """It is sent more than NATS keeps for a slow consumer, while a worker wants its keys."""
    log = bench.stack.layout.nats / "nats-server.log"
    dataset = await bench.new_dataset()
    with bench.orders.hold("pull"):
        run = await bench.submit(dataset=dataset)
        await run.reached("queued")
    with bench.paused("key-broker-north"):
        flood = bytes(MAX_PAYLOAD_BYTES)
        for _ in range(PENDING_BYTES // len(flood) + 16):
            await bench.host.publish(subjects.key_broker_op("north", "message"), flood)
            await bench.host.flush()
        await until(lambda: "Slow Consumer" in log.read_text())
    await bench.settled([run])
    assert await bench.check_invariants([run]) == Counter(sealed=1)


async def test_workers_clocks_decide_nothing(bench: Bench) -> None:
    """One is slow by half an hour, the other as much too fast."""
    dataset = await bench.new_dataset()
    for name, ahead_ms in zip(WORKERS, (-HOUR_MS // 2, HOUR_MS // 2), strict=True):
        bench.orders.skew(name, ahead_ms)
    await asyncio.gather(*map(bench.restart, WORKERS))
    runs = [await bench.submit(dataset=dataset) for _ in WORKERS]
    await bench.settled(runs)
    bench.orders.forget()
    await asyncio.gather(*map(bench.restart, WORKERS))
    assert await bench.check_invariants(runs) == Counter(sealed=2)


async def test_an_owners_clock_decides_for_its_own_data(bench: Bench) -> None:
    """At north it is past the deadline: it refuses, and nobody is charged. Its clock right again, it takes the next job."""
    dataset = await bench.new_dataset()
    bench.orders.skew("key-broker-north", PAST_DEADLINE_MS)
    await bench.restart("key-broker-north")
    run = await bench.submit(dataset=dataset, deadline_s=DEADLINE_S)
    await bench.settled([run])
    assert await bench.check_invariants([run]) == Counter(refused=1)
    bench.orders.forget()
    await bench.restart("key-broker-north")
    again = await bench.submit(dataset=dataset, deadline_s=DEADLINE_S)
    await bench.settled([again])
    assert await bench.check_invariants([run, again]) == Counter(refused=1, sealed=1)
    assert [len((await bench.budget(run, owner)).lines) for owner in OWNERS] == [1, 1]


async def test_poison_ends_and_harms_no_one_else(bench: Bench) -> None:
    """Weights that are cut short, and an envelope whose ciphertext is gone: both end, and other jobs pass them by."""
    dataset, before = await bench.new_dataset(), {name: bench.pid(name) for name in WORKERS}
    session = bench.scientist._session
    plan = await planned(
        session,
        [f"{dataset}@{owner}" for owner in OWNERS],
        model=zeroed(nn.Sequential(nn.Linear(3, 1))),
        target=TARGET,
        steps=STEPS,
        privacy=cm.Privacy(epsilon=EPSILON_PER_JOB, delta=DELTA),
        purpose=PURPOSE,
    )
    spec = plan.spec()
    malformed = bench.follow(await submit_spec(session, spec, plan.weights[:-1]), dataset)
    with bench.orders.hold("pull"):
        hollow = await bench.submit(dataset=dataset)
        await hollow.reached("queued")
        await bench.lose_ciphertext((await bench.record(hollow)).job_envelope)
    good = [await bench.submit(dataset=dataset) for _ in range(2)]
    runs = [malformed, hollow, *good]
    await bench.settled(runs)
    found = await bench.check_invariants(runs)
    assert [(await bench.record(run)).state for run in runs] == ["refused", "refused", "sealed", "sealed"], found
    assert {name: bench.pid(name) for name in WORKERS} == before
