"""What limits count, with a clock that stands still until it is told."""

from __future__ import annotations

import asyncio

import pytest
from casemate_gateway.limits import LONGEST_POLL_S, Doorkeeper, Pace, TokenBuckets
from casemate_schemas.errors import AuthenticationError, ThrottledError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def spend(buckets: TokenBuckets, member: str) -> None:
    with buckets.one(member):
        pass


def test_a_burst_then_a_rate_for_each_member_alone() -> None:
    clock = Clock()
    buckets = TokenBuckets(2.0, 3, clock)
    for _ in range(3):
        spend(buckets, "north")
    with pytest.raises(ThrottledError) as refused:
        spend(buckets, "north")
    assert refused.value.retry_after_s == pytest.approx(0.5)
    spend(buckets, "south")
    clock.now += 0.5
    spend(buckets, "north")
    with pytest.raises(ThrottledError):
        spend(buckets, "north")
    clock.now += 1000
    for _ in range(3):
        spend(buckets, "north")
    with pytest.raises(ThrottledError):
        spend(buckets, "north")


def test_what_fails_costs_nothing() -> None:
    buckets = TokenBuckets(1.0, 1, Clock())
    for _ in range(5):
        with pytest.raises(AuthenticationError), buckets.one("north"):
            raise AuthenticationError("received before")
    spend(buckets, "north")
    with pytest.raises(ThrottledError):
        spend(buckets, "north")


def simulated(pollers: int, least_s: int, per_s: float, seconds: int, late_s: float = 0.0) -> list[int]:
    """How many of ``pollers``, who do as they are told, come in each second."""
    clock = Clock()
    pace = Pace(least_s, per_s, clock)
    comes, came = [100.0 + i / pollers for i in range(pollers)], [0] * seconds
    for second in range(seconds):
        for tick in range(20):
            clock.now = 100.0 + second + tick / 20
            pace.late(late_s)
            for i, at in enumerate(comes):
                if at <= clock.now:
                    came[second] += 1
                    comes[i] = clock.now + pace.after_s()
    return came


def test_many_pollers_are_told_to_come_less_often() -> None:
    came = simulated(pollers=1000, least_s=2, per_s=50.0, seconds=200)
    assert sum(came[100:]) / 100 == pytest.approx(50, rel=0.35)


def test_a_gateway_that_is_late_wants_a_tenth_of_them() -> None:
    came = simulated(pollers=200, least_s=2, per_s=50.0, seconds=200, late_s=0.2)
    assert sum(came[100:]) / 100 == pytest.approx(5, rel=0.5)


def test_few_pollers_are_told_what_the_operator_chose() -> None:
    came = simulated(pollers=10, least_s=2, per_s=50.0, seconds=60)
    assert sum(came[20:]) / 40 == pytest.approx(5, rel=0.1)


def test_no_poller_waits_longer_than_a_minute() -> None:
    clock = Clock()
    pace = Pace(2, 0.001, clock)
    told = 0
    for _ in range(10_000):
        clock.now += 0.01
        told = pace.after_s()
    assert told == LONGEST_POLL_S


class Connection(asyncio.Protocol):
    pass


class Transport(asyncio.Transport):
    closed = False
    high: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.was_aborted = asyncio.Event()

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.was_aborted.set()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high


def test_the_door_is_shut_when_the_house_is_full() -> None:
    inside = 1
    door = Doorkeeper(Connection, lambda: inside, 2, 60)
    let_in, transport = door(), Transport()
    let_in.connection_made(transport)
    assert not transport.closed
    inside = 2
    refused, transport = door(), Transport()
    refused.connection_made(transport)
    assert transport.closed


async def test_who_does_not_take_what_was_written_is_hung_up_on() -> None:
    """Not who takes it in time, and not who is gone."""
    door = Doorkeeper(Connection, lambda: 0, 2, 0.01)
    protocols, transports = [door() for _ in range(3)], [Transport() for _ in range(3)]
    for protocol, transport in zip(protocols, transports, strict=True):
        protocol.connection_made(transport)
        assert transport.high == 0
        protocol.pause_writing()
    protocols[0].resume_writing()
    protocols[1].connection_lost(None)
    await transports[2].was_aborted.wait()
    assert [transport.was_aborted.is_set() for transport in transports] == [False, False, True]
