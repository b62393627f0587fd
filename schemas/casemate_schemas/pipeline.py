"""How a dataset's columns become a model's inputs and targets, by declared public bounds only.

No statistic of the data enters: no mean, no variance, no count. So the pipeline itself costs no privacy.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from .codec import WireModel
from .dataset import MAX_COLUMNS, ColumnName

MAX_CLASSES: Final = 1 << 16

Scaling = Literal["none", "unit", "minus_one_one"]
"""What becomes of a feature's declared ``[lower, upper]``: itself, ``[0, 1]`` or ``[-1, 1]``."""

Loss = Literal["cross_entropy", "binary_cross_entropy", "mean_squared_error"]
"""``binary_cross_entropy`` takes logits."""


class PipelineSpec(WireModel):
    """Columns to ``(features, target)``.

    ``features`` are flattened per row, joined in this order and given the model's input shape. A ``class`` target counts
    up from its column's declared lower bound and has ``n_classes`` values; a ``binary`` one has the two values 0 and 1;
    a ``value`` is a real number, clamped to its bounds.
    """

    KIND: ClassVar[str] = "pipeline-spec"

    version: Literal[1] = 1
    features: Annotated[tuple[ColumnName, ...], Field(min_length=1, max_length=MAX_COLUMNS)]
    scaling: Scaling = "minus_one_one"
    target: ColumnName
    target_kind: Literal["class", "binary", "value"]
    n_classes: Annotated[int, Field(ge=2, le=MAX_CLASSES)] | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if len(set(self.features)) != len(self.features):
            raise ValueError("a feature is listed twice")
        if self.target in self.features:
            raise ValueError("the target is listed as a feature")
        if (self.n_classes is not None) != (self.target_kind == "class"):
            raise ValueError("n_classes goes with the target kind 'class', and only with it")
        return self
