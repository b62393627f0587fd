"""Whose turn it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from casemate_gateway.schedule import Entry, Schedule
from casemate_schemas.job_state import JobState
from hypothesis import given
from hypothesis import strategies as st


def entry(
    name: str, member: str, state: JobState = "queued", *, urgency: int = 1, not_before: int = 0, created: int = 0
) -> Entry:
    return Entry(name, "cpu", member, state, urgency, not_before, created)


def taken(schedule: Schedule, count: int, now_ms: int = 0) -> list[str | None]:
    """The next jobs, handed out and claimed one after another; none ends."""
    found = []
    for _ in range(count):
        job_id = schedule.next(now_ms)
        found.append(job_id)
        if job_id is not None:
            schedule.hand_out(job_id)
            known = schedule.get(job_id)
            assert known is not None
            schedule.see(replace(known, state="claimed"))
    return found


def test_a_members_own_jobs_come_by_urgency_then_by_age() -> None:
    schedule = Schedule()
    schedule.see(entry("old", "north", created=1))
    schedule.see(entry("new", "north", created=2))
    schedule.see(entry("urgent", "north", urgency=2, created=3))
    schedule.see(entry("whenever", "north", urgency=0, created=0))
    assert taken(schedule, 5) == ["urgent", "old", "new", "whenever", None]


def test_ten_thousand_jobs_of_one_member_leave_the_other_one_next() -> None:
    schedule = Schedule()
    for number in range(10_000):
        schedule.see(entry(f"n{number:05}", "north", urgency=2, created=number))
    assert taken(schedule, 3) == ["n00000", "n00001", "n00002"]
    schedule.see(entry("s0", "south", urgency=0, created=99_999))
    assert taken(schedule, 3) == ["s0", "n00003", "n00004"]


def test_the_member_with_fewer_jobs_under_way_is_next_and_then_the_one_served_longest_ago() -> None:
    schedule = Schedule()
    for number in range(4):
        for member in ("north", "south", "east"):
            schedule.see(entry(f"{member}{number}", member, created=number))
    assert taken(schedule, 6) == ["east0", "north0", "south0", "east1", "north1", "south1"]
    schedule.see(entry("south0", "south", "sealed"))
    schedule.see(entry("north0", "north", "failed"))
    assert taken(schedule, 2) == ["north2", "south2"]


def test_a_job_waits_until_it_may_begin_and_holds_up_nobody() -> None:
    schedule = Schedule()
    schedule.see(entry("tomorrow", "north", not_before=500, urgency=2))
    schedule.see(entry("today", "north", not_before=100, created=9))
    assert schedule.next(99) is None
    assert schedule.due_ms() == 100
    assert taken(schedule, 2, now_ms=100) == ["today", None]
    assert schedule.due_ms() == 500
    assert taken(schedule, 1, now_ms=500) == ["tomorrow"]


def test_what_is_handed_out_is_not_handed_out_again_and_counts_until_it_ends() -> None:
    schedule = Schedule()
    for name in ("a", "b"):
        schedule.see(entry(name, "north"))
    schedule.hand_out("a")
    schedule.see(entry("a", "north"))
    assert schedule.handed_out == ("a",)
    assert schedule.next(0) == "b"
    schedule.replace([entry("b", "north")], schedule.moment)
    assert schedule.handed_out == ()
    assert schedule.get("a") is None


def test_what_moves_on_while_it_is_put_into_the_queue_counts_once() -> None:
    schedule = Schedule()
    for number in range(3):
        schedule.see(entry(f"n{number}", "north", created=number))
        schedule.see(entry(f"s{number}", "south", created=number))
    assert schedule.next(0) == "n0"
    schedule.see(entry("n0", "north", "claimed"))
    schedule.hand_out("n0")
    assert schedule.handed_out == ()
    schedule.see(entry("n0", "north", "sealed"))
    assert schedule.next(0) == "n1"
    schedule.see(entry("n1", "north", "cancelled"))
    schedule.hand_out("n1")
    assert taken(schedule, 4) == ["n2", "s0", "s1", "s2"]


def test_what_is_seen_while_jobs_are_listed_is_newer_than_the_list() -> None:
    schedule = Schedule()
    schedule.see(entry("ends", "north"))
    schedule.see(entry("gone", "north"))
    since = schedule.moment
    listed = [entry("ends", "north"), entry("other", "south")]
    schedule.see(entry("new", "north"))
    schedule.see(entry("ends", "north", "sealed"))
    schedule.replace(listed, since)
    assert {name: schedule.get(name) is not None for name in ("ends", "gone", "new", "other")} == (
        {"ends": False, "gone": False, "new": True, "other": True}
    )
    schedule.replace([], schedule.moment)
    assert schedule.next(0) is None


STATES: list[JobState] = ["awaiting_approval", "queued", "claimed", "running", "committing", "sealed", "cancelled"]
MEMBERS = ("east", "north", "south")


@given(st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["hand", "replace", *STATES])), max_size=60))
def test_it_agrees_with_a_schedule_that_looks_at_everything(events: list[tuple[int, str]]) -> None:
    schedule, jobs = Schedule(), {}
    handed: set[str] = set()
    served: dict[str, int] = {}
    turn = 0
    for number, what in events:
        job = entry(f"j{number:02}", MEMBERS[number % 3], urgency=number % 2, created=number, not_before=number % 5)
        if what == "replace":
            schedule.replace(jobs.values(), schedule.moment)
        elif what == "hand":
            if (job_id := schedule.next(2)) is not None:
                schedule.hand_out(job_id)
                handed.add(job_id)
                turn += 1
                served[jobs[job_id].member] = turn
        else:
            moved = replace(job, state=what)  # type: ignore[arg-type]
            if jobs.get(job.job_id) != moved:
                handed.discard(job.job_id)
            jobs.pop(job.job_id, None)
            if what not in ("sealed", "cancelled"):
                jobs[job.job_id] = moved
            schedule.see(moved)
        busy = Counter(
            j.member for j in jobs.values() if j.state in ("claimed", "running", "committing") or j.job_id in handed
        )
        waiting = [j for j in jobs.values() if j.state == "queued" and j.job_id not in handed and j.not_before <= 2]
        expected = min(
            waiting,
            key=lambda j: (busy[j.member], served.get(j.member, 0), j.member, -j.urgency, j.created, j.job_id),
            default=None,
        )
        assert schedule.next(2) == (expected and expected.job_id)
        assert set(schedule.handed_out) == handed
