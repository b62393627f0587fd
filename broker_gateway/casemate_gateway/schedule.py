"""Which job comes next: members in turn, and each member's own jobs by priority and age. No I/O.

The work queue itself holds little more than one job for each worker that waits; the rest wait here, where their order can
still change. So a member who has queued ten thousand jobs delays another member's next one by no more than the jobs that
workers already have or are about to take.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from casemate_schemas.job_state import TERMINAL, JobState
from casemate_schemas.subjects import ResourceClass

_UNDER_WAY: Final = frozenset[JobState]({"claimed", "running", "committing"})


@dataclass(frozen=True)
class Entry:
    """A job as far as its turn depends on it. ``urgency`` is higher for what its member wants sooner; times in Unix ms."""

    job_id: str
    resource_class: ResourceClass
    member: str
    state: JobState
    urgency: int
    not_before: int
    created: int


class Schedule:
    """All jobs of one resource class that have not ended, and whose turn it is.

    The member with the fewest jobs under way (or handed out) is next; among equals the one that was served longest ago.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, Entry] = {}
        self._handed: set[str] = set()
        self._busy: Counter[str] = Counter()
        self._members: Counter[str] = Counter()
        self._ready: dict[str, list[tuple[int, int, str]]] = {}
        self._later: list[tuple[int, str]] = []
        self._served: dict[str, int] = {}
        self._turn = 0
        self._moment = 0
        self._changed: dict[str, int] = {}

    def count(self, member: str) -> int:
        """Jobs of a member's that have not ended."""
        return self._members[member]

    def get(self, job_id: str) -> Entry | None:
        """The job as it was last seen, until it ended."""
        return self._jobs.get(job_id)

    @property
    def moment(self) -> int:
        """Of the last change; to be asked for before jobs are listed."""
        return self._moment

    def replace(self, entries: Iterable[Entry], since: int) -> None:
        """These were all there are at moment ``since``, or soon after; what was seen later than that stays as it was seen."""
        found = {entry.job_id: entry for entry in entries}
        newer = {job_id: moment for job_id, moment in self._changed.items() if moment > since}
        for job_id in self._jobs.keys() - found.keys() - newer.keys():
            self._forget(job_id)
        for job_id in found.keys() - newer.keys():
            self.see(found[job_id])
        self._changed = newer

    def see(self, entry: Entry) -> None:
        """A job is there, or has moved on."""
        known = self._jobs.get(entry.job_id)
        if known == entry:
            return
        self._moment += 1
        self._changed[entry.job_id] = self._moment
        self._forget(entry.job_id)
        if entry.state in TERMINAL:
            return
        self._jobs[entry.job_id] = entry
        self._members[entry.member] += 1
        if entry.state in _UNDER_WAY:
            self._busy[entry.member] += 1
        elif entry.state == "queued":
            heapq.heappush(self._later, (entry.not_before, entry.job_id))

    def next(self, now_ms: int) -> str | None:
        """The job whose turn it is; None if none is due."""
        while self._later and self._later[0][0] <= now_ms:
            _, job_id = heapq.heappop(self._later)
            if self._waits(job_id):
                entry = self._jobs[job_id]
                heap = self._ready.setdefault(entry.member, [])
                heapq.heappush(heap, (-entry.urgency, entry.created, job_id))
        waiting = [member for member in list(self._ready) if self._first(member) is not None]
        if not waiting:
            return None
        return self._first(min(waiting, key=lambda member: (self._busy[member], self._served.get(member, 0), member)))

    def due_ms(self) -> int | None:
        """When the earliest of the jobs that must not begin yet may."""
        return self._later[0][0] if self._later else None

    def hand_out(self, job_id: str) -> None:
        """The job is in the work queue now. Until it is seen under way it counts as its member's all the same.

        If it went on, or ended, while its message was on its way there, nothing happens.
        """
        if not self._waits(job_id):
            return
        entry = self._jobs[job_id]
        self._handed.add(job_id)
        self._busy[entry.member] += 1
        self._turn += 1
        self._served[entry.member] = self._turn

    @property
    def handed_out(self) -> tuple[str, ...]:
        """Jobs in the work queue that no worker was seen to have claimed."""
        return tuple(self._handed)

    def _first(self, member: str) -> str | None:
        heap = self._ready[member]
        while heap and not self._waits(heap[0][2]):
            heapq.heappop(heap)
        if heap:
            return heap[0][2]
        del self._ready[member]
        return None

    def _waits(self, job_id: str) -> bool:
        entry = self._jobs.get(job_id)
        return entry is not None and entry.state == "queued" and job_id not in self._handed

    def _forget(self, job_id: str) -> None:
        entry = self._jobs.pop(job_id, None)
        if entry is not None:
            self._members[entry.member] -= 1
        if entry is not None and (job_id in self._handed or entry.state in _UNDER_WAY):
            self._busy[entry.member] -= 1
        self._handed.discard(job_id)
