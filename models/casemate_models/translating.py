"""How torch's functions, methods and modules are said in operations of the allow-list, and the values they meet.

A translator has the parameter names of torch's own function. It only has to say the same thing: whether examples stay
apart is judged from the operation that it emits, here for the user's sake and by the builder for everyone's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, Protocol

import torch
import torch.nn.functional as F
from casemate_schemas.errors import BatchDependenceError, ModelError, UnsupportedOperationError
from casemate_schemas.model import Shape
from torch import fx, nn

from . import operations as ops

_BATCH_NORM: Final = "it normalises each example by the others; GroupNorm does not"
_DROPOUT: Final = "random operations are not supported yet"
_CONTROL_FLOW: Final = "control flow and comparisons cannot depend on data"
_IN_PLACE: Final = "it works in place; use the form that returns a new tensor"

_BATCH_NORMS: Final = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "batch_norm")
_DROPOUTS: Final = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "dropout")
_COMPARISONS: Final = ("bool", "gt", "ge", "lt", "le", "eq", "ne", "item", "any", "all", "where")
_IN_PLACE_OPERATORS: Final = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul)

REASONS: Final[Mapping[str, tuple[type[ModelError], str]]] = {
    **dict.fromkeys(_BATCH_NORMS, (BatchDependenceError, _BATCH_NORM)),
    **dict.fromkeys(_DROPOUTS, (UnsupportedOperationError, _DROPOUT)),
    **dict.fromkeys(_COMPARISONS, (UnsupportedOperationError, _CONTROL_FLOW)),
    **dict.fromkeys((f.__name__ for f in _IN_PLACE_OPERATORS), (UnsupportedOperationError, _IN_PLACE)),
    "setitem": (UnsupportedOperationError, _IN_PLACE),
    "iter": (BatchDependenceError, "a batch cannot be taken apart into its examples"),
    "len": (BatchDependenceError, "the batch size is not a number here"),
}
"""Why operations that people do reach for are refused, by name."""


class Recorder(Protocol):
    """Where translators put what they say."""

    def emit(self, cls: type[ops.Operation], *inputs: object, path: str | None = None, **options: Any) -> Value:
        """Records one operation on ``inputs`` and returns its value; ``path`` names a layer."""


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method that sends ``function`` to the tracer, where ``fx`` has none of its own."""
    return lambda self, *args: self.tracer.create_proxy("call_function", function, (self, *args), {})


class Value(fx.Proxy):
    """A symbolic batch: ``[n, *example_shape]``, computed by the node ``label``."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, label: str, example_shape: Shape) -> None:
        super().__init__(node, tracer)
        self.label = label
        self.example_shape = example_shape

    @property
    def shape(self) -> tuple[Any, ...]:
        return (BatchSize(self.node, self.tracer), *self.example_shape)

    @property
    def ndim(self) -> int:
        return 1 + len(self.example_shape)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    __len__ = _recorded(len)
    __setitem__ = _recorded(operator.setitem)
    __iadd__ = _recorded(operator.iadd)  # without these Python would turn x += y into x = x + y
    __isub__ = _recorded(operator.isub)
    __imul__ = _recorded(operator.imul)
    __itruediv__ = _recorded(operator.itruediv)
    __imatmul__ = _recorded(operator.imatmul)


class BatchSize(fx.Proxy):
    """The length of the batch axis. It can say where the batch axis goes in a reshape, and nothing else."""


def value_of(item: object) -> Value:
    """``item`` if it is a symbolic batch. Raises :class:`UnsupportedOperationError` for anything else."""
    if isinstance(item, Value):
        return item
    if isinstance(item, torch.Tensor):
        raise UnsupportedOperationError("constant tensors are not supported")
    if isinstance(item, fx.proxy.Attribute):
        raise UnsupportedOperationError(f"attribute '{item.attr}' of a tensor is not on the allow-list")
    raise UnsupportedOperationError(f"expected a tensor computed from the input, got {type(item).__name__}")


# Functions and methods. Each has the parameter names of torch's own.


def _elementwise(cls: type[ops.Operation]) -> Callable[..., Value]:
    def translate(t: Recorder, input: object) -> Value:
        return t.emit(cls, input)

    return translate


def _gelu(t: Recorder, input: object, approximate: str = "none") -> Value:
    return t.emit(ops.Gelu, input, tanh_approximation=approximate == "tanh")


def _elu(t: Recorder, input: object, alpha: float = 1.0) -> Value:
    return t.emit(ops.Elu, input, alpha=_number(alpha))


def _leaky_relu(t: Recorder, input: object, negative_slope: float = 0.01) -> Value:
    return t.emit(ops.LeakyRelu, input, negative_slope=_number(negative_slope))


def _softplus(t: Recorder, input: object, beta: float = 1.0, threshold: float = 20.0) -> Value:
    return t.emit(ops.Softplus, input, beta=_number(beta), threshold=_number(threshold))


def _add(t: Recorder, input: object, other: object) -> Value:
    if _is_number(other):
        return t.emit(ops.AddScalar, input, value=_number(other))
    if _is_number(input):
        return t.emit(ops.AddScalar, other, value=_number(input))
    return t.emit(ops.Add, input, other)


def _subtract(t: Recorder, input: object, other: object) -> Value:
    if _is_number(other):
        return t.emit(ops.AddScalar, input, value=-_number(other))
    if _is_number(input):
        return t.emit(ops.SubtractFromScalar, other, value=_number(input))
    return t.emit(ops.Subtract, input, other)


def _multiply(t: Recorder, input: object, other: object) -> Value:
    if _is_number(other):
        return t.emit(ops.MultiplyScalar, input, value=_number(other))
    if _is_number(input):
        return t.emit(ops.MultiplyScalar, other, value=_number(input))
    return t.emit(ops.Multiply, input, other)


def _divide(t: Recorder, input: object, other: object) -> Value:
    if not _is_number(other):
        raise UnsupportedOperationError("division is by a number only")
    return t.emit(ops.DivideByScalar, input, value=_number(other))


def _negate(t: Recorder, input: object) -> Value:
    return t.emit(ops.MultiplyScalar, input, value=-1.0)


def reshape(t: Recorder, input: object, *shape: Any) -> Value:
    example = value_of(input).example_shape
    first, *rest = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    if not isinstance(first, BatchSize) and first != -1:
        raise BatchDependenceError("the batch axis must stay first: write x.shape[0] or -1 there")
    if isinstance(first, BatchSize) and rest.count(-1) == 1:
        known = -math.prod(rest)
        rest[rest.index(-1)] = math.prod(example) // known if known > 0 else 0
    return t.emit(ops.Reshape, input, shape=_integers(rest))


def _flatten(t: Recorder, input: object, start_dim: int = 0, end_dim: int = -1) -> Value:
    shape = value_of(input).example_shape
    start = ops.per_example_axis(_axis(start_dim, 1 + len(shape)), shape)
    end = _axis(end_dim, 1 + len(shape))
    if end <= start:
        raise ModelError("expected start_dim to be at most end_dim")
    return t.emit(ops.Reshape, input, shape=(*shape[:start], math.prod(shape[start:end]), *shape[end:]))


def _squeeze(t: Recorder, input: object, dim: int | tuple[int, ...] | None = None) -> Value:
    shape = value_of(input).example_shape
    if dim is None:
        raise BatchDependenceError("it squeezes a batch of one; name the axis")
    axes = {ops.per_example_axis(_axis(axis, 1 + len(shape)), shape) for axis in _tuple(dim)}
    return t.emit(ops.Reshape, input, shape=tuple(n for i, n in enumerate(shape) if i not in axes or n != 1))


def _unsqueeze(t: Recorder, input: object, dim: int) -> Value:
    shape = value_of(input).example_shape
    at = ops.per_example_axis(_axis(dim, 2 + len(shape)), (*shape, 1))
    return t.emit(ops.Reshape, input, shape=(*shape[:at], 1, *shape[at:]))


def _reduction(cls: type[ops.Operation]) -> Callable[..., Value]:
    def translate(t: Recorder, input: object, dim: Any = None, keepdim: bool = False) -> Value:
        if dim is None or dim == ():
            raise BatchDependenceError("it reduces over the batch axis too; name the axes")
        rank = 1 + len(value_of(input).example_shape)
        return t.emit(cls, input, axes=tuple(_axis(axis, rank) for axis in _tuple(dim)), keep_axes=keepdim)

    return translate


def _along_axis(cls: type[ops.Operation]) -> Callable[..., Value]:
    def translate(t: Recorder, input: object, dim: int | None = None) -> Value:
        if dim is None:
            raise UnsupportedOperationError("name the axis")
        return t.emit(cls, input, axis=_axis(dim, 1 + len(value_of(input).example_shape)))

    return translate


def _concatenate(t: Recorder, tensors: Any, dim: int = 0) -> Value:
    if not isinstance(tensors, tuple | list) or not tensors:
        raise UnsupportedOperationError("expected a list of tensors")
    axis = _axis(dim, 1 + len(value_of(tensors[0]).example_shape))
    return t.emit(ops.Concatenate, *tensors, axis=axis)


def _max_pool2d(
    t: Recorder,
    input: object,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:
    _refuse_ceil_mode(ceil_mode)
    kernel = _pair(kernel_size)
    step = _pair(stride) if stride is not None and stride != [] else kernel
    return t.emit(
        ops.MaxPool2d, input, kernel_size=kernel, stride=step, padding=_pair(padding), dilation=_pair(dilation)
    )


def _avg_pool2d(
    t: Recorder,
    input: object,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Value:
    _refuse_ceil_mode(ceil_mode)
    kernel = _pair(kernel_size)
    step = _pair(stride) if stride is not None and stride != [] else kernel
    return t.emit(
        ops.AveragePool2d,
        input,
        kernel_size=kernel,
        stride=step,
        padding=_pair(padding),
        count_include_pad=count_include_pad,
    )


def _adaptive_avg_pool2d(t: Recorder, input: object, output_size: Any) -> Value:
    image = value_of(input).example_shape[-2:]
    wanted = output_size if isinstance(output_size, tuple | list) else (output_size, output_size)
    size = tuple(have if want is None else want for want, have in zip(wanted, image, strict=False))
    return t.emit(ops.AdaptiveAveragePool2d, input, output_size=_pair(size))


def _getitem(t: Recorder, input: object, index: Any) -> NoReturn:
    value_of(input)
    first = index[0] if isinstance(index, tuple) and index else index
    if first is ... or first == slice(None):
        raise UnsupportedOperationError("indexing features is not on the allow-list")
    raise BatchDependenceError("it picks examples of the batch")


def _refuse_ceil_mode(ceil_mode: bool) -> None:
    if ceil_mode:
        raise UnsupportedOperationError("ceil_mode is not supported")


FUNCTIONS: Final[Mapping[Any, Callable[..., Value]]] = {
    **dict.fromkeys((torch.relu, F.relu), _elementwise(ops.Relu)),
    **dict.fromkeys((torch.tanh, F.tanh), _elementwise(ops.Tanh)),
    **dict.fromkeys((torch.sigmoid, F.sigmoid), _elementwise(ops.Sigmoid)),
    **dict.fromkeys((operator.add, torch.add), _add),
    **dict.fromkeys((operator.sub, torch.sub, torch.subtract), _subtract),
    **dict.fromkeys((operator.mul, torch.mul, torch.multiply), _multiply),
    **dict.fromkeys((operator.truediv, torch.div, torch.divide, torch.true_divide), _divide),
    **dict.fromkeys((operator.neg, torch.neg, torch.negative), _negate),
    **dict.fromkeys((torch.softmax, F.softmax), _along_axis(ops.Softmax)),
    **dict.fromkeys((torch.log_softmax, F.log_softmax), _along_axis(ops.LogSoftmax)),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concatenate),
    F.silu: _elementwise(ops.Silu),
    F.gelu: _gelu,
    F.elu: _elu,
    F.leaky_relu: _leaky_relu,
    F.softplus: _softplus,
    torch.reshape: reshape,
    torch.flatten: _flatten,
    torch.squeeze: _squeeze,
    torch.unsqueeze: _unsqueeze,
    torch.mean: _reduction(ops.Mean),
    torch.sum: _reduction(ops.Sum),
    F.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    operator.getitem: _getitem,
}

METHODS: Final[Mapping[Any, Callable[..., Value]]] = {
    "relu": _elementwise(ops.Relu),
    "tanh": _elementwise(ops.Tanh),
    "sigmoid": _elementwise(ops.Sigmoid),
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "div": _divide,
    "neg": _negate,
    "reshape": reshape,
    "view": reshape,
    "flatten": _flatten,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "mean": _reduction(ops.Mean),
    "sum": _reduction(ops.Sum),
    "softmax": _along_axis(ops.Softmax),
    "log_softmax": _along_axis(ops.LogSoftmax),
}


# Modules. Those with parameters keep their path, the others become functions.


def _linear(t: Recorder, m: nn.Linear, path: str, input: object) -> Value:
    options = {"in_features": m.in_features, "out_features": m.out_features, "bias": _has(m, "bias")}
    return t.emit(ops.Linear, input, path=path, **options)


def _conv2d(t: Recorder, m: nn.Conv2d, path: str, input: object) -> Value:
    if m.padding_mode != "zeros":
        raise UnsupportedOperationError(f"padding_mode '{m.padding_mode}' is not supported")
    kernel, dilation = _pair(m.kernel_size), _pair(m.dilation)
    return t.emit(
        ops.Conv2d,
        input,
        path=path,
        in_channels=m.in_channels,
        out_channels=m.out_channels,
        kernel_size=kernel,
        stride=_pair(m.stride),
        padding=_conv_padding(m.padding, kernel, dilation),
        dilation=dilation,
        groups=m.groups,
        bias=_has(m, "bias"),
    )


def _conv_padding(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    if padding == "valid":
        return (0, 0)
    if padding != "same":
        return _pair(padding)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(n % 2 for n in total):
        raise UnsupportedOperationError("padding 'same' with an even kernel is not supported")
    return (total[0] // 2, total[1] // 2)


def _group_norm(t: Recorder, m: nn.GroupNorm, path: str, input: object) -> Value:
    _check_affine(m, m.affine)
    options = {"num_groups": m.num_groups, "num_channels": m.num_channels, "eps": m.eps, "affine": m.affine}
    return t.emit(ops.GroupNorm, input, path=path, **options)


def _layer_norm(t: Recorder, m: nn.LayerNorm, path: str, input: object) -> Value:
    _check_affine(m, m.elementwise_affine)
    options = {"normalized_shape": m.normalized_shape, "eps": m.eps, "affine": m.elementwise_affine}
    return t.emit(ops.LayerNorm, input, path=path, **options)


def _has(m: nn.Module, parameter: str) -> bool:
    return m._parameters.get(parameter) is not None


def _check_affine(m: nn.Module, affine: bool) -> None:
    if affine and not (_has(m, "weight") and _has(m, "bias")):
        raise UnsupportedOperationError("it needs both weight and bias, or neither")


MODULES: Final[Mapping[type[nn.Module], Callable[[Recorder, Any, str, object], Value]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Identity: lambda t, m, path, x: value_of(x),
    nn.ReLU: lambda t, m, path, x: _activation(t, m, ops.Relu, x),
    nn.Tanh: lambda t, m, path, x: t.emit(ops.Tanh, x),
    nn.Sigmoid: lambda t, m, path, x: t.emit(ops.Sigmoid, x),
    nn.SiLU: lambda t, m, path, x: _activation(t, m, ops.Silu, x),
    nn.GELU: lambda t, m, path, x: _gelu(t, x, m.approximate),
    nn.ELU: lambda t, m, path, x: _activation(t, m, ops.Elu, x, alpha=_number(m.alpha)),
    nn.LeakyReLU: lambda t, m, path, x: _activation(t, m, ops.LeakyRelu, x, negative_slope=_number(m.negative_slope)),
    nn.Softplus: lambda t, m, path, x: _softplus(t, x, m.beta, m.threshold),
    nn.Softmax: lambda t, m, path, x: _along_axis(ops.Softmax)(t, x, m.dim),
    nn.LogSoftmax: lambda t, m, path, x: _along_axis(ops.LogSoftmax)(t, x, m.dim),
    nn.Flatten: lambda t, m, path, x: _flatten(t, x, m.start_dim, m.end_dim),
    nn.MaxPool2d: lambda t, m, path, x: _max_pool_module(t, m, x),
    nn.AvgPool2d: lambda t, m, path, x: _avg_pool_module(t, m, x),
    nn.AdaptiveAvgPool2d: lambda t, m, path, x: _adaptive_avg_pool2d(t, x, m.output_size),
}


def _activation(t: Recorder, m: Any, cls: type[ops.Operation], x: object, **options: Any) -> Value:
    if m.inplace:
        raise UnsupportedOperationError("it works in place; use inplace=False")
    return t.emit(cls, x, **options)


def _max_pool_module(t: Recorder, m: nn.MaxPool2d, x: object) -> Value:
    if m.return_indices:
        raise UnsupportedOperationError("return_indices is not supported")
    return _max_pool2d(t, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)


def _avg_pool_module(t: Recorder, m: nn.AvgPool2d, x: object) -> Value:
    if m.divisor_override is not None:
        raise UnsupportedOperationError("divisor_override is not supported")
    return _avg_pool2d(t, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad)


# Arguments.


def _is_number(item: object) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool)


def _number(item: Any) -> float:
    if not _is_number(item):
        raise UnsupportedOperationError(f"expected a number, got {type(item).__name__}")
    return float(item)


def _tuple(item: Any) -> tuple[Any, ...]:
    return tuple(item) if isinstance(item, tuple | list) else (item,)


def _integers(items: Any) -> tuple[int, ...]:
    if any(type(item) is not int for item in items):
        raise UnsupportedOperationError("expected plain integers")
    return tuple(items)


def _pair(item: Any) -> tuple[int, int]:
    values = _integers(_tuple(item))
    if len(values) not in (1, 2):
        raise UnsupportedOperationError(f"expected one integer or two, got {len(values)}")
    return (values[0], values[-1])


def _axis(axis: Any, rank: int) -> int:
    """The absolute axis for a tensor of ``rank`` axes, the batch among them."""
    (value,) = _integers((axis,))
    if not -rank <= value < rank:
        raise ModelError(f"expected an axis from {-rank} to {rank - 1}, got {value}")
    return value % rank
