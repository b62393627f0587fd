"""The life of a job as NATS sees it: one state machine, one record, one kind of event.

::

    awaiting_approval -> queued -> claimed -> running -> committing -> sealed
                                      ^----------+-----------'   a redelivery starts the next attempt
    and, from where the table below allows it:  refused  failed  cancelled  expired

The record lives in an untrusted store and decides nothing about privacy: budgets and commits are the key brokers'.
It carries ciphertext by digest, signed messages as opaque bytes, and figures that are public by design.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from .codec import Digest, Name, UnixMs, WireModel
from .errors import ConflictError, StateError
from .subjects import ResourceClass

JobState = Literal[
    "awaiting_approval",
    "queued",
    "claimed",
    "running",
    "committing",
    "sealed",
    "refused",
    "failed",
    "cancelled",
    "expired",
]
"""Where a job is; the last five are final."""

TRANSITIONS: Final[dict[JobState, frozenset[JobState]]] = {
    "awaiting_approval": frozenset({"queued", "refused", "failed", "cancelled", "expired"}),
    "queued": frozenset({"claimed", "refused", "failed", "cancelled", "expired"}),
    "claimed": frozenset({"claimed", "running", "refused", "failed", "cancelled", "expired"}),
    "running": frozenset({"claimed", "committing", "refused", "failed", "cancelled", "expired"}),
    # A commit may already stand in a ledger: it can no longer be called off, only finished or given up.
    "committing": frozenset({"claimed", "sealed", "refused", "failed"}),
    "sealed": frozenset(),
    "refused": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
    "expired": frozenset(),
}
"""The one state machine: what may follow each state."""

_CALLED_OFF: Final[frozenset[JobState]] = frozenset({"cancelled", "expired"})
"""Ends that are not open to a job any more once a result of it was uploaded to be committed, in whatever state it is."""

TERMINAL: Final[frozenset[JobState]] = frozenset(state for state, after in TRANSITIONS.items() if not after)
"""States in which a job ends."""

ReasonCode = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
"""A stable code from the error tree, never text."""

Step = Annotated[int, Field(ge=0, lt=1 << 32)]
Epsilon = Annotated[float, Field(ge=0)]
Signed = Annotated[bytes, Field(max_length=8 << 10)]

MAX_ROUTING_BYTES: Final = 64 << 10
MAX_DELEGATION_BYTES: Final = 8 << 10
MAX_RELEASE_BYTES: Final = 256 << 10
MAX_KEY_BROKERS: Final = 65


class Approval(WireModel):
    """One key broker's say on a job: its signed answer is opaque here, and empty while it is pending."""

    verdict: Literal["pending", "yes", "refused"] = "pending"
    answer: Signed = b""


class JobRecord(WireModel):
    """All that gateway and workers share about one job, in one value of the KV bucket ``jobs``.

    ``routing`` and ``delegation`` are the submitter's canonical ``Signed`` messages, as they were posted.
    ``attempt`` counts deliveries to workers and is 0 until the first claims it. ``epsilon`` is the *planned* loss at
    ``step``, a function of public parameters. ``upload`` names a result's ciphertext that no recipient can open yet;
    ``release`` is the signed message that opens it to them.
    """

    KIND: ClassVar[str] = "job-record"

    version: Literal[1] = 1
    job_id: Name
    state: JobState = "awaiting_approval"
    resource_class: ResourceClass = "cpu"
    routing: Annotated[bytes, Field(max_length=MAX_ROUTING_BYTES)]
    delegation: Annotated[bytes, Field(max_length=MAX_DELEGATION_BYTES)] = b""
    job_envelope: Digest
    submission: Digest
    approvals: Annotated[dict[Name, Approval], Field(max_length=MAX_KEY_BROKERS)]
    created: UnixMs
    updated: UnixMs
    deadline: UnixMs | None = None
    attempt: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    worker: Name | None = None
    step: Step | None = None
    steps: Step | None = None
    epsilon: Epsilon | None = None
    reason: ReasonCode | None = None
    checkpoint: Digest | None = None
    upload: Digest | None = None
    release: Annotated[bytes, Field(max_length=MAX_RELEASE_BYTES)] | None = None


class JobEvent(WireModel):
    """What the world may hear while a job runs: where it is, how far, and the planned epsilon. Nothing else."""

    KIND: ClassVar[str] = "job-event"

    version: Literal[1] = 1
    job_id: Name
    state: JobState
    step: Step | None
    steps: Step | None
    epsilon: Epsilon | None
    reason: ReasonCode | None
    at: UnixMs


_FIXED: Final = frozenset(
    {
        "version",
        "job_id",
        "state",
        "resource_class",
        "routing",
        "delegation",
        "job_envelope",
        "submission",
        "created",
        "updated",
        "attempt",
    }
)


def check_transition(old: JobState, new: JobState) -> None:
    """Raises :class:`StateError` unless ``new`` may follow ``old``."""
    if new not in TRANSITIONS[old]:
        allowed = ", ".join(sorted(TRANSITIONS[old])) or "nothing: it is final"
        raise StateError(f"a job cannot go from {old} to {new}; after {old} may come {allowed}")


def check_attempt(record: JobRecord, *, worker: str, attempt: int) -> None:
    """Raises :class:`ConflictError` if the job has since been given to another worker, or delivered again."""
    if (record.worker, record.attempt) != (worker, attempt):
        raise ConflictError(f"attempt {attempt} of job {record.job_id} was superseded by attempt {record.attempt}")


def advance(record: JobRecord, state: JobState, *, now_ms: int, **changes: Any) -> JobRecord:
    """``record`` moved to ``state``, with ``changes`` to its other fields.

    Entering ``claimed`` starts the next attempt. Identity, envelopes and times cannot be changed. Raises
    :class:`StateError` for a transition outside :data:`TRANSITIONS`, for calling off a job that has been ``committing``,
    or for a change to a fixed field, and pydantic's ``ValidationError`` for a value out of bounds.
    """
    check_transition(record.state, state)
    if record.upload is not None and state in _CALLED_OFF:
        raise StateError(f"a result may be committed already: the job can no longer become {state}")
    attempt = record.attempt + (state == "claimed")
    return _changed(record, now_ms, changes, state=state, attempt=attempt)


def revise(record: JobRecord, *, now_ms: int, **changes: Any) -> JobRecord:
    """``record`` in the same state with ``changes`` (progress, an approval, a checkpoint).

    Raises :class:`StateError` if the job has ended, and otherwise as :func:`advance`.
    """
    if record.state in TERMINAL:
        raise StateError(f"the job ended as {record.state}; its record does not change any more")
    return _changed(record, now_ms, changes)


def event_of(record: JobRecord) -> JobEvent:
    """The event that tells of ``record`` as it is now."""
    return JobEvent(
        job_id=record.job_id,
        state=record.state,
        step=record.step,
        steps=record.steps,
        epsilon=record.epsilon,
        reason=record.reason,
        at=record.updated,
    )


def _changed(record: JobRecord, now_ms: int, changes: dict[str, Any], **own: Any) -> JobRecord:
    """A validated copy; times never run backwards."""
    if fixed := sorted(_FIXED & changes.keys()):
        raise StateError(f"fields that never change, or only with the state: {', '.join(fixed)}")
    return JobRecord.model_validate({**record.__dict__, **changes, **own, "updated": max(now_ms, record.updated)})
