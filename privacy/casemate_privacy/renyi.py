"""Rényi divergence of DP-SGD on one fixed grid of orders, rounded outward: what the lifetime ledger adds up.

A *curve* is a tuple of floats, one for each order of :data:`ORDERS`: upper bounds, in both directions of the add/remove
relation, on the Rényi divergence between the output distributions of neighbours. Curves of several releases add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from casemate_schemas.errors import ParameterError
from numpy.typing import NDArray

from .events import PrivacyEvent, TrainingEvent, phases_of

Curve: TypeAlias = tuple[float, ...]
Array: TypeAlias = NDArray[np.float64]

# fmt: off
ORDERS: Final[tuple[float, ...]] = (
    1.1, 1.2, 1.35, 1.5, 1.65, 1.8, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5,
    7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 23, 26, 30, 34, 39, 45, 52, 60, 70, 80, 92, 106, 122, 140, 160, 185, 212,
    244, 280, 322, 370, 426, 490,
)
# fmt: on
"""The orders of every curve. Stored curves depend on them: changing the grid is a new ledger format."""

CURVE_MAX: Final = 1e9
"""Curves saturate here: an order that reached it stays unusable for ever, whatever the budget."""

ZERO_CURVE: Final[Curve] = (0.0,) * len(ORDERS)
"""The curve of nothing released."""

_OUTWARD: Final = 1 + 1e-9
"""Factor that covers the rounding of all that follows (measured below 1e-11 against 60-digit arithmetic)."""

_ROUNDING: Final = 1e-12
"""Added where a divergence near zero is the logarithm of a sum near one."""

_MAX_POINTS: Final = 1 << 16
"""Of one quadrature over a mixture: some 20 ms."""


def rdp_curve(event: PrivacyEvent) -> Curve:
    """Upper bounds on the Rényi divergence of ``event`` at each of :data:`ORDERS`.

    Source: Mironov, Talwar, Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism" (2019), theorem 4 (the
    order of neighbours that dominates) and section 3.3 (integer orders); fractional orders by quadrature. Units of several
    records: the mixture of Gaussians over how many of them a batch holds, both directions by quadrature. Orders whose
    divergence exceeds :data:`CURVE_MAX` saturate.

    >>> from fractions import Fraction
    >>> from casemate_privacy import TrainingEvent
    >>> curve = rdp_curve(TrainingEvent(Fraction(1, 10), 2.0, 100))
    >>> [(order, round(value, 4)) for order, value in zip(ORDERS, curve) if order in (2, 4.5, 20)]
    [(2, 0.2836), (4.5, 0.6856), (20, 18.8314)]
    """
    first, *others = (_phase_curve(phase) for phase in phases_of(event))
    for other in others:
        first = add_curves(first, other)
    return first


def add_curves(first: Sequence[float], second: Sequence[float]) -> Curve:
    """The curve of both releases together: sums rounded up, saturating at :data:`CURVE_MAX`.

    Raises :class:`~casemate_schemas.errors.ParameterError` for what is not a curve.
    """
    check_curve(first)
    check_curve(second)
    return tuple(
        min(math.nextafter(a + b, math.inf), CURVE_MAX) if a and b else a + b
        for a, b in zip(first, second, strict=True)
    )


def check_curve(curve: Sequence[float]) -> None:
    """Refuse what is not one finite, non-negative float for each order."""
    if len(curve) != len(ORDERS):
        raise ParameterError(f"Rényi curve: expected {len(ORDERS)} values, got {len(curve)}")
    if not all(isinstance(value, float) and 0.0 <= value <= CURVE_MAX for value in curve):
        raise ParameterError(f"Rényi curve: expected floats in [0, {CURVE_MAX:g}]")


def rdp_epsilon(curve: Sequence[float], delta: float) -> float:
    """Epsilon of the (epsilon, ``delta``)-guarantee that a curve fixed in advance implies.

    Not a filter: the best order is chosen afterwards (see ``docs/decisions/0003-renyi-filter.md``). Source: Canonne,
    Kamath, Steinke, "The Discrete Gaussian for Differential Privacy" (2020), proposition 12.

    >>> from fractions import Fraction
    >>> from casemate_privacy import TrainingEvent
    >>> round(rdp_epsilon(rdp_curve(TrainingEvent(Fraction("0.0819"), 3.0, 2000)), 1e-5), 3)
    6.237
    """
    check_curve(curve)
    if not any(curve):
        return 0.0
    usable = [(a, r) for a, r in zip(ORDERS, curve, strict=True) if r < CURVE_MAX]
    bounds = [r + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a, r in usable]
    return max(min(bounds, default=math.inf) * _OUTWARD, 0.0)


def _phase_curve(event: TrainingEvent) -> Curve:
    """The curve of all of one phase's steps."""
    step = _step_curve(event.rate_upper, event.noise_multiplier, event.unit_records)
    return tuple(min(value * event.steps * _OUTWARD, CURVE_MAX) for value in step)


@lru_cache(maxsize=1024)
def _step_curve(rate: float, sigma: float, records: int = 1) -> Curve:
    """The divergence of one step at each order."""
    if records > 1:
        return _group_curve(rate, sigma, records)
    if rate == 1.0:
        return tuple(order / (2 * sigma * sigma) for order in ORDERS)
    moments = (_log_moment_integer if order == int(order) else _log_moment_fractional for order in ORDERS)
    return tuple(moment(order, rate, sigma) / (order - 1) for moment, order in zip(moments, ORDERS, strict=True))


def _group_curve(rate: float, sigma: float, records: int) -> Curve:
    """The divergence for a unit of several records, each sampled by itself: of sum_k p_k N(k, sigma^2) from N(0, sigma^2).

    At most that of moving by all records at every step, which stands in where the quadrature would be too long.
    """
    bound = _step_curve(1.0, math.nextafter(sigma / records, 0.0))
    if rate == 1.0:
        return bound
    counts = np.arange(records + 1)
    log_weight = np.array([math.log(math.comb(records, k)) for k in range(records + 1)])
    log_weight += counts * math.log(rate) + (records - counts) * math.log1p(-rate)
    return tuple(
        min(_group_divergence(order, log_weight, sigma), limit) for order, limit in zip(ORDERS, bound, strict=True)
    )


def _group_divergence(order: float, log_weight: Array, sigma: float) -> float:
    """The larger of both directions at one order, by the trapezoid rule; infinite where that would take too long.

    A polynomial of degree m with positive coefficients has no zero within pi/m of the positive axis (Obreschkoff 1923), so
    the integrands are analytic for |Im z| < pi sigma^2 / m, and the rule's error is below 1e-30.
    """
    records = len(log_weight) - 1
    h = min(sigma, sigma * sigma / records) / 4
    reach = order * records + 14 * sigma
    if reach / h > _MAX_POINTS:
        return math.inf
    divergence = 0.0
    for power, start, end in ((order, -14 * sigma, reach), (1 - order, -reach, 14 * sigma)):
        z = np.arange(start, end, h)
        counts = np.arange(records + 1)[:, None]
        log_ratio = np.logaddexp.reduce(log_weight[:, None] + counts * (2 * z - counts) / (2 * sigma * sigma))
        log_density = -z * z / (2 * sigma * sigma) + math.log(h / (sigma * math.sqrt(2 * math.pi)))
        divergence = max(divergence, float(np.logaddexp.reduce(log_density + power * log_ratio)))
    return (divergence + _ROUNDING) / (order - 1)


def _log_moment_integer(order: float, rate: float, sigma: float) -> float:
    """log E[((1-q) + q exp(X))^order], X the Gaussian's loss, by the binomial sum.

    The terms 0 and 1 and the binomial weights' sum, which is one, are taken out, so that all terms are positive and a
    divergence near zero keeps its relative precision.
    """
    k = np.arange(1, int(order) + 1)
    log_weight = np.cumsum(np.log((order + 1 - k) / k)) + k * math.log(rate) + (order - k) * math.log1p(-rate)
    growth = (k * k - k)[1:] / (2 * sigma * sigma)
    return float(np.logaddexp(0.0, np.logaddexp.reduce(log_weight[1:] + growth + np.log(-np.expm1(-growth)))))


def _log_moment_fractional(order: float, rate: float, sigma: float) -> float:
    """The same for any order below 8, by the trapezoid rule over the noise z.

    The integrand is positive: E[(1+u)^order - 1 - order*u] with u = q(exp((2z-1)/(2 sigma^2)) - 1) of mean zero. It is
    analytic in the strip |Im z| < pi sigma^2, where the rule's error falls as exp(-2 pi^2 sigma^2 / h): below 1e-60 here.
    """
    h = min(sigma, sigma * sigma) / 8
    z = np.arange(-14 * sigma, 8 + 14 * sigma, h)
    log_density = -z * z / (2 * sigma * sigma) + math.log(h / (sigma * math.sqrt(2 * math.pi)))
    loss = (2 * z - 1) / (2 * sigma * sigma)
    u = rate * np.expm1(np.minimum(loss, 100.0))
    near, far = u <= 1, u > 1
    log_excess = np.empty_like(z)
    log_excess[near] = _log_excess_near(order, u[near])
    log_excess[far] = _log_excess_far(order, np.logaddexp(math.log1p(-rate), math.log(rate) + loss[far]))
    return float(np.logaddexp(0.0, np.logaddexp.reduce(log_density + log_excess)))


def _log_excess_near(order: float, u: Array) -> Array:
    """log((1+u)^order - 1 - order*u) for -1 < u <= 1; by its series near zero, where the difference would cancel."""
    tail = np.zeros_like(u)
    for k in range(9, 1, -1):
        tail = (1 + tail) * u * (order - k + 1) / k
    direct = np.expm1(order * np.log1p(u)) - order * u
    excess = np.where(np.abs(u) < 0.01, order * u * tail, direct)
    return np.log(np.maximum(excess, np.finfo(np.float64).tiny))


def _log_excess_far(order: float, t: Array) -> Array:
    """The same for u > 1, where (1+u)^order may overflow, given t = log(1+u)."""
    return order * t + np.log1p((order - 1) * np.exp(-order * t) - order * np.exp((1 - order) * t))
