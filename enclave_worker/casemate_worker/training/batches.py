"""Which records a step computes on, and in which shape.

Three kinds of batches:

- :class:`RecordBatches`: the records drawn, ``[n, ...]``.
- :class:`PlaceBatches` of subjects: the subjects drawn, ``[n, k, ...]`` with the (at most ``k``) records of each. The loss
  of a subject is the mean over its records (:func:`mean_over_present`), so what is clipped is one vector a subject.
- :class:`PlaceBatches` that are *padded*: always ``padded_batch`` rows, whatever is drawn and whatever the data hold.

**Padding costs no privacy.** Each owner has as many *places* as its public bound on privacy units; its units take the first
of them and dummies the rest. (Which ones is all the same: an owner's places are drawn alike.) Each place is drawn by itself
with the owner's rate. Where more than ``padded_batch`` places are drawn, over all owners, the step uses none of them. Fix a
unit ``x`` and which other places are drawn, ``R``, which does not depend on the data, and let ``s(R)`` be the sum of the others'
clipped gradients:

1. ``|R| < padded_batch``: ``x`` is drawn with probability q, and then the sum is ``s(R)`` plus its vector; else ``s(R)``. With
   a dummy in its place the sum is ``s(R)``. This is the Poisson-sampled Gaussian mechanism.
2. ``|R| >= padded_batch``: the sum does not depend on ``x`` at all. Either ``R`` is too many by itself, or it becomes too
   many with the place of ``x``, dummy or not.

Every divergence that is jointly convex is therefore at most that of the mechanism without padding, and nothing has to be
added to what is charged. This would be false if the *units* drawn were counted, or if some of too many were used: then ``x``
could push others out.

A dummy is a synthetic record with a target that says so, which makes its loss and gradient zero (:func:`mean_over_present`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final, Protocol

import numpy as np
import torch
from casemate_schemas.errors import DatasetError
from numpy.typing import NDArray
from torch import Tensor

from .probe import synthetic_records
from .sampling import PoissonSampler
from .subjects import ABSENT

_NO_CLASS: Final = -100
"""``cross_entropy`` of this target is zero, and so is its gradient (PyTorch's ``ignore_index``)."""

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class OwnerData:
    """One owner's records: ``features`` float32 ``[n, ...]`` and ``targets`` ``[n]``, sampled at ``sample_rate``.

    Targets are int64 for ``cross_entropy`` and float32 else. ``owner`` is an id of its own in the job, which keys the
    sampling: a dataset's id where an owner lends several. ``subjects`` (int64 ``[m, k]``, see
    :func:`~casemate_worker.training.subjects.subject_table`) says that the unit is the subject. ``bound`` is the public
    bound on privacy units, which padded batches need. :class:`DatasetError` if the tensors do not fit together.
    """

    owner: str
    features: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    sample_rate: Fraction
    subjects: Tensor | None = field(default=None, repr=False)
    bound: int | None = None

    def __post_init__(self) -> None:
        if self.features.dtype != torch.float32 or self.features.dim() < 2:
            raise DatasetError("expected float32 features with an axis for records and at least one more")
        if self.targets.dim() != 1 or len(self.targets) != len(self.features):
            raise DatasetError("expected one target for each record")
        if self.subjects is not None and (self.subjects.dim() != 2 or self.subjects.dtype != torch.int64):
            raise DatasetError("expected a table of subjects' records")
        if self.bound is not None and self.units > self.bound:
            raise DatasetError("expected at most as many privacy units as declared")

    @property
    def units(self) -> int:
        """How many privacy units there are. Confidential."""
        return len(self.features if self.subjects is None else self.subjects)

    @property
    def unit_records(self) -> int | None:
        """How many records a subject may have; ``None`` where the unit is the record."""
        return None if self.subjects is None else self.subjects.shape[1]


class Batches(Protocol):
    """Where a step's records come from."""

    def drawn(self, step: int) -> tuple[Tensor, Tensor]:
        """Features and targets of ``step``: ``[n, ...]`` and ``[n]``, or ``[n, k, ...]`` and ``[n, k]``."""

    def everyone(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All privacy units once, at most ``size`` records at a time, in shapes as :meth:`drawn` gives them."""


def batches_of(owners: Sequence[OwnerData], seed: bytes, padded_batch: int | None) -> Batches:
    """The kind of batches that owners, sorted by id, and plan call for.

    Raises :class:`DatasetError` where owners' privacy units differ in kind, or padding lacks a bound.
    """
    if len({data.subjects is None for data in owners}) != 1:
        raise DatasetError("expected one kind of privacy unit from all owners")
    if padded_batch is None and owners[0].subjects is None:
        return RecordBatches(owners, seed)
    return PlaceBatches(owners, seed, padded_batch)


class RecordBatches:
    """The records drawn."""

    def __init__(self, owners: Sequence[OwnerData], seed: bytes) -> None:
        """Of these owners, in this order."""
        self._owners = owners
        self._samplers = [PoissonSampler(seed, data.owner, data.sample_rate) for data in owners]

    def drawn(self, step: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Batches.drawn`."""
        features, targets = [], []
        for data, sampler in zip(self._owners, self._samplers, strict=True):
            chosen = torch.from_numpy(sampler.indices(step, data.features.shape[0]))
            features.append(data.features.index_select(0, chosen))
            targets.append(data.targets.index_select(0, chosen))
        return (features[0], targets[0]) if len(features) == 1 else (torch.cat(features), torch.cat(targets))

    def everyone(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`Batches.everyone`."""
        for data in self._owners:
            if len(data.features):  # no model needs to run on no record
                yield from zip(torch.split(data.features, size), torch.split(data.targets, size), strict=True)


class PlaceBatches:
    """The subjects drawn, padded or not, or the records drawn, padded: see the module's docstring."""

    def __init__(self, owners: Sequence[OwnerData], seed: bytes, padded_batch: int | None) -> None:
        """Of these owners, in this order; everything is copied together once, with one dummy record at its end."""
        self._padded_batch = padded_batch
        self._samplers = [PoissonSampler(seed, data.owner, data.sample_rate) for data in owners]
        self._places = [_places(data, padded_batch) for data in owners]
        dummy = synthetic_records(owners[0].features, owners[0].targets, 1)[0]
        self._features = torch.cat([*(data.features for data in owners), dummy])
        self._targets = torch.cat([*(data.targets for data in owners), _absent(owners[0].targets)])
        self._table = _table(owners, self._places)
        self._total = len(self._table) - 1

    def drawn(self, step: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Batches.drawn`."""
        draws = [sampler.drawn(step, places) for sampler, places in zip(self._samplers, self._places, strict=True)]
        drawn = np.concatenate(draws)
        chosen = np.flatnonzero(drawn) if self._padded_batch is None else _padded(drawn, self._padded_batch)
        return self._at(torch.from_numpy(chosen))

    def everyone(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`Batches.everyone`. The last piece is filled up with dummies, so that all have one shape."""
        each = max(1, size // self._table.shape[1])
        for start in range(0, self._total, each):
            yield self._at(torch.arange(start, start + each).clamp(max=self._total))

    def _at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._table[places]
        return self._features[rows], self._targets[rows]


def mean_over_present(loss: Loss) -> Loss:
    """``loss`` of outputs ``[n, k, ...]`` and targets ``[n, k]``: of each row the mean over the records that are there.

    Zero, with a gradient of zero, for a row of dummies. Targets ``[n]`` stand for all ``k`` records.
    """

    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        each = targets if targets.dim() == 2 else targets[:, None].expand(-1, outputs.shape[1])
        there = present(each)
        found = loss(outputs.flatten(0, 1), torch.where(there, each, 0).flatten()).view(each.shape)
        return torch.where(there, found, 0.0).sum(dim=1) / there.sum(dim=1).clamp(min=1)

    return mean


def present(targets: Tensor) -> Tensor:
    """Which targets are those of records that take part."""
    return ~targets.isnan() if targets.is_floating_point() else targets != _NO_CLASS


def known_classes(targets: Tensor, classes: int) -> Tensor:
    """Class targets that the model has no output for are replaced by the one that makes loss and gradient zero."""
    return torch.where((targets >= 0) & (targets < classes), targets, _NO_CLASS)


def _absent(like: Tensor) -> Tensor:
    return torch.full((1,), torch.nan if like.is_floating_point() else _NO_CLASS, dtype=like.dtype)


def _places(data: OwnerData, padded_batch: int | None) -> int:
    if padded_batch is None:
        return data.units
    if data.bound is None:
        raise DatasetError("padded batches need a bound on each owner's privacy units")
    return data.bound


def _table(owners: Sequence[OwnerData], places: Sequence[int]) -> Tensor:
    """For each place of all owners, and a last one of dummies alone, the positions of its records, or the dummy's."""
    width = max(data.unit_records or 1 for data in owners)
    dummy = sum(len(data.features) for data in owners)
    table = torch.full((sum(places) + 1, width), dummy)
    place = position = 0
    for data, count in zip(owners, places, strict=True):
        records = torch.arange(data.units)[:, None] if data.subjects is None else data.subjects
        rows = table[place : place + data.units, : records.shape[1]]
        rows.copy_(torch.where(records == ABSENT, dummy, records + position))
        place, position = place + count, position + len(data.features)
    return table


def _padded(drawn: NDArray[np.bool_], size: int) -> NDArray[np.int64]:
    """``size`` places: those drawn, then dummies; dummies alone where more were drawn. The same work whatever is drawn."""
    total = len(drawn)
    rank = np.cumsum(drawn)
    found = np.full(size + 1, total, dtype=np.int64)
    found[np.where(drawn & (rank <= size), rank - 1, size)] = np.arange(total)
    return np.where(rank[-1] <= size, found[:size], total)
