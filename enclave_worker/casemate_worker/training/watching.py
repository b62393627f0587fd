"""One forward and one backward pass that leave behind how each parameter was used, without computing its gradient.

While :class:`Watch` lasts, a model's trainable parameters are stood in for by :class:`_Watched` tensors. Layers call PyTorch's
functions on them as ever; each function that has a rule here is computed as usual, with a hook on its result, and every
other one is refused. So whatever a model is made of (``torch.nn`` modules, a rebuilt graph, plain functions, one
parameter in many places) each use is seen, or the model is not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from casemate_schemas.errors import ModelError
from torch import Tensor, nn

from .uses import ConvUse, EmbeddingUse, LinearUse, RankOne, RowsUse, Strategy, Term, Use, check_batch, term_of


class Book:
    """The uses of all parameters by one batch of ``count`` records, by the parameter's position."""

    def __init__(self, count: int, strategy_of: Callable[[int, Use], Strategy]) -> None:
        """``strategy_of`` says what becomes of a use: only those of ``ghost`` parameters are kept as they are."""
        self.count = count
        self._strategy_of = strategy_of
        self._uses: dict[int, list[Use]] = {}
        self._strategies: dict[int, Strategy] = {}

    def add(self, index: int, use: Use) -> None:
        """Enter one use. Gradients that will be needed record by record are formed now, while all is in the cache."""
        strategy = self._strategies.setdefault(index, self._strategy_of(index, use))
        uses = self._uses.setdefault(index, [])
        uses.append(use if strategy == "ghost" else RowsUse(use.instantiate(strategy)))
        if strategy != "ghost" and len(uses) == 2:
            uses[:] = [RowsUse(uses[0].instantiate(strategy) + uses[1].instantiate(strategy))]

    def terms(self) -> dict[int, Term]:
        """What there is for each parameter that the batch used; one may stand for the parameter after its own, too."""
        found = {index: term_of(uses, self._strategies[index]) for index, uses in self._uses.items()}
        for index, term in sorted(found.items()):
            if isinstance(term, RankOne) and index + 1 in found and term.take_along(found[index + 1]):
                del found[index + 1]
        return found

    def uses(self) -> dict[int, list[Use]]:
        """The uses as entered."""
        return self._uses


class Watch:
    """Stands in for a model's parameters, wherever it keeps them, while a forward pass runs."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """For these of ``model``'s parameters; a use is entered under the parameter's position among them."""
        positions = {id(p): index for index, p in enumerate(parameters)}
        holders = [module._parameters for module in model.modules()]
        self._slots = [
            (holder, name, positions[id(p)])
            for holder in holders
            for name, p in holder.items()
            if id(p) in positions and p is not None
        ]
        self._parameters = parameters
        self._standing_in = [_watched(p, index) for index, p in enumerate(parameters)]

    @contextmanager
    def into(self, book: Book) -> Iterator[None]:
        """Enter each use into ``book``: forward runs inside, backward may run after."""
        for index, (parameter, watched) in enumerate(zip(self._parameters, self._standing_in, strict=True)):
            if watched.address != parameter.data_ptr():
                self._standing_in[index] = _watched(parameter, index)
            self._standing_in[index].book = book
        if any(holder[name] is not self._parameters[index] for holder, name, index in self._slots):
            raise ModelError("the model's parameters were replaced after its clipping was set up")
        try:
            for holder, name, index in self._slots:
                holder[name] = cast(nn.Parameter, self._standing_in[index])
            yield
        finally:
            for holder, name, index in self._slots:
                holder[name] = self._parameters[index]


class _Watched(Tensor):
    """Stands in for a parameter, shares its memory, and lets no use pass unseen."""

    position: int
    address: int
    book: Book

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func, func if func in _HARMLESS else None)
        if rule is None:
            raise ModelError(f"per-sample gradients are not available: no rule for {getattr(func, '__name__', 'it')}")
        with torch._C.DisableTorchFunctionSubclass():
            return rule(*args, **(kwargs or {}))


def _watched(parameter: nn.Parameter, index: int) -> _Watched:
    found = Tensor._make_subclass(_Watched, parameter.detach())
    found.position, found.address = index, parameter.data_ptr()
    return found


def _book(*parameters: Tensor | None) -> Book:
    return next(p.book for p in parameters if isinstance(p, _Watched))


def _enter(parameter: Tensor | None, use: Callable[[], Use]) -> None:
    if isinstance(parameter, _Watched):
        parameter.book.add(parameter.position, use())


def _on_gradient(output: Tensor, seen: Tensor, enter: Callable[[Tensor], None]) -> Tensor:
    """``output``, part of the graph, whose gradient goes to ``enter``; ``seen`` must by then be what it is now."""
    if not output.requires_grad:
        output.requires_grad_()
    version = seen._version

    def hook(gradient: Tensor) -> None:
        if seen._version != version:
            raise ModelError("per-sample gradients are not available: a layer's input was changed in place")
        enter(gradient)

    output.register_hook(hook)  # type: ignore[no-untyped-call]
    return output


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    check_batch(input, _book(weight, bias).count, 2)
    x = input.detach()

    def enter(gradient: Tensor) -> None:
        _enter(weight, lambda: LinearUse(x, gradient))
        _enter(bias, lambda: RowsUse(_sum_between(gradient, 1)))

    return _on_gradient(F.linear(input, weight, bias), x, enter)


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
        check_batch(input, _book(weight, bias).count, weight.dim())
        x, rank = input.detach(), weight.dim() - 2
        strides, dilations = _each(stride, rank), _each(dilation, rank)
        paddings = _padding(padding, weight.shape[2:], dilations)

        def enter(gradient: Tensor) -> None:
            _enter(weight, lambda: ConvUse(x, gradient, weight.shape, strides, paddings, dilations, groups))
            _enter(bias, lambda: RowsUse(gradient.flatten(2).sum(dim=2)))

        return _on_gradient(function(input, weight, bias, strides, paddings, dilations, groups), x, enter)

    return rule


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """All records' groups as groups of one: with scales and shifts repeated, their gradients come record by record."""
    count = _book(weight, bias).count
    check_batch(input, count, 2)
    n, c = input.shape[:2]
    scale, shift = (None if p is None else p.detach().repeat(n) for p in (weight, bias))
    for parameter, repeated in ((weight, scale), (bias, shift)):
        if isinstance(parameter, _Watched) and repeated is not None:
            _on_gradient(repeated, repeated, lambda g, p=parameter: _enter(p, lambda: RowsUse(g.reshape(n, c))))  # type: ignore[misc]
    joined = input.reshape(1, n * c, *input.shape[2:])
    return F.group_norm(joined, n * num_groups, scale, shift, eps).reshape(input.shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    output = F.layer_norm(input, tuple(normalized_shape), weight, bias, eps)
    return _scaled(
        input, output, len(normalized_shape), weight, bias, lambda x: F.layer_norm(x, tuple(normalized_shape), eps=eps)
    )


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
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
    check_batch(input, _book(weight, bias).count, axes + 1)
    x = input.detach()

    def enter(gradient: Tensor) -> None:
        _enter(weight, lambda: RowsUse(_sum_between(gradient * normalise(x), axes)))
        _enter(bias, lambda: RowsUse(_sum_between(gradient, axes)))

    return _on_gradient(output, x, enter)


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
    book = _book(weight)
    check_batch(input, book.count, 1)
    rows = input.detach().reshape(len(input), -1).long()

    def enter(gradient: Tensor) -> None:
        found = gradient.reshape(*rows.shape, -1)
        if padding_idx is not None:
            found = torch.where((rows == padding_idx % len(weight))[..., None], 0.0, found)
        _enter(weight, lambda: EmbeddingUse(rows, found, len(weight)))

    return _on_gradient(F.embedding(input, weight), input, enter)


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


_RULES: Final[dict[Callable[..., Any], Callable[..., Any]]] = {
    F.linear: _linear,
    F.conv1d: _convolution(F.conv1d),
    F.conv2d: _convolution(F.conv2d),
    F.conv3d: _convolution(F.conv3d),
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.embedding: _embedding,
}

_HARMLESS: Final = frozenset(
    [Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__]
    + [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")]
)
