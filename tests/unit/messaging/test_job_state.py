from __future__ import annotations

import itertools
from typing import get_args

import pytest
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import ConflictError, MalformedError, StateError
from casemate_schemas.job_state import (
    TERMINAL,
    TRANSITIONS,
    Approval,
    JobEvent,
    JobRecord,
    JobState,
    advance,
    check_attempt,
    check_transition,
    event_of,
    revise,
)
from pydantic import ValidationError

STATES: tuple[JobState, ...] = get_args(JobState)
ALLOWED = {
    "awaiting_approval": {"queued", "refused", "failed", "cancelled", "expired"},
    "queued": {"claimed", "refused", "failed", "cancelled", "expired"},
    "claimed": {"claimed", "running", "refused", "failed", "cancelled", "expired"},
    "running": {"claimed", "committing", "refused", "failed", "cancelled", "expired"},
    "committing": {"claimed", "sealed", "refused", "failed"},
}


def a_record(**changes) -> JobRecord:
    fields = {
        "job_id": "a" * 32,
        "routing": b"routing",
        "job_envelope": b"j" * 32,
        "submission": b"s" * 32,
        "approvals": {"north": Approval(), "south": Approval()},
        "created": 1000,
        "updated": 1000,
    }
    return JobRecord(**{**fields, **changes})


@pytest.mark.parametrize(("old", "new"), list(itertools.product(STATES, STATES)))
def test_every_pair_of_states(old: JobState, new: JobState) -> None:
    if new in ALLOWED.get(old, ()):
        check_transition(old, new)
        assert advance(a_record(state=old), new, now_ms=2000).state == new
    else:
        with pytest.raises(StateError):
            check_transition(old, new)
        with pytest.raises(StateError):
            advance(a_record(state=old), new, now_ms=2000)


def test_terminal_states_are_the_five_ends() -> None:
    assert {"sealed", "refused", "failed", "cancelled", "expired"} == TERMINAL
    assert set(TRANSITIONS) == set(STATES)


def test_the_straight_road_counts_one_attempt() -> None:
    record = a_record()
    for number, state in enumerate(("queued", "claimed", "running", "committing", "sealed"), 2):
        record = advance(record, state, now_ms=number * 1000)
    assert (record.state, record.attempt, record.updated, record.created) == ("sealed", 1, 6000, 1000)


@pytest.mark.parametrize("state", ["claimed", "running", "committing"])
def test_a_redelivery_starts_the_next_attempt(state: JobState) -> None:
    record = advance(a_record(state=state, attempt=3, worker="worker-1"), "claimed", now_ms=9, worker="worker-2")
    assert (record.attempt, record.worker, record.state) == (4, "worker-2", "claimed")


def test_time_does_not_run_backwards() -> None:
    assert advance(a_record(updated=5000), "queued", now_ms=4000).updated == 5000


@pytest.mark.parametrize(
    "field",
    ["job_id", "routing", "job_envelope", "submission", "created", "attempt", "version", "resource_class", "updated"],
)
def test_fixed_fields_stay(field: str) -> None:
    with pytest.raises(StateError, match=field):
        revise(a_record(), now_ms=2000, **{field: getattr(a_record(), field)})
    with pytest.raises(StateError, match=field):
        advance(a_record(), "queued", now_ms=2000, **{field: getattr(a_record(), field)})


def test_state_cannot_be_smuggled_through_changes() -> None:
    with pytest.raises(StateError):
        revise(a_record(), now_ms=2000, state="sealed")


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_an_ended_job_does_not_change(state: JobState) -> None:
    with pytest.raises(StateError):
        revise(a_record(state=state), now_ms=2000, step=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"epsilon": float("nan")},
        {"epsilon": -0.1},
        {"reason": "Text with spaces"},
        {"worker": "a.b"},
        {"upload": b"short"},
        {"release": b"x" * ((256 << 10) + 1)},
        {"approvals": {f"k{i}": Approval() for i in range(66)}},
        {"approvals": {"not a name": Approval()}},
        {"unknown": 1},
    ],
)
def test_changes_are_validated(changes) -> None:
    with pytest.raises(ValidationError):
        revise(a_record(), now_ms=2000, **changes)


def test_an_approval_answer_is_bounded() -> None:
    with pytest.raises(ValidationError):
        Approval(verdict="yes", answer=b"x" * ((8 << 10) + 1))


def test_an_attempt_that_was_superseded_is_told() -> None:
    record = a_record(state="running", attempt=2, worker="worker-2")
    check_attempt(record, worker="worker-2", attempt=2)
    for worker, attempt in (("worker-2", 1), ("worker-1", 2), ("worker-2", 3)):
        with pytest.raises(ConflictError):
            check_attempt(record, worker=worker, attempt=attempt)


def test_record_and_event_round_trip_and_refuse_strangers() -> None:
    record = revise(
        a_record(),
        now_ms=3,
        epsilon=0.5,
        step=3,
        steps=9,
        approvals={"north": Approval(verdict="yes", answer=b"signed")},
    )
    assert decode(JobRecord, encode(record)) == record
    event = event_of(record)
    assert decode(JobEvent, encode(event)) == event
    assert (event.step, event.steps, event.epsilon, event.at) == (3, 9, 0.5, 1000)
    with pytest.raises(MalformedError):
        decode(JobRecord, encode(event))


def test_events_hold_nothing_else() -> None:
    assert set(JobEvent.model_fields) == {"version", "job_id", "state", "step", "steps", "epsilon", "reason", "at"}
    for extra in ("loss", "message", "accuracy"):
        with pytest.raises(ValidationError):
            JobEvent.model_validate({**event_of(a_record()).model_dump(), extra: 1})


def test_the_largest_record_fits_one_message() -> None:
    record = a_record(
        routing=b"r" * (64 << 10),
        delegation=b"d" * (8 << 10),
        release=b"r" * (256 << 10),
        approvals={f"key-broker-{i}": Approval(verdict="yes", answer=b"a" * (8 << 10)) for i in range(65)},
    )
    assert len(encode(record)) < 900 << 10


@pytest.mark.parametrize("end", ["cancelled", "expired"])
@pytest.mark.parametrize("state", ["claimed", "running"])
def test_a_job_that_was_committing_can_no_longer_be_called_off(state: JobState, end: JobState) -> None:
    """A successor's claim takes it back to ``claimed``, but a key broker may hold its result already."""
    assert advance(a_record(state=state), end, now_ms=9).state == end
    with pytest.raises(StateError, match="committed"):
        advance(a_record(state=state, upload=b"u" * 32), end, now_ms=9)
    for other in ("failed", "refused"):
        assert advance(a_record(state=state, upload=b"u" * 32), other, now_ms=9).state == other
