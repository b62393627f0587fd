"""How programs log: one JSON object a line, an event name and fields from a fixed list. There is no free text to leak into."""

from __future__ import annotations

import json
import sys
import time
from typing import Final, Literal, TypedDict, Unpack

Level = Literal["info", "warning", "error"]


class LogFields(TypedDict, total=False):
    """All that may ever stand in a log line. Digests and ids are public; an error is its class and reason code."""

    job_id: str
    terms: str
    envelope: str
    dataset: str
    attempt: int
    state: str
    step: int
    steps: int
    reason: str
    error: str
    key_broker: str
    worker: str
    member: str
    op: str
    method: str
    route: str
    status: int
    bytes: int
    uploads: int
    envelopes: int
    blobs: int
    orphans: int
    records: int
    duration_ms: float
    address: str
    version: str
    number: int
    product: str
    kind: str
    simulation: bool
    hosted: bool


_ALLOWED: Final = frozenset(LogFields.__annotations__)


class ProgramLog:
    """Writes a program's events to standard error."""

    def __init__(self, program: str) -> None:
        self._program = program

    def info(self, event: str, **fields: Unpack[LogFields]) -> None:
        """Something that is meant to happen."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Unpack[LogFields]) -> None:
        """Something that another party did wrong, or that will be tried again."""
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Unpack[LogFields]) -> None:
        """Something that an operator should look at."""
        self._write("error", event, fields)

    def _write(self, level: Level, event: str, fields: LogFields) -> None:
        allowed = {name: value for name, value in fields.items() if name in _ALLOWED}
        line = {"at": round(time.time(), 3), "level": level, "program": self._program, "event": event, **allowed}
        print(json.dumps(line, ensure_ascii=True, separators=(",", ":")), file=sys.stderr, flush=True)  # noqa: T201
