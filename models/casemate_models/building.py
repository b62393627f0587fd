"""From a :class:`ModelSpec` and weights to a ``torch.nn.Module`` that interprets it.

No source is generated and none is run: ``torch.fx.GraphModule`` compiles Python text, so it is not used. The layers are
ordinary ``torch.nn`` modules at the user's own paths, so that ``state_dict`` has the user's names and hooks on layers
(per-sample gradients) work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from casemate_schemas.errors import MalformedError, ModelError
from casemate_schemas.model import MAX_ELEMENTS, MAX_NODES, ModelSpec, Shape
from torch import Tensor, nn

from . import operations as ops
from .batch_axis import Program, Step, check
from .tensors import MAX_HEADER_BYTES, read_tensors, write_tensors

_MAX_WEIGHT_BYTES: Final = 4 * MAX_ELEMENTS + MAX_HEADER_BYTES + 8

_LAYERS: Final[Mapping[type[ops.Operation], Callable[[Any], nn.Module]]] = {
    ops.Linear: lambda o: nn.Linear(o.in_features, o.out_features, o.bias),
    ops.Conv2d: lambda o: nn.Conv2d(
        o.in_channels, o.out_channels, o.kernel_size, o.stride, o.padding, o.dilation, o.groups, o.bias
    ),
    ops.GroupNorm: lambda o: nn.GroupNorm(o.num_groups, o.num_channels, o.eps, o.affine),
    ops.LayerNorm: lambda o: nn.LayerNorm(o.normalized_shape, o.eps, o.affine),
}

_FUNCTIONS: Final[Mapping[type[ops.Operation], Callable[..., Tensor]]] = {
    ops.Relu: lambda o, x: F.relu(x),
    ops.Tanh: lambda o, x: torch.tanh(x),
    ops.Sigmoid: lambda o, x: torch.sigmoid(x),
    ops.Silu: lambda o, x: F.silu(x),
    ops.Gelu: lambda o, x: F.gelu(x, approximate="tanh" if o.tanh_approximation else "none"),
    ops.Elu: lambda o, x: F.elu(x, o.alpha),
    ops.LeakyRelu: lambda o, x: F.leaky_relu(x, o.negative_slope),
    ops.Softplus: lambda o, x: F.softplus(x, o.beta, o.threshold),
    ops.AddScalar: lambda o, x: x + o.value,
    ops.SubtractFromScalar: lambda o, x: o.value - x,
    ops.MultiplyScalar: lambda o, x: x * o.value,
    ops.DivideByScalar: lambda o, x: x / o.value,
    ops.Add: lambda o, x, y: x + y,
    ops.Subtract: lambda o, x, y: x - y,
    ops.Multiply: lambda o, x, y: x * y,
    ops.Reshape: lambda o, x: x.reshape(x.shape[0], *o.shape),
    ops.Mean: lambda o, x: x.mean(o.axes, o.keep_axes),
    ops.Sum: lambda o, x: x.sum(o.axes, o.keep_axes),
    ops.Softmax: lambda o, x: torch.softmax(x, o.axis),
    ops.LogSoftmax: lambda o, x: torch.log_softmax(x, o.axis),
    ops.Concatenate: lambda o, *xs: torch.cat(xs, o.axis),
    ops.MaxPool2d: lambda o, x: F.max_pool2d(x, o.kernel_size, o.stride, o.padding, o.dilation),
    ops.AveragePool2d: lambda o, x: F.avg_pool2d(x, o.kernel_size, o.stride, o.padding, False, o.count_include_pad),
    ops.AdaptiveAveragePool2d: lambda o, x: F.adaptive_avg_pool2d(x, o.output_size),
}


class Interpreter(nn.Module):
    """Runs a checked :class:`Program`: ``[n, *input_shape]`` float32 in, ``[n, *output_shape]`` out, for any n."""

    def __init__(self, program: Program) -> None:
        """Layers are made on the ``meta`` device: no memory and no random numbers until weights are assigned."""
        super().__init__()
        self.__program = program
        with torch.device("meta"):
            for step in program.steps:
                if type(step.operation) in _LAYERS:
                    _install(self, step.name, _LAYERS[type(step.operation)](step.operation))

    @property
    def program(self) -> Program:
        """What is run."""
        return self.__program

    @property
    def input_shape(self) -> Shape:
        """One example's shape."""
        return self.__program.input_shape

    @property
    def output_shape(self) -> Shape:
        """One example's shape of the output."""
        return self.__program.output_shape

    def forward(self, x: Tensor) -> Tensor:
        """The output for the batch ``x``; row i depends on row i alone. :class:`ModelError` for another shape."""
        if x.dim() == 0 or x.shape[1:] != self.__program.input_shape:
            raise ModelError(f"expected a batch of {self.__program.input_shape}, got {tuple(x.shape)}")
        values = {self.__program.input: x}
        for step in self.__program.steps:
            values[step.name] = self.__run(step, [values[name] for name in step.inputs])
        return values[self.__program.output]

    def __run(self, step: Step, inputs: list[Tensor]) -> Tensor:
        if type(step.operation) in _LAYERS:
            output: Tensor = self.get_submodule(step.name)(*inputs)
            return output
        return _FUNCTIONS[type(step.operation)](step.operation, *inputs)


def build(spec: ModelSpec, weights: bytes) -> Interpreter:
    """The model that ``spec`` describes, with these weights, proven batch independent here and now.

    1. Re-validate the spec's fields, however it was made, and run :func:`check` on it.
    2. Read the weights; names, shapes and dtypes are exactly the spec's, and every value is finite.
    3. Assign them to the layers, as float32 parameters of their own memory that require gradients.

    Raises :class:`ModelError` or :class:`MalformedError` (and their subclasses).
    """
    program = _checked(spec)  # 1
    tensors = read_weights(spec, weights)  # 2
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"parameter '{name}' is not finite")
    module = Interpreter(program)
    module.load_state_dict(tensors, strict=True, assign=True)  # 3
    return module


def read_weights(spec: ModelSpec, weights: bytes) -> dict[str, Tensor]:
    """The weights by the names of the user's ``state_dict``; exactly the spec's names, shapes and dtypes.

    Values may be anything that float32 holds. Raises :class:`ModelError` or :class:`MalformedError`.
    """
    arrays = read_tensors(weights, max_bytes=_MAX_WEIGHT_BYTES, max_tensors=2 * MAX_NODES)
    table = {parameter.name: parameter for parameter in spec.parameters}
    if arrays.keys() != table.keys():
        raise ModelError(f"the weights do not have the spec's names: '{min(arrays.keys() ^ table.keys())}' differs")
    for name, array in arrays.items():
        if array.shape != table[name].shape or array.dtype != np.dtype(table[name].dtype):
            raise ModelError(f"expected '{name}' as float32 {table[name].shape}, got {array.dtype} {array.shape}")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def weights_of(module: nn.Module) -> bytes:
    """The module's ``state_dict`` as safetensors; the same bytes for the same values. Float32 only."""
    state = module.state_dict()
    if wrong := [name for name, tensor in state.items() if tensor.dtype != torch.float32]:
        raise ModelError(f"parameter '{wrong[0]}' is not float32: call .float() on the module")
    return write_tensors({name: tensor.detach().cpu().numpy() for name, tensor in state.items()})


def _checked(spec: ModelSpec) -> Program:
    try:
        return check(ModelSpec.model_validate(spec.model_dump()))
    except ValueError as error:
        raise MalformedError("not a valid ModelSpec") from error


def _install(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Puts ``layer`` at ``path``, with plain modules as containers, over nothing that torch or we named."""
    *containers, last = path.split(".")
    parent = root
    for name in containers:
        if name not in parent._modules:
            _add(parent, name, nn.Module())
        parent = parent.get_submodule(name)
    _add(parent, last, layer)


def _add(parent: nn.Module, name: str, child: nn.Module) -> None:
    if hasattr(parent, name):
        raise ModelError(f"a layer cannot be named '{name}'")
    parent.add_module(name, child)
