"""What a model makes of all records, as noisy sums: see :mod:`casemate_schemas.metrics` for what each record adds.

**Guarantee.** Vectors are multiples of 2^-20 with coordinates in [-1, 1], also for records that are not finite, so sums are
exact and one privacy unit moves them by at most Δ, the root of the number of coordinates. The noise is that of the plan's
mechanism for sensitivity ``Δ·(1 + 2^-16)``, which is more than Δ and the rounding to the mechanism's grid together (for σ up
to 10,000 less than 2^-16·Δ), and comes from a keystream of its own. So this is the Gaussian mechanism with the plan's noise
multiplier. That kernels give other records' outputs the same bits in another batch is arranged for (:mod:`.rows`) and tested
(:mod:`.kernels`), as in :mod:`.clipping`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from casemate_models.losses import per_example_loss
from casemate_schemas.job import Metrics, Training
from casemate_schemas.metrics import MARGIN, MetricSums, has_accuracy, noise_std, sensitivity
from casemate_schemas.pipeline import Loss
from torch import Tensor

from casemate_worker.key_schedule import derive_key

from .batches import Batches, present
from .noise import noise_mechanism
from .rows import in_rows, most_rows

_GRID: Final = 1 << 20
_SEED: Final = b"casemate/v1/training/metrics"


def noisy_metrics(
    model: Callable[[Tensor], Tensor], batches: Batches, training: Training, metrics: Metrics, seed: bytes
) -> MetricSums:
    """The noisy sums of ``model``'s answers to everyone in ``batches``; ``seed`` is the attempt's, of 32 bytes.

    ``model`` takes records ``[n, ...]``. Work depends on the number of privacy units alone, and with padded batches not on
    that either.
    """
    total = torch.zeros(3 if has_accuracy(training.loss) else 2, dtype=torch.int64)
    with torch.no_grad():
        for features, targets in batches.everyone(most_rows(training.max_physical_batch)):
            found = contributions(model, training.loss, metrics.loss_bound, in_rows(features), in_rows(targets))
            total += found[: len(features)].sum(dim=0)
    largest = sensitivity(training.loss) * MARGIN
    mechanism = noise_mechanism(training.mechanism, derive_key(seed, _SEED), largest)(metrics.noise_multiplier)
    count, *right, loss = (mechanism.add(total.double() / _GRID, 0)).tolist()
    return MetricSums(
        count=count,
        right=right[0] if right else None,
        loss=loss,
        noise_std=noise_std(training.loss, metrics.noise_multiplier),
        loss_bound=metrics.loss_bound,
    )


def contributions(
    model: Callable[[Tensor], Tensor], loss: Loss, bound: float, features: Tensor, targets: Tensor
) -> Tensor:
    """What each privacy unit adds, in units of 2^-20: int64 ``[n, 2 or 3]``, each coordinate at most 2^20 in size.

    Features ``[n, ...]`` and targets ``[n]`` are a record each, ``[n, k, ...]`` and ``[n, k]`` up to ``k`` records of a subject.
    Whoever has no record present adds nothing.
    """
    if targets.dim() == 1:
        features, targets = features[:, None], targets[:, None]
    there = present(targets)
    labels = torch.where(there, targets, 0).flatten()
    outputs = model(features.flatten(0, 1))
    losses = per_example_loss(loss, outputs, labels).double()
    scaled = 2 * torch.where(losses.isnan(), bound, losses.clamp(0, bound)) / bound - 1
    columns = [torch.ones_like(scaled), *_right(loss, outputs, labels, losses), scaled]
    vectors = torch.stack(columns, dim=1).view(*there.shape, -1)
    means = torch.where(there[..., None], vectors, 0.0).sum(dim=1) / there.sum(dim=1).clamp(min=1)[:, None]
    return (means.clamp(-1, 1) * _GRID).trunc().to(torch.int64)


def _right(loss: Loss, outputs: Tensor, labels: Tensor, losses: Tensor) -> list[Tensor]:
    """1 where the answer is right, -1 where not; nothing for a regression."""
    if not has_accuracy(loss):
        return []
    answers = outputs.argmax(dim=1) if loss == "cross_entropy" else (outputs.reshape(len(labels)) > 0).to(labels.dtype)
    return [torch.where((answers == labels) & ~losses.isnan(), 1.0, -1.0).double()]
