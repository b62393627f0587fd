"""What is added to the clipped sum: the two mechanisms a plan may name, and ``hardened``, the faster of them.

``exact`` (:mod:`~casemate_worker.training.exact_noise`) has a proof where this one has an argument.

Byte for byte, for a sum of ``d`` coordinates at step ``t``, noise multiplier σ and clipping norm C:

1. take ``2·ceil(d/2)`` words ``w`` of the noise keystream at ``t``;
2. each pair gives ``u = (float64(w[2j]) + 1) · 2^-64`` in (0, 1] and ``v = (w[2j+1] >> 11) · 2^-53`` in [0, 1), hence by
   Box and Muller (1958) the standard normals ``z[2j] = sqrt(-2 ln u) cos 2πv`` and ``z[2j+1] = sqrt(-2 ln u) sin 2πv``,
   all in float64, the conversion of ``w`` rounding to nearest even;
3. the noisy sum ``s + σC·z`` is rounded, to nearest even, to the public grid of spacing ``g = 2^(floor(log2 σC) - 16)``.

**Why the grid.** Floating-point noise has gaps that depend on what it is added to, so the low bits of a released sum can
exclude a neighbouring dataset outright (Mironov 2012, "On significance of the least significant bits for differential
privacy"). Here every released coordinate is a multiple of ``g``, chosen from σ and C alone, and each multiple is reached
by a great many draws. What comes later (division, float32, the optimiser) is post-processing.

**What can be argued.** Couple the value before rounding with the ideal ``s + N(0, σ²C²)`` through the same uniforms. With
``ln``, ``sqrt``, ``cos`` and ``sin`` good to 4 units in the last place and a radius of at most sqrt(128 ln 2) < 9.42, the
two differ by less than ``η = 2^-44 σC`` while ``|s| <= 128 σC``, apart from the coarseness of ``u``: near 1 it makes small
radii coarse, which counts like another η, and near 0 large ones, which with the missing tail has a probability of less
than 2^-38 to matter. The ideal density is flat over a cell of the grid, and ``g > 2^-17 σC``, so each cell's probability is
off by a factor within ``exp(±4η/g)``, that is ``exp(±2^-25)``. Over ``d`` coordinates and ``T`` steps an ideal (ε, δ) thus
becomes at worst ``ε + d·T·2^-24`` and ``δ + (1 + e^ε)·d·T·2^-38``: for 31 coordinates, 300 steps and ε = 3, 0.0006 more ε
and 8·10^-7 more δ. It is an argument on paper, linear in ``d·T`` where the truth surely is not, and says nothing useful
near ``d·T = 2^24``; nor does it cover rounding inside the clipped sum (:mod:`~casemate_worker.training.clipping`).

The grid could be coarser for a better bound. It is this fine so that a float32 difference of one unit in the last place,
which another machine may make, moves the released sum by no more than it moved the clipped one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from casemate_schemas.errors import ParameterError
from casemate_schemas.job import Mechanism
from numpy.typing import NDArray
from torch import Tensor

from .ahead import Ahead
from .exact_noise import ExactGaussian
from .keystream import NOISE, Keystream


class Noise(Protocol):
    """A noise mechanism, as the engine uses it. One draw a step serves the joint sum of all owners."""

    def add(self, total: Tensor, step: int) -> Tensor:
        """``total`` (float64, ``[d]``) with the noise of ``step``, on the public grid."""

    def draw_ahead(self, step: int, count: int) -> None:
        """Have the noise of ``step`` for ``count`` coordinates made by the time it is wanted."""


def noise_mechanism(mechanism: Mechanism, seed: bytes, clipping_norm: float) -> Callable[[float], Noise]:
    """What makes, of a noise multiplier, the mechanism that the plan names."""
    chosen = ExactGaussian if mechanism == "exact" else HardenedGaussian
    return lambda noise_multiplier: chosen(seed, noise_multiplier=noise_multiplier, clipping_norm=clipping_norm)


def standard_normals(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """As many standard normals as ``words``, an even number; see the module's docstring."""
    radius = words[0::2].astype(np.float64)
    radius += 1.0
    radius *= 2.0**-64
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle = (words[1::2] >> np.uint64(11)).astype(np.float64)
    angle *= 2.0**-53
    angle *= 2.0 * np.pi
    normals = np.empty(len(words))
    turned = torch.from_numpy(angle)
    np.multiply(radius, turned.cos().numpy(), out=normals[0::2])
    np.multiply(radius, turned.sin_().numpy(), out=normals[1::2])
    return normals


class HardenedGaussian:
    """Adds Gaussian noise of standard deviation σC to each coordinate of a sum of L2 sensitivity C."""

    def __init__(self, seed: bytes, *, noise_multiplier: float, clipping_norm: float) -> None:
        """Draw with σ = ``noise_multiplier`` and C = ``clipping_norm``; their product must be positive and finite."""
        self._deviation = noise_multiplier * clipping_norm
        if not 0 < self._deviation < math.inf:
            raise ParameterError("expected a positive noise multiplier and clipping norm")
        self._grid = math.ldexp(1.0, math.frexp(self._deviation)[1] - 17)
        self._keystream = Keystream(seed, NOISE)
        self._ahead = Ahead(self._draw)

    def add(self, total: Tensor, step: int) -> Tensor:
        """See :meth:`Noise.add`."""
        noisy = (total + self._ahead.take(step, len(total))).mul_(1.0 / self._grid)
        return noisy.round_().mul_(self._grid)

    def draw_ahead(self, step: int, count: int) -> None:
        """See :meth:`Noise.draw_ahead`."""
        self._ahead.start(step, count)

    def _draw(self, steps: range, count: int) -> list[Tensor]:
        """For each step normals of standard deviation σC, float64 ``[count]``: all at once."""
        even = count + count % 2
        normals = standard_normals(np.concatenate([self._keystream.words(step, even) for step in steps]))
        normals *= self._deviation
        return list(torch.from_numpy(normals.reshape(len(steps), even)[:, :count]).unbind())
