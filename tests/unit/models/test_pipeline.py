import contextlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from casemate_models.pipeline import check_pipeline, examples, read_columns, write_columns
from casemate_models.tensors import read_tensors, write_tensors
from casemate_schemas.codec import decode, encode
from casemate_schemas.dataset import Column, DatasetCard
from casemate_schemas.errors import DatasetError, MalformedError, TooLargeError
from casemate_schemas.pipeline import PipelineSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

CARD = DatasetCard(
    name="cardio",
    owner="north",
    columns=(
        Column(name="age", dtype="float64", lower=0.0, upper=120.0),
        Column(name="scan", dtype="uint8", shape=(2, 2), lower=0.0, upper=255.0),
        Column(name="stage", dtype="int64", lower=1.0, upper=4.0),
        Column(name="outcome", dtype="int32", lower=0.0, upper=1.0),
        Column(name="dose", dtype="float32", shape=(1,), lower=-1.0, upper=3.0),
    ),
    row_bound=6,
)


def _columns(n: int = 4) -> dict[str, Any]:
    return {
        "age": np.array([0.0, 30.0, 60.0, 120.0, 90.0, 15.0, 1.0, 2.0])[:n],
        "scan": np.arange(32, dtype=np.uint8).reshape(8, 2, 2)[:n],
        "stage": np.array([1, 2, 3, 4, 1, 2, 3, 4])[:n],
        "outcome": np.array([0, 1, 1, 0, 1, 0, 1, 0], np.int32)[:n],
        "dose": np.linspace(-1, 3, 8, dtype=np.float32).reshape(8, 1)[:n],
    }


def _pipeline(**changes: Any) -> PipelineSpec:
    base = {"features": ("age", "scan"), "target": "outcome", "target_kind": "binary"}
    return PipelineSpec(**(base | changes))


def test_columns_survive_their_bytes() -> None:
    columns = _columns()
    read = read_columns(write_columns(columns, CARD), CARD, 100)
    assert read.keys() == columns.keys()
    for name, array in columns.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_features_are_joined_in_order_and_scaled_by_declared_bounds_only() -> None:
    features, targets = examples(_columns(), CARD, _pipeline(scaling="unit"), (5,))
    assert features.dtype == targets.dtype == np.float32
    np.testing.assert_allclose(features[1], [0.25, 4 / 255, 5 / 255, 6 / 255, 7 / 255], rtol=1e-6)
    np.testing.assert_array_equal(targets, [0, 1, 1, 0])

    features, _ = examples(_columns(), CARD, _pipeline(features=("scan", "age")), (5, 1))
    assert features.shape == (4, 5, 1)
    np.testing.assert_allclose(features[:, 4, 0], [-1.0, -0.5, 0.0, 1.0])

    features, _ = examples(_columns(), CARD, _pipeline(features=("age",), scaling="none"), (1,))
    np.testing.assert_array_equal(features[:, 0], [0.0, 30.0, 60.0, 120.0])


def test_targets_of_each_kind() -> None:
    _, stages = examples(_columns(), CARD, _pipeline(target="stage", target_kind="class", n_classes=4), (5,))
    assert stages.dtype == np.int64
    np.testing.assert_array_equal(stages, [0, 1, 2, 3])
    _, doses = examples(_columns(), CARD, _pipeline(target="dose", target_kind="value"), (5,))
    assert doses.shape == (4,)
    assert doses.dtype == np.float32
    np.testing.assert_allclose(doses, _columns()["dose"][:, 0])


def test_values_outside_the_bounds_are_clamped_and_nan_is_the_middle() -> None:
    columns = _columns() | {
        "age": np.array([-np.inf, 1e300, np.nan, 5000.0]),
        "stage": np.array([-(2**62), 2**62, 0, 5]),
        "outcome": np.array([-7, 9, 0, 1], np.int32),
        "dose": np.array([[np.nan], [np.inf], [-9], [1]], np.float32),
    }
    features, targets = examples(columns, CARD, _pipeline(features=("age",)), (1,))
    np.testing.assert_array_equal(features[:, 0], [-1, 1, 0, 1])
    np.testing.assert_array_equal(targets, [0, 1, 0, 1])
    _, stages = examples(columns, CARD, _pipeline(target="stage", target_kind="class", n_classes=4), (5,))
    np.testing.assert_array_equal(stages, [0, 3, 0, 3])
    _, doses = examples(columns, CARD, _pipeline(target="dose", target_kind="value"), (5,))
    np.testing.assert_array_equal(doses, [1, 3, -1, 1])


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(np.float64, st.integers(0, 6), elements=st.floats(width=64)),
    bounds=st.tuples(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30)).filter(lambda b: b[0] < b[1]),
    scaling=st.sampled_from(["none", "unit", "minus_one_one"]),
)
def test_no_value_raises_or_leaves_the_scaled_bounds(values: Any, bounds: tuple[float, float], scaling: Any) -> None:
    columns = (
        Column(name="x", dtype="float64", lower=bounds[0], upper=bounds[1]),
        Column(name="y", dtype="float64", lower=0.0, upper=2.0),
    )
    card = DatasetCard(name="d", owner="o", columns=columns, row_bound=10)
    pipeline = PipelineSpec(features=("x",), scaling=scaling, target="y", target_kind="class", n_classes=3)
    features, targets = examples({"x": values, "y": values}, card, pipeline, (1,))
    low, high = {"unit": (0, 1), "minus_one_one": (-1, 1), "none": np.float32(bounds)}[scaling]
    assert features.shape == (len(values), 1)
    assert np.all((features >= low) & (features <= high))
    assert np.all((targets >= 0) & (targets <= 2))


def test_rows_beyond_the_declared_bound_are_dropped_without_a_word() -> None:
    read = read_columns(write_tensors(_columns(8)), CARD, 100)
    np.testing.assert_array_equal(read["age"], _columns(6)["age"])
    assert len(read_columns(write_tensors(_columns(8)), CARD, 2)["scan"]) == 2
    with pytest.raises(DatasetError, match="at most 6 rows"):
        write_columns(_columns(8), CARD)


def test_an_empty_dataset_is_a_dataset() -> None:
    read = read_columns(write_columns(_columns(0), CARD), CARD, 10)
    features, targets = examples(read, CARD, _pipeline(), (5,))
    assert features.shape == (0, 5)
    assert targets.shape == (0,)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"age": None}, "age"),
        ({"height": np.zeros(4)}, "height"),
        ({"age": np.zeros(4, np.float32)}, "age"),
        ({"scan": np.zeros((4, 4), np.uint8)}, "scan"),
        ({"stage": np.asarray(3)}, "stage"),
        ({"stage": np.zeros(3, np.int64)}, "number of rows"),
    ],
)
def test_data_that_are_not_the_cards_are_refused_by_column(change: dict[str, Any], column: str) -> None:
    columns = {name: array for name, array in (_columns() | change).items() if array is not None}
    with pytest.raises((DatasetError, TooLargeError), match=column if "height" not in change else "at most 5 tensors"):
        read_columns(write_tensors(columns), CARD, 100)


@pytest.mark.parametrize(
    ("changes", "shape", "why"),
    [
        ({"features": ("age", "weight")}, (2,), "no column 'weight'"),
        ({"target": "weight"}, (5,), "no column 'weight'"),
        ({}, (4,), "5 values a row, the model takes 4"),
        ({"features": ("age",), "target": "scan"}, (1,), "more than one value"),
        ({"target": "stage"}, (5,), "bounds 0 and 1"),
        ({"target": "stage", "target_kind": "class", "n_classes": 3}, (5,), "do not hold 3 classes"),
    ],
)
def test_a_pipeline_that_does_not_fit_the_card_is_refused_before_any_data(
    changes: dict[str, Any], shape: tuple[int, ...], why: str
) -> None:
    with pytest.raises(DatasetError, match=why):
        check_pipeline(_pipeline(**changes), CARD, shape)


def test_bounds_beyond_float32_are_refused() -> None:
    card = CARD.model_copy(update={"columns": (Column(name="x", dtype="float64", lower=-1e39, upper=1e39),)})
    with pytest.raises(DatasetError, match="beyond float32"):
        check_pipeline(_pipeline(features=("x",)), card, (1,))


@pytest.mark.parametrize(
    "changes",
    [
        {"features": ("age", "age")},
        {"features": ("outcome",)},
        {"features": ()},
        {"n_classes": 2},
        {"target_kind": "class"},
        {"target_kind": "class", "n_classes": 1},
        {"scaling": "standard"},
    ],
)
def test_an_inconsistent_pipeline_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        _pipeline(**changes)


def test_a_pipeline_survives_the_wire() -> None:
    pipeline = _pipeline(target="stage", target_kind="class", n_classes=4)
    assert decode(PipelineSpec, encode(pipeline)) == pipeline


def _safetensors(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 7,
        _safetensors(b"[]"),
        _safetensors(b"{"),
        _safetensors(b"[" * 100_000),
        _safetensors(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"\x00"),
        _safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"\x00\x00"),
        _safetensors(b'{"a":{"dtype":"U8","shape":[9223372036854775807,4],"data_offsets":[0,1]}}', b"\x00"),
        _safetensors(b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', b"\x00"),
        _safetensors(b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}', b"\x00\x00"),
        _safetensors(b'{"__metadata__":{"x":"y"}}'),
        _safetensors(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"\x00",
        ),
    ],
)
def test_malformed_safetensors_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        read_tensors(data, max_bytes=1 << 20, max_tensors=4)


def test_sizes_are_bounded_before_reading() -> None:
    with pytest.raises(TooLargeError, match="at most 10 bytes"):
        read_tensors(b"\x00" * 11, max_bytes=10, max_tensors=1)
    with pytest.raises(TooLargeError, match="header"):
        read_tensors((1 << 40).to_bytes(8, "little"), max_bytes=100, max_tensors=1)
    with pytest.raises(TooLargeError, match="at most 1 tensors"):
        read_tensors(write_tensors({"a": np.zeros(1), "b": np.zeros(1)}), max_bytes=1000, max_tensors=1)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4))
def test_no_bytes_escape_the_error_tree(data: bytes, flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(write_tensors({"a": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.int64)}))
    for at, change in flips:
        damaged[at % len(damaged)] ^= change
    for candidate in (data, bytes(damaged)):
        with contextlib.suppress(MalformedError):
            read_tensors(candidate, max_bytes=1 << 20, max_tensors=4)


def test_pipelines_and_the_proof_need_no_torch() -> None:
    code = "import sys, casemate_models.pipeline, casemate_models.batch_axis; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


SUBJECTS = CARD.model_copy(
    update={
        "privacy_unit": "subject",
        "subject_column": "stage",
        "max_records_per_subject": 2,
        "subject_bound": 3,
    }
)


def test_nobody_seals_more_subjects_than_declared() -> None:
    assert write_columns(_columns(3), SUBJECTS)
    with pytest.raises(DatasetError, match="at most 3 subjects"):
        write_columns(_columns(4), SUBJECTS)


@pytest.mark.parametrize("changed", [{"features": ("age", "stage")}, {"target": "stage", "target_kind": "value"}])
def test_no_model_sees_who_a_subject_is(changed: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match="names subjects"):
        check_pipeline(_pipeline(**changed), SUBJECTS, (5,))
