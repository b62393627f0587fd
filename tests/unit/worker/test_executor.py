"""What the worker believes of its training process, with the other end of the pipe in the test's hands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from casemate_schemas.audit import AuditCounts, Guesses
from casemate_schemas.codec import encode, pack
from casemate_schemas.errors import LicenceError, TrainingError, UnavailableError
from casemate_schemas.job import Audit, Metrics
from casemate_schemas.metrics import MetricSums
from casemate_worker.executor import CheckpointReady, Report, StepDone, Trained, TrainingProcess
from casemate_worker.frames import Coming, Done, Failure, Progress, frame
from support.reports import whole

STEPS = 5
PARAMETERS = ("weight", "bias")


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


def done(**clipping: str) -> bytes:
    return ended(0, **clipping)


def ended(weights_bytes: int, **clipping: str) -> bytes:
    return frame(b"W", encode(Done(clipping=clipping, weights_bytes=weights_bytes)))  # type: ignore[arg-type]


def coming(size: int) -> bytes:
    return frame(b"C", encode(Coming(bytes=size)))


async def nothing() -> AsyncIterator[bytes]:
    for _ in ():
        yield b""


async def fed(process: TrainingProcess, audit: Audit | None = None, metrics: Metrics | None = None) -> TrainingProcess:
    """Prepared with a plan of five steps, and fed one dataset."""

    await process.prepare(spec_of(audit, metrics), nothing())  # type: ignore[arg-type]
    await process.feed(nothing())
    return process


class Spec(SimpleNamespace):
    """As much of a job's spec as the parent reads; it goes into a pipe that nobody reads."""

    KIND = "job-spec"

    def model_dump(self, **_: object) -> dict[str, object]:
        return {}


def spec_of(audit: Audit | None = None, metrics: Metrics | None = None) -> Spec:
    plan = SimpleNamespace(training=SimpleNamespace(steps=STEPS), metrics=metrics, audit=audit)
    return Spec(plan=plan, model=SimpleNamespace(parameters=[SimpleNamespace(name=name) for name in PARAMETERS]))


async def reports_of(*frames: bytes, audit: Audit | None = None, metrics: Metrics | None = None) -> list[Report]:
    process = await fed(process_that_says(ready(), ready(), *frames), audit, metrics)
    return [await whole(report) async for report in process.train(bytes(32), None)]


async def steps_of(*frames: bytes) -> list[int]:
    return [report.step for report in await reports_of(*frames) if isinstance(report, StepDone)]


async def test_steps_are_counted_from_the_start_or_from_where_a_checkpoint_was() -> None:
    end = done()
    assert await steps_of(*progress(1, 2, 3, 4, 5), end) == [1, 2, 3, 4, 5]
    assert await steps_of(*progress(4, 5), end) == [4, 5]


async def test_an_end_before_the_last_step_is_the_same_failure() -> None:
    with pytest.raises(TrainingError, match="out of step"):
        await steps_of(*progress(1, 2, 3, 4), done())


@pytest.mark.parametrize("steps", [(0,), (STEPS + 1,), (1, 3), (2, 2), (3, 2), (4, 5, 6)])
async def test_steps_that_could_spell_out_something_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(TrainingError, match="out of step"):
        await steps_of(*progress(*steps))


async def test_progress_that_is_none_is_the_same_failure() -> None:
    with pytest.raises(TrainingError):
        await steps_of(frame(b"P", b"\x00"))


@pytest.mark.parametrize("reason", [LicenceError.reason, UnavailableError.reason, "internal", "a_secret"])
async def test_after_data_every_reason_is_one(reason: str) -> None:
    with pytest.raises(TrainingError) as caught:
        await steps_of(failure(reason, "the patient has"))
    assert str(caught.value) == "training failed" and caught.value.__cause__ is None


async def test_before_data_the_reason_is_told() -> None:
    with pytest.raises(LicenceError, match="in words"):
        await process_that_says(ready(), failure(LicenceError.reason, "in words")).prepare(spec_of(), nothing())  # type: ignore[arg-type]


async def test_how_it_clipped_comes_with_the_weights() -> None:
    end = ended(7, weight="ghost", bias="per_sample")
    (*_, last) = await reports_of(*progress(5), end, frame(b"w", b"weig"), frame(b"w", b"hts"))
    assert last == Trained(b"weights", 7, clipping={"weight": "ghost", "bias": "per_sample"})  # type: ignore[arg-type]


async def test_a_checkpoint_that_nobody_takes_is_dropped() -> None:
    process = await fed(
        process_that_says(ready(), ready(), *progress(3), coming(5), frame(b"c", b"state"), *progress(4, 5), done())
    )
    taken = [type(report) async for report in process.train(bytes(32), None)]
    assert taken == [StepDone, CheckpointReady, StepDone, StepDone, Trained]


@pytest.mark.parametrize(
    "frames",
    [
        [coming(5), frame(b"c", b"states")],
        [coming(5), frame(b"c", b""), frame(b"c", b"state")],
        [coming(5), frame(b"w", b"state")],
        [coming(5), frame(b"c", b"stat"), *progress(4)],
        [frame(b"c", b"state")],
        [frame(b"C", b"")],
        [frame(b"C", pack({"bytes": 1 << 60}))],
        [*progress(4, 5), ended(3), frame(b"w", b"four")],
        [*progress(4, 5), ended(3), frame(b"w", b"tw")],
        [*progress(4, 5), ended(3), frame(b"c", b"one")],
    ],
)
async def test_pieces_that_are_not_what_was_announced_are_the_same_failure(frames: list[bytes]) -> None:
    with pytest.raises(TrainingError):
        await reports_of(*progress(3), *frames)


@pytest.mark.parametrize(
    "clipping",
    [
        {"weight": "ghost", "patient 17": "ghost"},
        {"weight": "ghosts"},
        {"weight": ""},
        {"": "ghost"},
        {"weight": "ghost", **{f"w{i}": "ghost" for i in range(5000)}},
    ],
)
async def test_a_child_that_lies_about_how_it_clipped_gets_nothing_out(clipping: dict[str, str]) -> None:
    with pytest.raises(TrainingError, match="out of step"):
        await reports_of(*progress(5), frame(b"W", pack({"clipping": clipping, "weights_bytes": 0})))


@pytest.mark.parametrize("payload", [b"", b"\x00", encode(Progress(step=1))])
async def test_an_end_that_does_not_say_how_it_clipped_is_the_same_failure(payload: bytes) -> None:
    with pytest.raises(TrainingError):
        await reports_of(*progress(5), frame(b"W", payload))


COUNTS = AuditCounts(guesses=(Guesses(score="likelihood", top=3, bottom=0, correct=2),))
ANSWER = frame(b"A", encode(COUNTS))


async def test_an_audit_ends_with_its_counts_alone() -> None:
    (*_, last) = await reports_of(*progress(5), ANSWER, done(), audit=Audit(canaries=16))
    assert last == Trained(b"", 0, audit=COUNTS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("audit", "frames"),
    [
        (None, [*progress(5), ANSWER, done()]),
        (Audit(canaries=16), [*progress(5), done()]),
        (Audit(canaries=16), [*progress(4), ANSWER, done()]),
        (Audit(canaries=16), [*progress(5), ANSWER, ANSWER, done()]),
        (Audit(canaries=16), [*progress(5), frame(b"A", b"\x00"), done()]),
        (Audit(canaries=16), [*progress(5), ANSWER, ended(7), frame(b"w", b"weights")]),
        (Audit(canaries=16), [*progress(3), coming(5), frame(b"c", b"state"), *progress(4, 5), ANSWER, done()]),
    ],
    ids=["in training", "no counts", "too early", "twice", "not counts", "with weights", "with a checkpoint"],
)
async def test_nothing_else_comes_of_an_audit_and_counts_of_nothing_else(
    audit: Audit | None, frames: list[bytes]
) -> None:
    with pytest.raises(TrainingError, match="out of step"):
        await reports_of(*frames, audit=audit)


METRICS = Metrics(noise_multiplier=1.0, loss_bound=1.0)
SUMS = MetricSums(count=9.5, right=2.5, loss=-1.0, noise_std=1.0, loss_bound=1.0)
TOLD = frame(b"M", encode(SUMS))


async def test_metrics_come_once_after_the_last_step_if_they_were_asked_for() -> None:
    *_, last = await reports_of(*progress(4, 5), TOLD, done(), metrics=METRICS)
    assert isinstance(last, Trained)
    assert last.metrics == SUMS


@pytest.mark.parametrize(
    ("frames", "metrics"),
    [
        ([*progress(4, 5), TOLD, done()], None),
        ([*progress(4, 5), done()], METRICS),
        ([*progress(3, 4), TOLD, done()], METRICS),
        ([*progress(4, 5), TOLD, TOLD, done()], METRICS),
        ([*progress(4, 5), frame(b"M", b"rubbish"), done()], METRICS),
    ],
    ids=["unasked", "left out", "too early", "twice", "rubbish"],
)
async def test_metrics_that_are_not_those_asked_for_are_the_same_failure(
    frames: list[bytes], metrics: Metrics | None
) -> None:
    with pytest.raises(TrainingError):
        await reports_of(*frames, metrics=metrics)
