"""The lifetime budget of one dataset, enforced while scientists choose each job from the results of the last.

Why this rule and no simpler one: ``docs/decisions/0003-renyi-filter.md``. In short: what a fixed order of Rényi
divergence leaves may be spent adaptively at no loss (Feldman, Zrnic, "Individual Privacy Accounting via a Rényi Filter",
2021; Lécuyer, "Practical Privacy Filters and Odometers with Rényi Differential Privacy", 2021), but asking for *some*
order of a grid lets an adaptive scientist exceed delta. A mixture over the orders, fixed by the budget alone, is valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from .accounting import epsilon as pld_epsilon
from .events import PrivacyEvent, check_delta, check_epsilon
from .renyi import CURVE_MAX, ORDERS, Array, add_curves, check_curve, rdp_curve, rdp_epsilon

_ORDERS: Final = np.array(ORDERS)
_EXCESS: Final = np.concatenate([[0.0], np.geomspace(1e-4, 40.0, 1280)])
"""Grid of losses beyond epsilon; the bound between two points is taken from both, so any grid is safe."""

_TILT: Final = np.outer(_EXCESS, _ORDERS - 1)
_LOG_FRACTION: Final = np.append(np.log(-np.expm1(-_EXCESS[1:])), 0.0)
"""log(1 - exp(-excess)) at the upper end of each cell of the grid; the last cell is unbounded."""

_SIGMA_RANGE: Final = (0.01, 1e6)
_OUTWARD: Final = 1e-9
"""Subtracted from log(delta): covers rounding."""


@dataclass(frozen=True, slots=True)
class RenyiFilter:
    """A dataset's budget: all jobs that :meth:`admits` let through are together (``epsilon``, ``delta``)-DP.

    This holds whatever the jobs' order and parameters, chosen with knowledge of all earlier outputs, run one by one or
    concurrently, so long as each is admitted on the sum of the curves of *all* jobs admitted before it.

    Args:
        epsilon: in [0.001, 100].
        delta: in [1e-10, 0.5].

    Raises :class:`~casemate_schemas.errors.ParameterError` for anything else, and for malformed curves.

    >>> from fractions import Fraction
    >>> from casemate_privacy import TrainingEvent, ZERO_CURVE
    >>> budget, job = RenyiFilter(3.0, 1e-5), rdp_curve(TrainingEvent(Fraction(1, 100), 1.0, 300))
    >>> spent, jobs = ZERO_CURVE, 0
    >>> while budget.admits(spent, job):
    ...     spent, jobs = add_curves(spent, job), jobs + 1
    >>> jobs, round(budget.spent_epsilon(spent), 2)
    (6, 2.86)
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        check_delta(self.delta)

    def admits(self, spent: Sequence[float], new: Sequence[float]) -> bool:
        """Whether a release with the curve ``new`` keeps the guarantee after releases of total ``spent``."""
        return self._covers(add_curves(spent, new), self.epsilon)

    def admits_event(self, spent: Sequence[float], event: PrivacyEvent) -> bool:
        """:meth:`admits`, or, for the very first release, that its own exact epsilon fits the budget.

        The first release depends on no output, so its PLD is a guarantee. If only the PLD admits it, no later release
        passes :meth:`admits`, so it stays the only one.
        """
        if self.admits(spent, rdp_curve(event)):
            return True
        return not any(spent) and pld_epsilon(event, self.delta) <= self.epsilon

    def spent_epsilon(self, spent: Sequence[float]) -> float:
        """The smallest epsilon, rounded up, that the filter proves for the releases so far; 0 if there were none.

        It is far from additive, and above the budget after a first release that only the PLD admitted.
        """
        check_curve(spent)
        if not any(spent):
            return 0.0
        guess = rdp_epsilon(spent, self.delta)
        return _smallest(lambda epsilon: self._excess(spent, epsilon), (guess, 1.2 * guess), (1e-6, 1e6))

    def remaining_epsilon(self, spent: Sequence[float]) -> float:
        """Epsilon of the largest single Gaussian release, at this delta, that would still be admitted; rounded down.

        A guide for the next job, not a promise: one whose loss is far from Gaussian (a tiny noise multiplier at a tiny
        rate) may be refused at less.
        """
        check_curve(spent)
        if not any(spent):
            return self.epsilon
        if not self.admits(spent, _gaussian_curve(_SIGMA_RANGE[1])):
            return 0.0
        sigma = _smallest(
            lambda value: self._excess(add_curves(spent, _gaussian_curve(value)), self.epsilon),
            (1.0, 32.0),
            _SIGMA_RANGE,
        )
        from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

        return float(min(get_epsilon_gaussian(sigma, self.delta), self.epsilon))

    def _covers(self, total: Sequence[float], epsilon: float) -> bool:
        """Whether (1 - exp(epsilon - loss))+ <= delta * mixture(loss) for every privacy loss."""
        return self._excess(total, epsilon) <= 0

    def _excess(self, total: Sequence[float], epsilon: float) -> float:
        """By what factor, as a logarithm, the left side of that is larger at the worst loss. It falls with epsilon."""
        check_curve(total)
        exponent = _TILT + (_log_weights(self.epsilon, self.delta) + (_ORDERS - 1) * (epsilon - np.array(total)))
        peak = exponent.max(axis=1)
        log_mixture = peak + np.log(np.exp(exponent - peak[:, None]).sum(axis=1))
        return float((_LOG_FRACTION - log_mixture).max()) - (math.log(self.delta) - _OUTWARD)


@lru_cache(maxsize=256)
def _log_weights(epsilon: float, delta: float) -> Array:
    """The mixture over orders: three quarters about the order that serves Gaussian releases best, a quarter below it.

    It is a function of the budget alone: weights that followed the releases would void the proof. The shape trades the
    Gaussian-like case, which nearly all training is, for some service to heavy-tailed losses.
    """
    convert = np.log1p(-1 / _ORDERS) - np.log(delta * _ORDERS) / (_ORDERS - 1)
    log_order = np.log(_ORDERS - 1)
    best = log_order[np.argmax((epsilon - convert) / _ORDERS)]
    spacing = np.gradient(log_order)
    weights = 0.75 * _bump(log_order - best, 0.12, spacing) + 0.25 * _bump(log_order - best + 0.6, 0.5, spacing)
    log_weights: Array = np.log(np.maximum(weights, np.finfo(np.float64).tiny) / weights.sum()) - _OUTWARD
    return log_weights


def _bump(offset: Array, width: float, spacing: Array) -> Array:
    """Normal weights of total one over unevenly spaced points."""
    weights = np.exp(-((offset / width) ** 2) / 2) * spacing
    return np.asarray(weights / weights.sum())


def _gaussian_curve(sigma: float) -> tuple[float, ...]:
    """The curve of one Gaussian release at full rate."""
    return tuple(min(order / (2 * sigma * sigma), CURVE_MAX) for order in ORDERS)


def _smallest(excess: Callable[[float], float], near: tuple[float, float], within: tuple[float, float]) -> float:
    """The smallest value, rounded up by less than 1e-8 of it, from which a falling function is not above zero.

    It is looked for in ``near`` first. The upper end of ``within`` if there is none in it.
    """
    from scipy.optimize import brentq

    low, high = (min(max(value, within[0]), within[1]) for value in near)
    if not (excess(low) > 0 >= excess(high)):
        low, high = within
    if excess(low) <= 0 or excess(high) > 0:
        return low if excess(low) <= 0 else high
    found = brentq(lambda value: excess(math.exp(value)), math.log(low), math.log(high), xtol=1e-9)  # type: ignore[no-untyped-call]
    value = math.exp(found)
    while excess(value) > 0:
        value *= 1 + 2e-9
    return min(value, high)
