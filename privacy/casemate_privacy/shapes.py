"""What a job releases of each owner's records, but for how often they are drawn and how much noise there is at its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from casemate_schemas.errors import ParameterError
from casemate_schemas.job import NoisePhase, noise_phases

from .events import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER, ScheduledEvent, TrainingEvent, check_steps

_OUTWARD = 1 + 1e-9
"""Keeps products with the ends of a range within it, whichever way they round."""


@dataclass(frozen=True, slots=True)
class JobShape:
    """Steps in phases, each with its multiple of the noise multiplier, and releases in which everybody takes part.

    Args:
        phases: (number of steps, factor) each, in order.
        once: noise multipliers of single releases after the last step, over all records (DP metrics).

    >>> shape = JobShape.of(100, [NoisePhase(first_step=60, factor=0.5)])
    >>> shape.steps, [(phase.steps, phase.noise_multiplier) for phase in shape.event(Fraction(1, 8), 2.0).phases]
    (100, [(60, 2.0), (40, 1.0)])
    """

    phases: tuple[tuple[int, float], ...]
    once: tuple[float, ...] = ()

    @classmethod
    def of(cls, steps: int, schedule: Sequence[NoisePhase] = (), once: tuple[float, ...] = ()) -> JobShape:
        """Of so many steps, the noise as ``schedule`` has it.

        Raises :class:`~casemate_schemas.errors.ParameterError` for steps out of range, and unless the schedule's first steps
        ascend and lie below them.
        """
        check_steps(steps)
        starts = [0, *(phase.first_step for phase in schedule), steps]
        if starts != sorted(set(starts)):
            raise ParameterError(f"noise schedule: expected ascending first steps, each below {steps}")
        return cls(noise_phases(1.0, steps, schedule), once)

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(count for count, _ in self.phases)

    @property
    def noise_range(self) -> tuple[float, float]:
        """The noise multipliers with which each phase's own is one that can be accounted."""
        factors = [factor for _, factor in self.phases]
        least, most = min(1.0, *factors), max(1.0, *factors)
        low = MIN_NOISE_MULTIPLIER if least == 1.0 else MIN_NOISE_MULTIPLIER / least * _OUTWARD
        high = MAX_NOISE_MULTIPLIER if most == 1.0 else MAX_NOISE_MULTIPLIER / most / _OUTWARD
        return low, high

    def event(self, rate: Fraction, noise_multiplier: float) -> ScheduledEvent:
        """The job as records drawn at ``rate`` see it.

        Raises :class:`~casemate_schemas.errors.ParameterError` for what cannot be accounted.
        """
        phases = (TrainingEvent(rate, noise_multiplier * factor, count) for count, factor in self.phases)
        return ScheduledEvent((*phases, *(TrainingEvent(Fraction(1), sigma, 1) for sigma in self.once)))


def shape_of(steps: int | JobShape) -> JobShape:
    """The shape itself, or that of so many steps alike."""
    return steps if isinstance(steps, JobShape) else JobShape.of(steps)
