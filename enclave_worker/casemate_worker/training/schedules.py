"""What changes from step to step by the plan alone: the learning rate, and how much noise is added."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from casemate_schemas.job import LrSchedule
from torch import Tensor

from .noise import Noise


def lr_factor(schedule: LrSchedule, step: int, steps: int) -> float:
    """What the learning rate is multiplied with at ``step`` (from 0) of ``steps``: see :class:`LrSchedule`.

    >>> [round(lr_factor(LrSchedule(warmup_steps=2, decay="linear"), step, 6), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return 1.0
    done = (step - schedule.warmup_steps) / (steps - schedule.warmup_steps)
    left = 1 - done if schedule.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return schedule.final + (1 - schedule.final) * left


class ScheduledNoise:
    """The mechanism of each phase in its turn: ``phases`` are numbers of steps and noise multipliers.

    All draw from one keystream, each step's words being that step's alone, so no two steps share any.
    """

    def __init__(self, phases: Sequence[tuple[int, float]], mechanism: Callable[[float], Noise]) -> None:
        """``mechanism`` makes the one of a noise multiplier."""
        self._starts = [0, *accumulate(count for count, _ in phases[:-1])]
        self._phases = [mechanism(sigma) for _, sigma in phases]

    def add(self, total: Tensor, step: int) -> Tensor:
        """See :meth:`Noise.add`."""
        return self._at(step).add(total, step)

    def draw_ahead(self, step: int, count: int) -> None:
        """See :meth:`Noise.draw_ahead`."""
        self._at(step).draw_ahead(step, count)

    def _at(self, step: int) -> Noise:
        return self._phases[bisect_right(self._starts, step) - 1]


def mean_noise_variance(phases: Sequence[tuple[int, float]], beta: float, count: int) -> float:
    """The average of σ² over the first ``count`` steps (at least one) in which a step's share falls by ``beta`` each step.

    >>> mean_noise_variance([(100, 3.0)], 0.999, 7)
    9.0
    >>> round(mean_noise_variance([(1, 1.0), (9, 2.0)], 0.5, 2), 6)  # (1/2 · 1 + 1 · 4) / (1/2 + 1)
    3.0
    """
    total = weights = 0.0
    start = 0
    for steps, sigma in phases:
        end = min(start + steps, count)
        if end > start:
            share = beta ** (count - end) - beta ** (count - start)
            total, weights = total + share * sigma**2, weights + share
        start = end
    return total / weights
