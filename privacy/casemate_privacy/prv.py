"""A second accountant, which shares no code with the first: it is never charged by, it only says whether the first is right.

Privacy random variables: the loss of one step is discretised by inverting its distribution function, its mean is corrected,
and the composition is one power of its Fourier transform. Where the first accountant is an upper bound by construction,
this one states an interval in which the truth lies.

Source: Gopi, Lee, Wutschitz, "Numerical Composition of Differential Privacy" (2021), algorithms 1 and 2, theorem 5.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from casemate_schemas.errors import ParameterError
from scipy import special

from .events import PrivacyEvent, ScheduledEvent, TrainingEvent, check_delta, check_range, merge
from .renyi import Array

MAX_DISTINCT: Final = 256
_MAX_POINTS: Final = 1 << 22
"""Of one discretised loss. Where more would be needed for the error asked for, the interval is wider."""

_MAX_LOSS: Final = 600.0
"""exp() of it is a float."""

_SHARE: Final = 1e-4
"""Part of delta that each source of error in the probabilities may take."""


@dataclass(frozen=True, slots=True)
class EpsilonInterval:
    """The true epsilon lies between ``lower`` and ``upper``; ``estimate`` is the best guess."""

    lower: float
    estimate: float
    upper: float


def prv_epsilon(events: Sequence[PrivacyEvent], delta: float, error: float) -> EpsilonInterval:
    """An interval that holds the epsilon of ``events`` together at ``delta``, some ``2 * error`` wide.

    Args:
        events: up to 256 distinct ones, fixed in advance.
        delta: in [1e-10, 0.5].
        error: in [1e-4, 1], of epsilon. Some hundred thousand steps at once are answered more coarsely than asked.

    Takes 0.1 to 2 s. Raises :class:`~casemate_schemas.errors.ParameterError` for arguments out of range and for losses
    beyond 600.

    >>> from fractions import Fraction
    >>> found = prv_epsilon([TrainingEvent(Fraction("0.0819"), 3.0, 2000)], 1e-5, 0.01)
    >>> round(found.lower, 2), round(found.estimate, 2), round(found.upper, 2)
    (5.76, 5.77, 5.78)
    """
    return _interval([[phase] for phase in merge(events)], delta, error)


def prv_person_epsilon(events: Sequence[TrainingEvent | ScheduledEvent], delta: float, error: float) -> EpsilonInterval:
    """The same for a person with records at several owners of one job, as :func:`~casemate_privacy.person_epsilon` is.

    ``events`` has the same noise multipliers and steps for each owner, which this does not check.
    """
    owners = [event.phases if isinstance(event, ScheduledEvent) else (event,) for event in events]
    return _interval(list(zip(*owners, strict=True)), delta, error)


def _interval(releases: Sequence[Sequence[TrainingEvent]], delta: float, error: float) -> EpsilonInterval:
    """Each release is what the records of one unit, or of one person at several owners, see of it."""
    check_delta(delta)
    check_range("error", error, 1e-4, 1.0)
    if len(releases) > MAX_DISTINCT:
        raise ParameterError(f"expected at most {MAX_DISTINCT} distinct events, got {len(releases)}")
    if not releases:
        return EpsilonInterval(0.0, 0.0, 0.0)
    found = [_one_direction(releases, delta, error, adds=adds) for adds in (False, True)]
    return EpsilonInterval(*(max(values) for values in zip(*found, strict=True)))


@dataclass(frozen=True)
class _Step:
    """One step with noise ``sigma``: outcomes of N(0, sigma^2), or of a mixture of N(count, sigma^2), told apart.

    The loss log(mixture/null) rises with the outcome and is convex. Outcomes outside of [``low``, ``high``] are so rare
    that they count as those bounds.
    """

    log_weights: Array
    sigma: float
    low: float
    high: float

    @classmethod
    def of(cls, release: Sequence[TrainingEvent], tail: float) -> _Step:
        sigma, weights = release[0].noise_multiplier, np.ones(1)
        for event in release:
            for _ in range(event.unit_records):
                weights = np.convolve(weights, [1 - event.rate_upper, event.rate_upper])
        reach = -sigma * float(special.ndtri(tail))
        with np.errstate(divide="ignore"):
            return cls(np.log(weights), sigma, -reach, len(weights) - 1 + reach)

    def loss(self, outcome: Array) -> Array:
        return np.asarray(np.logaddexp.reduce(self._terms(outcome)))

    def outcome(self, loss: Array) -> Array:
        """The inverse of :meth:`loss`, by Newton's method from above, from where it cannot overshoot."""
        table = np.linspace(self.low, self.high, 1 << 12)
        found = table[np.minimum(np.searchsorted(self.loss(table), loss), len(table) - 1)]
        counts = np.arange(len(self.log_weights))[:, None]
        for _ in range(6):
            terms = self._terms(found)
            value = np.logaddexp.reduce(terms)
            slope = (counts * np.exp(terms - value)).sum(axis=0) / self.sigma**2
            found = np.clip(found - (value - loss) / np.maximum(slope, 1e-300), self.low, self.high)
        return np.asarray(found)

    def masses(self, outcomes: Array, *, null: bool) -> Array:
        """The probabilities of the gaps between ascending outcomes, the first and the last of which reach to infinity."""
        weights = [1.0] if null else np.exp(self.log_weights)
        total = np.zeros(len(outcomes) + 1)
        for count, weight in enumerate(weights):
            z = np.concatenate([[-np.inf], (outcomes - count) / self.sigma, [np.inf]])
            gaps = np.where(z[1:] < 0, np.diff(special.ndtr(z)), -np.diff(special.ndtr(-z)))
            total += weight * gaps
        return total

    def moments(self, tilts: Array, *, null: bool) -> tuple[float, Array]:
        """The mean loss, and the logarithms of E[exp(tilt * loss)], by the trapezoid rule."""
        spacing = min(self.sigma, self.sigma**2) / 32
        z = np.arange(self.low, self.high, spacing)
        loss = self.loss(z)
        log_density = -((z / self.sigma) ** 2) / 2 + (0.0 if null else loss)
        log_density -= np.logaddexp.reduce(log_density)
        moments = [np.logaddexp.reduce(log_density + tilt * loss) for tilt in tilts]
        return float(np.exp(log_density) @ loss), np.array(moments)

    def _terms(self, outcome: Array) -> Array:
        counts = np.arange(len(self.log_weights))[:, None]
        return np.asarray(self.log_weights[:, None] + counts * (2 * outcome - counts) / (2 * self.sigma**2))


@dataclass(frozen=True)
class _Loss:
    """The loss of one step of an event in one direction, and how many such steps there are."""

    step: _Step
    steps: int
    adds: bool

    @property
    def ends(self) -> Array:
        """Of the step's loss, as it is where a unit is removed."""
        return self.step.loss(np.array([self.step.low, self.step.high]))

    def moments(self, tilts: Array) -> tuple[float, Array]:
        """As :meth:`_Step.moments`, of the loss as it is in this direction."""
        sign = -1.0 if self.adds else 1.0
        mean, log_moments = self.step.moments(sign * tilts, null=self.adds)
        return sign * mean, log_moments

    def discretised(self, mesh: float, size: int) -> tuple[Array, float]:
        """Its masses at multiples of ``mesh`` modulo ``size``, each loss rounded to the nearest, and their mean."""
        first, last = (round(float(value) / mesh) for value in self.ends)
        edges = (np.arange(first, last, dtype=np.float64) + 0.5) * mesh
        found = self.step.masses(self.step.outcome(edges), null=self.adds)
        places = np.arange(first, last + 1) * (-1 if self.adds else 1)
        masses = np.bincount(places % size, found, minlength=size).astype(np.float64)
        return masses, float(places @ found) * mesh


_TILTS: Final = np.concatenate([-np.geomspace(1e-3, 1e3, 61), np.geomspace(1e-3, 1e3, 61)])


def _one_direction(
    releases: Sequence[Sequence[TrainingEvent]], delta: float, error: float, *, adds: bool
) -> tuple[float, float, float]:
    """Lower end, estimate and upper end where a unit is removed, or added.

    1. The mesh on which ``steps`` rounded losses of corrected mean stay within ``error`` of what they were (Hoeffding).
    2. A window that the composed loss does not leave, by Chernoff's bound. The transform's wrapping does no harm in it.
    3. The composition, moved by the difference of the means.
    4. Epsilon, with all that was neglected once added to delta and once taken from it.
    """
    steps, slack = sum(release[0].steps for release in releases), _SHARE * delta
    losses = [_Loss(_Step.of(release, slack / (4 * steps)), release[0].steps, adds) for release in releases]
    spread = math.sqrt(steps / 2 * math.log(2 / slack))  # 1
    found = [loss.moments(_TILTS) for loss in losses]
    low, high = _window(losses, [log_moments for _, log_moments in found], slack, error)  # 2
    mesh = max(
        error / spread, (high - low) / _MAX_POINTS, max(float(np.ptp(loss.ends)) for loss in losses) / _MAX_POINTS
    )
    size = 1 << math.ceil(math.log2((high - low) / mesh + 8))
    transform, shift = np.ones(size // 2 + 1, dtype=np.complex128), 0.0  # 3
    for loss, (mean, _) in zip(losses, found, strict=True):
        masses, discrete_mean = loss.discretised(mesh, size)
        step = np.fft.rfft(masses)
        transform *= np.abs(step) ** loss.steps * np.exp(1j * loss.steps * np.angle(step))
        shift += loss.steps * (mean - discrete_mean)
    start = math.floor((low - shift) / mesh)
    masses = np.roll(np.fft.irfft(transform, size), -(start % size))
    values = (start + np.arange(size, dtype=np.float64)) * mesh + shift
    neglected = 4 * slack + 1e-16 * steps  # 4
    lower, estimate, upper = (_epsilon(values, masses, delta + by) for by in (neglected, 0.0, -neglected))
    return max(lower - mesh * spread, 0.0), estimate, upper + mesh * spread


def _window(losses: Sequence[_Loss], log_moments: Sequence[Array], slack: float, error: float) -> tuple[float, float]:
    """What the composed loss leaves with probability ``slack`` at most, and ``error`` more."""
    total = np.sum([loss.steps * found for loss, found in zip(losses, log_moments, strict=True)], axis=0)
    ends = (total - math.log(slack / 2)) / _TILTS
    low, high = float(ends[_TILTS < 0].max()), float(ends[_TILTS > 0].min())
    if max(-low, high) > _MAX_LOSS:
        raise ParameterError(f"a loss of {max(-low, high):.0f} is beyond what the second accountant can check")
    return low - 2 * error, high + 2 * error


def _epsilon(losses: Array, masses: Array, delta: float) -> float:
    """The smallest epsilon at least 0 of which E[(1 - exp(epsilon - loss))+] is at most ``delta``."""
    if delta <= 0:
        return math.inf
    losses, masses = losses[losses > 0], masses[losses > 0]
    above = np.cumsum(masses[::-1])[::-1]
    scaled = np.cumsum((masses * np.exp(-losses))[::-1])[::-1]
    if not len(losses) or above[0] - scaled[0] <= delta:
        return 0.0
    deltas = above - np.exp(losses) * scaled
    index = int(np.flatnonzero(deltas > delta)[-1]) + 1 if (deltas > delta).any() else 0
    return math.log((above[index] - delta) / scaled[index])
