"""Background tasks: begun so that their failure is noticed, and ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from casemate_messaging.logs import ProgramLog

_AGAIN_S = 0.2


def begin(work: Coroutine[Any, Any, None], log: ProgramLog, on_failed: Callable[[], None]) -> asyncio.Task[None]:
    """Runs ``work``, which goes on until it is cancelled. If it ends by itself, that is logged, and ``on_failed`` hears of it."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.error("unexpected", error=type(task.exception()).__name__)
            on_failed()

    task = asyncio.create_task(work)
    task.add_done_callback(ended)
    return task


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels ``tasks`` and waits until all have ended.

    More than once if need be: ``asyncio.wait_for`` of Python 3.11, which the NATS client uses, loses a cancellation
    that comes just as what it waits for is done (python/cpython#86296).
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
