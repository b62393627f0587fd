"""What is added to the clipped sum: the two mechanisms a plan may name, and ``hardened``, the faster of them.

``exact`` (:mod:`~casemate_worker.training.exact_noise`) needs no assumption on a library's logarithm or cosine.

Byte for byte, for a sum of ``d`` coordinates at step ``t``, noise multiplier σ and clipping norm C:

1. take ``2·ceil(d/2)`` words ``w`` of the noise keystream at ``t``;
2. pair ``j`` has ``U_j = (w[2j]·2^64 + x_j + 1) · 2^-128`` in (0, 1]. Where ``2^44 <= w[2j] < 2^64 - 2^44``, ``x_j`` is
   ``2^64 - 1``: then ``L_j = ln u`` of ``u = (float64(w[2j]) + 1) · 2^-64``. Elsewhere (2^-19 of all pairs) it is the keystream's
   next word after those so far, in the order of ``j``; then ``L_j = ln u`` if ``w[2j] < 2^44`` and ``L_j = ln(1 - v)`` if
   not, with ``u = U_j`` and ``v = 1 - U_j``, each the float64 nearest to the exact number;
3. with ``v_j = (w[2j+1] >> 11) · 2^-53`` in [0, 1) each pair gives, by Box and Muller (1958), the standard normals
   ``z[2j] = sqrt(-2 L_j) cos 2πv_j`` and ``z[2j+1] = sqrt(-2 L_j) sin 2πv_j``, in float64;
4. ``g = 2^(floor(log2 σC) - 12)`` is public. What is released is ``g`` times ``n + round(s/g - n + σC·z/g)``, where
   ``n = round(s/g)``, in float64, rounding half to even.

**Why the grid.** Floating-point noise has gaps that depend on what it is added to, so the low bits of a released sum can
exclude a neighbouring dataset outright (Mironov 2012, "On significance of the least significant bits for differential
privacy"). Here every released coordinate is a multiple of ``g``, chosen from σ and C alone, and each multiple is reached
by a great many draws. What comes later (division, float32, the optimiser) is post-processing.

**However large the sum is**, step 4 is exact but for one addition of numbers below 12σC: ``s/g`` and ``s/g - n`` have no
rounding, as ``g`` is a power of two, and rounding commutes with adding an integer, so what is multiplied with ``g`` is
``s/g + σC·z/g``, rounded; beyond 2^53 the last addition rounds a function of that integer once more, which is
post-processing.

**What is guaranteed.** Couple each pair with an ideal one of radius ``r`` through the same uniforms, ``U`` being that of the
words plus a uniform remainder. With ``ln``, ``log1p``, ``sqrt``, ``cos`` and ``sin`` good to 4 units in the last place and
``r <= 10.8`` (so that ``U >= 2^-85``), the two differ in each coordinate by less than ``2^-43``, in units of σC:

- missing bits of U change ``ln U`` by at most ``2^-64/U`` (common pairs, ``U >= 2^-20``) or ``2^-128/U``, and the radius by that
  over ``r``: at most ``2^-46.3`` for ``U = 2^-20``, ``2^-54`` for ``1 - U = 2^-20``, ``2^-46.4`` for ``U = 2^-85``, and below
  ``2^-63`` as ``U`` nears 1;
- a common pair's float64 ``u`` is off by at most ``2^-53·u + 2^-64``, near 1 by ``2^-54 + 2^-64``, which changes the radius by
  that over ``u·r``: at most ``2^-44.4`` for ``1 - U = 2^-20``, where ``r`` is ``2^-9.5``, and ``2^-46.2`` for ``U = 2^-20``; rare
  pairs' ``u`` and ``v`` are off by ``2^-53`` of themselves, and their radii by less than that of theirs;
- logarithm, root, angle, cosine and products, that of σ and C among them, are off by less than ``2^-47.8·r`` together,
  thus by less than ``2^-44.3``; the addition in step 4 by ``2^-49``.

These are below ``2^-43`` together at any ``r``, because the largest do not meet. This is the premise of the theorem in
:mod:`casemate_privacy.hardened`, which gives what is added to ε and δ: it grows with the *root* of ``d·T``, and depends on
neither σ, C nor the sum. For 15,000 coordinates, 1,000 steps and (3, 10^-5) that is 0.0003 and 2·10^-9. Where it would be
more than a hundredth of either, the SDK and the worker refuse. It does not cover rounding inside the clipped sum, which
has a reserve of its own (:mod:`.rounding`).

A coarser grid would make it smaller still. It is this fine so that a float32 difference of one unit in the last place,
which another machine may make, hardly ever shows, and then as a 4,096th of the noise.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol

import numpy as np
import torch
from casemate_schemas.errors import ParameterError
from casemate_schemas.job import Mechanism
from numpy.typing import NDArray
from torch import Tensor

from .ahead import Ahead
from .exact_noise import ExactGaussian
from .keystream import NOISE, Keystream, Words

_GRID_BITS: Final = 12
_RARE: Final = np.uint64(1 << 44)
"""So near either end, a word is not enough."""
_WORDS: Final = 1 << 17
"""So many at a time, which stay in a core's cache: an even number."""
_MOST_AHEAD: Final = 1 << 20
"""Of so many coordinates at most noise is made ahead: of more it takes a fiftieth of a step, and twice their weights' memory."""


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


class Scratch:
    """Memory for one draw after another: fetching new pages for each would take as long as its arithmetic.

    Every thread has its own.
    """

    def __init__(self) -> None:
        """With nothing yet."""
        self._kept = threading.local()

    def arrays(self, pairs: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.uint64]]:
        """Two arrays ``[pairs]`` of floats and one of words, in the same place each time, holding anything."""
        if getattr(self._kept, "pairs", 0) < pairs:
            self._kept.found = np.empty(pairs), np.empty(pairs), np.empty(pairs, np.uint64)
            self._kept.pairs = pairs
        first, second, words = self._kept.found
        return first[:pairs], second[:pairs], words[:pairs]


def standard_normals(streams: Sequence[Words], count: int, scratch: Scratch | None = None) -> NDArray[np.float64]:
    """Of each stream ``count`` standard normals, an even number: ``[len(streams), count]``; see the module's docstring."""
    found = np.empty((len(streams), count))
    for row, stream in zip(found.view(np.uint64), streams, strict=True):
        for start in range(0, count, _WORDS):
            row[start : start + _WORDS] = stream.take(min(_WORDS, count - start))
    flat, scratch = found.ravel(), scratch or Scratch()
    for start in range(0, len(flat), _WORDS):
        _to_normals(flat[start : start + _WORDS], partial(_stream_of, streams, count, start), scratch)
    return found


def _stream_of(streams: Sequence[Words], count: int, start: int, pair: int) -> Words:
    """Which stream that pair, counted from ``start`` on, is of."""
    return streams[(start + 2 * pair) // count]


def _to_normals(normals: NDArray[np.float64], stream_of: Callable[[int], Words], scratch: Scratch) -> None:
    """Normals in place of words, with further words for rare pairs from the stream that ``stream_of`` tells."""
    words = normals.view(np.uint64)
    first, second = words[0::2], words[1::2]
    radius, turned, other = scratch.arrays(len(first))
    logarithms = np.add(first, 1.0, out=radius, dtype=np.float64)
    logarithms *= 2.0**-64
    np.log(logarithms, out=logarithms)
    for pair in np.flatnonzero(np.add(first, _RARE, out=other) < _RARE + _RARE):  # wraps
        more = stream_of(int(pair)).take(1)
        logarithms[pair] = _logarithm(int(first[pair]), int(more[0]))
    logarithms *= -2.0
    np.sqrt(logarithms, out=radius)
    angle = np.multiply(np.right_shift(second, np.uint64(11), out=other), 2.0**-53, out=turned, dtype=np.float64)
    angle *= 2.0 * np.pi
    cosine = torch.cos(torch.from_numpy(angle), out=torch.from_numpy(other.view(np.float64)))
    np.multiply(radius, cosine.numpy(), out=normals[0::2])  # both words of a pair have been read
    np.multiply(radius, torch.from_numpy(angle).sin_().numpy(), out=normals[1::2])


def _logarithm(first: int, second: int) -> float:
    """Of the 128-bit number in (0, 1] that these words make, to full precision at both ends."""
    above = (first << 64) + second + 1
    if above <= 1 << 127:
        return math.log(above / (1 << 128))
    return math.log1p(-(((1 << 128) - above) / (1 << 128)))


class HardenedGaussian:
    """Adds Gaussian noise of standard deviation σC to each coordinate of a sum of L2 sensitivity C."""

    def __init__(self, seed: bytes, *, noise_multiplier: float, clipping_norm: float) -> None:
        """Draw with σ = ``noise_multiplier`` and C = ``clipping_norm``; their product must be positive and finite."""
        self._deviation = noise_multiplier * clipping_norm
        if not 0 < self._deviation < math.inf:
            raise ParameterError("expected a positive noise multiplier and clipping norm")
        self._grid = math.ldexp(1.0, math.frexp(self._deviation)[1] - 1 - _GRID_BITS)
        self._keystream = Keystream(seed, NOISE)
        self._scratch = Scratch()
        self._ahead = Ahead(self._draw)

    def add(self, total: Tensor, step: int) -> Tensor:
        """See :meth:`Noise.add`."""
        noise, sums = self._ahead.take(step, len(total)).numpy(), total.numpy()
        found = np.empty(len(sums))
        for start in range(0, len(sums), _WORDS):
            some = slice(start, start + _WORDS)
            part = np.multiply(sums[some], 1.0 / self._grid, out=found[some])
            whole = np.rint(part)
            part -= whole
            part += noise[some]
            np.rint(part, out=part)
            part += whole
            part *= self._grid
        return torch.from_numpy(found)

    def draw_ahead(self, step: int, count: int) -> None:
        """See :meth:`Noise.draw_ahead`."""
        if count <= _MOST_AHEAD:
            self._ahead.start(step, count)

    def _draw(self, steps: range, count: int) -> list[Tensor]:
        """For each step normals of standard deviation σC in steps of the grid, float64 ``[count]``: all at once."""
        normals = standard_normals([self._keystream.at(step) for step in steps], count + count % 2, self._scratch)
        normals *= self._deviation / self._grid
        return list(torch.from_numpy(normals[:, :count]).unbind())
