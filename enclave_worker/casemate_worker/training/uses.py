"""How a batch used a parameter, and what that makes of one record's gradient: exact norms and weighted sums.

A *use* is one application of a layer: what went in and the gradient of what came out, record by record. A *term* is all
uses of one parameter in a batch, so that norms are those of the sum of its uses (weight tying, reuse), cross terms
included. Terms come in three kinds, which all can sum over records in float64, and the first and :class:`RankOne` also in
float32 where a bound on the error is provided for (:mod:`.blocks`):

- :class:`Instantiated`: the gradients of all records, float32, as computed; the certified object is these numbers.
- :class:`Outer` ("ghost", Goodfellow 2015; Li et al. 2022, §3): the gradient of record ``i`` is
  ``Σ_t g_it ⊗ a_it`` and is never formed; its squared norm is ``Σ_tt' (a_it·a_it')(g_it·g_it')``, in float64. The
  certified object is that sum over the captured float32 numbers, in exact arithmetic.
- :class:`Sparse`: the touched rows of an embedding's gradient, float64, as computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from casemate_schemas.errors import ModelError
from casemate_schemas.result import ClippingStrategy
from torch import Tensor

from .blocks import Part, sum_products, upper_products, upper_squares

Strategy = ClippingStrategy

_CHUNK_ELEMENTS: Final = 1 << 18
"""Float64 temporaries of this many elements (2 MiB) stay in a core's cache; larger ones cost page faults."""
_CHEAP_ELEMENTS: Final = 1024
"""Gradients of up to so many elements have their norms taken in float64."""
_FORMING_COST: Final = 50
"""What it costs to form one element, take it to float64, square it and sum it, in float32 multiply-adds (measured)."""
_DOUBLE_COST: Final = 2.3
"""A float64 multiply-add in float32 ones (measured)."""
_REGISTERS_ELEMENTS: Final = 16
"""MKL's small products take so many elements of the last axis at a time, and others in several goes (measured)."""
_GROUPED_ELEMENTS: Final = 1 << 16
"""Up to this size of a filter bank one grouped convolution beat one call for each record (measured)."""


class Use(Protocol):
    """One use of a parameter by a batch."""

    def instantiate(self, strategy: Strategy) -> Tensor:
        """Each record's gradient, float32 ``[n, elements]``, elements in the parameter's own order."""

    def form(self, strategy: Strategy) -> RowsUse:
        """Each record's gradient, elements in whatever order is quickest."""

    def elements(self) -> int:
        """How many the parameter has."""


class Term(Protocol):
    """All uses of one parameter by a batch of ``n`` records."""

    @property
    def elements(self) -> int:
        """How many the parameter has."""

    def squared_norms(self) -> tuple[Tensor, Tensor | None]:
        """For each record, the squared norm, float64 ``[n]``, and by how much at most the true one is larger (or None).

        Relative errors of ``(elements + 8)·2^-53`` come on top and are the caller's. NaN or infinity where a record's
        gradient holds one.
        """

    def drop(self, records: Tensor) -> None:
        """Make the gradients of these records (bool ``[n]``) zero, whatever they hold."""

    def keep(self, count: int) -> None:
        """Be the term of the first ``count`` records alone."""

    def parts(self) -> list[Tensor]:
        """What gradients are made of, as captured or formed, each ``[n, ...]``."""

    def add_weighted(self, total: Tensor, factors: Tensor) -> None:
        """Add ``Σ_i factors_i · gradient_i`` to ``total`` (float64 ``[elements]``); ``factors`` are float64 ``[n]``."""


@dataclass(frozen=True)
class Order:
    """How elements lie where not as the parameter has them: by axes of these sizes, which ``axes`` permute into its own.

    Of gradients of all records the first axis comes before that of records: ``[sizes[0], n, elements / sizes[0]]``.
    """

    sizes: torch.Size
    axes: tuple[int, ...]

    def undone(self, rows: Tensor) -> Tensor:
        """``[m, elements]`` in the parameter's own order."""
        return rows.view(-1, *self.sizes).permute(0, *(axis + 1 for axis in self.axes)).reshape(rows.shape)


@dataclass(eq=False)
class RowsUse:
    """Gradients record by record, float32 ``[n, elements]``: formed, or as the backward pass gives those of biases and scales.

    Where there is an ``order``, they lie as it says.
    """

    rows: Tensor
    order: Order | None = None

    def instantiate(self, strategy: Strategy) -> Tensor:
        """As they are, in the parameter's own order."""
        return self.rows if self.order is None else self.order.undone(self.rows.transpose(0, 1).flatten(1))

    def form(self, strategy: Strategy) -> RowsUse:
        """Itself."""
        return self

    def plus(self, other: RowsUse) -> RowsUse:
        """The sums."""
        if self.order == other.order:
            return RowsUse(self.rows + other.rows, self.order)
        return RowsUse(self.instantiate("per_sample") + other.instantiate("per_sample"))

    def elements(self) -> int:
        """See :meth:`Use.elements`."""
        return self.rows.shape[1] if self.order is None else self.order.sizes.numel()


@dataclass(eq=False)
class LinearUse:
    """``activation`` ``[n, ..., p]`` went in, ``gradient`` ``[n, ..., d]`` came back."""

    activation: Tensor
    gradient: Tensor

    def instantiate(self, strategy: Strategy) -> Tensor:
        """One small product a record."""
        a, g = self.factors(slice(None))
        return torch.bmm(g[:, 0].transpose(1, 2), a[:, 0]).flatten(1)

    def form(self, strategy: Strategy) -> RowsUse:
        """See :meth:`Use.form`."""
        return RowsUse(self.instantiate(strategy))

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

    def instantiate(self, strategy: Strategy) -> Tensor:
        """``per_sample`` calls the library's own kernel for each record; ``grouped`` once, a record being a group.

        ``patches`` multiplies gradients and unfolded patches.
        """
        n = self.activation.shape[0]
        if strategy == "grouped":
            x = self.activation.reshape(1, -1, *self.activation.shape[2:])
            g = self.gradient.reshape(1, -1, *self.gradient.shape[2:])
            return self._weight_gradient(x, g, n).reshape(n, -1)
        rows = self.activation.new_empty(n, self.weight_shape.numel())
        _, t, p, _ = self.sizes()
        most = 1 if strategy != "patches" else _CHUNK_ELEMENTS // (self.groups * t * p)
        for records in _chunks(n, most):
            if strategy == "patches":
                a, g = self.factors(records)
                rows[records] = (g.transpose(2, 3) @ a).flatten(1)
            else:
                rows[records] = self._weight_gradient(self.activation[records], self.gradient[records], 1).view(1, -1)
        return rows

    def form(self, strategy: Strategy) -> RowsUse:
        """See :meth:`Use.form`."""
        if strategy == "patches" and self.groups == 1 and len(self.stride) == 2:
            return self._by_rows()
        return RowsUse(self.instantiate(strategy))

    def _by_rows(self) -> RowsUse:
        """``patches`` in less time: unfolded along columns alone, so that what meets a row of the kernel lies in one piece.

        The order: rows of the kernel, then features out, features in and columns of the kernel, or features out last.
        """
        d, c, height, width = self.weight_shape
        n, (_, _, rows, columns) = self.activation.shape[0], self.gradient.shape
        lines = self.activation.shape[2] + 2 * self.padding[0]
        step, inner = min(self.stride[0], lines), c * width  # longer ones meet the first lines alone
        last = _whole_vectors(inner) >= _whole_vectors(d)
        found = self.activation.new_empty(height, n, *((d, inner) if last else (inner, d)))
        lines = -(-lines // step)
        some = _chunks(n, 2 * _CHUNK_ELEMENTS // (inner * step * lines * columns))
        unfolded = self.activation.new_empty(some[0].stop, inner, step, lines * columns)
        for records in some:
            x, g = unfolded[: records.stop - records.start], self.gradient[records].flatten(2)
            self._unfold_columns(records, x.view(-1, c, width, step, lines, columns))
            for row in range(height):
                start, phase = divmod(row * self.dilation[0], step)
                met = x[:, :, phase, start * columns : (start + rows) * columns]
                left, right = (g, met) if last else (met, g)
                torch.bmm(left, right.mT, out=found[row, records])
        sizes, axes = ((height, d, c, width), (1, 2, 0, 3)) if last else ((height, c, width, d), (3, 1, 0, 2))
        return RowsUse(found.flatten(2), Order(torch.Size(sizes), axes))

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

    def instantiate(self, strategy: Strategy) -> Tensor:
        """The whole table's gradient, mostly zeros."""
        n, width = len(self.rows), self.gradient.shape[2]
        keys = (self.rows + self.count * torch.arange(n)[:, None]).flatten()
        found = self.gradient.new_zeros(n * self.count, width).index_add_(0, keys, self.gradient.flatten(0, 1))
        return found.reshape(n, -1)

    def elements(self) -> int:
        """See :meth:`Use.elements`."""
        return self.count * self.gradient.shape[2]

    def form(self, strategy: Strategy) -> RowsUse:
        """See :meth:`Use.form`."""
        return RowsUse(self.instantiate(strategy))


class Instantiated:
    """See the module's docstring."""

    def __init__(self, rows: Tensor, order: Order | None = None) -> None:
        """Of float32 gradients ``[n, elements]``, or as ``order`` says; then sums alone are put into the parameter's own."""
        self.rows = rows
        self._order = order

    @property
    def elements(self) -> int:
        """See :attr:`Term.elements`."""
        return self.rows.shape[1] if self._order is None else self._order.sizes.numel()

    def squared_norms(self) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Term.squared_norms`. In float64 where that costs little."""
        if self.elements > _CHEAP_ELEMENTS:
            return upper_squares(self.rows), None
        axes = -1 if self._order is None else (0, 2)
        return torch.linalg.vector_norm(self.rows, dim=axes, dtype=torch.float64).square_(), None

    def drop(self, records: Tensor) -> None:
        """See :meth:`Term.drop`."""
        self.rows = torch.where(records[:, None], 0.0, self.rows)

    def keep(self, count: int) -> None:
        """See :meth:`Term.keep`."""
        self.rows = self.rows[..., :count, :]

    def parts(self) -> list[Tensor]:
        """See :meth:`Term.parts`."""
        return [self.rows] if self._order is None else list(self.rows.unbind())

    def add_weighted(self, total: Tensor, factors: Tensor) -> None:
        """See :meth:`Term.add_weighted`."""
        sums = torch.cat(
            [factors @ rows.double() for part in self.parts() for rows in torch.split(part, self._width(), 1)]
        )
        total += sums if self._order is None else self._order.undone(sums[None])[0]

    def sum_blocks(self, out: Tensor, part: Part, weights: Tensor) -> None:
        """See :meth:`~.blocks.BlockTerm.sum_blocks`."""
        if self._order is None:
            sum_products(out, part, weights, part.of(self.rows))
            return
        found = torch.empty(len(self.rows), part.count, self.rows.shape[2])
        for sums, rows in zip(found, self.rows, strict=True):
            sum_products(sums, part, weights, part.of(rows))
        out.copy_(self._order.undone(found.transpose(0, 1).flatten(1)))

    def _width(self) -> int:
        """Of what is taken to float64 at once."""
        return max(1, _CHUNK_ELEMENTS // self.rows.shape[-2])


class Outer:
    """See the module's docstring. Uses are joined along ``t``, so norms are those of their sum."""

    def __init__(self, uses: Sequence[LinearUse | ConvUse]) -> None:
        """Of at least one use, all of one parameter."""
        self._uses = uses
        self._dropped: Tensor | None = None
        self._count = uses[0].gradient.shape[0]
        self._groups, _, self._p, self._d = uses[0].sizes()
        self._t = sum(use.sizes()[1] for use in uses)
        self._whole: tuple[Tensor, Tensor] | None = None

    @property
    def elements(self) -> int:
        """See :attr:`Term.elements`."""
        return self._groups * self._d * self._p

    def squared_norms(self) -> tuple[Tensor, Tensor | None]:
        """Besides the Gram matrices' rounding, the slack keeps ``m_i = Σ_t ‖a_it‖‖g_it‖`` below 2^16 norms.

        So products that cancel, whose sum over records would round badly, are scaled down with the rest.
        """
        squares, slack = [], []
        # Twice Σ|rounding|: p and d products a dot product, one product each, groups·t² in the outer sum.
        unit = (self._p + self._d + self._groups * self._t**2 + 16) * 2.0**-52
        for records in self._chunks():
            a, g = self._factors(records)
            magnitudes = (a.norm(dim=3) * g.norm(dim=3)).sum(dim=(1, 2)).square()
            squares.append(((a @ a.transpose(2, 3)) * (g @ g.transpose(2, 3))).sum(dim=(1, 2, 3)))
            slack.append(magnitudes * (unit + 2.0**-32))
        return torch.cat(squares), torch.cat(slack)

    def drop(self, records: Tensor) -> None:
        """See :meth:`Term.drop`."""
        self._dropped = records
        self._whole = None

    def keep(self, count: int) -> None:
        """See :meth:`Term.keep`."""
        self._count = count
        if self._whole is not None:
            self._whole = self._whole[0][:count], self._whole[1][:count]

    def parts(self) -> list[Tensor]:
        """See :meth:`Term.parts`."""
        return [part for use in self._uses for part in (use.activation, use.gradient)]

    def add_weighted(self, total: Tensor, factors: Tensor) -> None:
        """See :meth:`Term.add_weighted`; always in float64, because products may cancel."""
        found = total.view(self._groups, self._d, self._p)
        for records in self._chunks():
            a, g = self._factors(records)
            g = (g * factors[records, None, None, None]).transpose(0, 1).flatten(1, 2)
            found.baddbmm_(g.transpose(1, 2), a.transpose(0, 1).flatten(1, 2))

    def _factors(self, records: slice) -> tuple[Tensor, Tensor]:
        """In float64, kept where they are all of them."""
        if self._whole is not None:
            return self._whole
        found = [use.factors(records) for use in self._uses]
        a, g = (torch.cat(part, dim=2).double() for part in zip(*found, strict=True))
        if self._dropped is not None:
            gone = self._dropped[records, None, None, None]
            a, g = torch.where(gone, 0.0, a), torch.where(gone, 0.0, g)
        if len(g) == self._count:
            self._whole = a, g
        return a, g

    def _chunks(self) -> list[slice]:
        per_record = self._groups * self._t * max(self._p + self._d, self._t)
        return _chunks(self._count, 4 * _CHUNK_ELEMENTS // per_record)


class RankOne:
    """:class:`Outer` for one use at one position: the norm of ``g_i ⊗ a_i`` is the product of norms, without slack.

    The layer's shift, whose gradient is ``g_i``, may go along: as if ``a_i`` had one more element, a 1.
    """

    def __init__(self, use: LinearUse, *, shift: bool = False, owned: bool = False) -> None:
        """Of one use with ``t = 1``; with the layer's shift if so asked. ``owned``: its gradient is nobody else's."""
        self._a, self._g = (x if x.dim() == 2 else x.flatten(1) for x in (use.activation, use.gradient))
        self._place = use.gradient.data_ptr(), self._g.shape
        self._shift, self._owned = shift, owned

    def take_along(self, other: Term) -> bool:
        """Whether ``other`` is the shift's term; then this one stands for both, the shift's elements after its own."""
        if isinstance(other, Instantiated) and (other.rows.data_ptr(), other.rows.shape) == self._place:
            self._shift = True
        return self._shift

    @property
    def elements(self) -> int:
        """See :attr:`Term.elements`."""
        return self._g.shape[1] * (self._a.shape[1] + self._shift)

    def squared_norms(self) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Term.squared_norms`. Upper bounds, which are also above 2^-80 of either factor's squared norm."""
        return upper_products([self.factors]), None

    @property
    def factors(self) -> tuple[Tensor, Tensor, bool]:
        """Activations, gradients, and whether the shift goes along."""
        return self._a, self._g, self._shift

    def drop(self, records: Tensor) -> None:
        """See :meth:`Term.drop`."""
        self._a, self._g = (torch.where(records[:, None], 0.0, part) for part in (self._a, self._g))

    def keep(self, count: int) -> None:
        """See :meth:`Term.keep`."""
        self._a, self._g = self._a[:count], self._g[:count]

    def parts(self) -> list[Tensor]:
        """See :meth:`Term.parts`."""
        return [self._a, self._g]

    def add_weighted(self, total: Tensor, factors: Tensor) -> None:
        """See :meth:`Term.add_weighted`."""
        d, p = self._g.shape[1], self._a.shape[1]
        g = self._g * factors[:, None]
        total[: d * p].view(d, p).addmm_(g.t(), self._a.double())
        if self._shift:
            total[d * p :] += g.sum(dim=0)

    def sum_blocks(self, out: Tensor, part: Part, weights: Tensor) -> None:
        """See :meth:`~.blocks.BlockTerm.sum_blocks`."""
        g = part.of(self._g)
        g = g.mul_(weights) if self._owned else g * weights
        sum_products(out, part, g, part.of(self._a), shift=self._shift)


class Sparse:
    """See the module's docstring."""

    def __init__(self, uses: Sequence[EmbeddingUse]) -> None:
        """Of at least one use, all of one table."""
        self._records, self._count = len(uses[0].rows), uses[0].count
        self._captured = [part for use in uses for part in (use.rows, use.gradient)]
        rows = torch.cat([use.rows for use in uses], dim=1)
        gradients = torch.cat([use.gradient for use in uses], dim=1).flatten(0, 1).double()
        keys = (rows + self._count * torch.arange(self._records)[:, None]).flatten()
        self._keys, places = torch.unique(keys, return_inverse=True)
        self._values = gradients.new_zeros(len(self._keys), gradients.shape[1]).index_add_(0, places, gradients)

    @property
    def elements(self) -> int:
        """See :attr:`Term.elements`."""
        return self._count * self._values.shape[1]

    def squared_norms(self) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Term.squared_norms`."""
        squares = torch.zeros(self._records, dtype=torch.float64)
        squares.index_add_(0, self._keys // self._count, self._values.square().sum(dim=1))
        return squares, None

    def drop(self, records: Tensor) -> None:
        """See :meth:`Term.drop`."""
        self._values = torch.where(records[self._keys // self._count, None], 0.0, self._values)

    def keep(self, count: int) -> None:
        """See :meth:`Term.keep`."""
        last = int(torch.searchsorted(self._keys, self._count * count))  # keys are in the order of records
        self._keys, self._values, self._records = self._keys[:last], self._values[:last], count

    def parts(self) -> list[Tensor]:
        """See :meth:`Term.parts`."""
        return self._captured

    def add_weighted(self, total: Tensor, factors: Tensor) -> None:
        """See :meth:`Term.add_weighted`; always in float64, as the values are."""
        weighted = self._values * factors[self._keys // self._count, None]
        total.view(self._count, -1).index_add_(0, self._keys % self._count, weighted)


def term_of(uses: Sequence[Use], strategy: Strategy) -> Term:
    """The term of these uses; uses of several kinds can only be added up instantiated."""
    linear = [use for use in uses if isinstance(use, LinearUse | ConvUse)]
    if strategy == "ghost" and len(linear) == len(uses) and len({use.sizes()[2:] for use in linear}) == 1:
        one = linear[0] if len(linear) == 1 and linear[0].sizes()[:2] == (1, 1) else None
        return RankOne(one) if isinstance(one, LinearUse) else Outer(linear)
    lookups = [use for use in uses if isinstance(use, EmbeddingUse)]
    if len(lookups) == len(uses):
        return Sparse(lookups)
    formed = reduce(RowsUse.plus, (use.form(strategy) for use in uses))
    return Instantiated(formed.rows, formed.order)


def _chunks(count: int, most: int) -> list[slice]:
    """All ``count`` records, or at most ``most`` at a time, then a power of two.

    With two threads a product by itself is rounded otherwise than among others: of batches as :mod:`.rows` has them no record
    is left over alone.
    """
    size = max(1, count) if most >= count else 1 << max(1, most).bit_length() - 1
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _whole_vectors(size: int) -> float:
    """The share of ``size`` that fills registers: the axis of a small product that is next to each other in memory."""
    return size // _REGISTERS_ELEMENTS * _REGISTERS_ELEMENTS / size


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
    first, last = strategies_for(use)[0], strategies_for(use)[-1]
    if last == "ghost" and (first == "ghost" or _ghost_operations(use) < operations(use)):
        return "ghost"
    return "grouped" if isinstance(use, ConvUse) and use.elements() <= _GROUPED_ELEMENTS else first


def operations(use: Use) -> int:
    """What forming one record's gradient costs, with its norm and sum, in float32 multiply-adds."""
    _, t, *_ = use.sizes() if isinstance(use, LinearUse | ConvUse) else (1, 1)
    return use.elements() * (t + _FORMING_COST)


def _ghost_operations(use: Use) -> float:
    if not isinstance(use, LinearUse | ConvUse):
        return 0.0
    groups, t, p, d = use.sizes()
    return _DOUBLE_COST * groups * (t * t * (p + d) + t * p * d)


def check_batch(tensor: Tensor, count: int, least_axes: int) -> None:
    """:class:`ModelError` unless axis 0 of ``tensor`` is the batch of ``count`` records."""
    if tensor.dim() < least_axes or tensor.shape[0] != count:
        raise ModelError("per-sample gradients are not available: a parameter's use does not follow the batch")
