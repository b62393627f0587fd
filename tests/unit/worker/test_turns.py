"""Whose job comes next, with queues in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

import pytest
from casemate_messaging.queue import Delivery
from casemate_worker.turns import serve_in_turn


class Log(list[str]):
    """What happened, for those who wait until enough has."""

    def __init__(self) -> None:
        self._grew = asyncio.Event()

    def add(self, entry: str) -> None:
        self.append(entry)
        self._grew.set()

    async def reached(self, count: int) -> None:
        while len(self) < count:
            self._grew.clear()
            await self._grew.wait()


class Queue:
    """A consortium's queue, and what becomes of its jobs."""

    pull_wait_s = 60.0

    def __init__(self, name: str, log: Log, *jobs: str) -> None:
        self.name, self.log, self.jobs = name, log, deque(jobs)
        self.more = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.drained = asyncio.Event()
        self.open = True

    def add(self, job: str) -> None:
        self.jobs.append(job)
        self.more.set()

    async def pull(self, wait_s: float) -> Delivery | None:
        if not self.jobs:
            self.more.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self.more.wait()
            except TimeoutError:
                return None
        return cast(Delivery, self.jobs.popleft())

    async def handle(self, delivery: Delivery) -> None:
        self.log.add(f"{self.name}{delivery}")
        await self.may_end.wait()
        self.log.add(f"end {self.name}{delivery}")

    async def close(self) -> None:
        self.open = False


@pytest.mark.parametrize("late", [False, True])
async def test_another_consortiums_job_waits_for_the_one_under_way_and_no_other(late: bool) -> None:
    log = Log()
    crowded, quiet = Queue("a", log, *"123456"), Queue("b", log)
    if not late:
        quiet.add("1")
    crowded.may_end.clear()
    stop = asyncio.Event()
    serving = asyncio.create_task(serve_in_turn([crowded, quiet], stop, asyncio.Event()))
    await log.reached(1)
    quiet.jobs.clear()
    quiet.add("1")
    quiet.add("2")
    crowded.may_end.set()
    await log.reached(16)
    stop.set()
    await serving
    starts = [entry for entry in log if not entry.startswith("end")]
    assert starts == ["a1", "b1", "a2", "b2", "a3", "a4", "a5", "a6"]


async def test_who_waits_alone_is_found_when_a_job_comes() -> None:
    log = Log()
    queues = [Queue("a", log), Queue("b", log), Queue("c", log)]
    stop = asyncio.Event()
    serving = asyncio.create_task(serve_in_turn(queues, stop, asyncio.Event()))
    for name, queue in zip("cab", (queues[2], queues[0], queues[1]), strict=True):
        queue.add("1")
        await log.reached(len(log) + 2)
        assert log[-1] == f"end {name}1"
    stop.set()
    await serving
    assert not any(queue.open for queue in queues)


async def test_stopping_gives_up_the_job_and_draining_ends_it_first() -> None:
    for event in (0, 1):
        log = Log()
        queue = Queue("a", log, "1", "2")
        queue.may_end.clear()
        stop, drain = asyncio.Event(), asyncio.Event()
        serving = asyncio.create_task(serve_in_turn([queue], stop, drain))
        await log.reached(1)
        (stop, drain)[event].set()
        if event == 1:
            queue.may_end.set()
        await serving
        assert log == [["a1"], ["a1", "end a1"]][event]
        assert list(queue.jobs) == ["2"]
        assert not queue.open


async def test_a_drained_consortiums_job_ends_and_the_others_go_on() -> None:
    log = Log()
    leaving, staying = Queue("a", log, "1", "2"), Queue("b", log)
    leaving.may_end.clear()
    serving = asyncio.create_task(serve_in_turn([leaving, staying], asyncio.Event(), asyncio.Event()))
    await log.reached(1)
    leaving.drained.set()
    leaving.may_end.set()
    staying.add("1")
    await log.reached(4)
    assert log == ["a1", "end a1", "b1", "end b1"]
    staying.drained.set()  # while it waits for a job: nobody is left, and the program ends
    await serving
    assert list(leaving.jobs) == ["2"]
    assert not leaving.open and not staying.open
