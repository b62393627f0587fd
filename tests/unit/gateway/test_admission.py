"""How often a job that waits is asked about, and what wakes it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from casemate_gateway.admission import Admission, Left

JOB = "0" * 32


def admission(retry_s: float = 0.0, max_wait_s: float = 300.0, lost_after_s: float = 60.0) -> Admission:
    """One whose stores are never asked."""
    none = cast("Any", None)
    stores = (
        "consortium",
        "jobs",
        "blobs",
        "envelopes",
        "queue",
        "dispatcher",
        "transitions",
        "records",
        "log",
        "clock",
    )
    return Admission(
        none,
        **dict.fromkeys(stores, none),
        key_broker_timeout_s=1.0,
        retry_s=retry_s,
        max_wait_s=max_wait_s,
        lost_after_s=lost_after_s,
    )


async def waits(monkeypatch: pytest.MonkeyPatch, *rounds: Left, woken_at: int | None = None) -> list[float]:
    """How long it waited after each round; somebody wakes the job in the wait of that number."""
    under_test, left, waited = admission(retry_s=5.0), iter(rounds), list[float]()

    async def asked(_: str) -> Left:
        return next(left)

    async def slept(seconds: float) -> None:
        waited.append(seconds)

    async def slept_on(_: str, seconds: float) -> bool:
        waited[-1] += seconds
        return len(waited) - 1 == woken_at

    monkeypatch.setattr(under_test, "_round", asked)
    monkeypatch.setattr(under_test, "_slept", slept_on)
    monkeypatch.setattr("casemate_gateway.admission.asyncio.sleep", slept)
    await under_test._admit(JOB)
    return waited


async def test_the_longer_people_take_the_rarer_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await waits(monkeypatch, *["approvals"] * 8, "nothing") == [5, 10, 20, 40, 80, 160, 300, 300]


async def test_a_key_broker_that_does_not_answer_is_asked_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await waits(monkeypatch, "approvals", "approvals", "answers", "answers", "approvals", "nothing") == (
        [5, 10, 5, 5, 5]
    )


async def test_who_is_woken_is_asked_soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await waits(monkeypatch, *["approvals"] * 5, "nothing", woken_at=2) == [5, 10, 20, 5, 10]


async def test_a_wake_ends_the_wait_also_if_it_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    under_test, rounds = admission(), asyncio.Event()

    async def asked(_: str) -> Left:
        rounds.set()
        await asyncio.Event().wait()
        return "nothing"

    monkeypatch.setattr(under_test, "_round", asked)
    under_test.wake(JOB)  # nobody waits: nothing happens
    under_test.take_up(JOB)
    await rounds.wait()
    under_test.wake(JOB)
    assert await under_test._slept(JOB, 300.0), "it was woken while key brokers were asked"
    waiting = asyncio.create_task(under_test._slept(JOB, 300.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    under_test.wake("1" * 32)
    under_test.wake(JOB)
    assert await waiting
    assert not await under_test._slept(JOB, 0.0), "a wake counts once"
    await under_test.close()


@pytest.mark.parametrize(("looks", "ends"), [((0, 60), True), ((0, 59), False), ((0, 30, None, 60), False)])
async def test_what_stays_unreadable_for_long_enough_ends_its_job(
    monkeypatch: pytest.MonkeyPatch, looks: tuple[int | None, ...], ends: bool
) -> None:
    """Seconds at which it was looked for in vain; None where it was there, and a key broker away."""
    under_test, moved, left = admission(), list[tuple[object, ...]](), iter([*looks, "end"])
    now = asyncio.get_running_loop().time()

    async def asked(_: str) -> Left:
        nonlocal now
        look = next(left)
        if look == "end":
            return "nothing"
        now += look or 0
        return "answers" if look is None else "submission"

    async def move(job_id: str, state: str, *, reason: str) -> None:
        moved.append((job_id, state, reason))

    monkeypatch.setattr(under_test, "_round", asked)
    monkeypatch.setattr(under_test, "_transitions", SimpleNamespace(move=move))
    monkeypatch.setattr(
        "casemate_gateway.admission.asyncio.get_running_loop", lambda: SimpleNamespace(time=lambda: now)
    )
    await under_test._admit(JOB)
    assert moved == ([(JOB, "failed", "not_found")] if ends else [])
