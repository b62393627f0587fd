"""What a worker is told when it asks for a job."""

from __future__ import annotations

import asyncio

from casemate_messaging.queue import WorkQueue
from support.nats import NatsStack

JOB = "0" * 31 + "1"


async def test_nothing_now_is_said_at_once_and_a_job_is_given(nats_stack: NatsStack) -> None:
    gateway, worker = (
        WorkQueue(await nats_stack.gateway()),
        WorkQueue(await nats_stack.connect("worker-1")),
    )
    assert await worker.pull(0) is None
    assert await gateway.publish(JOB)
    assert not await gateway.publish(JOB)
    delivery = await worker.pull(0)
    assert delivery is not None
    assert (delivery.job_id, delivery.count) == (JOB, 1)
    assert await worker.pull(0) is None
    await delivery.ack()
    assert await gateway.publish(JOB)


async def test_a_job_that_comes_while_a_worker_waits_reaches_it(nats_stack: NatsStack) -> None:
    gateway, worker = (
        WorkQueue(await nats_stack.gateway()),
        WorkQueue(await nats_stack.connect("worker-1")),
    )
    assert await worker.pull(0.05) is None
    waiting = asyncio.create_task(worker.pull(30))
    await gateway.publish(JOB)
    delivery = await waiting
    assert delivery is not None
    assert delivery.job_id == JOB


async def test_what_is_handed_back_comes_again_with_its_count(nats_stack: NatsStack) -> None:
    gateway, worker = (
        WorkQueue(await nats_stack.gateway()),
        WorkQueue(await nats_stack.connect("worker-1")),
    )
    await gateway.publish(JOB)
    for count in (1, 2, 3):
        delivery = await worker.pull(10)
        assert delivery is not None
        assert delivery.count == count
        await delivery.nak(0.01)
