"""Which records a step uses: each one independently, with its owner's own rate (Poisson sampling)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from casemate_schemas.errors import ParameterError
from numpy.typing import NDArray

from .keystream import Keystream, sampling_label


class PoissonSampler:
    """True Poisson sampling of one owner's records at an exact rational rate.

    Record ``i`` is in step ``t``'s batch if and only if word ``i`` of the owner's keystream at ``t`` is below
    ``floor(q · 2^64)``. The realised probability ``p = floor(q · 2^64) / 2^64`` satisfies ``q - 2^-64 < p <= q``.

    Accounting uses ``q`` itself. That is sound because ``p`` never exceeds it: the output distribution at rate ``p`` is
    a mixture of the one at rate ``q`` and the one without the record, so by joint convexity every (ε, δ) that holds at
    ``q`` holds at ``p``. Rounding to nearest or upward would spend more than is charged.

    Batches have random sizes, also zero; nothing shuffles, pads or fills them up.
    """

    def __init__(self, seed: bytes, owner: str, rate: Fraction) -> None:
        """Sample for ``owner`` at ``rate``, from above 0 to 1; else :class:`ParameterError`."""
        if not 0 < rate <= 1:
            raise ParameterError(f"expected a sample rate above 0 and at most 1, got {rate}")
        self._threshold = (rate.numerator << 64) // rate.denominator
        self._keystream = Keystream(seed, sampling_label(owner))

    def indices(self, step: int, record_count: int) -> NDArray[np.int64]:
        """The sampled records of ``step`` among ``record_count``, ascending."""
        if self._threshold == 1 << 64:
            return np.arange(record_count, dtype=np.int64)
        return np.flatnonzero(self.drawn(step, record_count)).astype(np.int64, copy=False)

    def drawn(self, step: int, record_count: int) -> NDArray[np.bool_]:
        """Whether each of ``record_count`` records is sampled in ``step``."""
        if self._threshold == 1 << 64:
            return np.ones(record_count, dtype=np.bool_)
        return self._keystream.words(step, record_count) < np.uint64(self._threshold)
