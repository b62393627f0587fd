"""Several owners, one job: one noise for the sum of all, a sample rate for each, so that each meets its own epsilon.

One record lies in one owner's data, and the noise is added to the sum over all owners. So owner i's records see the event
(q_i, sigma, T), whatever the other owners hold: a stricter owner is sampled less often, and does not set the noise for
all. People with records at several owners: :func:`casemate_privacy.accounting.person_epsilon`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from casemate_schemas.errors import ParameterError

from .accounting import epsilon
from .calibration import RATE_DENOMINATOR, crossing, noise_multiplier, sample_rate
from .events import MIN_RATE, ScheduledEvent, check_delta, check_epsilon, check_range
from .shapes import JobShape, shape_of

MAX_OWNERS = 64


@dataclass(frozen=True, slots=True)
class OwnerTarget:
    """One owner's terms: a declared, public bound on its rows (1 to 2**40), and the (epsilon, delta) for this job."""

    rows: int
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not isinstance(self.rows, int):
            raise ParameterError(f"rows: expected an integer, got {type(self.rows).__name__}")
        check_range("rows", self.rows, 1, 1 << 40)
        check_epsilon(self.epsilon)
        check_delta(self.delta)


@dataclass(frozen=True, slots=True)
class OwnersPlan:
    """One noise multiplier and step count for the job; for each owner, in order, its rate and the epsilon it reaches."""

    noise_multiplier: float
    shape: JobShape
    rates: tuple[Fraction, ...]
    epsilons: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Of the job."""
        return self.shape.steps

    def event(self, index: int) -> ScheduledEvent:
        """The event that owner ``index``'s records see."""
        return self.shape.event(self.rates[index], self.noise_multiplier)


def plan_rates(owners: Sequence[OwnerTarget], steps: int | JobShape, noise_multiplier: float) -> OwnersPlan:
    """Each owner's largest rate under a given noise multiplier.

    Each epsilon is at most its target, and within 0.1 % of it unless the owner's rate is 1. Owners with equal targets
    get equal rates.

    Raises :class:`~casemate_schemas.errors.ParameterError` for arguments out of range, more than 64 owners, or an owner
    whose target this noise cannot meet at any rate.

    >>> plan = plan_rates([OwnerTarget(152, 3.0, 1e-3), OwnerTarget(152, 1.0, 1e-3)], 300, 5.0)
    >>> [round(float(rate), 3) for rate in plan.rates], [round(value, 2) for value in plan.epsilons]
    ([0.274, 0.11], [3.0, 1.0])
    """
    _check_owners(owners)
    shape = shape_of(steps)
    rates = tuple(sample_rate(owner.epsilon, owner.delta, noise_multiplier, shape) for owner in owners)
    epsilons = tuple(
        epsilon(shape.event(rate, noise_multiplier), owner.delta) for rate, owner in zip(rates, owners, strict=True)
    )
    return OwnersPlan(noise_multiplier, shape, rates, epsilons)


def plan_job(owners: Sequence[OwnerTarget], steps: int | JobShape, expected_batch: float) -> OwnersPlan:
    """The plan whose batches hold ``expected_batch`` records on average over all owners, to within 1 %.

    Args:
        owners: 1 to 64 of them.
        steps: 1 to 1,000,000, or a job's shape.
        expected_batch: at most the owners' rows together.

    The common noise multiplier lies between what the loosest and the strictest owner would need if all were sampled at
    one rate. Raises as :func:`plan_rates`.

    >>> plan = plan_job([OwnerTarget(152, 3.0, 1e-3)] * 3, steps=300, expected_batch=114)
    >>> plan.noise_multiplier, len(set(plan.rates)), round(float(plan.rates[0]), 3)
    (4.5785, 1, 0.25)
    """
    _check_owners(owners)
    steps = shape_of(steps)
    rows = sum(owner.rows for owner in owners)
    check_range("expected batch", expected_batch, float(rows * MIN_RATE), rows)
    common = Fraction(math.floor(expected_batch / rows * RATE_DENOMINATOR), RATE_DENOMINATOR)
    needed = [noise_multiplier(owner.epsilon, owner.delta, common, steps) for owner in owners]

    def missing(sigma: float) -> float:
        return expected_batch / _expected_batch(owners, plan_rates(owners, steps, sigma))

    return plan_rates(owners, steps, crossing(missing, 1.0, min(needed), max(needed), tolerance=3e-3))


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a job, and what is left of its signal.

    ``samples`` is how many records each of the owners in ``names`` gives to a step on average, if its data has the declared
    rows. ``noise_to_signal`` is the noise's standard deviation in each coordinate of a step's mean gradient, in clipping
    norms: no step's signal is longer than one clipping norm.
    """

    name: str
    names: tuple[str, ...]
    plan: OwnersPlan
    samples: tuple[float, ...]
    noise_to_signal: float


def weigh_choices(
    owners: Mapping[str, OwnerTarget], steps: int | JobShape, expected_batch: float
) -> tuple[Choice, ...]:
    """What individual budgets are worth: rates by owner, against one budget for all, against leaving the strictest out.

    Where all owners' targets are alike there is only one choice. Leaving out is one only where the others have rows enough
    for the batch. Arguments and errors as for :func:`plan_job`; takes a second or two a choice.

    >>> owners = {"north": OwnerTarget(400, 3.0, 1e-3), "south": OwnerTarget(400, 1.0, 1e-3)}
    >>> for choice in weigh_choices(owners, steps=100, expected_batch=80):
    ...     print(choice.name, [round(count) for count in choice.samples], round(choice.noise_to_signal, 3))
    a budget for each [57, 23] 0.021
    the strictest for all [40, 40] 0.034
    without south [80] 0.028
    """
    chosen = {"a budget for each": dict(owners)}
    strictest = min(owners.values(), key=lambda owner: (owner.epsilon, owner.delta))
    alike = {name for name, owner in owners.items() if (owner.epsilon, owner.delta) == _budget_of(strictest)}
    if len(alike) < len(owners):
        lowest_delta = min(owner.delta for owner in owners.values())
        chosen["the strictest for all"] = {
            name: OwnerTarget(owner.rows, strictest.epsilon, lowest_delta) for name, owner in owners.items()
        }
        rest = {name: owner for name, owner in owners.items() if name not in alike}
        if expected_batch <= sum(owner.rows for owner in rest.values()):
            chosen[f"without {', '.join(sorted(alike))}"] = rest
    return tuple(_choice(name, targets, steps, expected_batch) for name, targets in chosen.items())


def _budget_of(owner: OwnerTarget) -> tuple[float, float]:
    return owner.epsilon, owner.delta


def _choice(name: str, targets: Mapping[str, OwnerTarget], steps: int | JobShape, expected_batch: float) -> Choice:
    owners = tuple(targets.values())
    plan = plan_job(owners, steps, expected_batch)
    samples = tuple(owner.rows * float(rate) for owner, rate in zip(owners, plan.rates, strict=True))
    return Choice(name, tuple(targets), plan, samples, plan.noise_multiplier / math.fsum(samples))


def _expected_batch(owners: Sequence[OwnerTarget], plan: OwnersPlan) -> float:
    """The mean size of a batch if every owner's data has the declared rows."""
    return math.fsum(owner.rows * float(rate) for owner, rate in zip(owners, plan.rates, strict=True))


def _check_owners(owners: Sequence[OwnerTarget]) -> None:
    """Refuse none and too many."""
    if not 1 <= len(owners) <= MAX_OWNERS:
        raise ParameterError(f"expected 1 to {MAX_OWNERS} owners, got {len(owners)}")
