"""What becomes of a delivery: claimed, handed back, ended. The record lives in memory; key brokers are out of reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from casemate_messaging.logs import ProgramLog
from casemate_schemas.errors import (
    CasemateError,
    ConflictError,
    DeadlineError,
    IntegrityError,
    LicenceError,
    NonceError,
    NotFoundError,
    ReleaseError,
    SealError,
    StateError,
    TrainingError,
    UnavailableError,
)
from casemate_schemas.evidence import MAX_ATTEMPTS
from casemate_schemas.job_state import JobEvent, JobRecord, JobState
from casemate_worker.settings import Settings
from casemate_worker.worker import Worker
from nats.aio.client import Client
from support.results import JOB_ID, World

NOW = 5_000


@dataclass
class Delivery:
    """A delivery that remembers what was said of it."""

    count: int = 1
    job_id: str = JOB_ID
    known: None = None
    said: list[Any] = field(default_factory=list)

    async def ack(self) -> None:
        self.said.append("ack")

    async def nak(self, delay_s: float) -> None:
        self.said.append(delay_s)


@dataclass
class Jobs:
    """One record."""

    record: JobRecord

    async def get(self, _: str) -> tuple[JobRecord, int]:
        return self.record, 1

    async def change(
        self, _: str, fn: Callable[[JobRecord], JobRecord], *, known: tuple[JobRecord, int] | None = None
    ) -> JobRecord:
        self.record = fn(self.record)
        return self.record


@dataclass
class Events:
    """What the world hears."""

    heard: list[JobEvent] = field(default_factory=list)

    async def publish(self, event: JobEvent) -> int:
        self.heard.append(event)
        return len(self.heard)


def a_record(state: JobState = "queued", **changes: Any) -> JobRecord:
    fields: dict[str, Any] = {
        "job_id": JOB_ID,
        "state": state,
        "routing": b"routing",
        "job_envelope": bytes(32),
        "submission": bytes(32),
        "approvals": {},
        "created": 1000,
        "updated": 1000,
        "deadline": NOW + 1,
    }
    return JobRecord(**{**fields, **changes})


class Bench:
    """A real worker whose attempts end with ``error``."""

    def __init__(self, w: World, folder: Path, record: JobRecord, error: Exception | None = None) -> None:
        settings = Settings(
            name="worker-1",
            nats_url="nats://127.0.0.1:1",
            nats_seed_file=folder / "seed",
            consortium=w.consortium.id.hex(),
            manifest_file=folder / "manifest",
            scratch_dir=folder,
            retry_delay_s=2.0,
            heartbeat_s=60.0,
        )
        guest: Any = None
        self.worker = Worker(
            settings, Client(), lambda: w.consortium, guest, clock=lambda: NOW, log=ProgramLog("worker")
        )
        self.jobs, self.events, self.attempts = Jobs(record), Events(), 0
        loose: Any = self.worker
        loose._jobs, loose._events = self.jobs, self.events

        async def work(_: JobRecord) -> None:
            self.attempts += 1
            if error is not None:
                raise error

        loose._work = work

    async def handle(self, delivery: Delivery | None = None) -> list[Any]:
        found: Any = delivery or Delivery()
        await self.worker.handle(found)
        said: list[Any] = found.said
        return said


async def test_a_job_is_claimed_worked_on_and_acknowledged_last(w: World, tmp_path: Path) -> None:
    bench = Bench(w, tmp_path, a_record())
    assert await bench.handle() == ["ack"]
    assert (bench.attempts, bench.jobs.record.attempt, bench.jobs.record.worker) == (1, 1, "worker-1")


@pytest.mark.parametrize("state", ["sealed", "failed", "refused", "cancelled", "expired"])
async def test_a_job_that_has_ended_is_told_again_and_let_go(w: World, tmp_path: Path, state: JobState) -> None:
    bench = Bench(w, tmp_path, a_record(state))
    assert await bench.handle() == ["ack"]
    assert (bench.attempts, [event.state for event in bench.events.heard]) == (0, [state])


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (LicenceError("no"), "refused", ["ack"]),
        (SealError("no"), "refused", ["ack"]),
        (NotFoundError("no"), "refused", ["ack"]),
        (TrainingError("no"), "failed", ["ack"]),
        (ReleaseError("no"), "failed", ["ack"]),
        (NonceError("later"), "claimed", [2.0]),
        (UnavailableError("later"), "claimed", [2.0]),
        (ConflictError("not ours"), "claimed", []),
        (IntegrityError("not right"), "claimed", []),
        (RuntimeError("nobody foresaw it"), "claimed", []),
    ],
)
async def test_the_kind_of_error_decides(
    w: World, tmp_path: Path, error: Exception, state: JobState, said: list[Any]
) -> None:
    bench = Bench(w, tmp_path, a_record(), error)
    assert await bench.handle() == said
    assert bench.jobs.record.state == state
    if state in ("refused", "failed") and isinstance(error, CasemateError):
        assert bench.jobs.record.reason == error.reason


async def test_a_wrong_state_that_a_key_broker_answered_does_not_lose_the_job(w: World, tmp_path: Path) -> None:
    """Only the record says that a job has ended; else its one message in the queue would be gone, and it would hang."""
    bench = Bench(w, tmp_path, a_record(), StateError("the answer of a key broker"))
    assert await bench.handle() == []
    assert bench.jobs.record.state == "claimed"


async def test_a_job_that_was_ended_meanwhile_is_let_go(w: World, tmp_path: Path) -> None:
    bench = Bench(w, tmp_path, a_record())

    async def cancelled(_: JobRecord) -> None:
        bench.jobs.record = a_record("cancelled")
        raise StateError("the job was ended as cancelled")

    loose: Any = bench.worker
    loose._work = cancelled
    assert await bench.handle() == ["ack"]


async def test_waits_double_with_each_delivery_up_to_a_bound(w: World, tmp_path: Path) -> None:
    waits = [
        (await Bench(w, tmp_path, a_record(), UnavailableError("away")).handle(Delivery(count=n)))[0]
        for n in (1, 2, 3, 7, 8, 9, 20)
    ]
    assert waits == [2.0, 4.0, 8.0, 128.0, 256.0, 256.0, 256.0]
    assert await Bench(w, tmp_path, a_record("awaiting_approval")).handle(Delivery(count=3)) == [8.0]


@pytest.mark.parametrize("state", ["queued", "claimed", "running"])
async def test_whether_it_is_too_late_a_key_broker_says_and_not_this_clock(
    w: World, tmp_path: Path, state: JobState
) -> None:
    bench = Bench(w, tmp_path, a_record(state, deadline=NOW - 1))
    assert await bench.handle() == ["ack"]
    assert (bench.attempts, bench.jobs.record.state) == (1, "claimed")
    bench = Bench(w, tmp_path, a_record(state), DeadlineError("the deadline has passed"))
    assert await bench.handle() == ["ack"]
    assert (bench.attempts, bench.jobs.record.state, bench.jobs.record.reason) == (1, "expired", "deadline_passed")


@pytest.mark.parametrize("state", ["claimed", "running", "committing"])
async def test_a_result_that_may_be_committed_is_published_past_the_deadline(
    w: World, tmp_path: Path, state: JobState
) -> None:
    """Also by the second successor, which finds the job ``claimed`` by the first."""
    bench = Bench(w, tmp_path, a_record(state, deadline=NOW - 1, upload=bytes(32)))
    assert await bench.handle() == ["ack"]
    assert (bench.attempts, bench.jobs.record.state) == (1, "claimed")


async def test_a_result_that_may_be_committed_does_not_expire_whatever_a_key_broker_says(
    w: World, tmp_path: Path
) -> None:
    """Nor does its message come back for ever."""
    bench = Bench(w, tmp_path, a_record("committing", upload=bytes(32)), DeadlineError("the deadline has passed"))
    assert await bench.handle() == ["ack"]
    assert (bench.attempts, bench.jobs.record.state, bench.jobs.record.reason) == (1, "refused", "deadline_passed")


@pytest.mark.parametrize("upload", [None, bytes(32)])
async def test_after_the_last_attempt_a_job_fails_rather_than_hang(
    w: World, tmp_path: Path, upload: bytes | None
) -> None:
    bench = Bench(w, tmp_path, a_record("claimed", attempt=MAX_ATTEMPTS - 1, upload=upload))
    assert await bench.handle() == ["ack"]
    assert (bench.attempts, bench.jobs.record.attempt) == (1, MAX_ATTEMPTS)
    assert await bench.handle() == ["ack"]
    assert (bench.attempts, bench.jobs.record.state) == (1, "failed")
    assert bench.jobs.record.reason == "attempts_exhausted"
