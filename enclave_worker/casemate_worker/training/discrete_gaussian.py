"""Integers with probability proportional to ``exp(-z²/2s²)``, ``s = 2^31``, from a keystream, by comparing integers alone.

No floating-point number is computed, so none can be wrong. ``z`` is cut into strips a 32nd of a deviation wide (after
Karney 2016, "Sampling exactly from the normal distribution", algorithm D, whose strips are a deviation wide), in rounds.
In a round each of the ``m`` coordinates that have no value yet gets a candidate, in the order of coordinates:

1. *Strip* ``i`` of 1,024, with probability proportional to ``exp(-(i/32)²/2)``: ``m`` words, each compared with the first 64
   bits of a table of 512-bit thresholds. Only a word that equals one of them needs seven more, to compare all 512 bits.
2. *Place* in the strip: ``m`` words ``w``; ``v = i·2^26 + (w mod 2^26)`` is the magnitude and the highest bit of ``w`` the sign.
3. *Decision*: ``v`` stays with probability ``exp(-γ)``, ``γ = (v² - (i·2^26)²) / 2^63 < 1``, decided like Forsythe (1972) and
   Canonne, Kamath, Steinke (2020, algorithm 1): for ``k = 1, 2, ...`` a uniform number is compared with ``γ/k``, until one is not
   below; an odd ``k`` means yes. In each turn all undecided candidates take a word, in order. Words that equal the first
   64 bits of ``γ/k`` take another, to compare the next 64. A zero with a negative sign does not stay.

Coordinates come in blocks of 2^16, each finished before the next begins. 98 of 100 candidates stay.

**How exact.** The table ends at 32 deviations and its probabilities are multiples of 2^-512; else the distribution is the
discrete Gaussian's. The total variation between the two is below 2^-500 for each coordinate, and counted in
:mod:`casemate_privacy.rounding`.
"""

from __future__ import annotations

from bisect import bisect_right
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np
from casemate_privacy.rounding import DEVIATION_BITS
from numpy.typing import NDArray

from .keystream import Words

Unsigned = NDArray[np.uint64]

_STRIPS: Final = 1024
_STRIP_BITS: Final = DEVIATION_BITS - 5
"""Strips have this many bits: 32 to a deviation."""

_TABLE_BITS: Final = 512
_WORD_BITS: Final = 64
_BUCKET_BITS: Final = 12
_BLOCK: Final = 1 << 16


def discrete_gaussian(words: Words, count: int) -> NDArray[np.int64]:
    """``count`` independent integers of standard deviation ``2**31``, magnitudes below ``2**36``; see the module's docstring."""
    drawn = np.empty(count, np.int64)
    for start in range(0, count, _BLOCK):
        block = drawn[start : start + _BLOCK]
        block[:], stays = _candidates(words, len(block))
        missing = np.flatnonzero(~stays)
        while missing.size:
            block[missing], stays = _candidates(words, missing.size)
            missing = missing[~stays]
    return drawn


def _candidates(words: Words, count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """One round: values, and which of them stay."""
    strips = _strips(words, count)  # 1
    word = words.take(count)  # 2
    start = strips << np.uint64(_STRIP_BITS)
    offset = word & np.uint64((1 << _STRIP_BITS) - 1)
    magnitude = start + offset
    negative = word >= np.uint64(1 << 63)
    exponent = offset * (magnitude + start) << np.uint64(_WORD_BITS - 1 - 2 * (_STRIP_BITS + 5))
    stays = _exp_minus(words, exponent)  # 3
    stays &= ~negative | (magnitude != 0)
    values = magnitude.view(np.int64)
    return np.where(negative, -values, values), stays


def _strips(words: Words, count: int) -> Unsigned:
    """Which strip each candidate lies in: the number of thresholds that a uniform 512-bit number reaches."""
    table, word = _table(), words.take(count)
    bucket = (word >> np.uint64(_WORD_BITS - _BUCKET_BITS)).astype(np.intp)
    found = table.before[bucket] + (word >= table.within[bucket])
    crowded = np.flatnonzero(bucket >= table.crowded)
    found[crowded] = np.searchsorted(table.leading, word[crowded], side="right")
    for place in np.flatnonzero(table.leading[found - 1] == word):
        number = int(word[place])
        for more in words.take(_TABLE_BITS // _WORD_BITS - 1).tolist():
            number = (number << _WORD_BITS) + more
        found[place] = bisect_right(table.thresholds, number)
    return found.astype(np.uint64, copy=False)


def _exp_minus(words: Words, exponent: Unsigned) -> NDArray[np.bool_]:
    """True with probability ``exp(-exponent / 2**64)``, each by itself."""
    found = words.take(len(exponent)) >= exponent
    undecided, divisor = np.flatnonzero(~found), 2
    while undecided.size:
        part = exponent[undecided] // np.uint64(divisor)
        word = words.take(undecided.size)
        below = word < part
        for place in np.flatnonzero(word == part):
            below[place] = _below(words, int(exponent[undecided[place]]) % divisor, divisor)
        if divisor % 2:
            found[undecided[~below]] = True
        undecided, divisor = undecided[below], divisor + 1
    return found


def _below(words: Words, numerator: int, denominator: int) -> bool:
    """Whether a uniform number is below ``numerator / denominator``, 64 bits at a time."""
    while numerator:
        part, numerator = divmod(numerator << _WORD_BITS, denominator)
        word = int(words.take(1)[0])
        if word != part:
            return word < part
    return False


class _Table(NamedTuple):
    """The 1,023 thresholds between strips, of 512 bits, the first 64 bits of each, and how to find one quickly.

    The words that share their first bits are a bucket. From bucket ``crowded`` on there may be several thresholds in one;
    below it there are ``before`` a bucket and at most one ``within``.
    """

    thresholds: tuple[int, ...]
    leading: Unsigned
    before: NDArray[np.int64]
    within: Unsigned
    crowded: int


@lru_cache(maxsize=1)
def _table() -> _Table:
    """A twentieth of a second, once."""
    with localcontext() as context:
        context.prec = 400
        base = (Decimal(-1) / 2048).exp()
        weights = accumulate((base ** (2 * i + 1) for i in range(_STRIPS - 1)), Decimal.__mul__, initial=Decimal(1))
        *reached, total = accumulate(weights)
        thresholds = tuple(int(weight / total * 2**_TABLE_BITS) for weight in reached)
    leading = np.array([threshold >> (_TABLE_BITS - _WORD_BITS) for threshold in thresholds], np.uint64)
    starts = np.arange(1 << _BUCKET_BITS, dtype=np.uint64) << np.uint64(_WORD_BITS - _BUCKET_BITS)
    before = np.searchsorted(leading, starts)
    crowded = int(np.flatnonzero(np.diff(before, append=len(leading)) > 1)[0])
    return _Table(thresholds, leading, before, leading[before], crowded)
