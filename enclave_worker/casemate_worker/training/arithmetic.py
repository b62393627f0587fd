"""Rules for parameters outside layers: positions that are added, scales, tokens, products, and what is made of them first.

With a batch, each record gets a copy of the parameter of its own (:func:`.watched.replicas`), whose gradient is that
record's. Among parameters and numbers alone, the result is watched in their place (:func:`.watched.derive`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from casemate_schemas.errors import ModelError
from torch import Tensor

from .uses import LinearUse, check_batch
from .watched import Book, Derived, Watched, book_of, derive, enter, in_batch, mapped, on_gradient, replicas, tensors_in


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Elements by elements, with broadcasting: axis 0 of the batch's tensor is the records."""

    def rule(*args: Any, **kwargs: Any) -> Tensor:
        tensors = list(tensors_in((args, kwargs)))
        others = [t for t in tensors if not isinstance(t, Watched)]
        if not others:
            return cast(Tensor, derive(function, *args, **kwargs))
        rank = _rank_of_batch(others, book_of(*tensors))
        return function(*mapped(args, lambda w: replicas(w, rank)), **mapped(kwargs, lambda w: replicas(w, rank)))

    return rule


def _rank_of_batch(tensors: Sequence[Tensor], book: Book) -> int:
    """How many axes the batch has; smaller tensors beside it are constants."""
    largest = max(tensors, key=lambda t: (t.dim(), t.dim() > 0 and t.shape[0] == book.count))
    check_batch(largest, book.count, 1)
    return largest.dim()


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat``: a parameter that was expanded along the batch goes to each record's own row."""
    others = [t for t in tensors if not isinstance(t, Watched)]
    if not others:
        return cast(Tensor, derive(torch.cat, tensors, dim))
    check_batch(others[0], book_of(*tensors).count, 2)
    if dim % others[0].dim() == 0:
        raise ModelError("per-sample gradients are not available: a parameter's use does not follow the batch")
    return torch.cat(mapped(tensors, in_batch), dim)


def _product(input: Tensor, other: Tensor) -> Tensor:
    """``matmul``: a matrix behind the batch is a linear layer's, transposed; any other is each record's own."""
    if isinstance(input, Watched) and isinstance(other, Watched):
        return cast(Tensor, derive(torch.matmul, input, other))
    batch, watched = (other, input) if isinstance(input, Watched) else (input, other)
    check_batch(batch, book_of(input, other).count, 2 if watched is other else 3)
    if watched.dim() < 2:
        raise ModelError("per-sample gradients are not available: a product with a vector (give it a second axis)")
    if watched is not other or watched.dim() > 2:
        return torch.matmul(*(mapped(t, lambda w: replicas(w, batch.dim())) for t in (input, other)))
    x = input.detach().float()

    def captured(gradient: Tensor) -> None:
        enter(other, lambda: LinearUse(gradient, x))

    return on_gradient(torch.matmul(input, other), x, captured)


def _expanded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``expand`` and ``repeat``: where axis 0 is new or was 1, it repeats one row."""

    def rule(watched: Tensor, *sizes: Any) -> Tensor:
        found = cast(Derived, derive(function, watched, *sizes))
        found.rows_alike = found.dim() > watched.dim() or (watched.dim() > 0 and watched.shape[0] == 1)
        return found

    return rule


def _both(*names: str) -> list[Callable[..., Any]]:
    """PyTorch's functions of these names, and its tensors' methods."""
    return [getattr(place, name) for name in names for place in (torch, Tensor) if hasattr(place, name)]


_ELEMENTWISE: Final = [
    *_both("add", "sub", "mul", "div", "true_divide", "pow", "maximum", "minimum", "where", "lerp"),
    *(getattr(Tensor, name) for name in ("__rsub__", "__rdiv__", "__pow__", "__rpow__")),
]
_ALONE: Final = [
    *_both("neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "reciprocal", "tanh", "sigmoid", "relu", "clamp"),
    *_both("softmax", "log_softmax", "sum", "mean", "norm", "cumsum", "flip", "clone", "stack"),
    *_both("t", "transpose", "permute", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *_both("chunk", "split", "unbind", "narrow", "select", "movedim"),
    *(Tensor.__getitem__, Tensor.view, Tensor.contiguous, Tensor.float),
    *(F.softplus, F.softmax, F.relu, F.tanh, F.sigmoid, F.normalize),
    *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
]

HARMLESS: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {
    function: function
    for function in [Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__]
    + [
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_nested")
    ]
}
"""What tells sizes and kinds, no values."""

ARITHMETIC: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {
    **{function: _elementwise(function) for function in _ELEMENTWISE},
    **{function: partial(derive, function) for function in _ALONE},
    **{function: _expanded(function) for function in (Tensor.expand, Tensor.repeat)},
    Tensor.expand_as: lambda watched, other: _expanded(Tensor.expand)(watched, other.shape),
    **dict.fromkeys([torch.cat, torch.concat], _joined),
    **dict.fromkeys([torch.matmul, Tensor.matmul], _product),
}
