"""Fairness between consortia: two of them, each with a NATS server of its own, on two workers that serve both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from casemate_messaging.queue import Delivery, WorkQueue
from casemate_worker.turns import serve_in_turn
from support.nats import WORKERS, NatsStack

CROWD = 200
"""Jobs that the crowded consortium has queued. ``benchmarks/broker.py`` takes 10,000."""


class Taker:
    """A worker of one consortium whose jobs take until they are told to end."""

    pull_wait_s = 5.0

    def __init__(self, consortium: str, queue: WorkQueue, started: asyncio.Queue[str], turn: asyncio.Semaphore) -> None:
        self._consortium, self._queue, self._started, self._turn = consortium, queue, started, turn
        self.drained = asyncio.Event()

    async def pull(self, wait_s: float) -> Delivery | None:
        return await self._queue.pull(wait_s)

    async def handle(self, delivery: Delivery) -> None:
        self._started.put_nowait(self._consortium)
        await self._turn.acquire()
        await delivery.ack()

    async def close(self) -> None:
        await self._queue.close()


@asynccontextmanager
async def consortia(folder: Path) -> AsyncIterator[dict[str, NatsStack]]:
    stacks = {name: NatsStack(folder / name) for name in ("crowded", "quiet")}
    try:
        for stack in stacks.values():
            await stack.start()
        yield stacks
    finally:
        for stack in stacks.values():
            await stack.close()


@pytest.mark.timeout(120)
async def test_a_crowded_consortium_delays_anothers_first_job_by_one_job_of_each_worker(tmp_path: Path) -> None:
    async with consortia(tmp_path) as stacks:
        crowded, quiet = [WorkQueue(await stack.gateway()) for stack in stacks.values()]
        await asyncio.gather(*(crowded.publish(f"{number:032x}") for number in range(CROWD)))
        started, turn, stop = asyncio.Queue[str](), asyncio.Semaphore(0), asyncio.Event()
        serving = []
        for worker in WORKERS:
            queues = {name: WorkQueue(await stack.connect(worker)) for name, stack in stacks.items()}
            takers = [Taker(name, queue, started, turn) for name, queue in queues.items()]
            serving.append(asyncio.create_task(serve_in_turn(takers, stop, asyncio.Event())))
        assert [await started.get() for _ in WORKERS] == ["crowded"] * 2
        for _ in range(4):  # both workers are deep in the crowd
            turn.release()
            assert await started.get() == "crowded"
        await quiet.publish("f" * 32)
        turn.release()  # whichever worker is done first takes it
        assert await started.get() == "quiet"
        turn.release()
        assert await started.get() == "crowded"
        stop.set()
        await asyncio.gather(*serving)
