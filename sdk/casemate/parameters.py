"""What users fill in: the wire models under their public names, and privacy parameters with the clipping norm beside them.

A value out of its range raises :class:`~casemate_schemas.errors.ParameterError` at once, where it was typed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from casemate_schemas import dataset as _dataset
from casemate_schemas import job as _job
from casemate_schemas import licence as _licence
from casemate_schemas.codec import WireModel
from casemate_schemas.errors import ParameterError
from casemate_schemas.licence import (
    AllOf,
    AnyOf,
    Approvals,
    AtLeast,
    Before,
    ForPurpose,
    MemberIs,
    Permission,
    RoleIs,
    WithMeasurement,
    WithModel,
)
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator

__all__ = [
    "SGD",
    "Adam",
    "AllOf",
    "AnyOf",
    "Approvals",
    "AtLeast",
    "Audit",
    "Augmentation",
    "Averaging",
    "Before",
    "Column",
    "DatasetCard",
    "ForPurpose",
    "Licence",
    "LrSchedule",
    "MemberIs",
    "Metrics",
    "NoisePhase",
    "Permission",
    "Privacy",
    "RoleIs",
    "WithMeasurement",
    "WithModel",
]

_M = TypeVar("_M", bound=WireModel)


class Checked(WireModel):
    """Turns pydantic's error into one of the tree, and takes lists where the wire has tuples."""

    @model_validator(mode="wrap")
    @classmethod
    def _raise_parameter_error(cls, value: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        if isinstance(value, dict):
            value = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
        with parameter_errors(cls.__name__):
            return handler(value)


class parameter_errors:
    """Within this block a pydantic ``ValidationError`` becomes a :class:`ParameterError` that names ``what`` and field."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ValidationError):
            raise ParameterError(f"{self._what}: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """Field and message of a validation's first error, without its value."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def to_wire(model: type[_M], value: _M) -> _M:
    """``value`` as exactly the wire's ``model``: what a receiver will decode and compare with."""
    return model.model_validate(value.model_dump())


class SGD(Checked, _job.SGD):
    """Stochastic gradient descent on the noised gradient: ``lr`` in (0, 1000], ``momentum`` in [0, 1).

    Weights shrink by ``lr * weight_decay`` (in [0, 1]) of themselves in each step, beside the gradient.
    """


class Adam(Checked, _job.Adam):
    """Adam (Kingma and Ba 2015) on the noised gradient: ``lr`` in (0, 1000], ``weight_decay`` as for :class:`SGD` (AdamW).

    ``bias_correction="dp"`` takes the noise's known variance out of the second moment (DP-AdamBC: Tang, Shpilevskiy,
    Lécuyer 2024), which is kept above ``variance_floor``; the smaller the floor, the larger steps along quiet coordinates.
    """


class LrSchedule(Checked, _job.LrSchedule):
    """Multiples of the learning rate: up over ``warmup_steps``, then ``decay`` (``constant``, ``linear`` or ``cosine``).

    ``final``, in [0, 1], is what the decay ends at.
    """


class NoisePhase(Checked, _job.NoisePhase):
    """From ``first_step`` on, the noise multiplier times ``factor``, in [0.01, 100]. Planned and charged as it is."""


class Averaging(Checked, _job.Averaging):
    """Release an exponential moving average of the weights, which ``decay``, in (0, 1), draws out; it costs no privacy."""


class Augmentation(Checked, _job.Augmentation):
    """Average each image's gradient over ``multiplicity`` (2 to 64) views before it is clipped; it costs no privacy.

    Views are shifted by up to ``shift`` pixels each way and mirrored left to right if ``flip``; one of them is the image.
    """


class Audit(Checked, _job.Audit):
    """Audit a training with so many ``canaries`` (16 to 10,000): lower bounds on epsilon, with ``confidence`` in [0.5, 0.9999].

    The more canaries, the more a flawed engine gives away, and the longer every step takes.
    """

    canaries: Annotated[int, Field(ge=16, le=_job.MAX_CANARIES)] = 1000


class Column(Checked, _dataset.Column):
    """One column: ``name``, ``dtype``, ``shape`` of a row's value, public ``lower`` and ``upper`` bounds, ``unit``."""


class DatasetCard(Checked, _dataset.DatasetCard):
    """A dataset's declared schema: ``name``, ``owner`` (a member id), ``columns``, ``row_bound``, ``description``."""


class Licence(Checked, _licence.Licence):
    """An owner's terms for one dataset: ``permissions``, ``epsilon`` and ``delta`` for its life, ``epsilon_per_job``, expiry."""


@dataclass(frozen=True)
class Privacy:
    """The guarantee asked for, for each owner's data, under adding or removing one privacy unit.

    Args:
        epsilon: in [0.001, 100].
        delta: in [1e-10, 0.5]; well below one over the number of records.
        clipping_norm: bound on the gradient of each privacy unit, in L2 norm, in [1e-6, 1e6].
        unit: what every dataset's card protects: one ``record``, or all records of one ``subject``.

    Raises :class:`ParameterError` for anything else, NaN included.
    """

    epsilon: float
    delta: float
    clipping_norm: float = 1.0
    unit: Literal["record", "subject"] = "record"

    def __post_init__(self) -> None:
        with parameter_errors("Privacy"):
            _job.Privacy(epsilon=self.epsilon, delta=self.delta, unit=self.unit)
        if not 1e-6 <= self.clipping_norm <= 1e6:
            raise ParameterError(f"Privacy: clipping_norm: expected 1e-6 to 1e6, got {self.clipping_norm}")


@dataclass(frozen=True)
class Metrics:
    """Accuracy and mean loss of the final weights on all the training records, with noise of their own.

    Args:
        epsilon_share: the part of ``Privacy.epsilon`` that they would cost alone, in (0, 1). Training gets what they leave.
        loss_bound: losses above it count as it, in [1e-6, 1e6]: the larger, the more noise there is in the mean loss.

    Raises :class:`ParameterError` for anything else, NaN included.
    """

    epsilon_share: float = 0.1
    loss_bound: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.epsilon_share < 1:
            raise ParameterError(f"Metrics: epsilon_share: expected a number between 0 and 1, got {self.epsilon_share}")
        if not 1e-6 <= self.loss_bound <= 1e6:
            raise ParameterError(f"Metrics: loss_bound: expected 1e-6 to 1e6, got {self.loss_bound}")
