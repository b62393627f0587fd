"""Chains of linear layers and activations, forward and backward by hand: for small networks dispatch is most of a step.

The same functions on the same numbers in the same order as :mod:`.watching` and autograd would call, so what comes out is
the same, bit for bit; only nothing is intercepted, and no graph is built, unless the loss needs one. Whatever is not such a
chain, or has hooks, goes the other way.
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

from .uses import Instantiated, LinearUse, RankOne, Term

Loss = Callable[[Tensor, Tensor], Tensor]
aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """``forward`` of its input; ``backward`` of a gradient and of what is kept: the output, or the input.

    Both may overwrite their first argument.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    keeps_output: bool


_relu_backward = aten.threshold_backward.grad_input
_RELU: Final = Activation(torch.relu_, lambda g, kept: _relu_backward(g, kept, 0, grad_input=g), True)
_TANH: Final = Activation(torch.tanh_, aten.tanh_backward, True)
_SIGMOID: Final = Activation(torch.sigmoid_, aten.sigmoid_backward, True)
_SILU: Final = Activation(F.silu, aten.silu_backward, False)


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda g, kept: aten.gelu_backward(g, kept, approximate=approximate),
        False,
    )


_OF_MODULES: Final[Mapping[type[nn.Module], Callable[[Any], Activation]]] = {
    nn.ReLU: lambda _: _RELU,
    nn.Tanh: lambda _: _TANH,
    nn.Sigmoid: lambda _: _SIGMOID,
    nn.SiLU: lambda _: _SILU,
    nn.GELU: lambda module: _gelu(module.approximate),
}
_OF_OPERATIONS: Final[Mapping[type[ops.Operation], Callable[[Any], Activation]]] = {
    ops.Relu: lambda _: _RELU,
    ops.Tanh: lambda _: _TANH,
    ops.Sigmoid: lambda _: _SIGMOID,
    ops.Silu: lambda _: _SILU,
    ops.Gelu: lambda operation: _gelu("tanh" if operation.tanh_approximation else "none"),
}


class Dense:
    """A chain, for a batch ``[n, features]``."""

    def __init__(self, model: nn.Module, links: Sequence[nn.Linear | Activation], positions: Mapping[int, int]) -> None:
        """``links`` in their order; ``positions`` are those of the trainable parameters, by their ``id``."""
        self._modules = list(model.modules())
        self._links = links
        self._layers = [link for link in links if isinstance(link, nn.Linear)]
        self._parameters = [(layer.weight, layer.bias) for layer in self._layers]
        self._positions = [[positions.get(id(p)) for p in pair] for pair in self._parameters]

    @property
    def weights(self) -> list[int]:
        """The positions of the trainable weights."""
        return [weight for weight, _ in self._positions if weight is not None]

    def takes(self, features: Tensor) -> bool:
        """Whether this does for such a batch what the model would; :class:`ModelError` if parameters were replaced."""
        for layer, (weight, bias) in zip(self._layers, self._parameters, strict=True):
            own = layer._parameters
            if own["weight"] is not weight or own["bias"] is not bias:
                raise ModelError("the model's parameters were replaced after its clipping was set up")
        hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in self._modules)
        return features.dim() == 2 and not hooked and not torch.is_autocast_enabled("cpu")

    def terms(self, features: Tensor, targets: Tensor, loss: Loss) -> tuple[dict[int, Term], Tensor]:
        """What the batch used, by position, and its losses ``[n]``."""
        with torch.no_grad():
            outputs, kept = self._forward(features)
            if isinstance(loss, ExampleLoss):
                losses, gradient = loss.with_gradient(outputs, targets)
            else:
                losses, gradient = loss_with_gradient(loss, outputs, targets)
            return self._backward(gradient, kept), losses

    def _forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The outputs, and what each link needs again: its input, or an activation's output."""
        kept, layers = [], iter(self._parameters)
        for link in self._links:
            if isinstance(link, Activation):
                output = link.forward(x)
                kept.append(output if link.keeps_output else x)
            else:
                kept.append(x)
                output = F.linear(x, *next(layers))
            x = output
        return x, kept

    def _backward(self, gradient: Tensor, kept: list[Tensor]) -> dict[int, Term]:
        terms: dict[int, Term] = {}
        layers = zip(reversed(self._parameters), reversed(self._positions), strict=True)
        left = len(self._layers)
        for link, seen in zip(reversed(self._links), reversed(kept), strict=True):
            if isinstance(link, Activation):
                gradient = link.backward(gradient, seen)
                continue
            (weight, _), positions = next(layers)
            terms.update(_terms(LinearUse(seen, gradient), *positions))
            left -= 1
            if not left:
                break
            gradient = torch.mm(gradient, weight)
        return dict(sorted(terms.items()))


def dense_of(model: nn.Module, positions: Mapping[int, int]) -> Dense | None:
    """The model as a chain, if it is one whose parameters, among them those at ``positions``, are each used once."""
    links = list(_links(model))
    layers = [link for link in links if isinstance(link, nn.Linear)]
    used = [id(p) for layer in layers for p in layer.parameters()]
    if None in links or not layers or len(set(used)) < len(used) or not positions.keys() <= set(used):
        return None
    if not isinstance(links[0], nn.Linear):  # an activation would change the records in place
        return None
    return Dense(model, [link for link in links if link is not None], positions)


def _links(model: nn.Module) -> Iterator[nn.Linear | Activation | None]:
    """In the order in which they are used; None where something else is."""
    if type(model) is nn.Sequential:
        for module in model:
            yield from _links(module)
    elif type(model) is Interpreter:
        yield from _links_of_program(model)
    elif type(model) is nn.Linear:
        yield model
    else:
        yield _OF_MODULES[type(model)](model) if type(model) in _OF_MODULES else None


def _links_of_program(model: Interpreter) -> Iterator[nn.Linear | Activation | None]:
    program = model.program
    value = program.input
    for step in program.steps:
        if step.inputs != (value,):
            yield None
        elif type(step.operation) is ops.Linear:
            yield from _links(model.get_submodule(step.name))
        else:
            known = _OF_OPERATIONS.get(type(step.operation))
            yield None if known is None else known(step.operation)
        value = step.name
    if program.output != value:
        yield None


def _terms(use: LinearUse, weight: int | None, bias: int | None) -> dict[int, Term]:
    """Of one layer, by position; the shift goes along with the weight where it comes right after it."""
    if weight is not None and bias == weight + 1:
        return {weight: RankOne(use, shift=True, owned=True)}
    found: dict[int, Term] = {} if weight is None else {weight: RankOne(use)}
    return found if bias is None else found | {bias: Instantiated(use.gradient)}
