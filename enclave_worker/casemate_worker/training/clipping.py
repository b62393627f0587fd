"""How much one record can move the sum: each record's gradient, clipped to the norm C with certainty.

**What is clipped.** Forward and backward run in float32, once for a batch, and leave behind for each record either its
gradient or the numbers whose products are its gradient (:mod:`.uses`, :mod:`.terms`). That vector, taken exactly, is what a
record adds, times a float64 factor.

**Sensitivity.** The exact L2 norm of factor times vector never exceeds C (:func:`clip_factors`); a record whose loss or
vector is not finite adds nothing. Sums over records are float64, or float32 over blocks of records with so much of C left
out of the clipping norm that errors, which are bounded, are inside C (:mod:`.blocks`). Two things are outside that
statement:

- float64 rounds the sum over ``n`` records. Where gradients are formed, by less than ``2n²C·2^-53``. Where they are not
  and a layer was used at ``t`` positions, by less than ``2n²tM·2^-53``, ``M`` being the largest ``factor·Σ_t‖a_t‖‖g_t‖``:
  a few C for ordinary records, and never above 2^16·C. With 1,024 hostile records of 64 positions each that is 2^-10 C
  at worst, and 2^-26 C for ordinary ones. So in training ``clipping_norm`` is C less what this can come to, for batches
  larger than any that occur, and layers for which that were more than 2^-10 C have their gradients formed (:mod:`.rounding`);
- that float32 kernels give *other* records' activations and gradients the same bits, whoever is in the batch, is arranged
  for (:mod:`.rows`) and tested for the very model (:mod:`.kernels`), and not proved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import reduce
from itertools import accumulate
from typing import Final, Protocol

import numpy as np
import torch
from casemate_schemas.errors import ModelError
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .blocks import LEAST_FACTOR, Blocks, blocks_for, upper_products
from .chain import Chain, chain_of
from .choosing import Mode, cheaper_by_count, chosen, costs, products, trial_size
from .precision import check_float32_products
from .rows import in_rows, most_rows, row_step
from .terms import Instantiated, RankOne, Term, term_of
from .uses import RowsUse, Strategy, Use
from .watched import Book
from .watching import Watch

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs ``[n, ...]`` and targets ``[n, ...]`` to per-example losses ``[n]``."""

_GRADIENT_BYTES: Final = 1 << 26
"""So many bytes of formed gradients a physical batch holds, unless the smallest there can be has more."""
_MOST_GRADIENT_BYTES: Final = 1 << 28
"""So many the smallest batch holds, unless there is no way but to form them."""


class Clipping(Protocol):
    """One way to compute the clipped sum. Ways differ in speed and memory, and agree up to rounding."""

    def clipped_sum(self, features: Tensor, targets: Tensor) -> Tensor:
        """The sum over records of clipped gradients, float64 ``[d]``; zeros for an empty batch.

        Coordinates are those of the model's trainable parameters in their order, each flattened row-major.
        """


def clip_factors(
    squared_norms: Tensor, slack: Tensor | None, usable: Tensor, *, elements: int, clipping_norm: float
) -> Tensor:
    """Factors, float64 ``[n]`` in [0, 1], that bring vectors of ``elements`` coordinates to norms at most C.

    A vector is ``usable`` (bool ``[n]``) or its factor is 0; likewise where its computed squared norm is not finite.

    The norm is certified. The true squared norm is at most ``slack`` plus the computed one, but for the rounding of a sum
    of ``elements`` float64 squares, which is at least ``1 - (elements + 1)·2^-53`` of the true sum (Higham 2002, §4.2).
    So the root of the sum of both, times ``1 + (elements + 8)·2^-52``, is an upper bound on the true norm that also
    absorbs the rounding of this product and of the quotient C / bound. Where the bound is at most C, the factor is 1.
    """
    squares = squared_norms.numpy() if slack is None else (squared_norms + slack).numpy()
    with np.errstate(all="ignore"):
        bounds = np.sqrt(squares)
        bounds *= 1.0 + (elements + 8) * 2.0**-52
        factors = np.divide(clipping_norm, bounds, out=bounds)  # NaN for NaN, 0 for infinity
        np.minimum(factors, 1.0, out=factors)
        return torch.from_numpy(np.where(usable.numpy() & (factors >= 0), factors, 0.0))


class BookKeeping:
    """The clipped sum by one forward and one backward pass (Bu et al. 2023, "book-keeping"), without weight gradients.

    1. The backward pass computes gradients of activations only, and leaves each layer's *uses* behind.
    2. Norms follow from them, by the strategy chosen for each parameter; then one factor a record.
    3. One weighted sum a parameter.

    At most ``max_physical_batch`` records are in memory at a time, and fewer where formed gradients would take more than
    64 MiB, but as many as :mod:`.rows` asks for: rows that are missing are zeros, and cut off before anything is summed.
    The model is trained in place and has no hooks afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        clipping_norm: float,
        max_physical_batch: int,
        uniform: bool = False,
        expected_batch: float | None = None,
    ) -> None:
        """For the trainable parameters of ``model``, with strategies of mode ``book_keeping`` until others are set.

        ``uniform``: call the same functions on the same shapes for any batch of one size, whatever the records hold.
        ``expected_batch``, the public mean of Poisson batches, lets sums be float32 where that takes little of C
        (:mod:`.blocks`); all are float64 without it. :class:`ParameterError` where PyTorch may shorten float32 products.
        """
        check_float32_products()
        self._model = model.train()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        *self._starts, self._size = accumulate((p.numel() for p in self._parameters), initial=0)
        self._watch = Watch(model, self._parameters)
        self._chain = chain_of(model, {id(p): index for index, p in enumerate(self._parameters)})
        self._by_hand: Chain | None = None
        self._loss = loss
        self._uniform = uniform
        self._blocks = None if expected_batch is None else blocks_for(expected_batch)
        self.clipping_norm = clipping_norm
        """The norm that no record's part exceeds."""
        self.cancelling: dict[str, int] = {}
        """How many products are summed for one record where ghost norms may cancel, by parameter; set by :meth:`choose`."""
        self._max_physical_batch = max_physical_batch
        self._strategies: dict[int, Strategy] = {}
        self._once: set[int] = set()
        self.physical_batch = most_rows(max_physical_batch)
        """How many rows forward and backward have at most."""

    @property
    def strategies(self) -> dict[str, Strategy]:
        """The strategy of each parameter, by name; those that the model does not use are not among them."""
        return {self._names[index]: strategy for index, strategy in sorted(self._strategies.items())}

    @strategies.setter
    def strategies(self, strategies: Mapping[str, Strategy]) -> None:
        """Use these, as :attr:`strategies` gave them elsewhere: then sums agree bit for bit."""
        if not strategies.keys() <= set(self._names):
            raise ModelError("clipping strategies are not of this model's parameters")
        self._strategies = {self._names.index(name): strategy for name, strategy in strategies.items()}
        ghosts = {index for index, strategy in self._strategies.items() if strategy == "ghost"}
        self._by_hand = self._chain if self._chain is not None and ghosts.issuperset(self._chain.matrices) else None
        formed = sum(4 * self._parameters[i].numel() for i, s in self._strategies.items() if s != "ghost")
        self.physical_batch = most_rows(min(self._max_physical_batch, _GRADIENT_BYTES // max(1, formed)))

    def choose(self, mode: Mode, records: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        """Set strategies by ``mode`` after a look at public records, of which ``records`` makes as many as asked for.

        Where formed gradients would take more than 256 MiB in the smallest batch there can be, fewer are formed.
        """
        book = self._kept(*records(1))
        if mode == "auto":
            book = self._kept(*records(trial_size(book.uses().values(), self._max_physical_batch)))
        self._once = {index for index, uses in book.uses().items() if len(uses) == 1}
        found = {self._names[index]: uses for index, uses in sorted(book.uses().items())}
        self.cancelling = {name: count for name, uses in found.items() if (count := products(uses)) > 1}
        sizes = {self._names[index]: 4 * self._parameters[index].numel() for index in book.uses()}
        each = {name: costs(mode, uses, self._blocks) for name, uses in found.items()}
        self.strategies = chosen(each, sizes, _MOST_GRADIENT_BYTES // row_step())

    def clipped_sum(self, features: Tensor, targets: Tensor, in_all: int | None = None) -> Tensor:
        """See :meth:`Clipping.clipped_sum`. Of ``in_all`` records a step, where that is more than these."""
        blocks, size, count = self._blocks, self.physical_batch, features.shape[0]
        if blocks is not None and (count if in_all is None else in_all) > blocks.records:
            blocks = None
        total = torch.zeros(self._size, dtype=torch.float64)
        for start in range(0, count, size):
            self._add_batch(total, features[start : start + size], targets[start : start + size], blocks)
        return total

    def _add_batch(self, total: Tensor, features: Tensor, targets: Tensor, blocks: Blocks | None) -> None:
        """Of one physical batch, of which nothing is held afterwards."""
        terms, losses = self._terms(in_rows(features), in_rows(targets))
        factors = self._factors(terms, losses)
        if (there := features.shape[0]) < losses.shape[0]:
            factors = factors[:there]
            for term in terms.values():
                term.keep(there)
        self._add_weighted(total, terms, factors, blocks)

    def examine(
        self,
        features: Tensor,
        targets: Tensor,
        inside: AbstractContextManager[object],
        take: Callable[[Tensor], None],
    ) -> None:
        """Hand to ``take`` what there is of each record of a batch: loss, norms, what its gradient is made of, ``[n, ...]``.

        Forward and backward run ``inside``, the rest does not. Gradients formed are handed over one parameter after another,
        and not held. For :mod:`.kernels`.
        """
        book = _Examined(features.shape[0], self._strategy, self._once, take)
        with inside:
            terms, losses = self._enter(book, features, targets)
        take(losses)
        _examine(terms | book.terms(), take)

    def gradients(self, features: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, float, float]]:
        """Of each record of a batch, by the very strategies that clip: gradient, squared norm, loss.

        Float64 ``[d]``; not clipped, and for few records: one weighted sum each.
        """
        n = len(features)
        terms, losses = self._terms(in_rows(features), in_rows(targets))
        squares, _ = _squared_norms(terms, len(losses))
        for term in terms.values():
            term.keep(n)
        for number, one in enumerate(torch.eye(n, dtype=torch.float64)):
            row = torch.zeros(self._size, dtype=torch.float64)
            for index, term in terms.items():
                term.add_weighted(self._coordinates(row, index, term), one)
            yield row, float(squares[number]), float(losses[number])

    def gradient_alone(self, feature: Tensor, target: Tensor) -> Tensor:
        """The gradient ``[d]`` of a batch of one record by plain autograd: the reference."""
        loss = self._loss(self._model(feature), target).sum()
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    def _terms(self, features: Tensor, targets: Tensor) -> tuple[dict[int, Term], Tensor]:
        """What a batch used, by position, and its losses."""
        book = Book(features.shape[0], self._strategy)
        terms, losses = self._enter(book, features, targets)
        return dict(sorted((terms | book.terms()).items())), losses

    def _enter(self, book: Book, features: Tensor, targets: Tensor) -> tuple[dict[int, Term], Tensor]:
        """Forward and backward in the quickest way there is for this model: the terms that ``book`` does not get, and losses."""
        if self._by_hand is None or not self._by_hand.takes(features):
            return {}, self._record(book, features, targets)
        return self._by_hand.terms(features, targets, self._loss, book)

    def _record(self, book: Book, features: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward through the model as it is, which leave their uses in ``book``; the losses."""
        with torch.enable_grad(), self._watch.into(book):
            losses = self._loss(self._model(features), targets)
            if losses.requires_grad:
                torch.autograd.backward(losses, torch.ones_like(losses))
        return losses.detach()

    def _kept(self, features: Tensor, targets: Tensor) -> Book:
        """Every use by a batch, as it was."""
        book = Book(len(features), lambda _index, _use: "ghost")
        self._record(book, features, targets)
        return book

    def _strategy(self, index: int, use: Use) -> Strategy:
        return self._strategies.get(index) or cheaper_by_count(use)

    def _factors(self, terms: Mapping[int, Term], losses: Tensor) -> Tensor:
        """Each record's: for C less what float32 sums need, whichever sums this batch gets, as neighbours may get others."""
        squares, slack = _squared_norms(terms, losses.shape[0])
        norm = self.clipping_norm if self._blocks is None else self.clipping_norm * (1.0 - self._blocks.room)
        usable = torch.from_numpy(np.isfinite(losses.numpy()))
        factors = clip_factors(squares, slack, usable, elements=self._size, clipping_norm=norm)
        if self._blocks is not None:
            values = factors.numpy()
            values *= values > LEAST_FACTOR
        return factors

    def _add_weighted(self, total: Tensor, terms: Mapping[int, Term], factors: Tensor, blocks: Blocks | None) -> None:
        """Zero times infinity is no zero: records of factor 0 are taken out before anything is multiplied."""
        if self._uniform or not factors.numpy().all():
            dropped = factors == 0
            for term in terms.values():
                term.drop(dropped)
        in_blocks = {i: t for i, t in terms.items() if blocks is not None and isinstance(t, Instantiated | RankOne)}
        for index, term in terms.items():
            if index not in in_blocks:
                term.add_weighted(self._coordinates(total, index, term), factors)
        if blocks is not None and in_blocks:
            blocks.add(total, {self._starts[i]: term for i, term in in_blocks.items()}, factors.float())

    def _coordinates(self, total: Tensor, index: int, term: Term) -> Tensor:
        """Those that the term at ``index`` stands for."""
        return total[self._starts[index] : self._starts[index] + term.elements]


class _Examined(Book):
    """Hands over what each record's gradient is made of, and its norm, as soon as a parameter has had its only use."""

    def __init__(
        self, count: int, strategy_of: Callable[[int, Use], Strategy], once: set[int], take: Callable[[Tensor], None]
    ) -> None:
        """``once`` are the positions of parameters that are used once."""
        super().__init__(count, strategy_of)
        self._once, self._take = once, take

    def add(self, index: int, use: Use) -> None:
        """See :meth:`Book.add`; what would be captured as it is, and held, is held here, too."""
        strategy = self.strategy_of(index, use)
        with _disable_current_modes():  # what forms gradients is no part of the model
            if index not in self._once or strategy == "ghost" or isinstance(use, RowsUse):
                super().add(index, use)
            else:
                _examine({index: term_of([use], strategy)}, self._take)


def _examine(terms: Mapping[int, Term], take: Callable[[Tensor], None]) -> None:
    if not terms:
        return
    squares, slack = _squared_norms(terms, 0)
    for rows in (squares, slack, *(part for _, term in sorted(terms.items()) for part in term.parts())):
        if rows is not None:
            take(rows)


def _squared_norms(terms: Mapping[int, Term], count: int) -> tuple[Tensor, Tensor | None]:
    """Over all terms, as :meth:`Term.squared_norms` of each."""
    found = [term.squared_norms() for term in terms.values() if not isinstance(term, RankOne)]
    if outer := [term.factors for term in terms.values() if isinstance(term, RankOne)]:
        found.append((upper_products(outer), None))
    squares = [square for square, _ in found] or [torch.zeros(count, dtype=torch.float64)]
    slack = [more for _, more in found if more is not None]
    return reduce(torch.add, squares), reduce(torch.add, slack) if slack else None
