"""What is added to the clipped sum: the ``hardened`` Gaussian mechanism.

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
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np
import torch
from casemate_schemas.errors import ParameterError
from numpy.typing import NDArray
from torch import Tensor

from .keystream import NOISE, Keystream

_AHEAD_ELEMENTS: Final = 1 << 18
_AHEAD_STEPS: Final = 32


def standard_normals(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """As many standard normals as ``words``, an even number; see the module's docstring."""
    radius = np.sqrt(-2.0 * np.log((words[0::2].astype(np.float64) + 1.0) * 2.0**-64))
    angle = 2.0 * np.pi * ((words[1::2] >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


class HardenedGaussian:
    """Adds Gaussian noise of standard deviation σC to each coordinate of a sum of L2 sensitivity C.

    One draw a step serves the joint sum of all owners. It depends on nothing but the step, so the next steps' are made on
    a thread of their own, while gradients are computed: the same draws, only earlier.
    """

    def __init__(self, seed: bytes, *, noise_multiplier: float, clipping_norm: float) -> None:
        """Draw with σ = ``noise_multiplier`` and C = ``clipping_norm``; their product must be positive and finite."""
        self._deviation = noise_multiplier * clipping_norm
        if not 0 < self._deviation < math.inf:
            raise ParameterError("expected a positive noise multiplier and clipping norm")
        self._grid = math.ldexp(1.0, math.frexp(self._deviation)[1] - 17)
        self._keystream = Keystream(seed, NOISE)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="noise")
        self._ahead: dict[tuple[int, int, int], Future[list[Tensor]]] = {}

    def add(self, total: Tensor, step: int) -> Tensor:
        """``total`` (float64, ``[d]``) with the noise of ``step``, on the public grid."""
        key = self._block(step, len(total))
        ahead = self._ahead.get(key)
        noise = self._draw(step, len(total)) if ahead is None else ahead.result()[step % key[1]]
        return torch.round((total + noise) / self._grid) * self._grid

    def draw_ahead(self, step: int, count: int) -> None:
        """Have the noise of ``step``, for ``count`` coordinates, made by the time it is wanted; of some later ones, too.

        Small models get that of many steps at once, for which it is worth to hand over to another thread.
        """
        block, steps, _ = self._block(step, count)
        wanted = [(number, steps, count) for number in ((block,) if steps == 1 else (block, block + 1))]
        self._ahead = {key: self._ahead.get(key) or self._thread.submit(self._draw_block, *key) for key in wanted}

    def _block(self, step: int, count: int) -> tuple[int, int, int]:
        steps = max(1, min(_AHEAD_STEPS, _AHEAD_ELEMENTS // count))
        return step // steps, steps, count

    def _draw_block(self, block: int, steps: int, count: int) -> list[Tensor]:
        return [self._draw(step, count) for step in range(block * steps, (block + 1) * steps)]

    def _draw(self, step: int, count: int) -> Tensor:
        """Normals of standard deviation σC, float64 ``[count]``."""
        words = self._keystream.words(step, count + count % 2)
        return self._deviation * torch.from_numpy(standard_normals(words)[:count])
