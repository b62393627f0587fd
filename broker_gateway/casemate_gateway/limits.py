"""How much each member may ask for, how often pollers should come, and how many may be connected."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Final

from casemate_schemas.errors import ThrottledError

LONGEST_POLL_S: Final = 60
_PACE_WINDOW_S: Final = 2.0
_LATE_S: Final = 0.1
_LEAST_SHARE: Final = 0.1
_LOOK_S: Final = 0.25


class TokenBuckets:
    """One token bucket a member: ``burst`` requests at once, and ``per_s`` more each second.

    Only requests with a verified signature get here, so there are as many buckets as members, and nobody can spend
    another member's tokens.
    """

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float]) -> None:
        """``clock`` in seconds, never going back."""
        self._per_s = per_s
        self._burst = float(burst)
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def one(self, member: str) -> Iterator[None]:
        """Takes one of ``member``'s tokens for the block; gives it back if the block raises (a replayed request costs nothing).

        Raises :class:`ThrottledError`, with the time until there is one again.
        """
        tokens = self._level(member)
        if tokens < 1:
            raise ThrottledError("this member asks too often: wait first", (1 - tokens) / self._per_s)
        self._set(member, tokens - 1)
        try:
            yield
        except BaseException:
            self._set(member, min(self._burst, self._level(member) + 1))
            raise

    def _level(self, member: str) -> float:
        now = self._clock()
        tokens, then = self._buckets.get(member, (self._burst, now))
        return min(self._burst, tokens + (now - then) * self._per_s)

    def _set(self, member: str, tokens: float) -> None:
        self._buckets[member] = (tokens, self._clock())


class Pace:
    """When those who poll should come back, so that all together come about ``per_s`` times a second.

    Each window it compares how many came with how many it wants, and moves the answer by that factor, at most twofold:
    between ``least_s`` and :data:`LONGEST_POLL_S`. While the gateway itself is late it wants fewer, half as many each window.
    """

    def __init__(self, least_s: int, per_s: float, clock: Callable[[], float]) -> None:
        self._least_s = float(least_s)
        self._wanted = per_s * _PACE_WINDOW_S
        self._clock = clock
        self._after_s = self._least_s
        self._began, self._came = clock(), 0
        self._share, self._late_s = 1.0, 0.0

    def late(self, seconds: float) -> None:
        """The gateway came so much later than it meant to to do something."""
        self._late_s = max(self._late_s, seconds)

    def after_s(self) -> int:
        """Counts one who polls; how long it should wait, in whole seconds."""
        self._came += 1
        passed = self._clock() - self._began
        wanted = self._wanted * self._share
        if passed >= _PACE_WINDOW_S or self._came >= 2 * wanted:
            factor = self._came / wanted * _PACE_WINDOW_S / max(passed, 1e-3)
            longest = max(self._least_s, LONGEST_POLL_S)
            self._after_s = min(longest, max(self._least_s, self._after_s * min(2.0, max(0.5, factor))))
            self._share = max(_LEAST_SHARE, self._share / 2) if self._late_s > _LATE_S else min(1.0, self._share * 1.2)
            self._began, self._came, self._late_s = self._clock(), 0, 0.0
        return math.ceil(self._after_s)


async def look_at_lateness(pace: Pace) -> None:
    """Tells ``pace`` how late the event loop is, for ever."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LOOK_S
        await asyncio.sleep(_LOOK_S)
        pace.late(loop.time() - due)


class Doorkeeper:
    """Lets in at most ``most`` connections at once; what comes above that is closed before a byte of it is read.

    Whoever has not taken all that was written within ``unread_s`` is hung up on, whatever the answer is: answers are written
    in pieces of half a MiB at most, so this is a least rate too.
    """

    def __init__(
        self, protocols: Callable[[], asyncio.Protocol], count: Callable[[], int], most: int, unread_s: float
    ) -> None:
        """``protocols`` makes the protocol of one connection, ``count`` says how many there are."""
        self._protocols = protocols
        self._count = count
        self._most = most
        self._unread_s = unread_s

    def __call__(self) -> asyncio.Protocol:
        """The protocol for the next connection."""
        return _Watched(self._protocols(), self._unread_s) if self._count() < self._most else _Refused()


class _Watched(asyncio.Protocol):
    """Another protocol's connection, which ends if what was written stands still."""

    def __init__(self, inner: asyncio.Protocol, unread_s: float) -> None:
        self._inner = inner
        self._unread_s = unread_s
        self._abort: Callable[[], None] = lambda: None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.WriteTransport):
            transport.set_write_buffer_limits(high=0)  # else what is last to be sent could lie here unnoticed
            self._abort = transport.abort
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._unread_s, self._abort)
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._rest()
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        self._inner.connection_lost(exc)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Refused(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
