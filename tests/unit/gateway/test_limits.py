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


def simulated(pollers: int, least_s: int, per_s: float, seconds: int) -> list[int]:
    """How many of ``pollers``, who do as they are told, come in each second."""
    clock = Clock()
    pace = Pace(least_s, per_s, clock)
    comes, came = [100.0 + i / pollers for i in range(pollers)], [0] * seconds
    for second in range(seconds):
        for tick in range(20):
            clock.now = 100.0 + second + tick / 20
            for i, at in enumerate(comes):
                if at <= clock.now:
                    came[second] += 1
                    comes[i] = clock.now + pace.after_s()
    return came


def test_many_pollers_are_told_to_come_less_often() -> None:
    came = simulated(pollers=1000, least_s=2, per_s=50.0, seconds=200)
    assert sum(came[100:]) / 100 == pytest.approx(50, rel=0.35)


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

    def close(self) -> None:
        self.closed = True


def test_the_door_is_shut_when_the_house_is_full() -> None:
    inside = 1
    door = Doorkeeper(Connection, lambda: inside, 2)
    assert isinstance(door(), Connection)
    inside = 2
    refused, transport = door(), Transport()
    refused.connection_made(transport)
    assert not isinstance(refused, Connection)
    assert transport.closed
