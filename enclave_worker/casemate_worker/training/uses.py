"""How a batch used a parameter: what went in and the gradient of what came out, record by record.

A *use* is one application of a layer; :mod:`.terms` has what uses make of norms and sums. Gradients are formed in pieces of some
records, which fit where activations were that the backward pass has given back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from casemate_schemas.errors import ModelError
from casemate_schemas.result import ClippingStrategy
from torch import Tensor

Strategy = ClippingStrategy

CHUNK_ELEMENTS: Final = 1 << 18
"""Float64 temporaries of this many elements (2 MiB) stay in a core's cache; larger ones cost page faults."""
_PIECE_ELEMENTS: Final = (1 << 20) - 1024
"""Gradients are formed in pieces of somewhat less than 4 MiB, or of two records.

So they lie where activations were, whose sizes are powers of two more often than not: the C library adds some bytes to
each, and of halves that are as large as can be one would fit there, not two.
"""
_REGISTERS_ELEMENTS: Final = 16
"""MKL's small products take so many elements of the last axis at a time, and others in several goes (measured)."""


class Use(Protocol):
    """One use of a parameter by a batch."""

    def form(self, strategy: Strategy) -> RowsUse:
        """Each record's gradient, elements in whatever order is quickest."""

    def elements(self) -> int:
        """How many the parameter has."""


@dataclass(frozen=True)
class Order:
    """How elements lie where not as the parameter has them: by axes of these sizes, which ``axes`` permute into its own."""

    sizes: torch.Size
    axes: tuple[int, ...]

    def undone(self, rows: Tensor) -> Tensor:
        """``[m, elements]`` in the parameter's own order."""
        return rows.view(-1, *self.sizes).permute(0, *(axis + 1 for axis in self.axes)).reshape(rows.shape)


class RowsUse:
    """Gradients record by record, float32: formed, or as the backward pass gives those of biases and scales.

    ``pieces`` hold some records each, one after another: ``[m, elements]``, or, where there is an ``order``, ``[k, m,
    elements / k]``: then elements lie as it says, ``k`` being its first size.
    """

    def __init__(self, *pieces: Tensor, order: Order | None = None) -> None:
        """At least one piece."""
        self.pieces, self.order = pieces, order

    def joined(self) -> Tensor:
        """``[n, elements]``, in the parameter's own order."""
        rows = self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces, dim=-2)
        return rows if self.order is None else self.order.undone(rows.transpose(0, 1).flatten(1))

    def form(self, strategy: Strategy) -> RowsUse:
        """Itself."""
        return self

    def plus(self, other: RowsUse) -> RowsUse:
        """The sums."""
        if self.order == other.order and [p.shape for p in self.pieces] == [p.shape for p in other.pieces]:
            return RowsUse(*(a + b for a, b in zip(self.pieces, other.pieces, strict=True)), order=self.order)
        return RowsUse(self.joined() + other.joined())

    def elements(self) -> int:
        """See :meth:`Use.elements`."""
        return self.pieces[0].numel() // self.pieces[0].shape[-2]


@dataclass(eq=False)
class LinearUse:
    """``activation`` ``[n, ..., p]`` went in, ``gradient`` ``[n, ..., d]`` came back."""

    activation: Tensor
    gradient: Tensor

    def form(self, strategy: Strategy) -> RowsUse:
        """One small product a record."""
        a, g = (factor[:, 0] for factor in self.factors(slice(None)))
        pieces = _pieces(a.shape[0], self.elements())
        return RowsUse(*(torch.bmm(g[records].transpose(1, 2), a[records]).flatten(1) for records in pieces))

    def sizes(self) -> tuple[int, int, int, int]:
        """Groups, positions, features in and out."""
        return 1, math.prod(self.gradient.shape[1:-1]), self.activation.shape[-1], self.gradient.shape[-1]

    def factors(self, records: slice) -> tuple[Tensor, Tensor]:
        """Activations ``[m, groups, t, p]`` and gradients ``[m, groups, t, d]`` of some records."""
        a, g = self.activation[records], self.gradient[records]
        return a.reshape(a.shape[0], 1, -1, a.shape[-1]), g.reshape(g.shape[0], 1, -1, g.shape[-1])

    def elements(self) -> int:
        """See :meth:`Use.elements`."""
        return self.gradient.shape[-1] * self.activation.shape[-1]


@dataclass(eq=False)
class ConvUse:
    """``activation`` ``[n, c, ...]`` went into a convolution, ``gradient`` ``[n, d, ...]`` came back."""

    activation: Tensor
    gradient: Tensor
    weight_shape: torch.Size
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def form(self, strategy: Strategy) -> RowsUse:
        """``per_sample`` calls the library's own kernel for each record; ``grouped`` once, a record being a group.

        ``patches`` multiplies gradients and unfolded patches.
        """
        pieces = _pieces(self.activation.shape[0], self.elements())
        if strategy == "patches" and self.groups == 1 and len(self.stride) == 2:
            order, last = self._order()
            return RowsUse(*(self._by_rows(records, order, last=last) for records in pieces), order=order)
        one = {"grouped": self._grouped, "patches": self._by_patches}.get(strategy, self._one_by_one)
        return RowsUse(*map(one, pieces))

    def _grouped(self, records: slice) -> Tensor:
        n = records.stop - records.start
        x, g = (part[records].reshape(1, -1, *part.shape[2:]) for part in (self.activation, self.gradient))
        return self._weight_gradient(x, g, n).reshape(n, -1)

    def _one_by_one(self, records: slice) -> Tensor:
        rows = self.activation.new_empty(records.stop - records.start, self.elements())
        for row, x, g in zip(rows, self.activation[records], self.gradient[records], strict=True):
            row.copy_(self._weight_gradient(x[None], g[None], 1).view(-1))
        return rows

    def _by_patches(self, records: slice) -> Tensor:
        _, t, p, _ = self.sizes()
        rows = self.activation.new_empty(records.stop - records.start, self.elements())
        for some in chunks(len(rows), CHUNK_ELEMENTS // (self.groups * t * p)):
            a, g = self.factors(slice(records.start + some.start, records.start + some.stop))
            rows[some] = (g.transpose(2, 3) @ a).flatten(1)
        return rows

    def _order(self) -> tuple[Order, bool]:
        """Of :meth:`_by_rows`: rows of the kernel, then features out, features in and columns of the kernel, which are the last.

        Or features out are, where they fill more of the registers.
        """
        d, c, height, width = self.weight_shape
        if _whole_vectors(c * width) >= _whole_vectors(d):
            return Order(torch.Size((height, d, c, width)), (1, 2, 0, 3)), True
        return Order(torch.Size((height, c, width, d)), (3, 1, 0, 2)), False

    def _by_rows(self, records: slice, order: Order, *, last: bool) -> Tensor:
        """``patches`` in less time: unfolded along columns alone, so that what meets a row of the kernel lies in one piece."""
        d, c, height, width = self.weight_shape
        n, (_, _, rows, columns) = records.stop - records.start, self.gradient.shape
        lines = self.activation.shape[2] + 2 * self.padding[0]
        step, inner = min(self.stride[0], lines), c * width  # longer ones meet the first lines alone
        found = self.activation.new_empty(height, n, *((d, inner) if last else (inner, d)))
        lines = -(-lines // step)
        some = chunks(n, 2 * CHUNK_ELEMENTS // (inner * step * lines * columns))
        unfolded = self.activation.new_empty(some[0].stop, inner, step, lines * columns)
        for few in some:
            among = slice(records.start + few.start, records.start + few.stop)
            x, g = unfolded[: few.stop - few.start], self.gradient[among].flatten(2)
            self._unfold_columns(among, x.view(-1, c, width, step, lines, columns))
            for row in range(height):
                start, phase = divmod(row * self.dilation[0], step)
                met = x[:, :, phase, start * columns : (start + rows) * columns]
                left, right = (g, met) if last else (met, g)
                torch.bmm(left, right.mT, out=found[row, few])
        return found.flatten(2)

    def _unfold_columns(self, records: slice, out: Tensor) -> None:
        """What meets each column of the kernel, ``[m, c, width, step, lines, columns]``: every ``step``-th line together."""
        (above, beside), across = self.padding, self.stride[1]
        _, _, width, step, lines, _ = out.shape
        below = lines * step - above - self.activation.shape[2]
        x = self.activation[records]
        x = F.pad(x, (beside, beside, above, below)) if above or beside or below else x
        x = x.unfold(3, self.dilation[1] * (width - 1) + 1, across)[..., :: self.dilation[1]]
        out.copy_(x.reshape(*x.shape[:2], lines, step, *x.shape[3:]).permute(0, 1, 5, 3, 2, 4))

    def elements(self) -> int:
        """See :meth:`Use.elements`."""
        return self.weight_shape.numel()

    def sizes(self) -> tuple[int, int, int, int]:
        """Groups, positions, features in and out."""
        out, *inner = self.weight_shape
        return self.groups, math.prod(self.gradient.shape[2:]), math.prod(inner), out // self.groups

    def factors(self, records: slice) -> tuple[Tensor, Tensor]:
        """Patches ``[m, groups, t, p]`` and gradients ``[m, groups, t, d]`` of some records."""
        x, kernel = self.activation[records], self.weight_shape[2:]
        x = F.pad(x, [side for padding in reversed(self.padding) for side in (padding, padding)])
        for axis, (size, step, dilation) in enumerate(zip(kernel, self.stride, self.dilation, strict=True), start=2):
            x = x.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
        m, rank = x.shape[0], len(kernel)
        x = x.reshape(m, self.groups, -1, *x.shape[2:])  # [m, groups, c, *positions, *kernel]
        x = x.permute(0, 1, 2, *range(3 + rank, 3 + 2 * rank), *range(3, 3 + rank))
        g = self.gradient[records].reshape(m, self.groups, -1, self.gradient.shape[2:].numel())
        return x.reshape(m, self.groups, -1, g.shape[3]).transpose(2, 3), g.transpose(2, 3)

    def _weight_gradient(self, x: Tensor, g: Tensor, records: int) -> Tensor:
        weight = x.new_empty(()).expand(records * self.weight_shape[0], *self.weight_shape[1:])
        zeros = [0] * len(self.stride)
        geometry = (self.stride, self.padding, self.dilation, False, zeros, records * self.groups)
        found: Tensor = torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, [False, True, False])[1]
        return found


@dataclass(eq=False)
class EmbeddingUse:
    """``rows`` (int64 ``[n, t]``) were looked up among ``count``, ``gradient`` ``[n, t, d]`` came back."""

    rows: Tensor
    gradient: Tensor
    count: int

    def form(self, strategy: Strategy) -> RowsUse:
        """The whole table's gradient, mostly zeros."""
        n, width = len(self.rows), self.gradient.shape[2]
        keys = (self.rows + self.count * torch.arange(n)[:, None]).flatten()
        found = self.gradient.new_zeros(n * self.count, width).index_add_(0, keys, self.gradient.flatten(0, 1))
        return RowsUse(found.reshape(n, -1))

    def elements(self) -> int:
        """See :meth:`Use.elements`."""
        return self.count * self.gradient.shape[2]


def chunks(count: int, most: int) -> list[slice]:
    """All ``count`` records, or at most ``most`` at a time, then a power of two.

    With two threads a product by itself is rounded otherwise than among others: of batches as :mod:`.rows` has them no record
    is left over alone.
    """
    size = max(1, count) if most >= count else 1 << max(1, most).bit_length() - 1
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _pieces(count: int, elements: int) -> list[slice]:
    """Which of ``count`` records to form together; none by itself, which might be rounded otherwise (:func:`chunks`)."""
    size = max(2, _PIECE_ELEMENTS // elements)
    starts = list(range(0, count, size))
    if count - starts[-1] == 1 < count:
        starts.pop()
    return [slice(start, end) for start, end in pairwise([*starts, count])]


def _whole_vectors(size: int) -> float:
    """The share of ``size`` that fills registers: the axis of a small product that is next to each other in memory."""
    return size // _REGISTERS_ELEMENTS * _REGISTERS_ELEMENTS / size


def check_batch(tensor: Tensor, count: int, least_axes: int) -> None:
    """:class:`ModelError` unless axis 0 of ``tensor`` is the batch of ``count`` records."""
    if tensor.dim() < least_axes or tensor.shape[0] != count:
        raise ModelError("per-sample gradients are not available: a parameter's use does not follow the batch")
