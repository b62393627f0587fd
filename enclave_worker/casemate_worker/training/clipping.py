"""How much one record can move the sum: per-sample gradients, each clipped to the norm C with certainty.

**Sensitivity.** A record adds one vector to the sum, whose exact L2 norm never exceeds C (:func:`clip_rows`), or nothing.
Two things are outside that statement: float64 addition rounds the sum of ``n`` vectors by less than ``n²C·2^-53``, and
the float32 kernels behind a batch may round *other* records' gradients differently, by about 2^-23 of each, when the
batch has another size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from casemate_schemas.errors import ModelError
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs ``[n, ...]`` and targets ``[n, ...]`` to per-example losses ``[n]``."""


class Clipping(Protocol):
    """One way to compute the clipped sum. Modes differ in speed and memory, and agree up to rounding."""

    def clipped_sum(self, features: Tensor, targets: Tensor) -> Tensor:
        """The sum over records of clipped gradients, float64 ``[d]``; zeros for an empty batch.

        Coordinates are those of the model's trainable parameters in their order, each flattened row-major.
        """


def clip_rows(gradients: Tensor, usable: Tensor, clipping_norm: float) -> Tensor:
    """Per-sample ``gradients`` ``[n, d]`` scaled to norms at most ``clipping_norm``, in float64.

    A row that is not ``usable`` (bool ``[n]``) or holds NaN or infinity becomes exactly zero.

    The norm is certified. Float32 values and their squares are far inside float64's range, and the computed sum of ``d``
    squares is at least ``1 - (d + 1)·2^-53`` of the true one (Higham 2002, §4.2), so its root times
    ``1 + (d + 8)·2^-52`` is an upper bound on the true norm that also absorbs the rounding of this product, of the
    quotient C / bound and of scaling each coordinate. Where the bound is at most C, the row is left as it is.
    """
    rows = gradients.double()
    squared_norms = rows.square().sum(dim=1)
    bounds = squared_norms.sqrt() * (1.0 + (rows.shape[1] + 8) * 2.0**-52)
    factors = (clipping_norm / bounds).clamp(max=1.0)
    kept = usable & squared_norms.isfinite()
    return torch.where(kept[:, None], rows * factors[:, None], 0.0)


class PerSampleClipping:
    """The clipped sum from explicit per-sample gradients, by Opacus' hooks (Yousefpour et al. 2021).

    Hooks stay on ``model``, which is trained in place. At most ``max_physical_batch`` records are in memory at a time,
    as float32 and float64 gradients: 20 bytes or so for each record and parameter.
    """

    def __init__(self, model: nn.Module, loss: Loss, *, clipping_norm: float, max_physical_batch: int) -> None:
        """Attach to ``model``; :class:`ModelError` if it has trainable layers that Opacus cannot follow."""
        try:
            self._model = GradSampleModule(model.train(), batch_first=True, loss_reduction="sum", strict=True)
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"per-sample gradients are not available: {error}") from error
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._size = sum(p.numel() for p in self._parameters)
        self._loss = loss
        self._clipping_norm = clipping_norm
        self._max_physical_batch = max_physical_batch

    def clipped_sum(self, features: Tensor, targets: Tensor) -> Tensor:
        """See :meth:`Clipping.clipped_sum`."""
        total = torch.zeros(self._size, dtype=torch.float64)
        for start in range(0, len(features), self._max_physical_batch):
            rows = slice(start, start + self._max_physical_batch)
            gradients, losses = self.gradients(features[rows], targets[rows])
            total += clip_rows(gradients, losses.isfinite(), self._clipping_norm).sum(dim=0)
        return total

    def gradients(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample gradients ``[n, d]`` and losses ``[n]`` of a batch of at least one record, not clipped."""
        # Gradients with respect to the input are not needed, but let full backward hooks fire as documented.
        losses = self._loss(self._model(features.detach().requires_grad_()), targets)
        torch.autograd.backward(losses.sum())
        return torch.cat([_take(p, len(features)).flatten(1) for p in self._parameters], dim=1), losses.detach()

    def gradient_alone(self, feature: Tensor, target: Tensor) -> Tensor:
        """The gradient ``[d]`` of a batch of one record by plain autograd, without hooks: the reference."""
        self._model.disable_hooks()
        loss = self._loss(self._model(feature.detach().requires_grad_()), target).sum()
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        self._model.enable_hooks()
        return torch.cat([gradient.flatten() for gradient in found])


def _take(parameter: nn.Parameter, count: int) -> Tensor:
    """Take the per-sample gradient off ``parameter``; a parameter that the model does not use has zeros."""
    found, unused = getattr(parameter, "grad_sample", None), parameter.grad is None
    vars(parameter)["grad_sample"] = parameter.grad = None
    if found is None and unused:
        return parameter.new_zeros(count, *parameter.shape)
    if not isinstance(found, Tensor) or found.shape != (count, *parameter.shape):
        raise ModelError("per-sample gradients are not available: a parameter's use does not follow the batch")
    return found.detach()
