"""What the worker believes of its training process, with the other end of the pipe in the test's hands."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from casemate_schemas.codec import encode
from casemate_schemas.errors import LicenceError, TrainingError, UnavailableError
from casemate_worker.executor import StepDone, TrainingProcess
from casemate_worker.frames import Failure, Progress, frame

STEPS = 5


class Sink:
    """A pipe into nowhere."""

    def write(self, _: bytes) -> None: ...

    async def drain(self) -> None: ...


def process_that_says(*frames: bytes) -> TrainingProcess:
    reader = asyncio.StreamReader()
    for item in frames:
        reader.feed_data(item)
    reader.feed_eof()
    fake: Any = SimpleNamespace(stdin=Sink(), stdout=reader, pid=0, returncode=0)
    return TrainingProcess(fake)


def ready() -> bytes:
    return frame(b"R", b"")


def progress(*steps: int) -> list[bytes]:
    return [frame(b"P", encode(Progress(step=step))) for step in steps]


def failure(reason: str, message: str = "") -> bytes:
    return frame(b"E", encode(Failure(reason=reason, message=message)))


async def fed(process: TrainingProcess) -> TrainingProcess:
    """Prepared with a plan of five steps, and fed one dataset."""

    async def nothing() -> Any:
        for _ in ():
            yield b""

    spec = Spec(plan=SimpleNamespace(training=SimpleNamespace(steps=STEPS)))
    await process.prepare(spec, b"")  # type: ignore[arg-type]
    await process.feed(nothing())
    return process


class Spec(SimpleNamespace):
    """As much of a job's spec as the parent reads; it goes into a pipe that nobody reads."""

    KIND = "job-spec"

    def model_dump(self, **_: object) -> dict[str, object]:
        return {}


async def steps_of(*frames: bytes) -> list[int]:
    process = await fed(process_that_says(ready(), ready(), *frames))
    return [report.step async for report in process.train(bytes(32), None) if isinstance(report, StepDone)]


async def test_steps_are_counted_from_the_start_or_from_where_a_checkpoint_was() -> None:
    end = frame(b"W", b"")
    assert await steps_of(*progress(1, 2, 3), end) == [1, 2, 3]
    assert await steps_of(*progress(4, 5), end) == [4, 5]


@pytest.mark.parametrize("steps", [(0,), (STEPS + 1,), (1, 3), (2, 2), (3, 2), (4, 5, 6)])
async def test_steps_that_could_spell_out_something_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(TrainingError):
        await steps_of(*progress(*steps), frame(b"W", b""))


async def test_progress_that_is_none_is_the_same_failure() -> None:
    with pytest.raises(TrainingError):
        await steps_of(frame(b"P", b"\x00"))


@pytest.mark.parametrize("reason", [LicenceError.reason, UnavailableError.reason, "internal", "a_secret"])
async def test_after_data_every_reason_is_one(reason: str) -> None:
    with pytest.raises(TrainingError) as caught:
        await steps_of(failure(reason, "the patient has"))
    assert str(caught.value) == "training failed" and caught.value.__cause__ is None


async def test_before_data_the_reason_is_told() -> None:
    spec = Spec(plan=SimpleNamespace(training=SimpleNamespace(steps=STEPS)))
    with pytest.raises(LicenceError, match="in words"):
        await process_that_says(ready(), failure(LicenceError.reason, "in words")).prepare(spec, b"")  # type: ignore[arg-type]
