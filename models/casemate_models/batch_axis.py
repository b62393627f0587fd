"""The proof of batch independence: one abstract interpretation of a :class:`ModelSpec`, over shapes alone.

Differential privacy bounds what one example can change, so a model in which one example can touch another's loss breaks
it (DESIGN: "batch independence is proven, not assumed"). The proof is by induction over the nodes. The input is a batch,
one example a row. Each operation keeps rows apart wherever its shape rule accepts (``operations``). So row i of the
output depends on row i of the input alone, for a batch of any length, whatever the weights.

The tracer runs this check for the user's sake; the builder runs it again, because it trusts nobody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from casemate_schemas.errors import MalformedError, ModelError, TooLargeError
from casemate_schemas.model import MAX_DIMENSION, MAX_ELEMENTS, MAX_RANK, ModelSpec, Node, Parameter, Shape

from .operations import Operation, operation_of


@dataclass(frozen=True)
class Step:
    """A checked node: the operation with valid options, and one example's shape of its result."""

    name: str
    operation: Operation
    inputs: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True)
class Program:
    """What a spec computes, checked. ``output`` names the value returned; ``output_shape`` is one example's."""

    input: str
    input_shape: Shape
    steps: tuple[Step, ...]
    output: str
    output_shape: Shape


def check(spec: ModelSpec) -> Program:
    """Proves that ``spec`` is well formed, within bounds, and keeps examples apart; no weights and no data are touched.

    1. The first node is the only input, the last the only output.
    2. Names are unique, and no layer lies inside another.
    3. Every node uses values of earlier nodes only, and its operation accepts their shapes.
    4. Every value is used, so that every parameter has a gradient.
    5. The parameter table is exactly what the layers have.

    Raises :class:`ModelError` (and its :class:`UnsupportedOperationError`, :class:`BatchDependenceError`),
    :class:`MalformedError` or :class:`TooLargeError`.
    """
    first, *middle, last = spec.nodes
    _check_ends(spec.nodes)  # 1
    _check_names(spec.nodes)  # 2
    shapes = {first.name: spec.input_shape}
    steps = tuple(_step(node, shapes) for node in middle)  # 3
    if sum(math.prod(shape) for shape in shapes.values()) > MAX_ELEMENTS:
        raise TooLargeError(f"expected at most {MAX_ELEMENTS} activations an example")
    output = last.inputs[0]
    if output not in shapes:
        raise ModelError(f"the output names '{output}', which no earlier node computes")
    unused = shapes.keys() - {name for node in spec.nodes for name in node.inputs}  # 4
    if unused:
        raise ModelError(f"the value of '{min(unused)}' is never used")
    _check_parameters(spec, steps)  # 5
    return Program(first.name, spec.input_shape, steps, output, shapes[output])


def result_shape(operation: Operation, inputs: tuple[Shape, ...]) -> Shape:
    """One example's shape of the result: :meth:`Operation.infer`, and the bounds that hold for every value."""
    shape = operation.infer(*inputs)
    if len(shape) > MAX_RANK or max(shape, default=1) > MAX_DIMENSION or math.prod(shape) > MAX_ELEMENTS:
        raise TooLargeError("a value is larger than the bound on rank, axis or elements")
    return shape


def parameter_table(layers: dict[str, Operation]) -> tuple[Parameter, ...]:
    """The parameters of ``layers`` (by path) in code-point order of their names."""
    shapes = {f"{path}.{name}": shape for path, op in layers.items() for name, shape in op.parameters().items()}
    return tuple(Parameter(name=name, shape=shapes[name]) for name in sorted(shapes))


def _check_ends(nodes: tuple[Node, ...]) -> None:
    kinds = [node.kind for node in nodes]
    if kinds[0] != "input" or kinds[-1] != "output" or {"input", "output"} & set(kinds[1:-1]):
        raise ModelError("expected one input, first, and one output, last")
    for node, n_inputs in ((nodes[0], 0), (nodes[-1], 1)):
        if node.operation != node.kind or node.options or len(node.inputs) != n_inputs:
            raise ModelError(f"the {node.kind} node is not well formed")


def _check_names(nodes: tuple[Node, ...]) -> None:
    if len({node.name for node in nodes}) != len(nodes):
        raise ModelError("two nodes have one name")
    paths = {node.name for node in nodes if node.kind == "module"}
    for node in nodes:
        if ("#" in node.name) == (node.kind == "module"):
            raise ModelError(f"'{node.name}' is no name for a node of kind {node.kind}")
        parts = node.name.split(".")
        if any(".".join(parts[:n]) in paths for n in range(1, len(parts))):
            raise ModelError(f"layer '{node.name}' lies inside another layer")


def _step(node: Node, shapes: dict[str, Shape]) -> Step:
    try:
        operation = operation_of(node)
        if missing := [name for name in node.inputs if name not in shapes]:
            raise ModelError(f"it uses '{missing[0]}', which no earlier node computes")
        shape = result_shape(operation, tuple(shapes[name] for name in node.inputs))
    except (ModelError, MalformedError) as error:
        raise type(error)(f"node '{node.name}': {error}") from error
    shapes[node.name] = shape
    return Step(node.name, operation, node.inputs, shape)


def _check_parameters(spec: ModelSpec, steps: tuple[Step, ...]) -> None:
    layers = {step.name: step.operation for step in steps if step.operation.KIND_OF_NODE == "module"}
    elements = sum(math.prod(shape) for op in layers.values() for shape in op.parameters().values())
    if elements > MAX_ELEMENTS:
        raise TooLargeError(f"expected at most {MAX_ELEMENTS} parameters")
    if spec.parameters != parameter_table(layers):
        raise ModelError("the parameter table is not that of the layers")
