"""Can this model be trained here? Asked with synthetic records, before any real one is touched.

The proof that examples do not mix is made elsewhere, on the model's graph. This check stands behind it: it runs the very
code that will clip real records, on four public ones, so whatever it finds says nothing about the data.
"""

from __future__ import annotations

from typing import Final

import torch
from casemate_schemas.errors import BatchDependenceError, ModelError, UnsupportedOperationError
from torch import Tensor, nn

from .clipping import PerSampleClipping

_RECORDS: Final = 4
_TOLERANCE: Final = 1e-3


def probe_model(model: nn.Module, clipping: PerSampleClipping, features: Tensor, targets: Tensor) -> None:
    """Check ``model`` on synthetic records of the shapes and types of ``features`` and ``targets``.

    1. Its trainable parameters are float32, and there is at least one.
    2. Loss and gradients of synthetic records are finite.
    3. It draws nothing from PyTorch's own generator (as dropout would).
    4. It learns nothing outside its parameters (as batch statistics would).
    5. Each per-sample gradient equals the one of that record alone, to 0.1 %.

    Raises:
        ModelError: 1 or 2 fails, or the model does not run on such records.
        UnsupportedOperationError: 3 fails.
        BatchDependenceError: 4 or 5 fails.
    """
    # 1. float32 parameters
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable or any(p.dtype != torch.float32 for p in trainable):
        raise ModelError("expected float32 parameters, at least one of them trainable")
    generator, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    x, y = _synthetic(features), torch.ones(_RECORDS, dtype=targets.dtype)
    together, alone = _run(clipping, x, y)
    # 2. finite
    if not (together.isfinite().all() and alone.isfinite().all()):
        raise ModelError("loss or gradients of a harmless synthetic record are not finite")
    # 3. no generator but the keystream
    if not torch.equal(generator, torch.get_rng_state()):
        raise UnsupportedOperationError("the model draws random numbers of its own (dropout?)")
    # 4. no state but the parameters
    if not all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True)):
        raise BatchDependenceError("the model changes a buffer while it trains")
    # 5. records do not touch each other
    if not bool(((together - alone).norm(dim=1) <= _TOLERANCE * alone.norm(dim=1) + 1e-6).all()):
        raise BatchDependenceError("a record's gradient is not the one that it has alone: the model mixes records")


def _synthetic(features: Tensor) -> Tensor:
    """Public records with values in [-0.5, 0.5] and no symmetry."""
    shape = (_RECORDS, *features.shape[1:])
    count = torch.Size(shape).numel()
    return (0.5 * torch.sin(1.7 * torch.arange(1, count + 1, dtype=torch.float64))).to(features.dtype).reshape(shape)


def _run(clipping: PerSampleClipping, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the records together, and each alone; whatever PyTorch raises says that the model does not fit."""
    try:
        together, losses = clipping.gradients(x, y)
        alone = torch.stack([clipping.gradient_alone(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ModelError("the model or loss does not run on records of the declared shape") from error
    return torch.where(losses.isfinite()[:, None], together, torch.nan), alone
