"""Losses, one number an example; and the static check that model, loss and target fit together."""

from __future__ import annotations

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
