"""Auditing the engine from inside: canaries go through a real training, and what it releases is searched for them.

**Canaries.** The model gets a few tables with one number for each canary, and canary records: one reads its own number in each
table, and its loss falls with their sum, steeply and whatever the numbers are. So its gradient is known: nothing but those
coordinates, equally large, and long enough to be clipped. That is the worst case that a sensitivity of C allows, and it passes
through everything that the owners' records pass through: sampling, forward and backward pass, norms over several parameters,
clipping, the sum, noise, the optimiser. The owners' records have the model's own coordinates, as ever, and are promised what the
training promises: neighbours differ in one of them, whichever canaries are there. The public mean of the batches, from which the
denominator and what is reserved for rounding follow, is the plan's and that of all canaries.

**What is observed** is what DP-SGD releases, the noised sum of each step; of the coins that chose the canaries, and of which
steps sampled them, the scores know nothing. Guesses are compared with the coins at the end. So the report is a function of the
noised sums and of coins that no record has touched: post-processing, and an audit costs each owner what the training costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from casemate_privacy.auditing import Array, guess
from casemate_schemas.audit import AuditCounts, Score
from casemate_schemas.errors import ParameterError
from casemate_schemas.job import Plan, Training
from casemate_schemas.result import ClippingStrategy
from numpy.typing import NDArray
from torch import Tensor, nn

from .training.engine import OwnerData, Trainer
from .training.keystream import Keystream

COINS: Final = "audit"
"""The label of the keystream that decides which canaries are in."""

PARTS: Final = 16
"""Tables that a canary's gradient is spread over: clipping each parameter by itself would let it be four times too long."""

OWNER: Final = "canaries"
"""Whose records the canaries are. No dataset's id, for those have an owner's name after an @."""

_LEAST_VARIANCE: Final = 1e-6

_STEEPNESS: Final = 1000.0
"""How many times a canary's gradient is longer than C, at least."""


class AuditedModel(nn.Module):
    """``model``, and tables for canaries beside it.

    Records are rows of ``prod(input_shape)`` features and one number more: 0 for a record of an owner, which goes through
    ``model`` alone, ``c`` for canary ``c``.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...], canaries: int, clipping_norm: float) -> None:
        super().__init__()
        self.model = model
        self.tables = nn.ParameterList([torch.zeros(canaries + 1, 1) for _ in range(PARTS)])
        self._input_shape = input_shape
        self._canaries = canaries
        self._slope = 2 * _STEEPNESS * clipping_norm / math.sqrt(PARTS)

    def forward(self, records: Tensor) -> Tensor:
        """Outputs of the shape that ``model`` has; a canary's are zero, with a slope in the first."""
        ids = records[:, -1].round().clamp(0, self._canaries).long()
        outputs = self.model(records[:, :-1].reshape(len(records), *self._input_shape))
        marks = torch.stack([F.embedding(ids, table) for table in self.tables]).sum(dim=(0, 2))
        slopes = self._slope * (marks - marks.detach())
        flat = F.pad(slopes[:, None], (0, outputs[0].numel() - 1)) if len(outputs) else outputs
        is_canary = (ids > 0).reshape(-1, *[1] * (outputs.dim() - 1))
        return torch.where(is_canary, flat.reshape(outputs.shape), outputs)


class AuditedTraining:
    """One training of ``plan`` with canaries in it; :attr:`trainer` is the engine's own, to be run to its end."""

    def __init__(self, model: nn.Module, owners: Sequence[OwnerData], plan: Plan, seed: bytes) -> None:
        """Canaries are sampled at the highest rate of the plan. Raises as :class:`~.training.engine.Trainer`."""
        if plan.audit is None:
            raise ParameterError("expected a plan of kind privacy_audit")
        rate = max(use.sample_rate.fraction for use in plan.datasets)
        self._included = flip_coins(seed, plan.audit.canaries)
        self._auditor = Auditor(plan.training, plan.audit.canaries, rate)
        shape = tuple(owners[0].features.shape[1:])
        self.trainer = Trainer(
            AuditedModel(model, shape, plan.audit.canaries, plan.training.clipping_norm),
            with_canaries(owners, self._included, rate),
            plan.training,
            expected_batch=plan.expected_batch + rate * plan.audit.canaries,
            seed=seed,
            observe=self._auditor.observe,
        )

    @property
    def clipping_strategies(self) -> dict[str, ClippingStrategy]:
        """Those of the model's own parameters; see :attr:`Trainer.clipping_strategies`."""
        found = self.trainer.clipping_strategies.items()
        return {name.removeprefix("model."): how for name, how in found if name.startswith("model.")}

    def counts(self) -> AuditCounts:
        """Guesses about the canaries, compared with the coins."""
        return guess(self._auditor.scores, self._included)


class Auditor:
    """Watches noised sums, step by step, and scores every canary.

    ``likelihood``: the logarithm of how much likelier what was seen of a canary is with it than without it (Neyman and Pearson),
    if sampled at its rate, and with as much noise as this step's coordinates show, table by table: where noise is missing, that
    is where to look. ``spread``: how much the canary's coordinates vary from step to step, which shows it where noise does not
    vary as it should. Both see the coordinates of a canary as one number, which is around 1 if it was sampled and else around 0.
    """

    def __init__(self, plan: Training, canaries: int, rate: Fraction) -> None:
        """For ``canaries`` of them, sampled at ``rate``."""
        self._canaries = canaries
        self._rate = float(rate)
        self._unit = -math.sqrt(PARTS) / plan.clipping_norm
        self._steps = 0
        self._likelihood, self._mean, self._squares = (np.zeros(canaries) for _ in range(3))

    def observe(self, noisy: Tensor) -> None:
        """Take in a step's noised sum, float64 ``[d]``, the tables' coordinates last."""
        tables = noisy[-PARTS * (self._canaries + 1) :].reshape(PARTS, self._canaries + 1)
        parts = self._unit * tables[:, 1:].numpy()
        precisions = 1.0 / np.maximum(parts.var(axis=1), _LEAST_VARIANCE)
        seen: Array = precisions @ parts / precisions.sum()
        exponent = (seen - 0.5) * precisions.sum()
        absent = math.log1p(-self._rate) if self._rate < 1 else -math.inf
        self._likelihood += np.logaddexp(absent, math.log(self._rate) + exponent)
        self._steps += 1
        change = seen - self._mean
        self._mean += change / self._steps
        self._squares += change * (seen - self._mean)

    @property
    def scores(self) -> dict[Score, Array]:
        """By name, float64 ``[canaries]``: higher where a canary looks more as if it were in."""
        return {"likelihood": self._likelihood, "spread": self._squares}


def with_canaries(owners: Sequence[OwnerData], included: NDArray[np.bool_], rate: Fraction) -> list[OwnerData]:
    """The owners' records in the form that :class:`AuditedModel` takes, and as one owner more the canaries that are in."""
    first = owners[0]
    ids = torch.from_numpy(np.flatnonzero(included) + 1).float()
    blank = torch.zeros(len(ids), first.features.shape[1:].numel())
    # Gradients of zero outputs are negative for these targets, whatever the loss.
    targets = torch.zeros(len(ids), dtype=torch.int64) if first.targets.dtype == torch.int64 else torch.ones(len(ids))
    canaries = OwnerData(OWNER, torch.cat([blank, ids[:, None]], dim=1), targets, rate)
    return [*(replace(data, features=F.pad(data.features.flatten(1), (0, 1))) for data in owners), canaries]


def flip_coins(seed: bytes, canaries: int) -> NDArray[np.bool_]:
    """Which canaries are in: a fair coin each, bool ``[canaries]``."""
    return (Keystream(seed, COINS).words(0, canaries) >> np.uint64(63)).astype(bool)
