"""What comes out of a training process, taken whole: in place of iterators, reports then hold bytes that tests compare."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from casemate_worker.executor import CheckpointReady, Report, Trained


async def in_pieces(data: bytes, size: int = 700) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def whole(report: Report) -> Any:
    """The report with the bytes themselves."""
    if isinstance(report, CheckpointReady):
        return replace(report, state=b"".join([piece async for piece in report.state]))  # type: ignore[arg-type]
    if isinstance(report, Trained):
        return replace(report, weights=b"".join([piece async for piece in report.weights]))  # type: ignore[arg-type]
    return report
