"""What a person asks of :meth:`~casemate.client.Consortium.train`, and whether it can be, whatever data and model are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, get_args

from casemate_schemas.admission import Priority
from casemate_schemas.errors import ParameterError
from casemate_schemas.job import MAX_DATASETS, MAX_NOISE_PHASES, MAX_STEPS, Mechanism
from casemate_schemas.pipeline import Loss, Scaling
from casemate_schemas.signatures import Signed

from .parameters import SGD, Adam, Audit, Augmentation, Averaging, LrSchedule, Metrics, NoisePhase, Privacy

MAX_DEADLINE_S: Final = 30 * 24 * 3600


@dataclass(frozen=True)
class TrainingRequest:
    """What :meth:`~casemate.client.Consortium.train` was asked for."""

    model: Any
    datasets: tuple[str, ...]
    target: str
    privacy: Privacy
    optimizer: SGD | Adam
    batch_size: int
    epochs: float | None
    steps: int | None
    features: tuple[str, ...] | None
    input_shape: tuple[int, ...] | None
    loss: Loss | None
    scaling: Scaling
    purpose: str
    recipients: tuple[Signed, ...] | None
    deadline_s: float
    max_physical_batch: int
    checkpoint_every_steps: int
    job_id: str | None
    mechanism: Mechanism = "hardened"
    lr_schedule: LrSchedule | None = None
    noise_schedule: tuple[NoisePhase, ...] = ()
    averaging: Averaging | None = None
    augmentation: Augmentation | None = None
    metrics: Metrics | None = None
    padded_batch: int | Literal["auto"] | None = None
    audit: Audit | None = None
    priority: Priority = "normal"
    not_before: datetime | None = None

    @property
    def begins(self) -> int | None:
        """``not_before`` as Unix ms, rounded up. Raises :class:`ParameterError` for what is no time since 1970, or of no zone."""
        if (asked := self.not_before) is None:
            return None
        if not isinstance(asked, datetime) or asked.utcoffset() is None:
            raise ParameterError(
                f"not_before: expected a datetime with its time zone, such as datetime(..., tzinfo=UTC), got {asked!r}"
            )
        if (begins := math.ceil(asked.timestamp() * 1000)) < 0:
            raise ParameterError(f"not_before: expected a time since 1970, got {asked!r}")
        return begins


def check_request(request: TrainingRequest) -> None:
    """Raises :class:`ParameterError` for what is wrong whatever the datasets and the model are."""
    if not isinstance(request.privacy, Privacy):
        raise ParameterError("privacy: expected casemate.Privacy(epsilon=..., delta=..., clipping_norm=...)")
    if not isinstance(request.optimizer, SGD | Adam):
        raise ParameterError("optimizer: expected casemate.SGD(lr=...) or casemate.Adam(lr=...)")
    _check_choices(request)
    if not 1 <= len(request.datasets) <= MAX_DATASETS or len(set(request.datasets)) != len(request.datasets):
        raise ParameterError(f"datasets: expected 1 to {MAX_DATASETS} ids, each once")
    if not _is_integer(request.batch_size) or request.batch_size < 1:
        raise ParameterError(f"batch_size: expected a whole number of records, got {request.batch_size!r}")
    if (request.epochs is None) == (request.steps is None):
        raise ParameterError("expected either epochs or steps")
    if request.epochs is not None and not 0 < request.epochs < math.inf:
        raise ParameterError(f"epochs: expected a positive number, got {request.epochs!r}")
    if request.steps is not None and not (_is_integer(request.steps) and 1 <= request.steps <= MAX_STEPS):
        raise ParameterError(f"steps: expected 1 to {MAX_STEPS}, got {request.steps!r}")
    if not 1 <= request.deadline_s <= MAX_DEADLINE_S:
        raise ParameterError(f"deadline_s: expected 1 to {MAX_DEADLINE_S} seconds, got {request.deadline_s!r}")
    _ = request.begins  # raises for what is no time
    if request.job_id is not None and not is_job_id(request.job_id):
        raise ParameterError("job_id: expected 32 hexadecimal digits")
    for name, value, known in (
        ("loss", request.loss, get_args(Loss)),
        ("scaling", request.scaling, get_args(Scaling)),
        ("mechanism", request.mechanism, get_args(Mechanism)),
        ("priority", request.priority, get_args(Priority)),
    ):
        if value is not None and value not in known:
            raise ParameterError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _check_choices(request: TrainingRequest) -> None:
    """Schedules and the like, each of its own type or left out."""
    kinds = {
        "lr_schedule": LrSchedule,
        "averaging": Averaging,
        "augmentation": Augmentation,
        "metrics": Metrics,
        "audit": Audit,
    }
    for name, kind in kinds.items():
        if not isinstance(value := getattr(request, name), kind | None):
            raise ParameterError(f"{name}: expected casemate.{kind.__name__}(...), got {type(value).__name__}")
    if request.audit is not None:
        _check_audit(request)
    if request.padded_batch not in (None, "auto") and not _is_integer(request.padded_batch):
        raise ParameterError(f"padded_batch: expected a whole number, 'auto' or None, got {request.padded_batch!r}")
    if not all(isinstance(phase, NoisePhase) for phase in request.noise_schedule):
        raise ParameterError("noise_schedule: expected casemate.NoisePhase(first_step=..., factor=...) each")
    if len(request.noise_schedule) >= MAX_NOISE_PHASES:
        raise ParameterError(f"noise_schedule: expected at most {MAX_NOISE_PHASES - 1} phases")


def _check_audit(request: TrainingRequest) -> None:
    """Canaries are single records, in batches of any size, and a report takes the place of all that is released."""
    for name in ("metrics", "augmentation", "padded_batch"):
        if getattr(request, name) is not None:
            raise ParameterError(f"{name}: an audit has none; leave it out, the engine is the same without it")
    if request.privacy.unit != "record":
        raise ParameterError("privacy: an audit's canaries are single records; the unit must be the record")


def is_job_id(value: object) -> bool:
    """Whether that is 32 lower-case hexadecimal digits: safe in a path, and what the wire takes."""
    return isinstance(value, str) and len(value) == 32 and set(value) <= set("0123456789abcdef")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
