"""What the ``hardened`` mechanism adds to ε and δ, because its normals are computed in float64.

**The mechanism.** To a step's clipped sum ``s`` (``d`` coordinates) computed normals ``y'`` of standard deviation σC are
added, and ``s + y'`` is rounded to the multiples of ``g``, a power of two above ``2^-13·σC`` and at most ``2^-12·σC``. With
ideal normals ``y`` in place of ``y'`` this would be the continuous Gaussian mechanism, post-processed. Normals come in pairs,
and each pair of its own words: uniform and independent as far as AES-256 in counter mode is pseudorandom.

**Premise.** The computed pair can be coupled with an ideal one such that neither coordinate is off by more than
``η = 2^-43·σC`` wherever the ideal pair's radius is at most ``R = 10.8·σC``, whatever ``s`` is
(``casemate_worker.training.noise`` says why).

**Theorem.** Where DP-SGD of ``T`` steps with ideal normals is (ε, δ)-DP, that with computed ones is
``(ε + 2α, e^α·δ + (1 + e^(ε + α))·p)``-DP, where ``m = T·ceil(d/2) + 2`` counts pairs, those of final metrics included,
``κ = 2^-27.9`` and

    ``α = min(m·κ, κ·sqrt(200·ln 2·m) + m·((e^κ - 1)² + 2^-83))``,    ``p = 2^-100 + m·2^-83``.

1. What is released of a pair is a cell: a square of side ``g`` in the plane of ``y``, wherever ``s`` puts it. Call it near if
   all its points, and those within ``2η`` of it, have radii of at most R. A point of another cell has a radius above
   ``R - 2g > 10.79·σC``, which the ideal pair exceeds with a probability below ``2^-83.9``, and the computed one, off
   by η at most until R, with one below ``2^-83``.
2. Within R the density changes over ``2g`` by a factor below ``exp(10.8·2^-11)``. The band of width η around or inside
   the edge of a near cell thus has at most ``4η/g·(1 + η/g)·exp(10.8·2^-11) < 4.1·2^-30 < κ·(1 - κ)`` of the cell's ideal
   probability. So ideal and computed probability of a near cell are within a factor ``exp(±κ)``, given all that went before.
3. Let both programs draw the same batches. The logarithm of the ratio of probabilities of all cells so far, stopped at the
   first that is not near, changes by at most κ with each pair, and on average, under either program, by at most
   ``(e^κ - 1)² + 2^-83``, as ``x·ln(x/y) <= (x - y)²/y + x - y``. By Azuma's inequality it exceeds α with a
   probability below ``2^-100`` (Dwork, Rothblum, Vadhan 2010, "Boosting and Differential Privacy", have this for ε). It never
   exceeds ``m·κ``.
4. So for any set of outcomes either program's probability is at most ``e^α`` times the other's, plus ``p``. Once for the
   data, once, the other way, for their neighbour: that is the claim.

Neighbours by groups of records have ε and δ of their own; the same is added to them.
"""

from __future__ import annotations

import math
from typing import Final

from casemate_schemas.errors import ParameterError

MAX_SHARE: Final = 0.01
"""No more of ε or of δ is added: the job is refused instead."""

_RATIO: Final = 2.0**-27.9
_RARE: Final = 2.0**-83
_NEVER_BITS: Final = 100


def hardened_excess(coordinates: int, steps: int, epsilon: float, delta: float) -> tuple[float, float]:
    """What computed noise adds at most to an ideal (``epsilon``, ``delta``), as (to ε, to δ). Linear in neither argument.

    Args:
        coordinates: the model's trainable parameters.
        steps: of the plan.
        epsilon: of the ideal mechanism, at most 100.
        delta: of the ideal mechanism.

    Raises :class:`~casemate_schemas.errors.ParameterError` for what is not positive, or an epsilon above 100.

    >>> to_epsilon, to_delta = hardened_excess(15_000, 1_000, 3.0, 1e-5)
    >>> to_epsilon < 2.7e-4, to_delta < 1.4e-9
    (True, True)
    """
    if not (coordinates > 0 < steps and 0 < epsilon <= 100 and delta > 0):
        raise ParameterError("expected positive coordinates, steps and delta, and an epsilon of at most 100")
    pairs = steps * -(-coordinates // 2) + 2
    spread = _RATIO * math.sqrt(2 * _NEVER_BITS * math.log(2) * pairs)
    alpha = min(pairs * _RATIO, spread + pairs * (math.expm1(_RATIO) ** 2 + _RARE))
    missed = 2.0**-_NEVER_BITS + pairs * _RARE
    return 2 * alpha, math.expm1(alpha) * delta + (1 + math.exp(epsilon + alpha)) * missed


def check_hardened(coordinates: int, steps: int, epsilon: float, delta: float) -> None:
    """Raises :class:`~casemate_schemas.errors.ParameterError` where that is more than a hundredth of either."""
    to_epsilon, to_delta = hardened_excess(coordinates, steps, min(epsilon, 100.0), delta)
    if to_epsilon > MAX_SHARE * epsilon or to_delta > MAX_SHARE * delta:
        raise ParameterError(
            f"hardened noise would add {to_epsilon:.2g} to epsilon {epsilon:g} and {to_delta:.2g} to delta {delta:g} "
            f"({coordinates} coordinates, {steps} steps): use mechanism='exact'"
        )
