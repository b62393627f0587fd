"""What the uses of a parameter make of one record's gradient: exact norms and weighted sums.

A *term* is all uses of one parameter in a batch, so that norms are those of the sum of its uses (weight tying, reuse), cross
terms included. Terms come in three kinds, which all can sum over records in float64, and the first and :class:`RankOne` also in
float32 where a bound on the error is provided for (:mod:`.blocks`):

- :class:`Instantiated`: the gradients of all records, float32, as computed; the certified object is these numbers.
- :class:`Outer` ("ghost", Goodfellow 2015; Li et al. 2022, §3): the gradient of record ``i`` is
  ``Σ_t g_it ⊗ a_it`` and is never formed; its squared norm is ``Σ_tt' (a_it·a_it')(g_it·g_it')``, in float64. The
  certified object is that sum over the captured float32 numbers, in exact arithmetic.
- :class:`Sparse`: the touched rows of an embedding's gradient, float64, as computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Final, Protocol

import torch
from torch import Tensor

from .blocks import Part, sum_pieces, sum_products, upper_products, upper_squares
from .uses import CHUNK_ELEMENTS, ConvUse, EmbeddingUse, LinearUse, Order, RowsUse, Strategy, Use, chunks

_CHEAP_ELEMENTS: Final = 1024
"""Gradients of up to so many elements have their norms taken in float64."""


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


class Instantiated:
    """See the module's docstring."""

    def __init__(self, *pieces: Tensor, order: Order | None = None) -> None:
        """Of float32 gradients as :class:`~.uses.RowsUse` has them; sums alone are put into the parameter's own order."""
        self._pieces, self._order = list(pieces), order

    @property
    def elements(self) -> int:
        """See :attr:`Term.elements`."""
        return self._pieces[0].shape[-1] if self._order is None else self._order.sizes.numel()

    @property
    def place(self) -> tuple[int, torch.Size]:
        """Where its first piece lies, and its shape."""
        return self._pieces[0].data_ptr(), self._pieces[0].shape

    def squared_norms(self) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Term.squared_norms`. In float64 where that costs little."""
        found = [self._squared_norms(piece) for piece in self._pieces]
        return found[0] if len(found) == 1 else torch.cat(found), None

    def _squared_norms(self, piece: Tensor) -> Tensor:
        if self.elements > _CHEAP_ELEMENTS:
            return upper_squares(piece)
        axes = -1 if self._order is None else (0, 2)
        found: Tensor = torch.linalg.vector_norm(piece, dim=axes, dtype=torch.float64).square_()
        return found

    def drop(self, records: Tensor) -> None:
        """See :meth:`Term.drop`."""
        start = 0
        for number, piece in enumerate(self._pieces):
            end = start + piece.shape[-2]
            self._pieces[number] = torch.where(records[start:end, None], 0.0, piece)
            start = end

    def keep(self, count: int) -> None:
        """See :meth:`Term.keep`."""
        kept = []
        for piece in self._pieces:
            if count > 0:
                kept.append(piece[..., :count, :])
            count -= piece.shape[-2]
        self._pieces = kept

    def parts(self) -> list[Tensor]:
        """See :meth:`Term.parts`."""
        rows = self._pieces[0] if len(self._pieces) == 1 else torch.cat(self._pieces, dim=-2)
        return list(_runs(rows))

    def add_weighted(self, total: Tensor, factors: Tensor) -> None:
        """See :meth:`Term.add_weighted`."""
        sums, start = torch.zeros(self.elements, dtype=torch.float64), 0
        for piece in self._pieces:
            count, at = piece.shape[-2], 0
            weights = factors[start : start + count]
            for run in _runs(piece):
                for rows in torch.split(run, max(1, CHUNK_ELEMENTS // count), dim=1):  # taken to float64 at once
                    sums[at : at + rows.shape[1]] += weights @ rows.double()
                    at += rows.shape[1]
            start += count
        total += sums if self._order is None else self._order.undone(sums[None])[0]

    def sum_blocks(self, out: Tensor, part: Part, weights: Tensor) -> None:
        """See :meth:`~.blocks.BlockTerm.sum_blocks`."""
        found = out if self._order is None else torch.empty(out.shape)
        start = 0
        for runs in zip(*map(_runs, self._pieces), strict=True):
            width = runs[0].shape[1]
            sums = found[:, start : start + width]
            if len(runs) == 1:
                sum_products(sums, part, weights, part.of(runs[0]))
            else:
                sum_pieces(sums, part, weights, runs)
            start += width
        if self._order is not None:
            out.copy_(self._order.undone(found))


def _runs(piece: Tensor) -> Sequence[Tensor]:
    """Of records' gradients what lies in one piece: ``[m, width]``."""
    return (piece,) if piece.dim() == 2 else piece.unbind()


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
        return chunks(self._count, 4 * CHUNK_ELEMENTS // per_record)


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
        if isinstance(other, Instantiated) and other.place == self._place:
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
    return Instantiated(*formed.pieces, order=formed.order)
