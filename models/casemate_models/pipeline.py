"""From a dataset's bytes to the arrays that a model is trained on, by the card and the pipeline alone.

Two kinds of fault are told apart. What the *card* says is public: a missing column or a dtype that does not fit is
refused before any data is opened. What the *data* say is not: no value raises, ever. Values outside their declared
bounds are clamped to them, NaN becomes the middle of the bounds, and rows beyond the declared bound are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from casemate_schemas.dataset import Column, DatasetCard
from casemate_schemas.errors import DatasetError
from casemate_schemas.pipeline import PipelineSpec

from .tensors import Array, read_tensors, write_tensors

_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


def check_pipeline(pipeline: PipelineSpec, card: DatasetCard, input_shape: tuple[int, ...]) -> None:
    """That the card has what the pipeline takes, and that it fills ``input_shape``. Touches no data.

    Raises :class:`DatasetError` that names the column.
    """
    if card.subject_column in (*pipeline.features, pipeline.target):
        raise DatasetError(f"column '{card.subject_column}' of '{card.id}' names subjects: no model may see it")
    n_elements = sum(math.prod(_feature(card, name).shape) for name in pipeline.features)
    if n_elements != math.prod(input_shape):
        raise DatasetError(f"the features have {n_elements} values a row, the model takes {math.prod(input_shape)}")
    _target(card, pipeline)


def read_columns(data: bytes, card: DatasetCard, max_rows: int) -> dict[str, Array]:
    """The card's columns from safetensors ``data``: ``[rows, *shape]`` each, in the card's dtype.

    There are at most ``min(max_rows, card.row_bound)`` rows: of more, the first are kept and the rest dropped, since an
    error would tell how many there are. (:func:`write_columns` lets no owner seal more by mistake: with rows dropped,
    removing a kept row would let in another, and the privacy unit would be two records.) Values are as stored;
    :func:`examples` clamps them. The structure is the owner's declaration, so a fault in it raises:
    :class:`DatasetError` names the column that is missing, unknown or of another dtype or shape;
    :class:`MalformedError` if ``data`` is not safetensors. At most one copy of ``data`` is made.
    """
    arrays = read_tensors(data, max_bytes=len(data), max_tensors=len(card.columns))
    if odd := sorted(arrays.keys() ^ {column.name for column in card.columns}):
        raise DatasetError(f"column '{odd[0]}' is on the card or in the data, but not in both")
    for column in card.columns:
        _check_column(arrays[column.name], column)
    if len({len(array) for array in arrays.values()}) != 1:
        raise DatasetError("the columns differ in their number of rows")
    kept = min(max_rows, card.row_bound)
    return {column.name: arrays[column.name][:kept] for column in card.columns}


def write_columns(columns: Mapping[str, Array], card: DatasetCard) -> bytes:
    """Safetensors bytes of a dataset's columns, for its owner to seal. They fit the card, and fit in its row bound.

    Raises :class:`DatasetError` as :func:`read_columns` does, and for more rows or subjects than the card declares: here
    the owner is at hand and can declare a higher bound.
    """
    if any(len(array) > card.row_bound for array in columns.values() if array.ndim):
        raise DatasetError(f"expected at most {card.row_bound} rows, as the card declares")
    data = write_tensors(columns)
    read = read_columns(data, card, card.row_bound)
    subjects = 0 if card.subject_column is None else len(np.unique(read[card.subject_column]))
    if card.subject_bound is not None and subjects > card.subject_bound:
        raise DatasetError(f"expected at most {card.subject_bound} subjects, as the card declares")
    return data


def examples(
    columns: Mapping[str, Array], card: DatasetCard, pipeline: PipelineSpec, input_shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Features ``[n, *input_shape]`` float32 and targets ``[n]``, for columns read by :func:`read_columns`.

    Row i of both depends on row i of the columns and on public declarations alone. Features are scaled as declared,
    and lie within the scaled bounds whatever was stored. Targets are int64 in ``[0, n_classes)`` for ``class``, float32
    0 or 1 for ``binary``, and float32 within the column's bounds for ``value``. Raises as :func:`check_pipeline`.
    """
    check_pipeline(pipeline, card, input_shape)
    n_rows = len(columns[pipeline.target])
    parts = [_scaled(columns[name], _feature(card, name), pipeline.scaling) for name in pipeline.features]
    features = np.concatenate([part.reshape(n_rows, math.prod(part.shape[1:])) for part in parts], axis=1)
    features = features.reshape(n_rows, *input_shape)
    target = _target(card, pipeline)
    values = _clamped(columns[pipeline.target], target).reshape(n_rows)
    if pipeline.target_kind == "class":
        return features, np.rint(values - target.lower).astype(np.int64)
    if pipeline.target_kind == "binary":
        return features, np.rint(values).astype(np.float32)
    return features, values.astype(np.float32)


def _feature(card: DatasetCard, name: str) -> Column:
    column = card.column(name)
    if column is None:
        raise DatasetError(f"dataset '{card.id}' has no column '{name}'")
    if max(abs(column.lower), abs(column.upper)) > _FLOAT32_MAX / 2:
        raise DatasetError(f"column '{name}' of '{card.id}' declares bounds beyond float32")
    return column


def _target(card: DatasetCard, pipeline: PipelineSpec) -> Column:
    column = _feature(card, pipeline.target)
    if math.prod(column.shape) != 1:
        raise DatasetError(f"target column '{column.name}' of '{card.id}' has more than one value a row")
    declared = (column.lower, column.upper)
    if pipeline.target_kind == "binary" and declared != (0.0, 1.0):
        raise DatasetError(f"target column '{column.name}' of '{card.id}': expected declared bounds 0 and 1")
    if pipeline.n_classes is not None and (
        not column.lower.is_integer() or column.upper != column.lower + pipeline.n_classes - 1
    ):
        raise DatasetError(
            f"target column '{column.name}' of '{card.id}': declared bounds {declared} do not hold "
            f"{pipeline.n_classes} classes"
        )
    return column


def _check_column(array: Array, column: Column) -> None:
    if array.ndim == 0 or array.shape[1:] != column.shape or array.dtype != np.dtype(column.dtype):
        raise DatasetError(
            f"column '{column.name}': expected {column.dtype} [rows, {column.shape}], got {array.dtype} {array.shape}"
        )


def _clamped(array: Array, column: Column) -> Array:
    """Float64 within the declared bounds; NaN becomes their middle."""
    values = np.clip(array.astype(np.float64), column.lower, column.upper)
    return np.where(np.isnan(values), (column.lower + column.upper) / 2, values)


def _scaled(array: Array, column: Column, scaling: str) -> Array:
    """Float32, scaled by the declared bounds, and clamped once more against rounding."""
    values = _clamped(array, column)
    if scaling == "none":
        return values.astype(np.float32)
    unit = np.clip((values - column.lower) / (column.upper - column.lower), 0.0, 1.0)
    return (unit if scaling == "unit" else 2.0 * unit - 1.0).astype(np.float32)
