"""From the user's own ``torch.nn.Module`` to a :class:`ModelSpec`, with ``torch.fx``'s tracer and none of its code.

The user's ``forward`` runs once with a symbolic value in place of a batch. Each operation is translated to the
allow-list at once, its shape inferred by the very rules that the builder proves with, and refused by name with the line
of the user's code where it stands. ``torch.fx`` is used for its patching only: its graph is thrown away, and
``GraphModule``, which compiles generated Python, is never made.
"""

from __future__ import annotations

import builtins
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final, cast

import torch
from casemate_schemas.errors import BatchDependenceError, CasemateError, ModelError, UnsupportedOperationError
from casemate_schemas.model import MAX_NODES, ModelSpec, Node
from pydantic import ValidationError
from torch import fx, nn

from . import operations as ops
from .batch_axis import check, parameter_table, result_shape
from .building import Interpreter, read_weights, weights_of
from .translating import FUNCTIONS, METHODS, MODULES, REASONS, BatchSize, Value, reshape, value_of

_NOT_THE_USERS: Final = tuple(os.path.dirname(path) + os.sep for path in (torch.__file__, __file__))
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def trace(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[ModelSpec, bytes]:
    """The spec and the weights (safetensors) of ``module``, for examples of ``input_shape`` (without the batch axis).

    The module is left as it was. Its ``state_dict`` has the spec's parameter names, so that trained weights load back.

    1. No module has hooks or a patched ``forward``: the trace would miss them.
    2. Run ``forward`` on a symbolic batch; refuse what is off the allow-list, by name and line.
    3. Prove batch independence of the whole, as the builder will, and that the layers' names can be used.
    4. Parameters are all used, each for itself (not tied), trainable, finite and float32; there is nothing else to save,
       and the weights are what the spec says.

    Raises :class:`UnsupportedOperationError`, :class:`BatchDependenceError`, or :class:`ModelError` for the rest.
    """
    _check_unpatched(module)  # 1
    tracer = _Tracer(input_shape)
    try:
        tracer.trace(module)  # 2
    except CasemateError:
        raise
    except Exception as error:
        raise ModelError(f"the module cannot be traced{_where_raised(error)}: {error}") from error
    spec = tracer.spec()
    Interpreter(check(spec))  # 3
    _check_parameters(module, spec)  # 4
    weights = weights_of(module)
    read_weights(spec, weights)
    return spec, weights


class _Tracer(fx.Tracer):
    """Records allow-listed operations as :class:`Node`, with their shapes, and refuses the rest."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self._input_shape = input_shape
        self._nodes: list[Node] = []
        self._layers: dict[str, ops.Operation] = {}

    def spec(self) -> ModelSpec:
        """What was recorded."""
        try:
            return ModelSpec(
                input_shape=self._input_shape, nodes=tuple(self._nodes), parameters=parameter_table(self._layers)
            )
        except ValidationError as error:
            raise ModelError(f"expected 1 or more parameters, and bounded names and shapes: {_first(error)}") from error

    def emit(self, cls: type[ops.Operation], *inputs: object, path: str | None = None, **options: Any) -> Value:
        """Records one node and returns its value."""
        values = [value_of(item) for item in inputs]
        label = path if path is not None else f"{cls.NAME}#{len(self._nodes)}"
        node = self._record(label, cls.KIND_OF_NODE, cls.NAME, tuple(value.label for value in values), options)
        operation = ops.operation_of(node)
        if path is not None:
            self._layers[path] = operation
        shape = result_shape(operation, tuple(value.example_shape for value in values))
        return Value(values[0].node, self, label, shape)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> fx.Proxy:
        """``fx`` comes here for each function or method that meets a symbolic value, and for ``forward``'s arguments."""
        if kind == "placeholder":
            return self._input()
        what = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if target is builtins.getattr:
            what = str(args[1])
        translate = METHODS.get(target) if kind == "call_method" else FUNCTIONS.get(target)
        return self._translate(what, translate, args, kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """``fx`` comes here for each module that ``forward`` calls; those of ``torch.nn`` are translated as a whole."""
        paths = cast(dict[nn.Module, str], self.submodule_paths)
        if m not in paths:
            raise ModelError(f"'{type(m).__name__}'{_where()}: assign the module to an attribute in __init__")
        if not self.is_leaf_module(m, paths[m]):
            return forward(*args, **kwargs)

        def translate(tracer: _Tracer, input: object) -> Value:
            if paths[m] in self._layers:
                raise ModelError("a layer can be called once only; parameters cannot be shared yet")
            return MODULES[type(m)](tracer, m, paths[m], input)

        what = f"{type(m).__name__}' (module '{paths[m]}')"
        return self._translate(type(m).__name__, translate if type(m) in MODULES else None, args, kwargs, what)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """``fx`` comes here for each attribute that a module keeps in its tables, which is where tensors are."""
        if isinstance(attr_val, nn.Parameter):
            raise UnsupportedOperationError(
                f"parameter '{attr}'{_where()}: parameters are used through layers of torch.nn only"
            )
        if isinstance(attr_val, torch.Tensor):
            raise BatchDependenceError(f"buffer '{attr}'{_where()}: a buffer can carry state from example to example")
        return attr_val

    def create_arg(self, a: Any) -> Any:
        """``fx`` comes here with what ``forward`` returns."""
        if not isinstance(a, Value):
            raise ModelError(f"forward must return one tensor computed from its input, not {type(a).__name__}")
        self._record(f"output#{len(self._nodes)}", "output", "output", (a.label,), {})
        return a.node

    def to_bool(self, obj: fx.Proxy) -> bool:
        """``fx`` comes here for control flow; always refused."""
        return bool(self._translate("bool", None, (obj,), {}))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """``fx`` comes here for a loop over a tensor; always refused."""
        return iter(self._translate("iter", None, (obj,), {}))

    def _input(self) -> Value:
        if self._nodes:
            raise ModelError("forward must take one tensor and nothing else")
        self._record("input#0", "input", "input", (), {})
        token = self.graph.create_node("placeholder", "x")
        return Value(token, self, "input#0", self._input_shape)

    def _record(self, label: str, kind: Any, operation: str, inputs: tuple[str, ...], options: dict[str, Any]) -> Node:
        if len(self._nodes) == MAX_NODES:
            raise ModelError(f"expected at most {MAX_NODES} operations")
        try:
            node = Node(name=label, kind=kind, operation=operation, options=options, inputs=inputs)
        except ValidationError as error:
            raise ModelError(f"not a valid operation: {_first(error)}") from error
        self._nodes.append(node)
        return node

    def _translate(
        self, name: str, translate: Callable[..., Value] | None, args: Any, kwargs: dict[str, Any], what: str = ""
    ) -> Value:
        what = what or f"{name}'"
        try:
            _refuse_by_name(name, translate, args, kwargs)
            return cast(Callable[..., Value], translate)(self, *args, **_plain(kwargs))
        except CasemateError as error:
            raise type(error)(f"'{what}{_where()}: {error}") from error


def _refuse_by_name(name: str, translate: Callable[..., Value] | None, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__")):
        raise UnsupportedOperationError("it works in place; use the form that returns a new tensor")
    if translate is not reshape and any(isinstance(arg, BatchSize) for arg in (*args, *kwargs.values())):
        raise BatchDependenceError("the batch size is used as a number")
    if translate is None:
        error, reason = REASONS.get(name, (UnsupportedOperationError, "it is not on the allow-list"))
        raise error(reason)
    try:
        inspect.signature(translate).bind(None, *args, **_plain(kwargs))
    except TypeError as error:
        raise UnsupportedOperationError(f"these arguments are not supported ({error})") from error


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what has no effect, and with torch's other name for an axis replaced."""
    inert = {"inplace": False, "_stacklevel": kwargs.get("_stacklevel"), "dtype": None, "return_indices": False}
    return {
        "dim" if key == "axis" else key: value
        for key, value in kwargs.items()
        if not (key in inert and value == inert[key])
    }


def _check_unpatched(root: nn.Module) -> None:
    if type(root) in MODULES:
        raise ModelError("a single layer has no forward to trace: wrap it as nn.Sequential(layer)")
    for path, module in root.named_modules():
        if any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in vars(module):
            raise ModelError(f"module '{path}' has hooks or a patched forward, which would be lost")


def _check_parameters(root: nn.Module, spec: ModelSpec) -> None:
    seen: dict[int, str] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
            raise ModelError(f"parameter '{name}' has no values yet")
        if (other := seen.setdefault(parameter.data_ptr(), name)) != name:
            raise ModelError(f"parameters '{other}' and '{name}' are tied, which is not supported yet")
    names = {parameter.name for parameter in spec.parameters}
    if left := sorted(root.state_dict().keys() - names):
        raise ModelError(f"'{left[0]}' is in the module's state_dict, but forward does not use it")
    for name, parameter in root.named_parameters():
        if parameter.dtype != torch.float32:
            raise ModelError(f"parameter '{name}' is {parameter.dtype}: call .float() on the module")
        if not parameter.requires_grad:
            raise ModelError(f"parameter '{name}' is frozen, which is not supported yet")
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"parameter '{name}' is not finite")


def _first(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _is_ours(filename: str) -> bool:
    return filename.startswith(_NOT_THE_USERS)


def _where() -> str:
    """The line of the user's code that runs now, ``" at file:line"``; empty where no code of theirs was traced."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not trace.__code__:
        if not _is_ours(frame.f_code.co_filename):
            return f" at {frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _where_raised(error: BaseException) -> str:
    """The user's line that ``error`` came through last."""
    where, traceback = "", error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not _is_ours(code.co_filename):
            where = f" at {code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return where
