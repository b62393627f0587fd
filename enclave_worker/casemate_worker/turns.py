"""One machine for several consortia: one job at a time, and each consortium in its turn.

After a job of one consortium the others are asked first. So however many jobs one of them has queued, another's next job
waits for no more than the job under way on each worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

from casemate_messaging.queue import Delivery
from casemate_messaging.tasks import AGAIN_S, end

T = TypeVar("T")

ROUND_S: Final = 0.25
"""How long one of several queues is waited at before the next one is looked into."""
CLEAN_UP_S: Final = 5.0
"""What a job that is given up has to end its training process, before it is told once more."""


class Taker(Protocol):
    """Takes jobs of one consortium."""

    pull_wait_s: float
    drained: asyncio.Event
    """Set when it is to take no more; the others go on."""

    async def pull(self, wait_s: float) -> Delivery | None:
        """A delivery, or None after ``wait_s`` seconds; 0 asks what is there now."""

    async def handle(self, delivery: Delivery) -> None:
        """Does all there is to do about it."""

    async def close(self) -> None:
        """Takes no more."""


async def serve_in_turn(takers: Sequence[Taker], stop: asyncio.Event, drain: asyncio.Event) -> None:
    """Handles deliveries until ``stop`` or ``drain`` is set, or every taker is drained.

    ``stop`` gives up a job under way, which is then delivered to another worker; ``drain`` lets it end first.
    """
    order = list(takers)
    ending = [asyncio.create_task(event.wait()) for event in (stop, drain)]
    leaving = {taker: asyncio.create_task(taker.drained.wait()) for taker in order}
    try:
        while (order := [taker for taker in order if not taker.drained.is_set()]) and not (
            stop.is_set() or drain.is_set()
        ):
            pulling = asyncio.create_task(_next(order))
            watched = {pulling, *ending, *(leaving[taker] for taker in order)}
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            found = await _ended(pulling, AGAIN_S)
            if found is None:
                continue
            taker, delivery = found
            order.append(order.pop(order.index(taker)))
            handling = asyncio.create_task(taker.handle(delivery))
            await asyncio.wait({handling, ending[0]}, return_when=asyncio.FIRST_COMPLETED)
            await _ended(handling, CLEAN_UP_S)
    finally:
        await end((*ending, *leaving.values()))
        for taker in takers:
            await taker.close()


async def _next(order: Sequence[Taker]) -> tuple[Taker, Delivery] | None:
    """The first job found, the one who waits longest asked first; None if there is none for a while."""
    if len(order) > 1:
        for taker in order:
            if (delivery := await taker.pull(0)) is not None:
                return taker, delivery
    for taker in order:
        wait_s = taker.pull_wait_s if len(order) == 1 else ROUND_S
        if (delivery := await taker.pull(wait_s)) is not None:
            return taker, delivery
    return None


async def _ended(task: asyncio.Task[T], again_s: float) -> T | None:
    """What the task came to; it is ended first if it goes on."""
    await end([task], again_s=again_s)
    return None if task.cancelled() else task.result()
