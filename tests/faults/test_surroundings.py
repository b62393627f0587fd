"""No program dies: a disk is full, a reader or a writer is slow, a clock is wrong, a job is poison or half lost."""

from __future__ import annotations

import asyncio
from collections import Counter

import casemate as cm
import pytest
from casemate_messaging.server import MAX_PAYLOAD_BYTES
from casemate_schemas import subjects
from casemate_schemas.errors import CasemateError
from support.faults import STEPS, Bench, zeroed
from support.road import planned, submit_spec
from support.stack import DELTA, EPSILON_PER_JOB, OWNERS, PURPOSE, TARGET, WORKERS
from support.waiting import until
from torch import nn

pytestmark = pytest.mark.asyncio(loop_scope="session")

HOUR_MS = 3600_000
HOUR_S = 3600.0
DEADLINE_S, PAST_DEADLINE_MS = 120.0, 200_000
"""Far enough apart for the one, near enough for key brokers to hear people's requests all the same."""
REFUSED_S = 3.0
UNWRITABLE_S = 2.0
SLOW_CLIENTS = 50
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


@pytest.mark.parametrize("program", ["nats", "key-broker-north"])
async def test_a_disk_takes_nothing_more_while_a_worker_wants_its_keys(bench: Bench, program: str) -> None:
    """Of what nats-server or an owner's key broker has to remember: nothing is taken for stored, and it goes on later.

    nats-server 2.15 writes to a stream no more once a write has failed, until it is started again.
    """
    with bench.orders.hold("before-grant", "key-broker-north"):
        run = await bench.submit()
        await bench.orders.held("before-grant", "key-broker-north")
        with bench.unwritable(program):
            bench.orders.let_go("before-grant", "key-broker-north")
            await asyncio.sleep(UNWRITABLE_S)
    if program == "nats":
        await bench.kill(program)
    await bench.check_one_result(run)


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


async def test_clients_who_stand_still_hold_up_nobody(bench: Bench) -> None:
    """Heads that never end, bodies that never come, answers that are never read: other people's jobs go by them."""
    host, _, port = bench.stack.facts.url.removeprefix("http://").partition(":")
    heads = (
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    )
    whole = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 64
    slow = [await asyncio.open_connection(host, int(port), limit=1) for _ in range(3 * SLOW_CLIENTS)]
    for number, (_, writer) in enumerate(slow):
        writer.write((*heads, whole)[number % 3])
    try:
        await bench.check_one_result(await bench.submit())
    finally:
        for _, writer in slow:
            writer.transport.abort()


async def test_workers_clocks_decide_nothing(bench: Bench) -> None:
    """One is slow by two hours, the other as much too fast: by its clock every job is past its deadline."""
    dataset = await bench.new_dataset()
    for name, ahead_ms in zip(WORKERS, (-2 * HOUR_MS, 2 * HOUR_MS), strict=True):
        bench.orders.skew(name, ahead_ms)
    await asyncio.gather(*map(bench.restart, WORKERS))
    with bench.orders.hold("reserved"):
        runs = [await bench.submit(dataset=dataset, deadline_s=HOUR_S) for _ in WORKERS]
        for name in WORKERS:
            await bench.orders.held("reserved", name)
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
    """Weights cut short, an envelope without its ciphertext, a job without its submission: all end, and others pass them by."""
    dataset, before = await bench.new_dataset(), {name: bench.pid(name) for name in WORKERS}
    with bench.orders.hold("before-precheck", "key-broker-north"):
        lost = await bench.submit(dataset=dataset)
        await bench.orders.held("before-precheck", "key-broker-north")
        await bench.lose_blob((await bench.record(lost)).submission)
        await bench.settled([lost])
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
    runs = [malformed, hollow, lost, *good]
    await bench.settled(runs)
    found = await bench.check_invariants(runs)
    assert [(await bench.record(run)).state for run in runs] == ["refused", "refused", "failed", "sealed", "sealed"], (
        found
    )
    assert (await bench.record(lost)).reason == "not_found"
    assert {name: bench.pid(name) for name in WORKERS} == before
