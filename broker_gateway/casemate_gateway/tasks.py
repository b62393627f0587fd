"""Ending background tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_AGAIN_S = 0.2


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
