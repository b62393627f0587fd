"""Can this model be trained here? Asked with synthetic records, before any real one is touched.

The proof that examples do not mix is made elsewhere, on the model's graph. This check stands behind it: it runs the very
code that will clip real records, on four public ones, so whatever it finds says nothing about the data.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from casemate_schemas.errors import BatchDependenceError, ModelError, UnsupportedOperationError
from torch import Tensor, nn

from .choosing import Mode
from .clipping import BookKeeping

_RECORDS: Final = 4
_TOLERANCE: Final = 1e-3


def probe_model(
    model: nn.Module, clipping: BookKeeping, features: Tensor, targets: Tensor, mode: Mode = "book_keeping"
) -> Tensor:
    """Choose strategies and check ``model`` on synthetic records like ``features`` and ``targets``; its outputs for some.

    1. Its trainable parameters are float32, and there is at least one.
    2. Loss, gradients and norms of synthetic records are finite.
    3. It draws nothing from PyTorch's own generator (as dropout would).
    4. It learns nothing outside its parameters (as batch statistics would).
    5. Each per-sample gradient equals the one of that record alone, to 0.1 %, and its norm is the one that clipping uses.

    Raises:
        ModelError: 1 or 2 fails, the model does not run on such records, or uses a parameter in a way without a rule.
        UnsupportedOperationError: 3 fails.
        BatchDependenceError: 4 or 5 fails.
    """
    # 1. float32 parameters
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable or any(p.dtype != torch.float32 for p in trainable):
        raise ModelError("expected float32 parameters, at least one of them trainable")
    generator, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    found = _run(clipping, features, targets, mode)
    # 2. finite
    if not all(one.finite for one in found):
        raise ModelError("loss or gradients of a harmless synthetic record are not finite")
    # 3. no generator but the keystream
    if not torch.equal(generator, torch.get_rng_state()):
        raise UnsupportedOperationError("the model draws random numbers of its own (dropout?)")
    # 4. no state but the parameters
    if not all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True)):
        raise BatchDependenceError("the model changes a buffer while it trains")
    # 5. records do not touch each other
    if not all(one.difference <= _TOLERANCE * one.alone + 1e-6 for one in found):
        raise BatchDependenceError("a record's gradient is not the one that it has alone: the model mixes records")
    if not all(abs(one.norm - one.together) <= _TOLERANCE * one.alone + 1e-6 for one in found):
        raise BatchDependenceError("a record's norm is not the one of its gradient")
    with torch.no_grad():
        outputs: Tensor = model(synthetic_records(features, targets, _RECORDS)[0])
    return outputs


def synthetic_records(features: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Public records shaped like these: values in [-0.5, 0.5] without symmetry, targets 1."""
    shape = (count, *features.shape[1:])
    values = 0.5 * torch.sin(1.7 * torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64))
    return values.to(features.dtype).reshape(shape), torch.ones(count, dtype=targets.dtype)


class _Compared(NamedTuple):
    """Norms of one record's gradient: as clipping has it, computed among others, alone, and of the difference of these two."""

    norm: float
    together: float
    alone: float
    difference: float
    loss: float

    @property
    def finite(self) -> bool:
        """Whether all of them are."""
        return all(map(math.isfinite, self))


def _run(clipping: BookKeeping, features: Tensor, targets: Tensor, mode: Mode) -> list[_Compared]:
    """Of each record; whatever PyTorch raises is the model's."""
    try:
        clipping.choose(mode, lambda count: synthetic_records(features, targets, count))
        x, y = synthetic_records(features, targets, _RECORDS)
        found = []
        for i, (together, square, loss) in enumerate(clipping.gradients(x, y)):
            alone = clipping.gradient_alone(x[i : i + 1], y[i : i + 1])
            norms = float(together.norm()), float(alone.norm()), float(together.sub_(alone).norm())
            found.append(_Compared(math.sqrt(max(square, 0.0)), *norms, loss))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ModelError("the model or loss does not run on records of the declared shape") from error
    return found
