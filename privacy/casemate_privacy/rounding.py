"""What the ``exact`` mechanism takes off the clipping norm, so that its accounting is the ideal Gaussian's.

**The mechanism.** A step's clipped sum ``x`` (float64, ``d`` coordinates) is rounded to ``n = round(x / g)`` in Z^d, where
``g`` is the smallest number that floats find with ``s·g >= σC`` and ``s = 2^31``. To ``n`` discrete Gaussian noise is added
(Canonne, Kamath, Steinke 2020): integers ``z`` with probability proportional to ``exp(-|z|²/2s²)``, and ``(n + z)·g`` is
released.

**Theorem.** Let ``r = 16``, and let ``|n - n'|_2 <= Δ`` for every two batches that differ in one record. Then DP-SGD of T
steps with this noise is ``(ε + 6γ, e^(3γ)·δ)``-DP wherever Poisson-subsampled DP-SGD with the *continuous* Gaussian and noise
multiplier ``sqrt(s² - r²) / Δ`` is ``(ε, δ)``-DP, where ``γ = d·T·η`` and ``η = 2·Σ_{k>=1} exp(-2π²r²k²) < 10^-2194``.

1. Draw ``y`` from the continuous ``N(n, (s² - r²)·I)``, then each ``w_j`` from the integers with probability proportional
   to ``exp(-(w_j - y_j)²/2r²)``. By Poisson summation the normalising sum is ``r·sqrt(2π)·(1 ± η)`` for every real
   ``y_j``, so the density of ``w_j`` is ``φ_s(w_j - n_j) / (1 ± η)``, with ``φ_s`` that of ``N(0, s²)``, as convolving Gaussians
   adds variances (Peikert 2010, "An Efficient and Parallel Gaussian Sampler for Lattices", theorem 3.1).
2. ``n_j + z_j`` has probability ``φ_s(w - n_j) / (1 ± η)`` as well, because ``n_j`` is an integer and ``s > r``. So ``n + z``
   and ``w`` have probabilities within a factor ``exp(±3dη)`` of each other, whatever the batch was; hence also after mixing
   over batches, and over T adaptive steps within ``exp(±3dTη)``.
3. ``w`` is made from ``y`` without looking at records: post-processing of subsampled DP-SGD with continuous noise of
   deviation ``sqrt(s² - r²)`` and sensitivity Δ. Its dominating pairs (PLD, Rényi, mixtures for groups) hold as they are.

So no discrete loss distribution in ``d`` dimensions is needed, which depends on more of ``n - n'`` than its length.

**Nothing is charged, because everything is reserved.** Records are clipped to ``C' < C`` such that ``Δ·g <= C·sqrt(1 - r²/s²)``;
the noise multiplier above is then at least σ, and terms, which do not tell the number of coordinates, determine ε. It
remains ``6γ``, below the smallest positive float, and ``p < T·(2^-256 + d·2^-500)``, the probability of a batch larger than
:func:`largest_batch`, of a draw beyond 32 deviations, or of one that shows the rounding of the sampler's table. It adds
``(1 + e^ε)·p`` to δ: below 10^-26 for the largest T and ε that anyone may ask for, where the smallest δ is 10^-10.

A group of k records, or one record in the place of another (k = 2), moves ``n`` by at most ``k·Δ``: the reserve covers them.
"""

from __future__ import annotations

import math
from typing import Final

from casemate_schemas.errors import ParameterError

DEVIATION_BITS: Final = 31
"""The noise has a standard deviation of ``2**31`` steps of the grid."""

CANCELLATION: Final = 2.0**16
"""Layers whose products may cancel keep the sum of the products' norms below so many clipping norms."""

MAX_RESERVE: Final = 2.0**-6
"""More of the clipping norm is not reserved: the job is refused instead."""

_UNIT: Final = 2.0**-53
_MIXING: Final = 2.0**8 / 2.0 ** (2 * DEVIATION_BITS)
_NEVER: Final = 256 * math.log(2)
_OUTWARD: Final = 1 + 2.0**-20


def largest_batch(expected_batch: float) -> float:
    """So many records a Poisson batch of this mean exceeds with a probability below 2^-256 (Bernstein's inequality)."""
    mean, tail = expected_batch * _OUTWARD, _NEVER / 3
    return mean + tail + math.sqrt(tail * tail + 2 * _NEVER * mean)


def rounding_reserve(noise_multiplier: float, coordinates: int, expected_batch: float, positions: int = 0) -> float:
    """The share of the clipping norm that rounding can take, of two sums that differ in one record: rounded up.

    1. Float64 sums of up to ``n`` vectors of norm at most C, in any order, and one division each: ``2γ(n + 4)·nC``, where
       ``γ(k) = k·2^-53 / (1 - k·2^-53)`` (Higham 2002, §3.1 and §4.2). Where ``positions`` products a record are summed that
       may cancel, their number and norms stand for it.
    2. Rounding to the grid, by half a step for each coordinate and sum: ``sqrt(d)·g``.
    3. What makes the discrete Gaussian a continuous one: ``r²/s²``.
    """
    n = largest_batch(expected_batch)
    summed = 2 * (n + 4) * n * _UNIT  # 1
    cancelled = 2 * (n * positions + 4) * n * CANCELLATION * _UNIT if positions else 0.0
    grid = math.sqrt(coordinates) * noise_multiplier * 2.0**-DEVIATION_BITS  # 2
    return (summed + cancelled + grid + _MIXING) * _OUTWARD  # 3


def exact_clipping_norm(
    clipping_norm: float, noise_multiplier: float, coordinates: int, expected_batch: float, positions: int = 0
) -> float:
    """The norm to clip to under ``exact`` noise, so that the released sums have sensitivity ``clipping_norm``.

    Args:
        clipping_norm: C of the terms.
        noise_multiplier: σ of the terms.
        coordinates: the model's trainable parameters.
        expected_batch: the terms' public denominator.
        positions: the most products a record that one layer sums without forming its gradient; 0 if none does.

    Raises :class:`~casemate_schemas.errors.ParameterError` where more than a 64th of C would be lost.

    >>> 1 - exact_clipping_norm(1.0, 1.0, 15_000, 256.0) < 6e-8
    True
    """
    reserve = rounding_reserve(noise_multiplier, coordinates, expected_batch, positions)
    if not reserve <= MAX_RESERVE:
        raise ParameterError(
            f"exact noise would take {reserve:.2g} of the clipping norm for rounding ({coordinates} coordinates, noise "
            f"multiplier {noise_multiplier:g}, batches of {expected_batch:.0f}): use hardened noise"
        )
    return clipping_norm * (1 - reserve) * (1 - 2.0**-50)


def hardened_clipping_norm(clipping_norm: float, expected_batch: float, positions: int = 0) -> float:
    """The norm to clip to under ``hardened`` noise, so that float64 sums have sensitivity ``clipping_norm``.

    As :func:`exact_clipping_norm`, without the grid, because noise is added before anything is rounded to one.

    Raises :class:`~casemate_schemas.errors.ParameterError` where more than a 64th of C would be lost.

    >>> 1 - hardened_clipping_norm(1.0, 256.0) < 1e-10
    True
    """
    reserve = rounding_reserve(0.0, 0, expected_batch, positions)
    if not reserve <= MAX_RESERVE:
        raise ParameterError(
            f"rounding would take {reserve:.2g} of the clipping norm (batches of {expected_batch:.0f}): use smaller batches"
        )
    return clipping_norm * (1 - reserve) * (1 - 2.0**-50)
