"""How long the SDK waits before it tries again, and when it gives up."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import casemate as cm
import pytest
from casemate._http import Patience, retry_after_s
from casemate_schemas.errors import ParameterError, StorageFullError, ThrottledError, UnavailableError
from support.results import World


class Clockless:
    def __init__(self) -> None:
        self.waited_s: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waited_s.append(seconds)


async def often(patience: Patience, error: UnavailableError) -> None:
    for _ in range(9):
        await patience.wait(error)


async def test_waits_grow_and_end_with_the_error() -> None:
    clock = Clockless()
    patience = Patience(clock.sleep, attempts=5, max_wait_s=90)
    error = UnavailableError("away")
    for _ in range(4):
        await patience.wait(error)
    with pytest.raises(UnavailableError) as raised:
        await patience.wait(error)
    assert raised.value is error
    for wait, longest in zip(clock.waited_s, (0.5, 1.0, 2.0, 4.0), strict=True):
        assert longest / 2 <= wait <= longest


async def test_it_never_comes_back_before_it_was_told_to_and_waits_no_longer_than_it_may_in_all() -> None:
    clock = Clockless()
    patience = Patience(clock.sleep, attempts=9, max_wait_s=90)
    busy = ThrottledError("busy", retry_after_s=25)
    with pytest.raises(ThrottledError):
        await often(patience, busy)
    assert all(25 <= wait <= 31.25 for wait in clock.waited_s)
    assert sum(clock.waited_s) <= 90 < sum(clock.waited_s) + 31.25
    with pytest.raises(StorageFullError):
        await Patience(clock.sleep, attempts=9, max_wait_s=90).wait(StorageFullError("full", retry_after_s=90.1))


async def test_getting_further_starts_anew() -> None:
    clock = Clockless()
    patience = Patience(clock.sleep, attempts=2, max_wait_s=90)
    for _ in range(5):
        await patience.wait(ThrottledError("busy", retry_after_s=60))
        patience.renew()
    assert len(clock.waited_s) == 5


def test_a_retry_after_is_seconds_or_a_date_and_anything_else_says_nothing() -> None:
    later = datetime.now(UTC) + timedelta(seconds=100)
    assert retry_after_s("60") == 60
    assert 95 < retry_after_s(format_datetime(later, usegmt=True)) <= 100
    assert retry_after_s("Sun, 06 Nov 1994 08:49:37 GMT") == 0
    for text in (None, "", "-5", "1e9", "٣", "inf", "9" * 7, "tomorrow", "Fri, 99 Xyz 2100 00:00:00 GMT"):
        assert retry_after_s(text) == 0


@pytest.mark.parametrize("max_wait_s", [-1.0, math.nan, math.inf])
async def test_a_longest_wait_that_is_none_is_refused(w: World, max_wait_s: float) -> None:
    with pytest.raises(ParameterError, match="max_wait_s"):
        async with cm.connect("http://127.0.0.1:1", identity=w.clara, max_wait_s=max_wait_s):
            pass
