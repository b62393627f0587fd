"""Float32 sums over records, and what has to be left out of the clipping norm so that they may be used.

Summing ``n`` vectors ``c_i`` in float32 errs, and errs differently with one record more. So much as that can come to is set
aside in advance: records are clipped to less than C, by a share that follows from the plan alone.

**The bound.** ``u = 2^-24``. A sum of ``b`` products of floats, in whatever order and with or without fused operations, errs
by at most ``γ_b·Σ_i |x_i·y_i|`` in each coordinate, where ``γ_k = k·u / (1 - k·u)`` (Higham 2002, §3.1). Products go over
blocks of at most ``b`` records; to one of them up to ``k - 1`` more, left over, are added, at worst product by product, which
makes ``b + k - 1``; and at most ``k = 8`` blocks are added up in float32, in ``k - 1`` additions. Everything else is float64.
Weighting costs two roundings more, float64 less than one. So a sum of ``n`` parts of L2 norm at most C' errs, by the triangle
inequality, by at most ``γ_(b+2k+1)·n·C'`` in L2 norm.

**Underflow.** That holds for results that are normal numbers. Else a result errs by at most 2^-126, whether gradual underflow
is on or not, times what it is multiplied with. Factors below 2^-40 do not occur (their records add nothing), and a factor is at
most 1 and at most C' by a bound that is at least 2^-40 times the norm of either vector multiplied (:func:`upper_squares`). So
none is longer than 2^80·C', and for at most 2^30 coordinates and C from 10^-6 to 10^6 all this is below ``u·n·C'``.

**The share.** Neighbouring sums of at most ``N`` and ``N + 1`` records differ by at most ``C' + 2·(b+2k+2)·u·N·C'·(1 + 2^-10)``,
underflow included (sums of more than ``N`` are made in float64). ``C' = C·(1 - 2·(b+2k+2)·u·N·(1 + 2^-10))`` makes this at
most C.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST_FACTOR: Final = 2.0**-40
"""Records whose norm is more than C divided by this add nothing."""

_UNIT: Final = 2.0**-24
_SUMMED: Final = 8
_BUFFER_ELEMENTS: Final = 1 << 20
"""So many coordinates of blocks' sums are held at once, or one parameter's of one block."""
_SIZES: Final = (64, 32, 16, 8)
_MOST_ROOM: Final = 2.0**-8
_WIDTH: Final = 2048
_FLOOR: Final = 2.0**-80


@dataclass(frozen=True)
class Blocks:
    """Float32 sums of batches of at most ``records`` records, over blocks of at most ``size``."""

    records: int
    size: int

    @property
    def room(self) -> float:
        """The share of the clipping norm that these sums need; see the module's docstring."""
        return 2 * (self.size + 2 * _SUMMED + 2) * _UNIT * self.records * (1 + 2.0**-10)

    def add(self, total: Tensor, terms: Mapping[int, BlockTerm], factors: Tensor) -> None:
        """Add ``Σ_i factors_i · gradient_i`` of ``terms``, by where their coordinates begin, to ``total`` (float64 ``[d]``).

        ``factors`` are float32 ``[n]``.
        """
        count, column = factors.shape[0], factors[:, None]
        for begin, end, group in _groups(terms):
            elements, found = end - begin, total[begin:end]
            at_once = self.size * max(1, min(_SUMMED, _BUFFER_ELEMENTS // elements))
            for start in range(0, count, at_once):
                part = Part(start, min(at_once, count - start), self.size)
                sums, at = torch.empty(part.count, elements), 0
                weights = part.of(column)
                for term in group:
                    at, before = at + term.elements, at
                    term.sum_blocks(sums[:, before:at], part, weights)
                found += sums[0] if part.count == 1 else sums.sum(dim=0)


class Part:
    """``records`` of a batch from ``start`` on, as ``count`` blocks of one size, so that one kernel takes them, and a rest."""

    def __init__(self, start: int, records: int, most: int) -> None:
        """In as few blocks of at most ``most`` as there can be; the rest are fewer than blocks."""
        self.count = -(-records // most)
        self._size, self._rest = divmod(records, self.count)
        self._start, self._end = start, start + records

    def of(self, rows: Tensor) -> Tensor:
        """Those of a batch's ``rows`` (``[n, ...]``)."""
        return rows[self._start : self._end] if self._start or self._end < rows.shape[0] else rows

    def blocks(self, rows: Tensor) -> Tensor:
        """Of these ``rows`` (``[records, width]``) those in blocks, ``[count, size, width]``."""
        whole = rows[: -self._rest] if self._rest else rows
        return whole.reshape(self.count, self._size, -1)

    def ranges(self) -> list[tuple[int, int, int]]:
        """The batch's records that each block sums, the rest among those of the first: block, first record and the one after."""
        ends = [self._start + number * self._size for number in range(self.count + 1)]
        found = [(number, *pair) for number, pair in enumerate(pairwise(ends))]
        return [*found, (0, ends[-1], self._end)] if self._rest else found

    def offset(self, record: int) -> int:
        """Where that record of the batch is among the part's."""
        return record - self._start

    def rest(self, rows: Tensor) -> Tensor | None:
        """The others of these ``rows``, if there are any."""
        return rows[-self._rest :] if self._rest else None


class BlockTerm(Protocol):
    """What can be summed in blocks."""

    @property
    def elements(self) -> int:
        """How many coordinates it has."""

    def sum_blocks(self, out: Tensor, part: Part, weights: Tensor) -> None:
        """Write the weighted sum of each block of ``part``, with the rest, to ``out`` (float32 ``[count, elements]``).

        ``weights`` (float32 ``[records, 1]``) are those of the part.
        """


def _groups(terms: Mapping[int, BlockTerm]) -> Iterator[tuple[int, int, list[BlockTerm]]]:
    """Terms whose coordinates follow each other, so many that their sums stay in the cache: from where to where, and which."""
    group: list[BlockTerm] = []
    begin = end = 0
    for start, term in terms.items():
        if group and (start != end or start + term.elements - begin > _BUFFER_ELEMENTS):
            yield begin, end, group
            group = []
        begin, end = begin if group else start, start + term.elements
        group.append(term)
    if group:
        yield begin, end, group


def sum_products(out: Tensor, part: Part, left: Tensor, right: Tensor, *, shift: bool = False) -> None:
    """Write ``Σ_i left_i ⊗ right_i`` of each block of ``part`` to ``out`` (``[count, d·p]``).

    ``left`` and ``right`` are the part's: ``[records, d]`` and ``[records, p]``. With ``shift``, ``Σ_i left_i`` comes after
    it, in ``d`` columns more.
    """
    d, p = left.shape[1], right.shape[1]
    products, shifts = out.split_with_sizes((d * p, d), 1) if shift else (out, None)
    blocks, found = part.blocks(left), products.view(part.count, d, p)
    torch.bmm(blocks.mT, part.blocks(right), out=found)
    if shifts is not None:
        torch.sum(blocks, 1, out=shifts)
    if (x := part.rest(left)) is not None and (y := part.rest(right)) is not None:
        found[0].addmm_(x.t(), y)
        if shifts is not None:
            shifts[0] += x.sum(dim=0)


def sum_pieces(out: Tensor, part: Part, weights: Tensor, pieces: Sequence[Tensor]) -> None:
    """Write ``Σ_i weights_i · rows_i`` of each block of ``part`` to ``out`` (``[count, width]``).

    ``pieces``, ``[m, width]``, are all rows of the batch, one after another. Each block's is one sum of so many products,
    added up piece by piece.
    """
    out.zero_()
    start = 0
    for rows in pieces:
        end = start + rows.shape[0]
        for block, first, last in part.ranges():
            lower, upper = max(start, first), min(end, last)
            if lower < upper:
                some = weights[part.offset(lower) : part.offset(upper)]
                out[block : block + 1].addmm_(some.t(), rows[lower - start : upper - start])
        start = end


def blocks_for(expected_batch: float) -> Blocks | None:
    """For Poisson batches of so many records on average; None where the room would be more than 2^-8 of C.

    Batches are larger than this provides for once in many millions of steps.
    """
    records = math.ceil(expected_batch + 6 * math.sqrt(expected_batch)) + 16
    fitting = (blocks for size in _SIZES if (blocks := Blocks(records, size)).room <= _MOST_ROOM)
    return next(fitting, None)


def upper_products(pairs: Sequence[tuple[Tensor, Tensor, bool]]) -> Tensor:
    """Upper bounds on ``Σ (‖a_i‖² + shift)·‖g_i‖²`` over ``a``, ``g`` and whether there is a shift, float64 ``[n]``.

    As the products of :func:`upper_squares`, with one rounding more for a root; all at once, because operations on so little
    cost more than their arithmetic.
    """
    widest = max(max(a.shape[1], g.shape[1]) for a, g, _ in pairs)
    if widest >= _WIDTH:
        return sum((upper_squares(a) + float(shift)) * upper_squares(g) for a, g, shift in pairs)  # type: ignore[return-value]
    norms = torch.stack([torch.linalg.vector_norm(rows, dim=1) for pair in pairs for rows in pair[:2]])
    squares = np.square(norms.numpy(), dtype=np.float64)
    squares += _floors(tuple(shift for *_, shift in pairs))
    products = np.einsum("in,in->n", squares[0::2], squares[1::2])
    products *= (1 + (widest + 6) * _UNIT) ** 2
    return torch.from_numpy(products)


@lru_cache(maxsize=64)
def _floors(shifts: tuple[bool, ...]) -> NDArray[np.float64]:
    """What is added to squared norms, ``[2·len(shifts), 1]``."""
    return np.array([[floor] for shift in shifts for floor in (shift + _FLOOR, _FLOOR)])


def upper_squares(rows: Tensor) -> Tensor:
    """Upper bounds on the squared L2 norms of float32 ``[n, width]``, float64 ``[n]``, at least 2^-80 each.

    Of ``[k, n, width]``, those of ``k`` pieces of each record together. Above the truth by at most 2^-79 and a share of
    2^-11. Infinite for norms from some 10^19 on, NaN or infinite where a row is not finite.

    Float32 sums of at most 2,048 squares err by a share of at most γ_2048, roots and float64 by little more; a square that
    underflows is less than 2^-126.
    """
    parts = rows.shape[-1] // _WIDTH
    rest = rows[..., parts * _WIDTH :]
    found: Tensor = torch.linalg.vector_norm(rest, dim=-1).double().square_()
    if parts:
        whole = rows[..., : parts * _WIDTH].reshape(*rows.shape[:-1], parts, _WIDTH)
        found += torch.linalg.vector_norm(whole, dim=-1).double().square_().sum(dim=-1)
    if rows.dim() == 3:
        found = found.sum(dim=0)
    return found.mul_(1 + (_WIDTH + 4) * _UNIT).add_(_FLOOR)
