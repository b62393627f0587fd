"""Waiting for other processes, and not for ever."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, ParamSpec, TypeVar

from casemate_messaging.jobs import JobStore
from casemate_schemas.job_state import JobRecord

_P = ParamSpec("_P")
_R = TypeVar("_R")

POLL_S: Final = 0.02
PATIENCE_S: Final = 60.0


def bounded(function: Callable[_P, Awaitable[_R]]) -> Callable[_P, Coroutine[Any, Any, _R]]:
    """What waits for another process says so when it has waited for long enough."""

    @functools.wraps(function)
    async def waiting(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        async with asyncio.timeout(PATIENCE_S):
            return await function(*args, **kwargs)

    return waiting


@bounded
async def until(condition: Callable[[], bool]) -> None:
    """Waits for what other processes do to files or processes."""
    while not condition():  # noqa: ASYNC110 - the other side is another process
        await asyncio.sleep(POLL_S)


@bounded
async def record_once(jobs: JobStore, job_id: str, holds: Callable[[JobRecord], bool]) -> JobRecord:
    """A job's record, as soon as that is true of it."""
    while not holds(record := (await jobs.get(job_id))[0]):  # noqa: ASYNC110 - as above
        await asyncio.sleep(POLL_S)
    return record
