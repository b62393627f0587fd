"""What was released: privacy events as plain values, from which every accountant starts.

The neighbouring relation is add/remove of one record throughout. An event says nothing about data, so it may be signed,
stored and shown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from casemate_schemas.errors import ParameterError

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

# Together these bounds keep every question that a stranger can ask of an accountant to a few seconds.
MIN_NOISE_MULTIPLIER: Final = 0.3
"""Nobody may ask for less: below it one step costs tens of epsilon, which is a mistake, not a parameter."""

MIN_ACCOUNTED_NOISE: Final = 0.01
"""What others have run with less can still be accounted."""

MAX_NOISE_MULTIPLIER: Final = 1e4
MAX_STEPS: Final = 1_000_000
MIN_RATE: Final = Fraction(1, 1 << 20)
MAX_RATE_DENOMINATOR: Final = 1 << 64
MIN_DELTA: Final = 1e-10
"""Smallest delta accounted for: the numerical error of the PLD's Fourier transforms is some 1e-14."""

MAX_DELTA: Final = 0.5
MAX_EPSILON: Final = 100.0
"""Largest epsilon anyone may ask for. Guarantees beyond it are reported, but nobody plans for them."""

MAX_UNIT_RECORDS: Final = 16
"""Bound on the records of one person or subject in one job."""

MAX_PHASES: Final = 256
"""Bound on the phases of one job's schedule of noise."""


@dataclass(frozen=True, slots=True)
class TrainingEvent:
    """``steps`` releases of a clipped sum over a Poisson sample with Gaussian noise: DP-SGD as one owner's records see it.

    Args:
        sample_rate: probability with which each record joins each step's batch, exact, in [2**-20, 1], denominator at
            most 2**64.
        noise_multiplier: standard deviation of the noise over the clipping norm, in [0.01, 10,000].
        steps: number of releases, 1 to 1,000,000.
        unit_records: the most records that belong to one privacy unit, 1 to 16, sampled and clipped each by itself. One in
            every job of Casemate, which samples a subject with all its records at once.

    Raises :class:`~casemate_schemas.errors.ParameterError` for anything else, NaN included.

    >>> TrainingEvent(Fraction(1, 4), 2.0, 100)
    TrainingEvent(sample_rate=Fraction(1, 4), noise_multiplier=2.0, steps=100, unit_records=1)
    """

    sample_rate: Fraction
    noise_multiplier: float
    steps: int
    unit_records: int = 1

    def __post_init__(self) -> None:
        check_rate(self.sample_rate)
        check_range("noise multiplier", self.noise_multiplier, MIN_ACCOUNTED_NOISE, MAX_NOISE_MULTIPLIER)
        check_steps(self.steps)
        check_unit_records(self.unit_records)

    @property
    def rate_upper(self) -> float:
        """The smallest float that is not below ``sample_rate``; equal to it when the denominator is a power of two."""
        rate = float(self.sample_rate)
        return rate if Fraction(rate) >= self.sample_rate else math.nextafter(rate, 1.0)

    def to_dp_event(self) -> DpEvent:
        """The same event for ``dp_accounting``, with the rate rounded up to a float.

        Raises :class:`~casemate_schemas.errors.ParameterError` for a unit of several records, which its events cannot say.
        """
        from dp_accounting import dp_event as dp

        if self.unit_records != 1:
            raise ParameterError("only events whose unit is one record have a form in dp_accounting")
        step = dp.PoissonSampledDpEvent(self.rate_upper, dp.GaussianDpEvent(self.noise_multiplier))
        return dp.SelfComposedDpEvent(step, self.steps)

    @classmethod
    def from_dp_event(cls, event: DpEvent) -> TrainingEvent:
        """The inverse of :meth:`to_dp_event`; the float rate is taken as the exact rational that it is.

        Raises :class:`~casemate_schemas.errors.ParameterError` for an event of another form.
        """
        from dp_accounting import dp_event as dp

        match event:
            case dp.SelfComposedDpEvent(
                event=dp.PoissonSampledDpEvent(sampling_probability=rate, event=dp.GaussianDpEvent() as gaussian),
                count=count,
            ):
                check_range("sample rate", rate, 0.0, 1.0)
                return cls(Fraction(rate), gaussian.noise_multiplier, count)
        raise ParameterError("expected a self-composed, Poisson-sampled Gaussian event")


@dataclass(frozen=True, slots=True)
class GaussianSumEvent:
    """``releases`` sums over *all* records with Gaussian noise: what evaluations, statistics and DP metrics release.

    Args:
        sensitivity: how far one record can move the released vector, in Euclidean norm; positive.
        noise_std: standard deviation of the noise, in the same unit; 0.01 to 10,000 times the sensitivity.
        releases: their number, 1 to 1,000,000.

    Raises :class:`~casemate_schemas.errors.ParameterError` for anything else, NaN included.

    >>> GaussianSumEvent(sensitivity=2.0, noise_std=10.0, releases=3).sampled
    TrainingEvent(sample_rate=Fraction(1, 1), noise_multiplier=5.0, steps=3, unit_records=1)
    """

    sensitivity: float
    noise_std: float
    releases: int = 1

    def __post_init__(self) -> None:
        check_range("sensitivity", self.sensitivity, 1e-100, 1e100)
        check_range("standard deviation of the noise", self.noise_std, 1e-100, 1e100)
        check_range("noise over sensitivity", self._ratio, MIN_ACCOUNTED_NOISE, MAX_NOISE_MULTIPLIER)
        check_steps(self.releases)

    @property
    def sampled(self) -> TrainingEvent:
        """The same release as steps that sample every record, with the noise multiplier rounded down."""
        return TrainingEvent(Fraction(1), self._ratio, self.releases)

    @property
    def _ratio(self) -> float:
        ratio = self.noise_std / self.sensitivity
        exact = Fraction(ratio) * Fraction(self.sensitivity) <= Fraction(self.noise_std)
        return ratio if exact else math.nextafter(ratio, 0.0)


@dataclass(frozen=True, slots=True)
class ScheduledEvent:
    """Phases of one job, one after another, as its schedule of noise, fixed in advance, has them.

    Args:
        phases: 1 to 256 of them, of one unit; up to 1,000,000 steps together.

    Raises :class:`~casemate_schemas.errors.ParameterError` for anything else.

    >>> rate = Fraction(1, 4)
    >>> ScheduledEvent((TrainingEvent(rate, 3.0, 50), TrainingEvent(rate, 2.0, 50))).steps
    100
    """

    phases: tuple[TrainingEvent, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.phases, tuple) or not 1 <= len(self.phases) <= MAX_PHASES:
            raise ParameterError(f"expected a tuple of 1 to {MAX_PHASES} phases")
        if not all(isinstance(phase, TrainingEvent) for phase in self.phases):
            raise ParameterError("phases: expected training events")
        if len({phase.unit_records for phase in self.phases}) > 1:
            raise ParameterError("phases: expected the same records of one unit in all of them")
        check_steps(self.steps)

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)


PrivacyEvent: TypeAlias = TrainingEvent | GaussianSumEvent | ScheduledEvent
"""Whatever a job may release."""


def sampled(event: PrivacyEvent) -> TrainingEvent:
    """The one form that accountants work on. Raises :class:`~casemate_schemas.errors.ParameterError` for several phases."""
    parts = phases_of(event)
    if len(parts) != 1:
        raise ParameterError(f"expected an event of one phase, got {len(parts)}")
    return parts[0]


def phases_of(event: PrivacyEvent) -> tuple[TrainingEvent, ...]:
    """The training events that an event stands for, equal ones counted together.

    >>> phases_of(GaussianSumEvent(1.0, 2.0, 50))
    (TrainingEvent(sample_rate=Fraction(1, 1), noise_multiplier=2.0, steps=50, unit_records=1),)
    """
    match event:
        case TrainingEvent():
            return (event,)
        case GaussianSumEvent():
            return (event.sampled,)
        case ScheduledEvent():
            return merge(event.phases)


def merge(events: Sequence[PrivacyEvent]) -> tuple[TrainingEvent, ...]:
    """The same composition with equal steps counted together, up to a million, in a fixed order.

    >>> merge([TrainingEvent(Fraction(1), 2.0, 100), GaussianSumEvent(1.0, 2.0, 50)])
    (TrainingEvent(sample_rate=Fraction(1, 1), noise_multiplier=2.0, steps=150, unit_records=1),)
    """
    steps: Counter[tuple[Fraction, float, int]] = Counter()
    for part in (part for event in events for part in phases_of(event)):
        steps[part.sample_rate, part.noise_multiplier, part.unit_records] += part.steps
    return tuple(
        TrainingEvent(rate, sigma, min(count - done, MAX_STEPS), unit)
        for (rate, sigma, unit), count in sorted(steps.items())
        for done in range(0, count, MAX_STEPS)
    )


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Refuse what is not a finite number in [low, high], with :class:`~casemate_schemas.errors.ParameterError`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ParameterError(f"{name}: expected a number in [{low:g}, {high:g}], got {value!r:.40}")


def check_epsilon(value: float) -> None:
    """Refuse an epsilon that nobody can ask for: not a number in [0.001, 100]."""
    check_range("epsilon", value, 1e-3, MAX_EPSILON)


def check_delta(value: float) -> None:
    """Refuse a delta outside [1e-10, 0.5]."""
    check_range("delta", value, MIN_DELTA, MAX_DELTA)


def check_steps(value: int) -> None:
    """Refuse a number of steps that is not an integer in [1, 1,000,000]."""
    if not isinstance(value, int):
        raise ParameterError(f"steps: expected an integer, got {type(value).__name__}")
    check_range("steps", value, 1, MAX_STEPS)


def check_unit_records(value: int) -> None:
    """Refuse a number of records of one unit that is not an integer in [1, 16]."""
    if not isinstance(value, int):
        raise ParameterError(f"records of one unit: expected an integer, got {type(value).__name__}")
    check_range("records of one unit", value, 1, MAX_UNIT_RECORDS)


def check_rate(value: Fraction) -> None:
    """Refuse a sample rate that is not a fraction in [2**-20, 1] with a denominator of at most 2**64."""
    if not isinstance(value, Fraction):
        raise ParameterError(f"sample rate: expected an exact Fraction, got {type(value).__name__}")
    if value.denominator > MAX_RATE_DENOMINATOR or not MIN_RATE <= value <= 1:
        raise ParameterError("sample rate: expected a fraction in [2**-20, 1] with denominator at most 2**64")
