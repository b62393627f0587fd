"""Which noise, or which sample rate, meets a target epsilon: the PLD's answer, on public grids.

Results satisfy :func:`casemate_privacy.accounting.epsilon` <= target exactly as computed, so whoever recomputes agrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Final

from casemate_schemas.errors import ParameterError

from .accounting import epsilon
from .events import (
    MAX_NOISE_MULTIPLIER,
    MIN_NOISE_MULTIPLIER,
    MIN_RATE,
    check_delta,
    check_epsilon,
    check_range,
    check_rate,
)
from .renyi import rdp_curve, rdp_epsilon
from .shapes import JobShape, shape_of

RATE_DENOMINATOR: Final = 1 << 32
"""Planned sample rates are multiples of 2**-32: exact as rationals, as floats and as integer thresholds."""

_SIGNIFICANT_DIGITS: Final = 5
_MARGIN: Final = 1 - 1e-7
"""Plans aim this much below the target, so that another machine's last digit cannot turn a plan into a refusal."""


def noise_multiplier(target_epsilon: float, delta: float, sample_rate: Fraction, steps: int | JobShape) -> float:
    """The smallest noise multiplier of five significant digits with which ``steps`` steps stay within the target.

    Args:
        target_epsilon: in [0.001, 100].
        delta: in [1e-10, 0.5].
        sample_rate: in [2**-20, 1], denominator at most 2**64.
        steps: 1 to 1,000,000; or a job's shape, whose first noise multiplier is then looked for.

    The epsilon reached is at most the target, and within 0.1 % of it unless the smallest noise multiplier allowed, 0.3,
    already does better.

    Raises :class:`~casemate_schemas.errors.ParameterError` for arguments out of range and for a target that no noise
    multiplier up to 10,000 meets.

    >>> noise_multiplier(3.0, 1e-3, Fraction(1, 4), 300)
    4.5785
    """
    check_epsilon(target_epsilon)
    check_delta(delta)
    check_rate(sample_rate)
    return _noise_multiplier(target_epsilon, delta, sample_rate, shape_of(steps))


def sample_rate(target_epsilon: float, delta: float, noise_multiplier: float, steps: int | JobShape) -> Fraction:
    """The largest sample rate, a multiple of 2**-32, with which ``steps`` steps stay within the target.

    Arguments as for :func:`noise_multiplier`, which must be in [0.3, 10,000] here. The epsilon reached is within 0.1 % of
    the target unless the rate is 1.

    Raises :class:`~casemate_schemas.errors.ParameterError` for arguments out of range and for a target that no rate of
    at least 2**-20 meets.

    >>> sample_rate(3.0, 1e-3, 4.5785, 300) > Fraction(1, 4)
    True
    """
    check_epsilon(target_epsilon)
    check_delta(delta)
    check_range("noise multiplier", noise_multiplier, MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER)
    return _sample_rate(target_epsilon, delta, noise_multiplier, shape_of(steps))


@lru_cache(maxsize=256)
def _noise_multiplier(target: float, delta: float, rate: Fraction, shape: JobShape) -> float:
    """Bracket with the Rényi bound, which is above the PLD, then refine with the PLD."""

    def cost(sigma: float) -> float:
        return epsilon(shape.event(rate, sigma), delta)

    def bound(sigma: float) -> float:
        return rdp_epsilon(rdp_curve(shape.event(rate, sigma)), delta)

    goal = target * _MARGIN
    least, most = shape.noise_range
    if bound(most) > goal:
        raise ParameterError(f"no noise multiplier up to {most:g} keeps epsilon within {target:g}")
    if cost(least) <= goal:
        return least
    enough = crossing(bound, goal, least, most, tolerance=1e-3)
    enough = min(enough * 1.002, most)
    little = max(enough / 2, least)
    if cost(little) <= goal:  # the bound is loose here
        little = least
    sigma = crossing(cost, goal, little, enough, tolerance=2e-6)
    return _smallest_on_grid(lambda value: cost(value) <= goal, sigma, least)


@lru_cache(maxsize=256)
def _sample_rate(target: float, delta: float, sigma: float, shape: JobShape) -> Fraction:
    """The same for the rate; epsilon falls with its inverse."""

    def cost(rate: float) -> float:
        return epsilon(shape.event(_on_grid(rate), sigma), delta)

    def bound(rate: float) -> float:
        return rdp_epsilon(rdp_curve(shape.event(_on_grid(rate), sigma)), delta)

    goal = target * _MARGIN
    if cost(1.0) <= goal:
        return Fraction(1)
    lowest = float(MIN_RATE)
    if cost(lowest) > goal:
        raise ParameterError(f"no sample rate keeps epsilon within {target:g} at noise multiplier {sigma:g}")
    few = crossing(lambda inverse: bound(1 / inverse), goal, 1.0, 1 / lowest, tolerance=1e-2)
    many = max(few / 2, 1.0)
    if cost(1 / many) <= goal:  # the bound is loose here
        many = 1.0
    rate = 1 / crossing(lambda inverse: cost(1 / inverse), goal, many, min(few * 1.02, 1 / lowest), tolerance=1e-5)
    chosen = _on_grid(rate)
    while cost(float(chosen)) > goal:  # ends: the smallest rate meets it
        chosen = _on_grid(float(chosen) * (1 - 1e-5))
    return chosen


def crossing(cost: Callable[[float], float], goal: float, low: float, high: float, tolerance: float) -> float:
    """Where ``cost``, which falls from ``low`` to ``high``, crosses ``goal``, to a relative ``tolerance``."""
    from scipy.optimize import brentq

    def value(log_value: float) -> float:
        return min(max(math.exp(log_value), low), high)

    def excess(log_value: float) -> float:
        return math.log(max(cost(value(log_value)), goal * 1e-9) / goal)

    start, end = math.log(low), math.log(high)
    if excess(start) <= 0:
        return low
    if excess(end) >= 0:
        return high
    root = brentq(excess, start, end, xtol=tolerance, rtol=1e-12)  # type: ignore[no-untyped-call]
    return value(root)


def _smallest_on_grid(meets: Callable[[float], bool], guess: float, least: float) -> float:
    """The smallest grid value, not below ``least``, that meets a condition which holds from near ``guess`` upwards."""
    exponent = math.floor(math.log10(guess)) - _SIGNIFICANT_DIGITS + 1

    def grid(k: int) -> float:
        return float(f"{k}e{exponent}")

    k = math.ceil(guess / 10.0**exponent)
    while not meets(grid(k)):
        k += 1
    while grid(k - 1) >= least and meets(grid(k - 1)):
        k -= 1
    return grid(k)


def _on_grid(rate: float) -> Fraction:
    """``rate`` rounded down to the grid, but not below the smallest rate."""
    return max(Fraction(math.floor(rate * RATE_DENOMINATOR), RATE_DENOMINATOR), MIN_RATE)
