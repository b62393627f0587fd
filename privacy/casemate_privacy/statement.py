"""What a plan costs each owner, and a person in several owners' data: figures that follow from public parameters alone.

Workers put the statement into the result; the SDK makes it again from the terms and compares.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final

from casemate_schemas.errors import ParameterError
from casemate_schemas.job import DatasetUse, Plan
from casemate_schemas.result import NoisedSteps, OwnerPrivacy, PrivacyStatement

from .accounting import epsilon, person_epsilon
from .events import ScheduledEvent, TrainingEvent

MAX_ACCOUNTED: Final = 64
"""Bound on the pairs of a sample rate and a noise in one plan."""


def job_event(plan: Plan, use: DatasetUse, steps: int | None = None) -> ScheduledEvent:
    """The plan as one privacy unit of one of its datasets sees it, after ``steps`` steps (all, if not given).

    A subject is sampled with all its records at once, and they share one clipping norm, so it costs what a record does.
    Padding draws from places that do not depend on the data, so it costs nothing (``docs/privacy-accounting.md``). Metrics
    are one more phase after the last step, in which everyone takes part.
    """
    training, rate = plan.training, use.sample_rate.fraction
    left = training.steps if steps is None else min(steps, training.steps)
    phases: list[TrainingEvent] = []
    for count, sigma in training.noise_phases:
        if (taken := min(count, left)) > 0:
            phases.append(TrainingEvent(rate, sigma, taken))
            left -= taken
    if plan.metrics is not None and (steps is None or steps >= training.steps):
        phases.append(TrainingEvent(Fraction(1), plan.metrics.noise_multiplier, 1))
    return ScheduledEvent(tuple(phases))


def check_accountable(plan: Plan) -> None:
    """Raises :class:`ParameterError` for a plan of more than :data:`MAX_ACCOUNTED` pairs of a rate and a phase's noise.

    Datasets that are sampled alike count once. Everyone who judges a plan composes all its pairs of theirs, so this bounds
    what a stranger can have them do: some 0.15 s a pair at worst.
    """
    rates = {use.sample_rate for use in plan.datasets}
    sigmas = {sigma for _, sigma in plan.training.noise_phases}
    if (pairs := len(rates) * len(sigmas)) > MAX_ACCOUNTED:
        raise ParameterError(
            f"{len(rates)} sample rates in {len(sigmas)} phases of noise make {pairs} pairs to account for, at most "
            f"{MAX_ACCOUNTED} are: fewer phases, or a target that more owners can share"
        )


def privacy_statement(plan: Plan) -> PrivacyStatement:
    """The guarantee of the whole plan. Takes seconds, at worst, the first time.

    Raises :class:`ParameterError` for parameters that no accountant takes, or too many of them.
    """
    check_accountable(plan)
    events = [job_event(plan, use) for use in plan.datasets]
    owners = tuple(
        OwnerPrivacy(
            dataset=use.dataset,
            epsilon=epsilon(event, plan.privacy.delta),
            delta=plan.privacy.delta,
            sample_rate=use.sample_rate,
        )
        for use, event in zip(plan.datasets, events, strict=True)
    )
    person = _person(events, plan.privacy.delta)
    return PrivacyStatement(
        unit=plan.privacy.unit,
        mechanism=plan.training.mechanism,
        noise=tuple(NoisedSteps(steps=steps, noise_multiplier=sigma) for steps, sigma in plan.training.noise_phases),
        owners=owners,
        person_epsilon=person,
        person_delta=plan.privacy.delta,
        metrics_noise_multiplier=None if plan.metrics is None else plan.metrics.noise_multiplier,
    )


def planned_epsilon(plan: Plan, step: int) -> float:
    """The largest owner's epsilon after ``step`` steps, at the plan's delta."""
    if step == 0:
        return 0.0
    use = max(plan.datasets, key=lambda use: use.sample_rate.fraction)  # the noise is the same for all
    return epsilon(job_event(plan, use, step), plan.privacy.delta)


def _person(events: list[ScheduledEvent], delta: float) -> float | None:
    try:
        return person_epsilon(events, delta)
    except ParameterError:
        return None
