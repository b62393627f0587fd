"""Which strategy each parameter gets: by counting operations, or measured on public records, on this machine, now."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import torch

from .blocks import Blocks
from .terms import Instantiated, RankOne, term_of
from .uses import ConvUse, EmbeddingUse, LinearUse, RowsUse, Strategy, Use

Mode = Literal["auto", "book_keeping", "ghost", "per_sample"]
"""Which strategy each layer gets: the one measured to be fastest here, the one with fewer operations, or always one."""

_ROUNDS: Final = 3
_SLOW: Final = 4.0
_TRIAL_RECORDS: Final = 64
_TRIAL_OPERATIONS: Final = 1 << 30
_FORMING_COST: Final = 50
"""What it costs to form one element, take it to float64, square it and sum it, in float32 multiply-adds (measured)."""
_DOUBLE_COST: Final = 2.3
"""A float64 multiply-add in float32 ones (measured)."""
_GROUPED_ELEMENTS: Final = 1 << 16
"""Up to this size of a filter bank one grouped convolution beat one call for each record (measured)."""

_WORTH: Final = 2.5
"""So many times what is cheapest a strategy may cost that forms nothing, where memory is dear."""

_measured: dict[object, dict[Strategy, float]] = {}


def costs(mode: Mode, uses: Sequence[Use], blocks: Blocks | None) -> Mapping[Strategy, float]:
    """What each strategy that ``mode`` allows costs a parameter with these uses, where sums are as ``blocks`` says.

    Costs of one mode can be compared with each other, also between parameters.
    """
    if mode != "ghost" and any(isinstance(use, RowsUse) for use in uses):
        return {"per_sample": 0.0}  # what comes formed has to be added to what else there is
    if mode == "auto" and len(uses) == 1 and isinstance(uses[0], LinearUse) and products(uses) == 1:
        return {"ghost": 0.0}  # a product of two vectors: nothing is cheaper, whatever a measurement of so little says
    if mode == "auto":
        return _measured_seconds(uses, blocks)
    return _counted(uses[0]) if mode == "book_keeping" else {mode: 0.0}


def chosen(
    costs: Mapping[str, Mapping[Strategy, float]], formed_bytes: Mapping[str, int], most_bytes: int
) -> dict[str, Strategy]:
    """Each parameter's cheapest strategy; fewer form gradients where a record's would take more than ``most_bytes`` in all.

    Those that lose least by it, for a byte, go first; none whose cost would be more than 2.5 times as high.
    """
    found = {name: min(each, key=each.__getitem__) for name, each in costs.items()}
    losses = {
        name: (each["ghost"] - each[found[name]]) / formed_bytes[name]
        for name, each in costs.items()
        if found[name] != "ghost" and each.get("ghost", math.inf) <= _WORTH * each[found[name]]
    }
    formed = sum(formed_bytes[name] for name, strategy in found.items() if strategy != "ghost")
    for name in sorted(losses, key=losses.__getitem__):
        if formed <= most_bytes:
            break
        found[name] = "ghost"
        formed -= formed_bytes[name]
    return found


def products(uses: Iterable[Use]) -> int:
    """How many products of an activation and a gradient make up one record's gradient under ``ghost``."""
    return sum(use.sizes()[1] for use in uses if isinstance(use, LinearUse | ConvUse))


def trial_size(all_uses: Iterable[Sequence[Use]], most: int) -> int:
    """On how many records to measure: as many as a physical batch may have (``most``), if that takes little memory and time."""
    largest = max(sum(operations(use) for use in uses) for uses in all_uses)
    return max(2, min(most, _TRIAL_RECORDS, _TRIAL_OPERATIONS // largest))


def strategies_for(use: Use) -> tuple[Strategy, ...]:
    """Those that differ for such a use, without ghost where it takes many times the operations."""
    if isinstance(use, EmbeddingUse):
        return ("ghost",)
    if not isinstance(use, LinearUse | ConvUse):
        return ("per_sample",)
    formed: tuple[Strategy, ...] = ("per_sample",)
    if isinstance(use, ConvUse):
        formed = ("per_sample", "grouped", "patches")
    return (*formed, "ghost") if _ghost_operations(use) < 4 * operations(use) else formed


def cheaper_by_count(use: Use) -> Strategy:
    """The strategy with fewer operations: ghost where ``t`` is small beside the layer, else per sample."""
    found = _counted(use)
    return min(found, key=found.__getitem__)


def _counted(use: Use) -> dict[Strategy, float]:
    """Operations of forming gradients in the usual way, and of ghost norms and sums."""
    small = isinstance(use, ConvUse) and use.elements() <= _GROUPED_ELEMENTS
    found: dict[Strategy, float] = {
        "grouped" if small else "per_sample": operations(use),
        "ghost": _ghost_operations(use),
    }
    allowed = strategies_for(use)
    return {strategy: count for strategy, count in found.items() if strategy in allowed}


def operations(use: Use) -> int:
    """What forming one record's gradient costs, with its norm and sum, in float32 multiply-adds."""
    _, t, *_ = use.sizes() if isinstance(use, LinearUse | ConvUse) else (1, 1)
    return use.elements() * (t + _FORMING_COST)


def _ghost_operations(use: Use) -> float:
    if not isinstance(use, LinearUse | ConvUse):
        return 0.0
    groups, t, p, d = use.sizes()
    return _DOUBLE_COST * groups * (t * t * (p + d) + t * p * d)


def _measured_seconds(uses: Sequence[Use], blocks: Blocks | None) -> Mapping[Strategy, float]:
    """In what time each strategy formed norms and one weighted sum of ``uses``, the best of three.

    Asked again in this process for layers of the same kind and sizes, it gives the same answer without a measurement,
    so trainers of one process agree. Strategies four times slower at first are not tried again, and left out.
    """
    candidates = strategies_for(uses[0])
    if len(candidates) == 1:
        return {candidates[0]: 0.0}
    key = (torch.get_num_threads(), blocks, tuple(_signature(use) for use in uses))
    if key not in _measured:
        first = {strategy: _seconds(uses, strategy, blocks) for strategy in candidates}
        close = [strategy for strategy in candidates if first[strategy] <= _SLOW * min(first.values())]
        _measured[key] = {s: min(_seconds(uses, s, blocks) for _ in range(_ROUNDS)) for s in close}
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
