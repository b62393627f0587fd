"""The model that crosses the wire: a graph of allow-listed operations. It is data; nothing in it is ever executed.

A :class:`ModelSpec` says *what* is computed. Weights travel apart, as safetensors bytes. What an operation is, and the
proof that no example touches another, is in ``casemate_models``: whoever builds a model from a spec runs that proof
again and trusts nothing that the sender checked.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from .codec import WireModel

MAX_NODES: Final = 2000
MAX_RANK: Final = 8
MAX_DIMENSION: Final = 1 << 24
MAX_ELEMENTS: Final = 10**9
"""Bound on a model's parameters together, and on one example's activations together."""

Dimension = Annotated[int, Field(ge=1, le=MAX_DIMENSION)]
"""The length of one axis."""

Shape = Annotated[tuple[Dimension, ...], Field(max_length=MAX_RANK)]
"""A tensor's shape. Where a batch is meant, it is one example's: the batch axis comes before it and is never written."""

_PATH: Final = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$"

NodeName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(#[0-9]{1,4})?$", max_length=200)
]
"""A layer's path in the user's module (``features.0``); for any other node a label with ``#`` and a number."""

OptionName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z_]{0,31}$")]

Integer = Annotated[int, Field(ge=-MAX_DIMENSION, le=MAX_DIMENSION)]

Option = bool | Integer | float | Annotated[tuple[Integer, ...], Field(max_length=MAX_RANK)]
"""A hyper-parameter: a truth value, a bounded integer, a finite float, or a few bounded integers."""


class Node(WireModel):
    """One step of the graph. ``module`` nodes are layers with parameters of their own, named by their path."""

    name: NodeName
    kind: Literal["input", "module", "function", "output"]
    operation: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    options: Annotated[dict[OptionName, Option], Field(max_length=16)]
    inputs: Annotated[tuple[NodeName, ...], Field(max_length=64)]


class Parameter(WireModel):
    """A trainable tensor: its name in the user's ``state_dict`` (the layer's path and one word), its shape and dtype."""

    name: Annotated[str, StringConstraints(pattern=_PATH, max_length=220)]
    shape: Shape
    dtype: Literal["float32"] = "float32"


class ModelSpec(WireModel):
    """A model without its weights: nodes in the order they are computed, and the table of its parameters.

    ``input_shape`` is one example's, without the batch axis. ``parameters`` are in code-point order of their names.
    """

    KIND: ClassVar[str] = "model-spec"

    version: Literal[1] = 1
    input_shape: Annotated[Shape, Field(min_length=1)]
    input_dtype: Literal["float32"] = "float32"
    nodes: Annotated[tuple[Node, ...], Field(min_length=3, max_length=MAX_NODES)]
    parameters: Annotated[tuple[Parameter, ...], Field(min_length=1, max_length=2 * MAX_NODES)]
