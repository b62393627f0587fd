"""Ending background tasks, for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

AGAIN_S: Final = 0.2


async def end(tasks: Iterable[asyncio.Task[Any]], *, again_s: float = AGAIN_S) -> None:
    """Cancels ``tasks`` and waits until all have ended; how each ended is theirs to say (``Task.result``).

    More than once if need be: ``asyncio.wait_for`` of Python 3.11, which the NATS client uses, loses a cancellation
    that comes just as what it waits for is done (python/cpython#86296). A task that goes round for ever would then go on
    for ever, and whoever waited for its end as well. ``again_s`` is what a task has to clean up before the next one.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=again_s)
        for task in done:
            if not task.cancelled():
                task.exception()  # heard, so that it is not reported as one that nobody asked for
