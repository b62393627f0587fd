"""Time that never runs backwards, for a key broker whose clock is set by a host that its owner does not trust."""

from __future__ import annotations

import threading
from collections.abc import Callable


class MonotoneClock:
    """Unix ms: the host's clock, but never less than what was told or learnt before. Thread-safe.

    What expired stays expired, whatever the host does to its clock. A host's clock that is *ahead* cannot be recognised:
    it makes things expire early, for good, which is a loss of availability and of nothing else.
    """

    def __init__(self, wall: Callable[[], int]) -> None:
        """``wall`` tells the host's Unix ms."""
        self._wall = wall
        self._newest = 0
        self._lock = threading.Lock()

    def __call__(self) -> int:
        """Now."""
        with self._lock:
            self._newest = max(self._newest, self._wall())
            return self._newest

    def raise_to(self, at: int) -> None:
        """From now on it is at least ``at``: someone who is believed has said so."""
        with self._lock:
            self._newest = max(self._newest, at)
