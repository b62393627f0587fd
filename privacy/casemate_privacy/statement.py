"""What a plan costs each owner, and a person in several owners' data: figures that follow from public parameters alone.

Workers put the statement into the result; the SDK makes it again from the terms and compares.
"""

from __future__ import annotations

from casemate_schemas.errors import ParameterError
from casemate_schemas.job import DatasetUse, Plan
from casemate_schemas.result import OwnerPrivacy, PrivacyStatement

from .accounting import epsilon, person_epsilon
from .events import TrainingEvent


def training_event(plan: Plan, use: DatasetUse, steps: int | None = None) -> TrainingEvent:
    """The plan as the records of one of its datasets see it, after ``steps`` steps (all, if not given)."""
    training = plan.training
    return TrainingEvent(
        use.sample_rate.fraction, training.noise_multiplier, training.steps if steps is None else steps
    )


def privacy_statement(plan: Plan) -> PrivacyStatement:
    """The guarantee of the whole plan. Takes up to a second the first time.

    Raises :class:`ParameterError` for parameters that no accountant takes.
    """
    events = [training_event(plan, use) for use in plan.datasets]
    owners = tuple(
        OwnerPrivacy(
            dataset=use.dataset,
            epsilon=epsilon(event, plan.privacy.delta),
            delta=plan.privacy.delta,
            sample_rate=use.sample_rate,
            noise_multiplier=event.noise_multiplier,
            steps=event.steps,
        )
        for use, event in zip(plan.datasets, events, strict=True)
    )
    person = _person(events, plan.privacy.delta)
    return PrivacyStatement(owners=owners, person_epsilon=person, person_delta=plan.privacy.delta)


def planned_epsilon(plan: Plan, step: int) -> float:
    """The largest owner's epsilon after ``step`` steps, at the plan's delta."""
    if step == 0:
        return 0.0
    return max(epsilon(training_event(plan, use, step), plan.privacy.delta) for use in plan.datasets)


def _person(events: list[TrainingEvent], delta: float) -> float | None:
    try:
        return person_epsilon(events, delta)
    except ParameterError:
        return None
