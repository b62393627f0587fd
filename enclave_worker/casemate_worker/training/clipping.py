"""How much one record can move the sum: each record's gradient, clipped to the norm C with certainty.

**What is clipped.** Forward and backward run in float32, once for a batch, and leave behind for each record either its
gradient or the numbers whose products are its gradient (:mod:`.uses`). That vector, taken exactly, is what a record adds,
times a float64 factor.

**Sensitivity.** The exact L2 norm of factor times vector never exceeds C (:func:`clip_factors`); a record whose loss or
vector is not finite adds nothing. Factors are applied and records summed in float64 throughout: no float32 sum runs over
records, so no share of C has to be set aside for one. Two things are outside that statement:

- float64 rounds the sum over ``n`` records. Where gradients are formed, by less than ``2n²C·2^-53``. Where they are not
  and a layer was used at ``t`` positions, by less than ``2n²tM·2^-53``, ``M`` being the largest ``factor·Σ_t‖a_t‖‖g_t‖``:
  a few C for ordinary records, and never above 2^16·C. With 1,024 hostile records of 64 positions each that is 2^-10 C
  at worst, and 2^-26 C for ordinary ones;
- the float32 kernels behind a batch may round *other* records' activations and gradients differently, by about 2^-23
  of each, when the batch has another size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Final, Literal, Protocol

import torch
from casemate_schemas.errors import ModelError
from torch import Tensor, nn

from .choosing import measured_strategy
from .uses import Strategy, Term, Use, cheaper_by_count, operations
from .watching import Book, Watch

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs ``[n, ...]`` and targets ``[n, ...]`` to per-example losses ``[n]``."""

Mode = Literal["auto", "book_keeping", "ghost", "per_sample"]
"""Which strategy each layer gets: the one measured to be fastest here, the one with fewer operations, or always one."""

_GRADIENT_BYTES: Final = 1 << 26
"""So many bytes of formed gradients a physical batch holds, unless one record has more."""
_TRIAL_RECORDS: Final = 64
_TRIAL_OPERATIONS: Final = 1 << 28


class Clipping(Protocol):
    """One way to compute the clipped sum. Ways differ in speed and memory, and agree up to rounding."""

    def clipped_sum(self, features: Tensor, targets: Tensor) -> Tensor:
        """The sum over records of clipped gradients, float64 ``[d]``; zeros for an empty batch.

        Coordinates are those of the model's trainable parameters in their order, each flattened row-major.
        """


def clip_factors(
    squared_norms: Tensor, slack: Tensor, usable: Tensor, *, elements: int, clipping_norm: float
) -> Tensor:
    """Factors, float64 ``[n]`` in [0, 1], that bring vectors of ``elements`` coordinates to norms at most C.

    A vector is ``usable`` (bool ``[n]``) or its factor is 0; likewise where its computed squared norm is not finite.

    The norm is certified. The true squared norm is at most ``slack`` plus the computed one, but for the rounding of a sum
    of ``elements`` float64 squares, which is at least ``1 - (elements + 1)·2^-53`` of the true sum (Higham 2002, §4.2).
    So the root of the sum of both, times ``1 + (elements + 8)·2^-52``, is an upper bound on the true norm that also
    absorbs the rounding of this product and of the quotient C / bound. Where the bound is at most C, the factor is 1.
    """
    bounds = (squared_norms + slack).sqrt() * (1.0 + (elements + 8) * 2.0**-52)
    factors = (clipping_norm / bounds).clamp(max=1.0)
    return torch.where(usable & squared_norms.isfinite(), factors, 0.0)


class BookKeeping:
    """The clipped sum by one forward and one backward pass (Bu et al. 2023, "book-keeping"), without weight gradients.

    1. The backward pass computes gradients of activations only, and leaves each layer's *uses* behind.
    2. Norms follow from them, by the strategy chosen for each parameter; then one factor a record.
    3. One weighted sum a parameter.

    At most ``max_physical_batch`` records are in memory at a time, and fewer where formed gradients would take more than
    64 MiB. The model is trained in place and has no hooks afterwards.
    """

    def __init__(self, model: nn.Module, loss: Loss, *, clipping_norm: float, max_physical_batch: int) -> None:
        """For the trainable parameters of ``model``, with strategies of mode ``book_keeping`` until others are set."""
        self._model = model.train()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        *self._starts, self._size = accumulate((p.numel() for p in self._parameters), initial=0)
        self._watch = Watch(model, self._parameters)
        self._loss = loss
        self._clipping_norm = clipping_norm
        self._max_physical_batch = max_physical_batch
        self._strategies: dict[int, Strategy] = {}
        self._physical_batch = max_physical_batch

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
        formed = sum(4 * self._parameters[i].numel() for i, s in self._strategies.items() if s != "ghost")
        self._physical_batch = max(1, min(self._max_physical_batch, _GRADIENT_BYTES // max(1, formed)))

    def choose(self, mode: Mode, records: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        """Set strategies by ``mode`` after a look at public records, of which ``records`` makes as many as asked for."""
        book, _ = self._record(*records(1), lambda _index, _use: "ghost")
        if mode == "auto":
            book, _ = self._record(*records(self._trial_size(book)), lambda _index, _use: "ghost")
        self.strategies = {self._names[i]: _choice(mode, uses) for i, uses in sorted(book.uses().items())}

    def _trial_size(self, book: Book) -> int:
        """As many records as a physical batch may have, if that takes little memory and time."""
        most = max(sum(operations(use) for use in uses) for uses in book.uses().values())
        return max(2, min(self._max_physical_batch, _TRIAL_RECORDS, _TRIAL_OPERATIONS // most))

    def clipped_sum(self, features: Tensor, targets: Tensor) -> Tensor:
        """See :meth:`Clipping.clipped_sum`."""
        total = torch.zeros(self._size, dtype=torch.float64)
        for start in range(0, len(features), self._physical_batch):
            rows = slice(start, start + self._physical_batch)
            book, losses = self._record(features[rows], targets[rows], self._strategy)
            terms = book.terms()
            squares, slack = _squared_norms(terms, losses.shape[0])
            factors = clip_factors(
                squares, slack, losses.isfinite(), elements=self._size, clipping_norm=self._clipping_norm
            )
            self._add_weighted(total, terms, factors)
        return total

    def gradients(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch of at least one record, by the very strategies that clip: gradients, squared norms, losses.

        Float64 ``[n, d]`` and ``[n]``, and float32 ``[n]``; not clipped, and for small ``n``: one weighted sum each.
        """
        book, losses = self._record(features, targets, self._strategy)
        terms, n = book.terms(), len(features)
        rows = torch.zeros(n, self._size, dtype=torch.float64)
        squares, _ = _squared_norms(terms, n)
        for row, one in zip(rows, torch.eye(n, dtype=torch.float64), strict=True):
            for index, term in terms.items():
                term.add_weighted(self._coordinates(row, index, term), one)
        return rows, squares, losses

    def gradient_alone(self, feature: Tensor, target: Tensor) -> Tensor:
        """The gradient ``[d]`` of a batch of one record by plain autograd: the reference."""
        loss = self._loss(self._model(feature), target).sum()
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    def _record(
        self, features: Tensor, targets: Tensor, strategy_of: Callable[[int, Use], Strategy]
    ) -> tuple[Book, Tensor]:
        """Forward and backward; the uses that they leave behind, and the losses."""
        book = Book(len(features), strategy_of)
        with torch.enable_grad():
            with self._watch.into(book):
                losses = self._loss(self._model(features), targets)
            if losses.requires_grad:
                torch.autograd.backward(losses, torch.ones_like(losses))
        return book, losses.detach()

    def _strategy(self, index: int, use: Use) -> Strategy:
        return self._strategies.get(index) or cheaper_by_count(use)

    def _add_weighted(self, total: Tensor, terms: Mapping[int, Term], factors: Tensor) -> None:
        """Zero times infinity is no zero: records of factor 0 are taken out before anything is multiplied."""
        dropped = factors == 0
        any_dropped = bool(dropped.any())
        for index, term in terms.items():
            if any_dropped:
                term.drop(dropped)
            term.add_weighted(self._coordinates(total, index, term), factors)

    def _coordinates(self, total: Tensor, index: int, term: Term) -> Tensor:
        """Those that the term at ``index`` stands for."""
        return total[self._starts[index] : self._starts[index] + term.elements]


def _squared_norms(terms: Mapping[int, Term], count: int) -> tuple[Tensor, Tensor]:
    squares, slack = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for term in terms.values():
        found, more = term.squared_norms()
        squares += found
        if more is not None:
            slack += more
    return squares, slack


def _choice(mode: Mode, uses: list[Use]) -> Strategy:
    if mode == "auto":
        return measured_strategy(uses)
    if mode == "book_keeping":
        return cheaper_by_count(uses[0])
    return mode
