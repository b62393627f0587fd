"""Noise depends on nothing but the step: a thread of its own makes the next steps' while gradients are computed.

The same draws, bit for bit, only earlier.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from torch import Tensor

_ELEMENTS: Final = 1 << 19
_STEPS: Final = 64


class Ahead:
    """What ``draw`` makes of steps and a number of coordinates, made by the time it is wanted."""

    def __init__(self, draw: Callable[[range, int], list[Tensor]]) -> None:
        """``draw`` gives one tensor a step. It runs on another thread, and a step's must depend on step and number alone.

        Few calls on long arrays leave Python's lock to the thread that computes gradients.
        """
        self._draw = draw
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="noise")
        self._blocks: dict[tuple[int, int, int], Future[list[Tensor]]] = {}

    def start(self, step: int, count: int) -> None:
        """Have the draw of ``step``, for ``count`` coordinates, made; of some later ones, too.

        Small models get that of many steps at once, for which it is worth to hand over to another thread.
        """
        block, steps, _ = self._block(step, count)
        wanted = [(number, steps, count) for number in ((block,) if steps == 1 else (block, block + 1))]
        self._blocks = {key: self._blocks.get(key) or self._thread.submit(self._draw_block, *key) for key in wanted}

    def take(self, step: int, count: int) -> Tensor:
        """The draw of ``step``: here and now if nobody started it."""
        key = self._block(step, count)
        block = self._blocks.get(key)
        return self._draw(range(step, step + 1), count)[0] if block is None else block.result()[step % key[1]]

    def _block(self, step: int, count: int) -> tuple[int, int, int]:
        steps = max(1, min(_STEPS, _ELEMENTS // count))
        return step // steps, steps, count

    def _draw_block(self, block: int, steps: int, count: int) -> list[Tensor]:
        return self._draw(range(block * steps, (block + 1) * steps), count)
