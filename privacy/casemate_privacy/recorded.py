"""A file of privacy events as they were recorded, with the figures stated for them: what anyone recomputes, offline.

It is JSON, of format ``casemate-privacy-events``: made of a result's terms, or of an owner's ledger. It holds no secret and
proves nothing by itself; it says exactly what a figure follows from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal

from casemate_schemas.codec import WireModel
from casemate_schemas.errors import MalformedError, TooLargeError
from casemate_schemas.job import JobId, Plan, Rational
from casemate_schemas.requests import MAX_RELEASE_PHASES, Budget, LedgerLine, ReleasePhase
from casemate_schemas.result import PrivacyStatement
from pydantic import Field, StringConstraints, ValidationError

from .accounting import epsilon, person_epsilon
from .events import MAX_DELTA, MAX_EPSILON, MIN_DELTA, ScheduledEvent, TrainingEvent
from .prv import EpsilonInterval, prv_epsilon, prv_person_epsilon
from .renyi import ZERO_CURVE, add_curves, rdp_curve
from .renyi_filter import RenyiFilter
from .statement import job_event

MAX_FILE_BYTES: Final = 16 << 20
MAX_GUARANTEES: Final = 8192
MAX_EVENTS: Final = 4096

Rule = Literal["fixed", "person", "adaptive"]


class RecordedEvent(WireModel):
    """What one job did with one dataset, phase by phase."""

    phases: Annotated[tuple[ReleasePhase, ...], Field(min_length=1, max_length=MAX_RELEASE_PHASES + 1)]

    @classmethod
    def of(cls, event: ScheduledEvent) -> RecordedEvent:
        """The event's phases, in order."""
        phases = (
            ReleasePhase(sample_rate=Rational.of(p.sample_rate), noise_multiplier=p.noise_multiplier, steps=p.steps)
            for p in event.phases
        )
        return cls(phases=tuple(phases))

    @property
    def event(self) -> ScheduledEvent:
        """What accountants take. Raises :class:`~casemate_schemas.errors.ParameterError` for what they do not."""
        return ScheduledEvent(
            tuple(TrainingEvent(p.sample_rate.fraction, p.noise_multiplier, p.steps) for p in self.phases)
        )


class StatedGuarantee(WireModel):
    """A figure, and the events that it is stated for.

    ``fixed``: releases fixed in advance; ``person``: one job, one event for each owner whose data hold a unit of one person;
    ``adaptive``: jobs chosen one after another under a budget of ``limit_epsilon``, as the lifetime filter proves it.
    """

    of: Annotated[str, StringConstraints(min_length=1, max_length=140)]
    job_id: JobId | None
    rule: Rule
    epsilon: Annotated[float, Field(ge=0)]
    delta: Annotated[float, Field(ge=MIN_DELTA, le=MAX_DELTA)]
    limit_epsilon: Annotated[float, Field(ge=1e-3, le=MAX_EPSILON)] | None = None
    events: Annotated[tuple[RecordedEvent, ...], Field(min_length=1, max_length=MAX_EVENTS)]

    def recomputed(self, delta: float | None = None) -> float:
        """The figure once more, from the events alone, at the stated delta or another.

        Raises :class:`~casemate_schemas.errors.ParameterError` for events that no accountant takes.
        """
        delta, events = delta or self.delta, [recorded.event for recorded in self.events]
        match self.rule:
            case "fixed":
                return epsilon(events, delta)
            case "person":
                return person_epsilon(events, delta)
            case "adaptive":
                return self._proven(events, delta)

    def checked(self, delta: float | None = None, error: float = 0.01) -> EpsilonInterval | None:
        """Where the second accountant finds the true figure; ``None`` for ``adaptive``, whose rule is more than a figure.

        Raises :class:`~casemate_schemas.errors.ParameterError` for what that accountant does not take.
        """
        delta, events = delta or self.delta, [recorded.event for recorded in self.events]
        match self.rule:
            case "fixed":
                return prv_epsilon(events, delta, error)
            case "person":
                return prv_person_epsilon(events, delta, error)
            case "adaptive":
                return None

    def _proven(self, events: Sequence[ScheduledEvent], delta: float) -> float:
        """What the lifetime filter proves; a single job is stated at its own epsilon if that is less."""
        curve = ZERO_CURVE
        for event in events:
            curve = add_curves(curve, rdp_curve(event))
        proven = RenyiFilter(self.limit_epsilon or MAX_EPSILON, delta).spent_epsilon(curve)
        return min(proven, epsilon(events, delta)) if len(events) == 1 else proven


class RecordedEvents(WireModel):
    """The file."""

    format: Literal["casemate-privacy-events"] = "casemate-privacy-events"
    version: Literal[1] = 1
    source: Literal["result", "ledger"]
    neighbouring_relation: Literal["add-or-remove-one"] = "add-or-remove-one"
    unit: Literal["record", "subject"]
    guarantees: Annotated[tuple[StatedGuarantee, ...], Field(max_length=MAX_GUARANTEES)]


def events_of_result(job_id: str, plan: Plan, statement: PrivacyStatement) -> RecordedEvents:
    """What a result states, and the events of its terms that it follows from."""
    events = [RecordedEvent.of(job_event(plan, use)) for use in plan.datasets]
    guarantees = [
        StatedGuarantee(
            of=owner.dataset, job_id=job_id, rule="fixed", epsilon=owner.epsilon, delta=owner.delta, events=(event,)
        )
        for owner, event in zip(statement.owners, events, strict=True)
    ]
    if statement.person_epsilon is not None:
        person = StatedGuarantee(
            of="a person in each of them",
            job_id=job_id,
            rule="person",
            epsilon=statement.person_epsilon,
            delta=statement.person_delta,
            events=tuple(events),
        )
        guarantees.append(person)
    return RecordedEvents(source="result", unit=statement.unit, guarantees=tuple(guarantees))


def events_of_ledger(budget: Budget) -> RecordedEvents:
    """Every charge that an owner's ledger shows, and, where it shows all of them, what each period cost as a whole."""
    guarantees = [
        StatedGuarantee(
            of=f"{budget.dataset}, {line.kind}",
            job_id=line.job_id,
            rule="fixed",
            epsilon=line.epsilon,
            delta=line.delta,
            events=(_event_of(line),),
        )
        for line in budget.lines
    ]
    if budget.n_charges == len(budget.lines):
        for period in sorted({line.period for line in budget.lines}):
            guarantees += _whole(budget, period)
    return RecordedEvents(source="ledger", unit=budget.privacy_unit, guarantees=tuple(guarantees))


def _whole(budget: Budget, period: int) -> tuple[StatedGuarantee, ...]:
    """The period's charges together after the last of them, unless that is still being computed."""
    lines = [line for line in budget.lines if line.period == period]
    if lines[-1].epsilon_after is None:
        return ()
    whole = StatedGuarantee(
        of=f"{budget.dataset}, all of period {period}",
        job_id=None,
        rule="adaptive",
        epsilon=lines[-1].epsilon_after,
        delta=lines[-1].delta,
        limit_epsilon=lines[-1].limit_epsilon,
        events=tuple(map(_event_of, lines)),
    )
    return (whole,)


def _event_of(line: LedgerLine) -> RecordedEvent:
    first = ReleasePhase(sample_rate=line.sample_rate, noise_multiplier=line.noise_multiplier, steps=line.steps)
    return RecordedEvent(phases=(first, *line.further))


def read_events(data: bytes) -> RecordedEvents:
    """The file's contents. Raises :class:`TooLargeError`, or :class:`MalformedError` that names the field."""
    if len(data) > MAX_FILE_BYTES:
        raise TooLargeError(f"expected at most {MAX_FILE_BYTES} bytes, got {len(data)}")
    try:
        return RecordedEvents.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise MalformedError(f"not a file of privacy events: {where}: {first['msg']}") from error
