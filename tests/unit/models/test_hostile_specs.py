"""Specs and weights that no honest tracer makes: the builder refuses each, whatever the sender claims to have checked."""

from typing import Any

import numpy as np
import pytest
import torch
from casemate_models.batch_axis import check
from casemate_models.building import build, weights_of
from casemate_models.tensors import write_tensors
from casemate_models.tracing import trace
from casemate_schemas.codec import decode, encode, pack
from casemate_schemas.errors import (
    BatchDependenceError,
    CasemateError,
    MalformedError,
    ModelError,
    TooLargeError,
    UnsupportedOperationError,
)
from casemate_schemas.model import ModelSpec, Node, Parameter
from torch import nn

LINEAR = {"in_features": 4, "out_features": 4, "bias": False}
CONV = {
    "in_channels": 1,
    "out_channels": 1,
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "bias": False,
}


def node(name: str, operation: str, *inputs: str, kind: str = "function", **options: Any) -> Node:
    return Node(name=name, kind=kind, operation=operation, options=options, inputs=inputs)


INPUT = node("input#0", "input", kind="input")
LAYER = node("fc", "linear", "input#0", kind="module", **LINEAR)
WEIGHT = Parameter(name="fc.weight", shape=(4, 4))


def spec(*middle: Node, output: str, shape: tuple[int, ...] = (4,), parameters: Any = (WEIGHT,)) -> ModelSpec:
    last = node("output#99", "output", output, kind="output")
    return ModelSpec(input_shape=shape, nodes=(INPUT, *middle, last), parameters=parameters)


def after(*extra: Node) -> ModelSpec:
    return spec(LAYER, *extra, output=extra[-1].name)


def test_the_plain_spec_of_these_tests_is_accepted() -> None:
    program = check(after(node("relu#2", "relu", "fc")))
    assert program.output_shape == (4,)
    assert program.output == "relu#2"


@pytest.mark.parametrize(
    "last",
    [
        node("x#2", "reshape", "fc", shape=(2,)),
        node("x#2", "reshape", "fc", shape=(8,)),
        node("x#2", "reshape", "fc", shape=()),
        node("x#2", "mean", "fc", axes=(0,), keep_axes=False),
        node("x#2", "sum", "fc", axes=(1, 0), keep_axes=True),
        node("x#2", "softmax", "fc", axis=0),
        node("x#2", "log_softmax", "fc", axis=0),
        node("x#2", "concatenate", "fc", "fc", axis=0),
        node("norm", "layer_norm", "fc", kind="module", normalized_shape=(9, 4), eps=1e-5, affine=False),
        node("norm", "group_norm", "fc", kind="module", num_groups=4, num_channels=4, eps=1e-5, affine=False),
    ],
)
def test_a_hand_made_spec_that_mixes_examples_is_refused(last: Node) -> None:
    with pytest.raises(BatchDependenceError, match=f"^node '{last.name}': "):
        build(after(last), b"")


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (after(node("x#2", "batch_norm", "fc")), UnsupportedOperationError),
        (after(node("x#2", "eval", "fc")), UnsupportedOperationError),
        (after(node("x#2", "linear", "fc", **LINEAR)), MalformedError),
        (after(node("x", "relu", "fc", kind="module")), MalformedError),
        (after(node("x#2", "relu", "fc", inplace=True)), MalformedError),
        (after(node("x#2", "elu", "fc")), MalformedError),
        (after(node("x#2", "elu", "fc", alpha=True)), MalformedError),
        (after(node("x#2", "elu", "fc", alpha=1e30)), MalformedError),
        (after(node("x#2", "reshape", "fc", shape=(-4,))), MalformedError),
        (after(node("x#2", "softmax", "fc", axis=-1)), MalformedError),
        (after(node("x#2", "mean", "fc", axes=(2,), keep_axes=False)), ModelError),
        (after(node("x#2", "mean", "fc", axes=(1, 1), keep_axes=False)), ModelError),
        (after(node("x#2", "mean", "fc", axes=(), keep_axes=False)), MalformedError),
        (after(node("x#2", "divide_by_scalar", "fc", value=0.0)), ModelError),
        (after(node("x#2", "add", "fc")), ModelError),
        (after(node("x#2", "add", "fc", "fc", "fc")), ModelError),
        (after(node("x#2", "relu")), ModelError),
        (after(node("x#2", "concatenate", axis=1)), ModelError),
        (after(node("x#2", "relu", "y#3"), node("y#3", "relu", "x#2")), ModelError),
        (after(node("x#2", "add", "x#2", "fc")), ModelError),
        (after(node("x#2", "relu", "nowhere")), ModelError),
        (after(node("x#2", "relu", "fc"), node("x#2", "tanh", "fc")), ModelError),
        (after(node("input#0", "relu", "fc")), ModelError),
        (after(node("x", "relu", "fc")), ModelError),
        (after(node("x#2", "relu", "fc"), node("y#3", "tanh", "fc")), ModelError),
        (after(node("x#2", "input", kind="input"), node("y#3", "add", "fc", "x#2")), ModelError),
        (spec(LAYER, output="nowhere"), ModelError),
        (spec(LAYER, output="output#99"), ModelError),
        (spec(LAYER, node("fc.a", "linear", "fc", kind="module", **LINEAR), output="fc.a"), ModelError),
        (spec(LAYER, output="fc", parameters=(Parameter(name="fc.weight", shape=(4, 5)),)), ModelError),
        (spec(LAYER, output="fc", parameters=(WEIGHT, Parameter(name="fc.bias", shape=(4,)))), ModelError),
        (spec(LAYER, output="fc", parameters=(WEIGHT, WEIGHT)), ModelError),
        (spec(LAYER, output="fc", shape=(5,)), ModelError),
        (spec(LAYER, output="fc", shape=(2, 4, 4, 4, 4, 4, 4, 4)), CasemateError),
    ],
)
def test_a_spec_that_is_not_well_formed_is_refused(bad: ModelSpec, error: type[CasemateError]) -> None:
    with pytest.raises(error):
        build(bad, b"")


@pytest.mark.parametrize(
    "name", ["forward", "training", "__class__", "_modules", "_Interpreter__program", "output_shape"]
)
def test_a_layer_cannot_take_the_place_of_the_interpreters_own_attributes(name: str) -> None:
    hostile = spec(
        node(name, "linear", "input#0", kind="module", **LINEAR),
        output=name,
        parameters=(Parameter(name=f"{name}.weight", shape=(4, 4)),),
    )
    with pytest.raises(ModelError, match="cannot be named"):
        build(hostile, write_tensors({f"{name}.weight": np.zeros((4, 4), np.float32)}))


@pytest.mark.parametrize(
    "options",
    [
        {**CONV, "in_channels": 8},
        {**CONV, "kernel_size": (9, 9)},
        {**CONV, "groups": 2},
        {**CONV, "stride": (0, 1)},
        {**CONV, "padding": (-1, 0)},
        {**CONV, "kernel_size": (3,)},
    ],
)
def test_a_convolution_that_does_not_fit_is_refused(options: dict[str, Any]) -> None:
    conv = node("conv", "conv2d", "input#0", kind="module", **options)
    with pytest.raises((ModelError, MalformedError), match="node 'conv'"):
        check(spec(conv, output="conv", shape=(1, 8, 8)))


def test_an_image_without_its_channels_is_not_taken_for_one_image() -> None:
    """Torch reads a tensor of three axes as one unbatched image: the batch would become its channels."""
    conv = node("conv", "conv2d", "input#0", kind="module", **CONV)
    pool = node("p#2", "max_pool2d", "fc", kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    with pytest.raises(ModelError, match="expected images"):
        check(spec(conv, output="conv", shape=(8, 8)))
    with pytest.raises(ModelError, match="expected images"):
        check(spec(LAYER, pool, output="p#2", shape=(4, 4)))


def test_sizes_beyond_the_bounds_are_refused_before_any_allocation() -> None:
    big = {"in_features": 4, "out_features": 1 << 24, "bias": False}
    layers = (
        node("a", "linear", "input#0", kind="module", **big),
        node("b", "linear", "a", kind="module", in_features=1 << 24, out_features=1 << 24, bias=False),
    )
    with pytest.raises(TooLargeError, match="parameters"):
        build(spec(*layers, output="b"), b"")
    wide = [node("a", "linear", "input#0", kind="module", **big)]
    wide += [node(f"r#{i}", "relu", "a" if i == 2 else f"r#{i - 1}") for i in range(2, 70)]
    with pytest.raises(TooLargeError, match="activations"):
        build(spec(*wide, output="r#69"), b"")
    doubled = [LAYER, node("c#0", "concatenate", *("fc",) * 64, axis=1)]
    doubled += [node(f"c#{i}", "concatenate", *(f"c#{i - 1}",) * 64, axis=1) for i in range(1, 9)]
    with pytest.raises(TooLargeError):
        build(spec(*doubled, output="c#8"), b"")


def test_a_spec_made_around_its_validation_is_validated_again() -> None:
    honest = after(node("relu#2", "relu", "fc"))
    forged = honest.model_copy(update={"nodes": (honest.nodes[0], *honest.nodes[1:-1] * 3000, honest.nodes[-1])})
    with pytest.raises(MalformedError, match="not a valid ModelSpec"):
        build(forged, b"")


def test_option_types_survive_the_wire_exactly() -> None:
    sent = after(node("x#2", "elu", "fc", alpha=1.0), node("y#3", "sum", "x#2", axes=(1,), keep_axes=True))
    received = decode(ModelSpec, encode(sent))
    assert received == sent
    assert [type(v) for n in received.nodes for v in n.options.values()] == [
        type(v) for n in sent.nodes for v in dict(sorted(n.options.items())).values()
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"input_dtype": "float64"},
        {"input_shape": []},
        {"nodes": []},
        {"parameters": []},
        {"source": "import os"},
    ],
)
def test_other_wire_forms_of_a_spec_are_refused(change: dict[str, Any]) -> None:
    value = after(node("relu#2", "relu", "fc")).model_dump()
    with pytest.raises(MalformedError):
        decode(ModelSpec, pack(value | change))


def _weights(**arrays: Any) -> bytes:
    return write_tensors({name.replace("__", "."): np.asarray(array) for name, array in arrays.items()})


GOOD = np.ones((4, 4), np.float32)
NAN = np.full((4, 4), np.nan, np.float32)


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (b"", MalformedError),
        (b"\x80\x04\x95", MalformedError),
        (b"\xff" * 64, TooLargeError),
        (_weights(fc__weight=GOOD)[:-1], MalformedError),
        (_weights(fc__weight=GOOD) + b"\x00", MalformedError),
        (_weights(fc__weight=GOOD, extra=GOOD), ModelError),
        (_weights(other=GOOD), ModelError),
        (_weights(fc__weight=GOOD[:3]), ModelError),
        (_weights(fc__weight=GOOD.reshape(16)), ModelError),
        (_weights(fc__weight=GOOD.astype(np.float64)), ModelError),
        (_weights(fc__weight=GOOD.view(np.int32)), ModelError),
        (_weights(fc__weight=GOOD.astype(np.float16)), MalformedError),
        (_weights(fc__weight=NAN), ModelError),
        (_weights(fc__weight=GOOD * np.float32(np.inf)), ModelError),
    ],
)
def test_weights_that_are_not_the_specs_are_refused(weights: bytes, error: type[CasemateError]) -> None:
    with pytest.raises(error):
        build(after(node("relu#2", "relu", "fc")), weights)


def test_weights_of_another_dtype_are_not_written() -> None:
    with pytest.raises(ModelError, match="not float32"):
        weights_of(nn.Linear(2, 2).double())


def test_a_batch_of_another_shape_is_refused() -> None:
    built = build(*trace(nn.Sequential(nn.Linear(4, 2)), (4,)))
    for shape in [(4,), (3, 2, 4), (2, 5), ()]:
        with pytest.raises(ModelError, match="expected a batch"):
            built(torch.zeros(shape))
