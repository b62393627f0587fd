"""The allow-list: what each operation is, within which bounds, and the shape rule that keeps examples apart.

Every value of a graph is a tensor whose axis 0 is the batch; a shape here is one example's, the axes after it. The
invariant, for a batch of any length: *row i of a value is a function of row i of the input and of the parameters
alone*. An operation is on the list only if it keeps that invariant wherever :meth:`Operation.infer` returns; ``infer``
raises for every other use. Axes are absolute and never negative, so that axis 0 is always the batch.

No torch is needed here: this file is arithmetic on shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Final

from casemate_schemas.codec import WireModel
from casemate_schemas.errors import BatchDependenceError, MalformedError, ModelError, UnsupportedOperationError
from casemate_schemas.model import MAX_DIMENSION, MAX_RANK, Node, Shape
from pydantic import Field, ValidationError

Count = Annotated[int, Field(ge=1, le=MAX_DIMENSION)]
Pair = tuple[Count, Count]
Padding = tuple[Annotated[int, Field(ge=0, le=MAX_DIMENSION)], Annotated[int, Field(ge=0, le=MAX_DIMENSION)]]
Axis = Annotated[int, Field(ge=0, le=MAX_RANK)]
Axes = Annotated[tuple[Axis, ...], Field(min_length=1, max_length=MAX_RANK)]
Scalar = Annotated[float, Field(ge=-1e6, le=1e6)]
Epsilon = Annotated[float, Field(ge=1e-12, le=1.0)]


class Operation(WireModel):
    """One use of an operation: its fields are the options. Immutable; building and judging it touches no data."""

    NAME: ClassVar[str] = ""
    KIND_OF_NODE: ClassVar[str] = "function"

    def parameters(self) -> dict[str, Shape]:
        """The layer's own parameters, by the names torch gives them."""
        return {}

    def infer(self, *inputs: Shape) -> Shape:
        """The result's shape for inputs of these shapes (one example's, without the batch axis).

        Raises :class:`BatchDependenceError` if examples would meet, :class:`ModelError` if the shapes do not fit.
        """
        raise NotImplementedError


class Elementwise(Operation):
    """Each element by itself."""

    def infer(self, *inputs: Shape) -> Shape:
        return _one(inputs)


class Relu(Elementwise):
    NAME = "relu"


class Tanh(Elementwise):
    NAME = "tanh"


class Sigmoid(Elementwise):
    NAME = "sigmoid"


class Silu(Elementwise):
    NAME = "silu"


class Gelu(Elementwise):
    """``tanh_approximation`` is torch's ``approximate="tanh"``."""

    NAME = "gelu"
    tanh_approximation: bool


class Elu(Elementwise):
    NAME = "elu"
    alpha: Scalar


class LeakyRelu(Elementwise):
    NAME = "leaky_relu"
    negative_slope: Scalar


class Softplus(Elementwise):
    NAME = "softplus"
    beta: Annotated[float, Field(ge=1e-3, le=1e3)]
    threshold: Scalar


class AddScalar(Elementwise):
    """``x + value``."""

    NAME = "add_scalar"
    value: Scalar


class SubtractFromScalar(Elementwise):
    """``value - x``."""

    NAME = "subtract_from_scalar"
    value: Scalar


class MultiplyScalar(Elementwise):
    """``x * value``."""

    NAME = "multiply_scalar"
    value: Scalar


class DivideByScalar(Elementwise):
    """``x / value``."""

    NAME = "divide_by_scalar"
    value: Scalar

    def infer(self, *inputs: Shape) -> Shape:
        if abs(self.value) < 1e-6:
            raise ModelError("expected a divisor of at least 1e-6")
        return super().infer(*inputs)


class Binary(Operation):
    """Two values of one shape, element by element. No broadcasting: an axis of one could not tell batch from feature."""

    def infer(self, *inputs: Shape) -> Shape:
        if len(inputs) != 2 or inputs[0] != inputs[1]:
            raise ModelError(f"expected two values of one shape, got {_shown(*inputs)}")
        return inputs[0]


class Add(Binary):
    NAME = "add"


class Subtract(Binary):
    NAME = "subtract"


class Multiply(Binary):
    NAME = "multiply"


class Reshape(Operation):
    """Another shape for one example's elements; the batch axis stays as it is."""

    NAME = "reshape"
    shape: Shape

    def infer(self, *inputs: Shape) -> Shape:
        shape = _one(inputs)
        if math.prod(shape) != math.prod(self.shape):
            raise BatchDependenceError(
                f"an example has {math.prod(shape)} elements and cannot take the shape {_shown(self.shape)} "
                "without elements of other examples"
            )
        return self.shape


class Reduction(Operation):
    """One number in place of all along ``axes``."""

    axes: Axes
    keep_axes: bool

    def infer(self, *inputs: Shape) -> Shape:
        shape = _one(inputs)
        axes = {per_example_axis(axis, shape) for axis in self.axes}
        if len(axes) != len(self.axes):
            raise ModelError("an axis is named twice")
        kept = ((1 if i in axes else size) for i, size in enumerate(shape) if self.keep_axes or i not in axes)
        return tuple(kept)


class Mean(Reduction):
    NAME = "mean"


class Sum(Reduction):
    NAME = "sum"


class AlongAxis(Operation):
    """The same shape, normalised along one axis."""

    axis: Axis

    def infer(self, *inputs: Shape) -> Shape:
        shape = _one(inputs)
        per_example_axis(self.axis, shape)
        return shape


class Softmax(AlongAxis):
    NAME = "softmax"


class LogSoftmax(AlongAxis):
    NAME = "log_softmax"


class Concatenate(Operation):
    """Values joined along ``axis``, equal elsewhere."""

    NAME = "concatenate"
    axis: Axis

    def infer(self, *inputs: Shape) -> Shape:
        if not inputs:
            raise ModelError("expected at least one value")
        at = per_example_axis(self.axis, inputs[0])
        if any(len(s) != len(inputs[0]) or _without(s, at) != _without(inputs[0], at) for s in inputs):
            raise ModelError(f"expected shapes equal outside axis {self.axis}, got {_shown(*inputs)}")
        return (*inputs[0][:at], sum(s[at] for s in inputs), *inputs[0][at + 1 :])


class MaxPool2d(Operation):
    NAME = "max_pool2d"
    kernel_size: Pair
    stride: Pair
    padding: Padding
    dilation: Pair

    def infer(self, *inputs: Shape) -> Shape:
        channels, height, width = _image(inputs)
        _check_pool_padding(self.kernel_size, self.padding)
        return (channels, *_slide((height, width), self.kernel_size, self.stride, self.padding, self.dilation))


class AveragePool2d(Operation):
    NAME = "avg_pool2d"
    kernel_size: Pair
    stride: Pair
    padding: Padding
    count_include_pad: bool

    def infer(self, *inputs: Shape) -> Shape:
        channels, height, width = _image(inputs)
        _check_pool_padding(self.kernel_size, self.padding)
        return (channels, *_slide((height, width), self.kernel_size, self.stride, self.padding, (1, 1)))


class AdaptiveAveragePool2d(Operation):
    NAME = "adaptive_avg_pool2d"
    output_size: Pair

    def infer(self, *inputs: Shape) -> Shape:
        return (_image(inputs)[0], *self.output_size)


class Layer(Operation):
    """An operation with parameters of its own."""

    KIND_OF_NODE = "module"


class Linear(Layer):
    """On the last axis, which is never the batch."""

    NAME = "linear"
    in_features: Count
    out_features: Count
    bias: bool

    def parameters(self) -> dict[str, Shape]:
        return _weight_and_bias((self.out_features, self.in_features), (self.out_features,), self.bias)

    def infer(self, *inputs: Shape) -> Shape:
        shape = _one(inputs)
        if not shape or shape[-1] != self.in_features:
            raise ModelError(f"expected {self.in_features} features on the last axis, got {_shown(shape)}")
        return (*shape[:-1], self.out_features)


class Conv2d(Layer):
    """On images with their batch axis: torch would take three axes for one image, channels first."""

    NAME = "conv2d"
    in_channels: Count
    out_channels: Count
    kernel_size: Pair
    stride: Pair
    padding: Padding
    dilation: Pair
    groups: Count
    bias: bool

    def parameters(self) -> dict[str, Shape]:
        weight = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return _weight_and_bias(weight, (self.out_channels,), self.bias)

    def infer(self, *inputs: Shape) -> Shape:
        channels, height, width = _image(inputs)
        if channels != self.in_channels:
            raise ModelError(f"expected {self.in_channels} channels, got {_shown(*inputs)}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ModelError(f"expected channels divisible by {self.groups} groups")
        return (self.out_channels, *_slide((height, width), self.kernel_size, self.stride, self.padding, self.dilation))


class GroupNorm(Layer):
    """Normalises within one example, over groups of channels."""

    NAME = "group_norm"
    num_groups: Count
    num_channels: Count
    eps: Epsilon
    affine: bool

    def parameters(self) -> dict[str, Shape]:
        return _weight_and_bias((self.num_channels,), (self.num_channels,), True) if self.affine else {}

    def infer(self, *inputs: Shape) -> Shape:
        shape = _one(inputs)
        if not shape or shape[0] != self.num_channels or self.num_channels % self.num_groups:
            raise ModelError(
                f"expected {self.num_channels} channels, divisible by {self.num_groups} groups, got {_shown(shape)}"
            )
        if math.prod(shape) == self.num_groups:  # torch then refuses a batch of one, and so would tell its length
            raise BatchDependenceError("expected more than one element a group")
        return shape


class LayerNorm(Layer):
    """Normalises one example's last axes."""

    NAME = "layer_norm"
    normalized_shape: Annotated[tuple[Count, ...], Field(min_length=1, max_length=MAX_RANK)]
    eps: Epsilon
    affine: bool

    def parameters(self) -> dict[str, Shape]:
        return _weight_and_bias(self.normalized_shape, self.normalized_shape, True) if self.affine else {}

    def infer(self, *inputs: Shape) -> Shape:
        shape = _one(inputs)
        if len(self.normalized_shape) > len(shape):
            raise BatchDependenceError(f"normalising {_shown(self.normalized_shape)} reaches over the batch axis")
        if shape[-len(self.normalized_shape) :] != self.normalized_shape:
            raise ModelError(f"expected the last axes {_shown(self.normalized_shape)}, got {_shown(shape)}")
        return shape


_CLASSES: Final[tuple[type[Operation], ...]] = (
    Relu,
    Tanh,
    Sigmoid,
    Silu,
    Gelu,
    Elu,
    LeakyRelu,
    Softplus,
    AddScalar,
    SubtractFromScalar,
    MultiplyScalar,
    DivideByScalar,
    Add,
    Subtract,
    Multiply,
    Reshape,
    Mean,
    Sum,
    Softmax,
    LogSoftmax,
    Concatenate,
    MaxPool2d,
    AveragePool2d,
    AdaptiveAveragePool2d,
    Linear,
    Conv2d,
    GroupNorm,
    LayerNorm,
)

OPERATIONS: Final[Mapping[str, type[Operation]]] = {cls.NAME: cls for cls in _CLASSES}
"""The whole allow-list, by name."""


def operation_of(node: Node) -> Operation:
    """The operation that ``node`` names, its options validated.

    Raises :class:`UnsupportedOperationError` for a name that is not on the list and :class:`MalformedError` for options
    that are not exactly the operation's own, within bounds.
    """
    cls = OPERATIONS.get(node.operation)
    if cls is None:
        raise UnsupportedOperationError(f"operation '{node.operation}' is not on the allow-list")
    if node.kind != cls.KIND_OF_NODE:
        raise MalformedError(f"operation '{node.operation}' is a {cls.KIND_OF_NODE}, not a {node.kind}")
    try:
        return cls.model_validate(node.options)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise MalformedError(f"operation '{node.operation}', option '{field}': {first['msg']}") from error


def per_example_axis(axis: int, shape: Shape) -> int:
    """Where the absolute ``axis`` lies in one example's ``shape``. Raises :class:`BatchDependenceError` for axis 0."""
    if axis == 0:
        raise BatchDependenceError("axis 0 is the batch: examples would meet")
    if not 0 < axis <= len(shape):
        raise ModelError(f"expected an axis from 1 to {len(shape)}, got {axis}")
    return axis - 1


def _one(inputs: tuple[Shape, ...]) -> Shape:
    if len(inputs) != 1:
        raise ModelError(f"expected one value, got {len(inputs)}")
    return inputs[0]


def _image(inputs: tuple[Shape, ...]) -> Shape:
    shape = _one(inputs)
    if len(shape) != 3:
        raise ModelError(f"expected images (channels, height, width), got {_shown(shape)}")
    return shape


def _slide(image: Shape, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair) -> Shape:
    """The size of a sliding window's result (torch.nn.Conv2d, section "Shape")."""
    window = zip(image, kernel, stride, padding, dilation, strict=True)
    sizes = tuple((size + 2 * pad - dil * (k - 1) - 1) // step + 1 for size, k, step, pad, dil in window)
    if min(sizes) < 1:
        raise ModelError(f"a window of {kernel[0]}x{kernel[1]} does not fit into {image[0]}x{image[1]}")
    return sizes


def _check_pool_padding(kernel: Pair, padding: Padding) -> None:
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        raise ModelError("expected padding of at most half the kernel")


def _weight_and_bias(weight: Shape, bias: Shape, has_bias: bool) -> dict[str, Shape]:
    return {"weight": weight, "bias": bias} if has_bias else {"weight": weight}


def _without(shape: Shape, at: int) -> Shape:
    return (*shape[:at], *shape[at + 1 :])


def _shown(*shapes: Shape) -> str:
    return ", ".join("x".join(map(str, ("n", *shape))) for shape in shapes)
