"""Losses, one number an example; and the static check that model, loss and target fit together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from casemate_schemas.errors import ModelError, ParameterError
from casemate_schemas.model import ModelSpec
from casemate_schemas.pipeline import Loss, PipelineSpec
from torch import Tensor

from .batch_axis import check

_TARGET_KINDS: dict[Loss, str] = {
    "cross_entropy": "class",
    "binary_cross_entropy": "binary",
    "mean_squared_error": "value",
}


def per_example_loss(name: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each example, shape ``[n]``; element i depends on row i of ``outputs`` and ``targets`` alone.

    ``cross_entropy``: outputs ``[n, k]``, targets int64 ``[n]`` in ``[0, k)``. ``binary_cross_entropy`` (of logits) and
    ``mean_squared_error``: outputs ``[n]`` or ``[n, 1]``, targets float32 ``[n]``. Raises :class:`ModelError` for
    other shapes: torch would broadcast ``[n, 1]`` against ``[n]`` and mix all examples.
    """
    if name not in _TARGET_KINDS:
        raise ParameterError(f"unknown loss '{name}'")
    n = targets.shape[0] if targets.dim() == 1 else -1
    if name == "cross_entropy":
        if outputs.dim() != 2 or outputs.shape[0] != n:
            raise ModelError(f"expected outputs [n, k] and targets [n], got {_shown(outputs, targets)}")
        return F.cross_entropy(outputs, targets, reduction="none")
    if outputs.shape not in ((n,), (n, 1)):
        raise ModelError(f"expected outputs [n] or [n, 1] and targets [n], got {_shown(outputs, targets)}")
    if name == "binary_cross_entropy":
        return F.binary_cross_entropy_with_logits(outputs.reshape(n), targets, reduction="none")
    return F.mse_loss(outputs.reshape(n), targets, reduction="none")


@dataclass(frozen=True)
class ExampleLoss:
    """:func:`per_example_loss` by its name."""

    name: Loss

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :func:`per_example_loss`."""
        return per_example_loss(self.name, outputs, targets)

    def with_gradient(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The losses, and the gradient of their sum by ``outputs``: what autograd makes of them, bit for bit."""
        if self.name == "cross_entropy" and outputs.dim() == 2 and targets.shape == outputs.shape[:1]:
            return _cross_entropy_with_gradient(outputs, targets)
        return loss_with_gradient(self, outputs, targets)


def loss_with_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """``loss`` of outputs and targets, ``[n]``, and the gradient of its sum by ``outputs``: zeros if it is constant."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        losses = loss(leaf, targets)
        if not losses.requires_grad:
            return losses, torch.zeros_like(outputs)
        (gradient,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
    return losses.detach(), gradient


_aten: Any = torch.ops.aten
_log_softmax = _aten._log_softmax.default
_log_softmax_backward = _aten._log_softmax_backward_data.default
_nll_loss = _aten.nll_loss_forward.default
_nll_loss_backward = _aten.nll_loss_backward.default
_NO_REDUCTION = 0
_IGNORED = -100


def _cross_entropy_with_gradient(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels that PyTorch calls for it, without a graph: for small networks that takes longer than the arithmetic."""
    logs = _log_softmax(outputs, 1, False)
    losses, weight = _nll_loss(logs, targets, None, _NO_REDUCTION, _IGNORED)
    of_logs = _nll_loss_backward(torch.ones_like(losses), logs, targets, None, _NO_REDUCTION, _IGNORED, weight)
    return losses, _log_softmax_backward(of_logs, logs, 1, outputs.dtype)


def check_loss(spec: ModelSpec, loss: Loss, pipeline: PipelineSpec) -> None:
    """That the model's output, the loss and the target's kind fit. Raises :class:`ModelError` saying what to change."""
    if pipeline.target_kind != _TARGET_KINDS[loss]:
        raise ModelError(f"loss '{loss}' needs a target of kind '{_TARGET_KINDS[loss]}', not '{pipeline.target_kind}'")
    shape = check(spec).output_shape
    if loss == "cross_entropy":
        if shape != (pipeline.n_classes,):
            raise ModelError(f"expected {pipeline.n_classes} outputs for {pipeline.n_classes} classes, got {shape}")
    elif shape not in ((), (1,)):
        raise ModelError(f"loss '{loss}' needs one output an example, got {shape}")


def _shown(outputs: Tensor, targets: Tensor) -> str:
    return f"{list(outputs.shape)} and {list(targets.shape)}"
