"""Background tasks, begun so that their failure is noticed. Ended by :func:`casemate_messaging.tasks.end`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from casemate_messaging.logs import ProgramLog


def begin(work: Coroutine[Any, Any, None], log: ProgramLog, on_failed: Callable[[], None]) -> asyncio.Task[None]:
    """Runs ``work``, which goes on until it is cancelled. If it ends by itself, that is logged, and ``on_failed`` hears of it."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.error("unexpected", error=type(task.exception()).__name__)
            on_failed()

    task = asyncio.create_task(work)
    task.add_done_callback(ended)
    return task
