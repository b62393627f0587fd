"""Which strategy is fastest for one parameter, on this machine, now: measured on public records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import torch

from .blocks import Blocks
from .uses import ConvUse, Instantiated, LinearUse, RankOne, Strategy, Use, strategies_for, term_of

_ROUNDS: Final = 3
_SLOW: Final = 4.0

_measured: dict[object, Strategy] = {}


def measured_strategy(uses: Sequence[Use], blocks: Blocks | None = None) -> Strategy:
    """The strategy that formed norms and one weighted sum of ``uses`` in the least time, the best of three each.

    Asked again in this process for layers of the same kind and sizes, it gives the same answer without a measurement,
    so trainers of one process agree. Strategies four times slower at first are not tried again.
    """
    candidates = strategies_for(uses[0])
    if len(candidates) == 1:
        return candidates[0]
    key = (torch.get_num_threads(), blocks, tuple(_signature(use) for use in uses))
    if key not in _measured:
        first = {strategy: _seconds(uses, strategy, blocks) for strategy in candidates}
        close = [strategy for strategy in candidates if first[strategy] <= _SLOW * min(first.values())]
        best = {strategy: min(_seconds(uses, strategy, blocks) for _ in range(_ROUNDS)) for strategy in close}
        _measured[key] = min(close, key=best.__getitem__)
    return _measured[key]


def _seconds(uses: Sequence[Use], strategy: Strategy, blocks: Blocks | None) -> float:
    started = time.thread_time()
    term = term_of(uses, strategy)
    squares, _ = term.squared_norms()
    total = torch.zeros(uses[0].elements(), dtype=torch.float64)
    if blocks is not None and isinstance(term, Instantiated | RankOne):
        blocks.add(total, {0: term}, squares.float())
    else:
        term.add_weighted(total, squares)
    return time.thread_time() - started


def _signature(use: Use) -> object:
    sizes = (len(use.gradient), use.sizes()) if isinstance(use, LinearUse | ConvUse) else ()
    return type(use).__name__, sizes
