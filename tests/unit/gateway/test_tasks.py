"""What goes on in the background is not missed in silence."""

from __future__ import annotations

import asyncio
import json

import pytest
from casemate_gateway.tasks import begin
from casemate_messaging.logs import ProgramLog
from casemate_messaging.tasks import end


async def _fails() -> None:
    raise ValueError("a patient's name")


async def _ends() -> None: ...


async def _goes_on() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(("work", "said"), [(_fails, "ValueError"), (_ends, "NoneType"), (_goes_on, None)])
async def test_work_that_ends_by_itself_is_noticed(
    capfd: pytest.CaptureFixture[str], work: object, said: str | None
) -> None:
    failed: list[bool] = []
    task = begin(work(), ProgramLog("gateway"), lambda: failed.append(True))  # type: ignore[operator]
    if said is not None:
        await asyncio.wait([task])
    await asyncio.sleep(0)
    await end([task])
    await asyncio.sleep(0)
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(event["event"], event["error"]) for event in events] == ([("unexpected", said)] if said else [])
    assert "patient" not in str(events) and bool(failed) == (said is not None)
