"""``casemate jobs submit --plan FILE.toml``: what :meth:`~casemate.client.Consortium.train` takes, under the same names."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import click
from casemate_messaging.files import read_file
from casemate_schemas.admission import Priority
from casemate_schemas.errors import ParameterError, SetupError
from casemate_schemas.job import Mechanism
from casemate_schemas.pipeline import Loss, Scaling
from pydantic import BeforeValidator, Field

from casemate.parameters import (
    SGD,
    Adam,
    Audit,
    Augmentation,
    Averaging,
    Checked,
    LrSchedule,
    Metrics,
    NoisePhase,
    Privacy,
)

_T = TypeVar("_T")

MAX_PLAN_BYTES: Final = 64 << 10

OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "datasets": ("datasets",),
    "target": ("target",),
    "features": ("features",),
    "epsilon": ("privacy", "epsilon"),
    "delta": ("privacy", "delta"),
    "clipping_norm": ("privacy", "clipping_norm"),
    "batch_size": ("batch_size",),
    "epochs": ("epochs",),
    "steps": ("steps",),
    "optimizer": ("optimizer", "optimizer"),
    "lr": ("optimizer", "lr"),
    "loss": ("loss",),
    "purpose": ("purpose",),
    "deadline_s": ("deadline_s",),
    "priority": ("priority",),
    "not_before": ("not_before",),
    "audit": ("audit", "canaries"),
    "confidence": ("audit", "confidence"),
}
"""Options of the command, and where each stands in the file."""

_NEEDED: Final = {
    "datasets": "dataset",
    "target": "target",
    "epsilon": "epsilon",
    "delta": "delta",
    "batch_size": "batch-size",
    "lr": "lr",
}
"""Of these, those that the command or the file must give, and their flags."""


def _made(kind: type[_T]) -> BeforeValidator:
    def make(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if unknown := sorted(set(value) - {field.name for field in fields(kind)}):  # type: ignore[arg-type]
            raise ParameterError(f"{kind.__name__}: {unknown[0]}: no such parameter")
        try:
            return kind(**value)
        except TypeError as error:
            raise ParameterError(f"{kind.__name__}: expected numbers, and the unit as a word") from error

    return BeforeValidator(make)


class TrainingPlan(Checked):
    """All arguments of :meth:`~casemate.client.Consortium.train` that a file can say: not the model, the recipients, the id."""

    datasets: tuple[str, ...]
    target: str
    privacy: Annotated[Privacy, _made(Privacy)]
    optimizer: Annotated[SGD | Adam, Field(discriminator="optimizer")]
    batch_size: int
    epochs: float | None = None
    steps: int | None = None
    features: tuple[str, ...] | None = None
    input_shape: tuple[int, ...] | None = None
    loss: Loss | None = None
    scaling: Scaling = "minus_one_one"
    purpose: str = "research"
    deadline_s: float = 24 * 3600
    max_physical_batch: int = 1024
    checkpoint_every_steps: int = 100
    mechanism: Mechanism = "hardened"
    lr_schedule: LrSchedule | None = None
    noise_schedule: tuple[NoisePhase, ...] = ()
    averaging: Averaging | None = None
    augmentation: Augmentation | None = None
    metrics: Annotated[Metrics, _made(Metrics)] | None = None
    padded_batch: int | Literal["auto"] | None = None
    audit: Audit | None = None
    priority: Priority = "normal"
    not_before: datetime | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """For :meth:`~casemate.client.Consortium.train`, as they are."""
        return {name: getattr(self, name) for name in type(self).model_fields}


def read_plan(path: Path | None, options: Mapping[str, Any]) -> TrainingPlan:
    """What the file says, with every option that was given in its place.

    Raises :class:`SetupError` for a file that cannot be read, :class:`click.UsageError` for what neither of them says
    or an option that belongs to another, and :class:`ParameterError` that names the field.
    """
    said = {} if path is None else _read(path)
    if options.get("confidence") is not None and options.get("audit") is None and "audit" not in said:
        raise click.UsageError("--confidence is an audit's: expected --audit, or a table [audit] in the file of --plan")
    if options.get("steps") is not None or options.get("epochs") is not None:
        said = {name: value for name, value in said.items() if name not in ("steps", "epochs")}
    for option, (*tables, name) in OPTIONS.items():
        if (value := options.get(option)) not in (None, ()):
            _table(said, tables)[name] = value
    if isinstance(optimizer := said.get("optimizer"), dict):
        optimizer.setdefault("optimizer", "sgd")
    for option, flag in _NEEDED.items():
        *tables, name = OPTIONS[option]
        if name not in _table(said, tables):
            raise click.UsageError(f"expected --{flag}, or {'.'.join((*tables, name))} in the file of --plan")
    return TrainingPlan.model_validate(said)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_file(path, MAX_PLAN_BYTES).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SetupError(f"--plan: {path} is not a TOML file") from error


def _table(said: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for name in names:
        said = said.setdefault(name, {})
        if not isinstance(said, dict):
            raise ParameterError(f"{name}: expected a table, [{name}]")
    return said
