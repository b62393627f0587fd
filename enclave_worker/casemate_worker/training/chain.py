"""Chains of layers, forward and backward by hand: for small networks dispatch is most of a step.

Linear layers, convolutions, activations and max-pooling, one after another. The same functions on the same numbers in the same
order as :mod:`.watching` and autograd would call, so what comes out is the same, bit for bit; only nothing is intercepted, and
no graph is built, unless the loss needs one. Pooling two by two, for which PyTorch takes longer than for a convolution, goes
by a few vector operations instead, with the same outcome: the first of equal numbers in a window is its largest. Whatever is
not such a chain, or has hooks, goes the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from casemate_models import operations as ops
from casemate_models.building import Interpreter
from casemate_models.losses import ExampleLoss, loss_with_gradient
from casemate_schemas.errors import ModelError
from torch import Tensor, nn

from .terms import Instantiated, RankOne, Term
from .uses import ConvUse, LinearUse, RowsUse
from .watched import Book

Loss = Callable[[Tensor, Tensor], Tensor]
aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """Without parameters: ``forward`` of an input to the output and what ``backward`` of a gradient needs.

    ``in_place`` is a forward that overwrites its input, where there is one; ``keeps_output``: the output is needed again.
    ``backward`` may overwrite the gradient.
    """

    forward: Callable[[Tensor], tuple[Tensor, Any]]
    backward: Callable[[Tensor, Any], Tensor]
    in_place: Callable[[Tensor], tuple[Tensor, Any]] | None = None
    keeps_output: bool = False


_relu_backward = aten.threshold_backward.grad_input


def _of_output(
    forward: Callable[[Tensor], Tensor],
    in_place: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor, Tensor], Tensor],
) -> Step:
    """An activation whose derivative is a function of its output."""
    return Step(lambda x: ((y := forward(x)), y), backward, lambda x: (in_place(x), x), True)


def _gelu(approximate: str) -> Step:
    return Step(
        lambda x: (F.gelu(x, approximate=approximate), x),
        lambda gradient, x: aten.gelu_backward(gradient, x, approximate=approximate),
    )


_RELU: Final = _of_output(torch.relu, torch.relu_, lambda g, y: _relu_backward(g, y, 0, grad_input=g))
_TANH: Final = _of_output(torch.tanh, torch.tanh_, aten.tanh_backward)
_SIGMOID: Final = _of_output(torch.sigmoid, torch.sigmoid_, aten.sigmoid_backward)
_SILU: Final = Step(lambda x: (F.silu(x), x), aten.silu_backward)
_FLATTEN: Final = Step(lambda x: (x.flatten(1), x.shape), lambda gradient, shape: gradient.reshape(shape))


def _two_by_two(x: Tensor) -> tuple[Tensor, Any]:
    """The largest of each two in a row, then of each two of these in a column; and all of them."""
    height, width = (size // 2 * 2 for size in x.shape[2:])
    left, right = x[..., :height, 0:width:2], x[..., :height, 1:width:2]
    larger = torch.maximum(left, right)
    above, below = larger[..., 0::2, :], larger[..., 1::2, :]
    return torch.maximum(above, below), (x, left, right, above, below)


def _two_by_two_backward(gradient: Tensor, kept: Any) -> Tensor:
    """To the second of two goes the gradient where that one is larger, and zero elsewhere; the rest to the first."""
    x, left, right, above, below = kept
    rows = torch.empty_like(left, memory_format=torch.contiguous_format)
    height, width = rows.shape[2], 2 * rows.shape[3]
    found = torch.empty_like(x) if (height, width) == x.shape[2:] else torch.zeros_like(x)
    for given, difference, first, second in (
        (gradient, below - above, rows[..., 0::2, :], rows[..., 1::2, :]),
        (rows, right - left, found[..., :height, 0:width:2], found[..., :height, 1:width:2]),
    ):
        _relu_backward(given, difference, 0, grad_input=difference)
        second.copy_(difference)
        torch.sub(given, difference, out=first)
    return found


def _max_pool(kernel: Any, stride: Any, padding: Any, dilation: Any) -> Step:
    window = [_pair(value) for value in (kernel, stride, padding, dilation)]
    if window == [[2, 2], [2, 2], [0, 0], [1, 1]]:
        return Step(_two_by_two, _two_by_two_backward)

    def forward(x: Tensor) -> tuple[Tensor, Any]:
        output, indices = aten.max_pool2d_with_indices(x, *window)
        return output, (x, indices)

    def backward(gradient: Tensor, kept: Any) -> Tensor:
        found: Tensor = aten.max_pool2d_with_indices_backward(gradient, kept[0], *window, False, kept[1])
        return found

    return Step(forward, backward)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class LinearLayer:
    """Of vectors; its trainable weight's strategy has to be ``ghost``."""

    def __init__(self, module: nn.Linear, positions: Mapping[int, int]) -> None:
        """``positions`` are those of the trainable parameters, by their ``id``."""
        self.module, self._weight, self._bias = module, module.weight, module.bias
        self.weight, self.bias = positions.get(id(module.weight)), positions.get(id(module.bias))

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        return F.linear(x, self._weight, self._bias)

    def enter(self, x: Tensor, gradient: Tensor, terms: dict[int, Term], book: Book) -> None:
        """Add what input and gradient make to ``terms``; the shift goes along with the weight where it comes right after it."""
        if self.weight is not None and self.bias == self.weight + 1:
            terms[self.weight] = RankOne(LinearUse(x, gradient), shift=True, owned=True)
            return
        if self.weight is not None:
            terms[self.weight] = RankOne(LinearUse(x, gradient))
        if self.bias is not None:
            terms[self.bias] = Instantiated(gradient)

    def backward(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient by the input."""
        return torch.mm(gradient, self._weight)


class ConvLayer:
    """Of images."""

    def __init__(self, module: nn.Conv2d, positions: Mapping[int, int]) -> None:
        """``positions`` are those of the trainable parameters, by their ``id``."""
        self.module, self._weight, self._bias = module, module.weight, module.bias
        self._geometry = _pair(module.stride), _pair(module.padding), _pair(module.dilation)
        self.weight, self.bias = positions.get(id(module.weight)), positions.get(id(module.bias))

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        return torch.conv2d(x, self._weight, self._bias, *self._geometry, self.module.groups)

    def enter(self, x: Tensor, gradient: Tensor, terms: dict[int, Term], book: Book) -> None:
        """Enter what input and gradient are a use of into ``book``."""
        if self.weight is not None:
            book.add(self.weight, ConvUse(x, gradient, self._weight.shape, *self._geometry, self.module.groups))
        if self.bias is not None:
            book.add(self.bias, RowsUse(gradient.flatten(2).sum(dim=2)))

    def backward(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient by the input."""
        rest = False, [0, 0], self.module.groups, [True, False, False]
        found: Tensor = aten.convolution_backward(gradient, x, self._weight, None, *self._geometry, *rest)[0]
        return found


Layer = LinearLayer | ConvLayer
_LAYERS: Final = (LinearLayer, ConvLayer)

_OF_MODULES: Final[Mapping[type[nn.Module], Callable[[Any], Step | None]]] = {
    nn.ReLU: lambda _: _RELU,
    nn.Tanh: lambda _: _TANH,
    nn.Sigmoid: lambda _: _SIGMOID,
    nn.SiLU: lambda _: _SILU,
    nn.GELU: lambda module: _gelu(module.approximate),
    nn.MaxPool2d: lambda m: (
        None if m.ceil_mode or m.return_indices else _max_pool(m.kernel_size, m.stride, m.padding, m.dilation)
    ),
    nn.Flatten: lambda module: _FLATTEN if (module.start_dim, module.end_dim) == (1, -1) else None,
}
_OF_OPERATIONS: Final[Mapping[type[ops.Operation], Callable[[Any], Step | None]]] = {
    ops.Relu: lambda _: _RELU,
    ops.Tanh: lambda _: _TANH,
    ops.Sigmoid: lambda _: _SIGMOID,
    ops.Silu: lambda _: _SILU,
    ops.Gelu: lambda operation: _gelu("tanh" if operation.tanh_approximation else "none"),
    ops.MaxPool2d: lambda o: _max_pool(o.kernel_size, o.stride, o.padding, o.dilation),
    ops.Reshape: lambda operation: _FLATTEN if len(operation.shape) == 1 else None,
}


class Chain:
    """A chain, for a batch ``[n, features]``, or ``[n, channels, height, width]`` where it begins with a convolution."""

    def __init__(self, model: nn.Module, links: Sequence[Layer | Step]) -> None:
        """``links`` of ``model``, in their order, the first being a layer."""
        self._modules = list(model.modules())
        self._layers = [link for link in links if isinstance(link, _LAYERS)]
        self._parameters = [(layer.module, layer.module.weight, layer.module.bias) for layer in self._layers]
        self._links = list(zip(links, _forwards(links), strict=True))
        self._axes = 4 if isinstance(links[0], ConvLayer) else 2

    @property
    def matrices(self) -> list[int]:
        """The positions of linear layers' trainable weights."""
        return [layer.weight for layer in self._layers if isinstance(layer, LinearLayer) and layer.weight is not None]

    def takes(self, features: Tensor) -> bool:
        """Whether this does for such a batch what the model would; :class:`ModelError` if parameters were replaced."""
        for module, weight, bias in self._parameters:
            own = module._parameters
            if own["weight"] is not weight or own["bias"] is not bias:
                raise ModelError("the model's parameters were replaced after its clipping was set up")
        hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in self._modules)
        return features.dim() == self._axes and not hooked and not torch.is_autocast_enabled("cpu")

    def terms(self, features: Tensor, targets: Tensor, loss: Loss, book: Book) -> tuple[dict[int, Term], Tensor]:
        """What the batch used of linear layers, by position, and its losses ``[n]``; what of others goes into ``book``."""
        with torch.no_grad():
            outputs, kept = self._forward(features)
            if isinstance(loss, ExampleLoss):
                losses, gradient = loss.with_gradient(outputs, targets)
            else:
                losses, gradient = loss_with_gradient(loss, outputs, targets)
            return self._backward(gradient, kept, book), losses

    def _forward(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        """The outputs, and what each link needs again: a layer its input."""
        kept: list[Any] = []
        for link, forward in self._links:
            if forward is None:
                kept.append(x)
                x = link.forward(x)  # type: ignore[assignment]
            else:
                x, held = forward(x)
                kept.append(held)
        return x, kept

    def _backward(self, gradient: Tensor, kept: list[Any], book: Book) -> dict[int, Term]:
        terms: dict[int, Term] = {}
        left = len(self._layers)
        for link, _ in reversed(self._links):
            seen = kept.pop()  # what is not needed again is given back as the backward pass goes
            if isinstance(link, _LAYERS):
                link.enter(seen, gradient, terms, book)
                left -= 1
                if not left:
                    break
            gradient = link.backward(gradient, seen)
        return terms


def _forwards(links: Sequence[Layer | Step]) -> Iterator[Callable[[Tensor], tuple[Tensor, Any]] | None]:
    """Each step's forward: that which overwrites, where there is one and its input is not needed again."""
    needed = True
    for link in links:
        if isinstance(link, Step):
            yield link.forward if needed or link.in_place is None else link.in_place
            needed = link.keeps_output or (needed and link is _FLATTEN)
        else:
            yield None
            needed = False


def chain_of(model: nn.Module, positions: Mapping[int, int]) -> Chain | None:
    """The model as a chain, if it is one whose parameters, among them those at ``positions``, are each used once."""
    found = list(_links(model, positions))
    links = [link for link in found if link is not None]
    used = [id(p) for link in links if isinstance(link, _LAYERS) for p in link.module.parameters()]
    if len(links) < len(found) or len(set(used)) < len(used) or not positions.keys() <= set(used):
        return None
    return Chain(model, links) if _fit(links) else None


def _fit(links: Sequence[Layer | Step]) -> bool:
    """Whether the first is a layer, and linear layers get vectors: images are made into them before."""
    images = bool(links) and isinstance(links[0], ConvLayer)
    for link in links:
        if isinstance(link, _LAYERS) and images != isinstance(link, ConvLayer):
            return False
        images = images and link is not _FLATTEN
    return bool(links) and isinstance(links[0], _LAYERS)


def _links(model: nn.Module, positions: Mapping[int, int]) -> Iterator[Layer | Step | None]:
    """In the order in which they are used; None where something else is."""
    if type(model) is nn.Sequential:
        for module in model:
            yield from _links(module, positions)
    elif type(model) is Interpreter:
        yield from _links_of_program(model, positions)
    elif type(model) is nn.Linear:
        yield LinearLayer(model, positions)
    elif type(model) is nn.Conv2d and model.padding_mode == "zeros" and not isinstance(model.padding, str):
        yield ConvLayer(model, positions)
    else:
        yield _OF_MODULES[type(model)](model) if type(model) in _OF_MODULES else None


def _links_of_program(model: Interpreter, positions: Mapping[int, int]) -> Iterator[Layer | Step | None]:
    program = model.program
    value = program.input
    for step in program.steps:
        if step.inputs != (value,):
            yield None
        elif type(step.operation) in (ops.Linear, ops.Conv2d):
            yield from _links(model.get_submodule(step.name), positions)
        else:
            known = _OF_OPERATIONS.get(type(step.operation))
            yield None if known is None else known(step.operation)
        value = step.name
    if program.output != value:
        yield None
