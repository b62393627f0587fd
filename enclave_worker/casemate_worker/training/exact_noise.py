"""What is added to the clipped sum: the ``exact`` mechanism, discrete Gaussian noise on a fixed-point grid.

For a sum of ``d`` coordinates at step ``t``, noise multiplier σ and clipping norm C:

1. the grid's spacing is ``g = up(σC)·2^-31``, ``up`` being the next float above the product as floats have it, so that
   ``2^31·g >= σC``;
2. each coordinate becomes ``n = round(x / g)``, half to even, an integer kept within ±2^61;
3. :func:`~casemate_worker.training.discrete_gaussian.discrete_gaussian` gives an integer ``|z| < 2^36`` for each, from the noise
   keystream at ``t``; ``n + z`` cannot overflow 64 bits;
4. what is released is ``(n + z)·g`` in float64, which is a function of ``n + z`` alone.

Records are clipped to less than C (:mod:`.rounding`), so that ``n`` moves by at most ``C·sqrt(1 - r²/s²) / g`` with one
record, float64's rounding of the sum and in steps 1 and 2 included; keeping within ±2^61 brings integers no further apart.
The guarantee is then that of the continuous Gaussian mechanism with noise multiplier σ: theorem and proof are in
:mod:`casemate_privacy.rounding`. One thing is presumed: that float32 kernels give a record the same bits in every
batch, which :mod:`.rows` arranges and :mod:`.kernels` tests.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from casemate_privacy.rounding import DEVIATION_BITS
from casemate_schemas.errors import ParameterError
from torch import Tensor

from .ahead import Ahead
from .discrete_gaussian import discrete_gaussian
from .keystream import NOISE, Keystream

_LARGEST: Final = 2.0**61


class ExactGaussian:
    """Adds discrete Gaussian noise of standard deviation σC to each coordinate of a sum."""

    def __init__(self, seed: bytes, *, noise_multiplier: float, clipping_norm: float) -> None:
        """Draw with σ = ``noise_multiplier`` and C = ``clipping_norm``; their product must be positive and finite."""
        deviation = math.nextafter(noise_multiplier * clipping_norm, math.inf)
        if not (noise_multiplier > 0 < clipping_norm and deviation < math.inf):
            raise ParameterError("expected a positive noise multiplier and clipping norm")
        self._grid = math.ldexp(deviation, -DEVIATION_BITS)
        self._keystream = Keystream(seed, NOISE)
        self._ahead = Ahead(self._draw)

    def add(self, total: Tensor, step: int) -> Tensor:
        """``total`` (float64, ``[d]``), rounded to the grid, with the noise of ``step``."""
        rounded = torch.round(total / self._grid).clamp_(-_LARGEST, _LARGEST).to(torch.int64)
        return (rounded + self._ahead.take(step, len(total))).double() * self._grid

    def draw_ahead(self, step: int, count: int) -> None:
        """Have the noise of ``step``, for ``count`` coordinates, made by the time it is wanted."""
        self._ahead.start(step, count)

    def _draw(self, steps: range, count: int) -> list[Tensor]:
        return [torch.from_numpy(discrete_gaussian(self._keystream.at(step), count)) for step in steps]
