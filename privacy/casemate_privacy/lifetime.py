"""What all jobs on one dataset would cost had they been fixed in advance: one privacy loss distribution, grown job by job.

An estimate, as :func:`casemate_privacy.accounting.epsilon_estimate` is: jobs are chosen from earlier results, and only
the :mod:`~casemate_privacy.renyi_filter` accounts for that. Composing thousands of jobs from scratch takes minutes;
adding one to what is kept takes milliseconds. What is kept is bounded: at most 2**14 points in each direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from casemate_schemas.codec import pack, unpack
from casemate_schemas.errors import CasemateError, IntegrityError

from .accounting import event_pld
from .events import MAX_EPSILON, PrivacyEvent, check_delta, phases_of
from .renyi import Array

FORMAT: Final = 1
"""Of :meth:`LifetimeLoss.to_bytes`. What has another is made again from the jobs."""

MAX_POINTS: Final = 1 << 14
_FINEST: Final = 2.0**-20
"""The interval between two losses at the start. It doubles whenever there would be more than ``MAX_POINTS`` of them."""

_MAX_LOSS: Final = 4 * MAX_EPSILON
"""Losses beyond it count as infinite: no epsilon that anyone may ask for tells them apart."""

_TAIL: Final = 1e-16
"""Probability that may be moved outward at each end when a job is added. The smallest delta is 1e-10."""


@dataclass(frozen=True, eq=False)
class _Losses:
    """A distribution of privacy losses on the multiples of an interval; ``masses[0]`` is at ``first`` intervals."""

    interval: float
    first: int
    masses: Array
    infinite: float
    """Probability of an infinite loss."""

    def coarser(self, interval: float) -> _Losses:
        """On a coarser grid. Each mass p at loss x goes to both neighbours so that p and p exp(-x) stay what they were.

        Merging the two gives x back, so by post-processing the new distribution dominates the old one: it is the same
        approximation as that of Doroshenko et al. (2022), "Connect the Dots", without their differences of deltas.
        """
        if interval == self.interval:
            return self
        loss = (self.first + np.arange(len(self.masses))) * self.interval
        below = np.floor(loss / interval).astype(np.int64)
        above = np.expm1(-np.clip(loss - below * interval, 0.0, interval)) / math.expm1(-interval)
        first = int(below[0])
        masses = np.zeros(int(below[-1]) - first + 2)
        masses[:-1] += np.bincount(below - first, self.masses * (1 - above))
        masses[1:] += np.bincount(below - first, self.masses * above)
        return _Losses(interval, first, masses, self.infinite)

    def composed(self, other: _Losses) -> _Losses:
        """Both releases together. Both are on one grid."""
        from scipy.signal import fftconvolve  # type: ignore[attr-defined]

        masses = np.maximum(fftconvolve(self.masses, other.masses), 0.0)
        infinite = self.infinite + other.infinite - self.infinite * other.infinite
        return _Losses(self.interval, self.first + other.first, masses, infinite).trimmed()

    def trimmed(self) -> _Losses:
        """Without its tails: what is smallest moves up to the first point kept, what is largest becomes infinite."""
        end = min(len(self.masses), max(1, math.floor(_MAX_LOSS / self.interval) - self.first))
        end = min(end, len(self.masses) - int(np.searchsorted(np.cumsum(self.masses[::-1]), _TAIL)))
        start = min(int(np.searchsorted(np.cumsum(self.masses), _TAIL)), max(end - 1, 0))
        end = max(end, start + 1)
        kept = self.masses[start:end].copy()
        kept[0] += self.masses[:start].sum()
        return _Losses(self.interval, self.first + start, kept, self.infinite + float(self.masses[end:].sum()))

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon of which E[(1 - exp(epsilon - loss))+] is at most ``delta``."""
        if self.infinite > delta:
            return math.inf
        losses = (self.first + np.arange(len(self.masses))) * self.interval
        heavier = np.cumsum(self.masses[::-1])[::-1] + self.infinite
        scaled = np.cumsum((self.masses * np.exp(-losses))[::-1])[::-1]
        exceeds = np.append(heavier[1:] - np.exp(losses[:-1]) * scaled[1:], self.infinite) > delta
        index = int(np.flatnonzero(exceeds)[-1]) + 1 if exceeds.any() else 0
        if index == len(losses) or heavier[index] <= delta:
            return max(float(losses[min(index, len(losses) - 1)]), 0.0)
        return max(math.log((heavier[index] - delta) / scaled[index]), 0.0)


@dataclass(frozen=True, eq=False)
class LifetimeLoss:
    """The composed privacy loss of some jobs, for removing and for adding a privacy unit. Immutable.

    >>> from fractions import Fraction
    >>> from casemate_privacy import TrainingEvent, epsilon_estimate
    >>> jobs = [TrainingEvent(Fraction(1, 10), 4.0, steps) for steps in (10, 20, 30)]
    >>> kept = LifetimeLoss.empty()
    >>> for job in jobs:
    ...     kept = kept.after(job, 1e-5)
    >>> round(kept.epsilon(1e-5), 3), round(epsilon_estimate(jobs, 1e-5), 3)
    (0.752, 0.752)
    """

    remove: _Losses
    add: _Losses

    @classmethod
    def empty(cls) -> LifetimeLoss:
        """Of no job."""
        nothing = _Losses(_FINEST, 0, np.ones(1), 0.0)
        return cls(nothing, nothing)

    def after(self, event: PrivacyEvent, delta: float) -> LifetimeLoss:
        """With one more job, whose own distribution is made for ``delta``. Takes 10 to 300 ms, nearly all for that one.

        Raises :class:`~casemate_schemas.errors.ParameterError` for a delta out of range.
        """
        check_delta(delta)
        remove, add = self.remove, self.add
        for pld in (event_pld(phase, delta) for phase in phases_of(event)):
            remove, add = _with(remove, _losses(pld._pmf_remove)), _with(add, _losses(pld._pmf_add))
        return LifetimeLoss(remove, add)

    def epsilon(self, delta: float) -> float:
        """Epsilon of all jobs together at ``delta``: at least the true value, and within 1 % of it for 1,000 jobs.

        Infinite beyond what the grid holds. Raises :class:`~casemate_schemas.errors.ParameterError` for a delta out of
        range.
        """
        check_delta(delta)
        return max(self.remove.epsilon(delta), self.add.epsilon(delta))

    def to_bytes(self) -> bytes:
        """For :meth:`from_bytes`; at most some 0.25 MB."""
        return pack((FORMAT, *(_packed(losses) for losses in (self.remove, self.add))))

    @classmethod
    def from_bytes(cls, data: bytes) -> LifetimeLoss:
        """What :meth:`to_bytes` wrote. Raises :class:`~casemate_schemas.errors.IntegrityError` for anything else."""
        try:
            version, remove, add = unpack(data)
            if version != FORMAT:
                raise IntegrityError(f"kept losses have format {version!r:.20}, expected {FORMAT}")
            return cls(_unpacked(*remove), _unpacked(*add))
        except (ValueError, TypeError, CasemateError) as error:
            raise IntegrityError("kept losses cannot be read") from error


def _losses(pmf: Any) -> _Losses:
    """One direction of a ``dp_accounting`` distribution, which shows its masses to nobody (release 0.6).

    Its masses are differences of deltas, whose rounding leaves them up to 1e-4 above one together.
    """
    dense = pmf.to_dense_pmf()
    masses = np.maximum(np.asarray(dense._probs, dtype=np.float64), 0.0)
    masses *= (1.0 - dense._infinity_mass) / masses.sum()
    return _Losses(dense._discretization, dense._lower_loss, masses, dense._infinity_mass)


def _with(kept: _Losses, new: _Losses) -> _Losses:
    """Both composed on the finest grid of doubled intervals on which neither they nor their sum have too many points."""
    span = new.interval * len(new.masses) + kept.interval * len(kept.masses)
    interval = kept.interval
    while interval < new.interval or span / interval > MAX_POINTS - 4:
        interval *= 2
    return kept.coarser(interval).composed(new.coarser(interval))


def _packed(losses: _Losses) -> tuple[float, int, bytes, float]:
    return losses.interval, losses.first, losses.masses.tobytes(), losses.infinite


def _unpacked(interval: float, first: int, masses: bytes, infinite: float) -> _Losses:
    """Raises :class:`IntegrityError` unless it is a distribution of bounded size."""
    values = np.frombuffer(masses, dtype=np.float64)
    total = float(values.sum()) + infinite
    doublings = math.log2(interval / _FINEST)
    if not 0 < len(values) <= MAX_POINTS or not doublings.is_integer() or not abs(total - 1) < 1e-6:
        raise IntegrityError("kept losses are no distribution")
    return _Losses(interval, first, values, infinite)
