"""Rules for layers of one step: the layer as ever, and what of it is a use of its parameters.

Activations and gradients are captured in float32, exactly as they are or widened from less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from casemate_schemas.errors import ModelError
from torch import Tensor

from .uses import ConvUse, EmbeddingUse, LinearUse, RowsUse, check_batch
from .watched import Book, Watched, book_of, enter, in_batch, on_gradient, replicas


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, some of whose arguments are watched."""
    input = _batch(input, book_of(input, weight, bias), 2)
    x = input.detach().float()

    def captured(gradient: Tensor) -> None:
        enter(weight, lambda: LinearUse(x, gradient))
        enter(bias, lambda: RowsUse(_sum_between(gradient, 1)))

    return on_gradient(F.linear(input, weight, bias), x, captured)


def linear_or_plain(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear`, also where neither weight nor bias is trained."""
    return (linear if isinstance(weight, Watched) or isinstance(bias, Watched) else F.linear)(input, weight, bias)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        input = _batch(input, book_of(input, weight, bias), weight.dim())
        x, rank = input.detach().float(), weight.dim() - 2
        strides, dilations = _each(stride, rank), _each(dilation, rank)
        paddings = _padding(padding, weight.shape[2:], dilations)

        def captured(gradient: Tensor) -> None:
            enter(weight, lambda: ConvUse(x, gradient, weight.shape, strides, paddings, dilations, groups))
            enter(bias, lambda: RowsUse(gradient.flatten(2).sum(dim=2)))

        return on_gradient(function(input, weight, bias, strides, paddings, dilations, groups), x, captured)

    return rule


def _transposed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The adjoint of a convolution: the weight's use is that one's, with gradients for inputs and inputs for gradients."""

    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Tensor:
        input = _batch(input, book_of(input, weight, bias), weight.dim())
        x, rank = input.detach().float(), weight.dim() - 2
        strides, paddings, dilations, extra = (_each(v, rank) for v in (stride, padding, dilation, output_padding))
        if any(more >= step for more, step in zip(extra, strides, strict=True)):
            raise ModelError("per-sample gradients are not available: output padding that is not below the stride")

        def captured(gradient: Tensor) -> None:
            enter(weight, lambda: ConvUse(gradient, x, weight.shape, strides, paddings, dilations, groups))
            enter(bias, lambda: RowsUse(gradient.flatten(2).sum(dim=2)))

        return on_gradient(function(input, weight, bias, strides, paddings, extra, groups, dilations), x, captured)

    return rule


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer on the products of both inputs' elements."""
    book = book_of(input1, input2, weight, bias)
    one, two = _batch(input1, book, 2), _batch(input2, book, 2)
    x = one.detach().float(), two.detach().float()

    def captured(gradient: Tensor) -> None:
        enter(weight, lambda: LinearUse((x[0][..., :, None] * x[1][..., None, :]).flatten(-2), gradient))
        enter(bias, lambda: RowsUse(_sum_between(gradient, 1)))

    output = F.bilinear(one, two, weight, bias)
    return on_gradient(on_gradient(output, x[0], lambda _gradient: None), x[1], captured)


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Negative values times a slope for all or for each channel."""
    input = _batch(input, book_of(input, weight), 2)
    if not isinstance(weight, Watched):
        return F.prelu(input, weight)
    slopes = replicas(weight, 2).reshape(len(input), -1, *[1] * (input.dim() - 2))
    return torch.where(input > 0, input, input * slopes)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None or running_var is not None or not use_input_stats:
        raise ModelError("per-sample gradients are not available: running statistics")
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """All records' groups as groups of one: with scales and shifts repeated, their gradients come record by record."""
    input = _batch(input, book_of(input, weight, bias), 2)
    n, c = input.shape[:2]
    scale, shift = (None if p is None else p.detach().repeat(n) for p in (weight, bias))
    for parameter, repeated in ((weight, scale), (bias, shift)):
        if isinstance(parameter, Watched) and repeated is not None:
            on_gradient(repeated, repeated, lambda g, p=parameter: enter(p, lambda: RowsUse(g.reshape(n, c))))  # type: ignore[misc]
    joined = input.reshape(1, n * c, *input.shape[2:])
    return F.group_norm(joined, n * num_groups, scale, shift, eps).reshape(input.shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    input = _batch(input, book_of(input, weight, bias), len(normalized_shape) + 1)
    output = F.layer_norm(input, tuple(normalized_shape), weight, bias, eps)
    return _scaled(
        input, output, len(normalized_shape), weight, bias, lambda x: F.layer_norm(x, tuple(normalized_shape), eps=eps)
    )


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    input = _batch(input, book_of(input, weight), len(normalized_shape) + 1)
    output = F.rms_norm(input, list(normalized_shape), weight, eps)
    return _scaled(
        input, output, len(normalized_shape), weight, None, lambda x: F.rms_norm(x, list(normalized_shape), eps=eps)
    )


def _scaled(
    input: Tensor,
    output: Tensor,
    axes: int,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Callable[[Tensor], Tensor],
) -> Tensor:
    """``normalise(input)`` times a scale plus a shift over the last ``axes``: normalised once more when needed."""
    x = input.detach()

    def captured(gradient: Tensor) -> None:
        enter(weight, lambda: RowsUse(_sum_between(gradient * normalise(x.float()), axes)))
        enter(bias, lambda: RowsUse(_sum_between(gradient, axes)))

    return on_gradient(output, x, captured)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq:
        raise ModelError("per-sample gradients are not available: an embedding that renormalises or counts its rows")
    check_batch(input, book_of(weight).count, 1)
    rows = input.detach().reshape(len(input), -1).long()

    def captured(gradient: Tensor) -> None:
        found = gradient.reshape(*rows.shape, -1)
        if padding_idx is not None:
            found = torch.where((rows == padding_idx % len(weight))[..., None], 0.0, found)
        enter(weight, lambda: EmbeddingUse(rows, found, len(weight)))

    return on_gradient(F.embedding(input, weight), input, captured)


def _sum_between(gradient: Tensor, axes: int) -> Tensor:
    """Over all but the first and the last ``axes`` axes; ``[n, elements]``."""
    if gradient.dim() == axes + 1:
        return gradient if axes == 1 else gradient.flatten(1)
    return gradient.reshape(gradient.shape[0], -1, gradient.shape[-axes:].numel()).sum(dim=1)


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    return [value] * rank if isinstance(value, int) else list(value) * (rank if len(value) == 1 else 1)


def _padding(value: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    if not isinstance(value, str):
        return _each(value, len(kernel))
    totals = [step * (size - 1) if value == "same" else 0 for size, step in zip(kernel, dilation, strict=True)]
    if any(total % 2 for total in totals):
        raise ModelError("per-sample gradients are not available: a convolution that pads one side more than the other")
    return [total // 2 for total in totals]


def _batch(input: Tensor, book: Book, least_axes: int) -> Tensor:
    """``input``, whose axis 0 is the batch."""
    input = in_batch(input)
    check_batch(input, book.count, least_axes)
    return input


LAYERS: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {
    F.linear: linear,
    F.bilinear: _bilinear,
    F.conv1d: _convolution(F.conv1d),
    F.conv2d: _convolution(F.conv2d),
    F.conv3d: _convolution(F.conv3d),
    F.conv_transpose1d: _transposed(F.conv_transpose1d),
    F.conv_transpose2d: _transposed(F.conv_transpose2d),
    F.conv_transpose3d: _transposed(F.conv_transpose3d),
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.prelu: _prelu,
    F.embedding: _embedding,
}
