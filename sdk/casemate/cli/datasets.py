"""``casemate datasets list|push`` and ``casemate budget``."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from casemate_schemas.dataset import DatasetCard
from casemate_schemas.errors import MalformedError, ParameterError, SetupError
from casemate_schemas.licence import Licence
from casemate_schemas.requests import Budget
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from casemate._http import printable
from casemate.client import Consortium
from casemate.datasets import Array
from casemate.parameters import first_problem

from .common import connected

_MAX_JSON_BYTES: Final = 1 << 20
_MAX_COLUMNS_BYTES: Final = 64 << 30


@click.group()
def datasets() -> None:
    """List datasets, or push one."""


@datasets.command("list")
@connected
async def list_(consortium: Consortium, console: Console) -> None:
    """The datasets you may list, what they declare and what is left of their budgets."""
    console.print(str(await consortium.datasets()), markup=False, highlight=False)


@datasets.command()
@click.option("--columns", required=True, type=click.Path(exists=True, dir_okay=False), help=".npz or .safetensors")
@click.option("--card", "card_file", required=True, type=click.Path(exists=True, dir_okay=False), help="JSON")
@click.option("--licence", "licence_file", required=True, type=click.Path(exists=True, dir_okay=False), help="JSON")
@connected
async def push(consortium: Consortium, console: Console, columns: str, card_file: str, licence_file: str) -> None:
    """Seal a dataset to its owner's key broker, upload it and register it under its licence. For stewards."""
    card = read_card(Path(card_file))
    registered = await consortium.push(read_columns(Path(columns)), card, licence=read_licence(Path(licence_file)))
    console.print(
        f"{registered.dataset} registered", f"envelope {registered.envelope.hex()}", sep="\n", highlight=False
    )


@click.command()
@click.argument("dataset")
@connected
async def budget(consortium: Consortium, console: Console, dataset: str) -> None:
    """The privacy ledger of DATASET (name@owner): what is spent, what is left, and every charge. For stewards."""
    console.print(_ledger(await consortium.budget(dataset)))


def read_columns(path: Path) -> dict[str, Array]:
    """The columns in an ``.npz`` (no pickles) or ``.safetensors`` file. Raises :class:`MalformedError`."""
    from casemate_models.tensors import read_tensors
    from casemate_schemas.dataset import MAX_COLUMNS

    if path.suffix == ".safetensors":
        return read_tensors(path.read_bytes(), max_bytes=_MAX_COLUMNS_BYTES, max_tensors=MAX_COLUMNS)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, AttributeError) as error:
        raise MalformedError(f"{path} is neither .safetensors nor an .npz without pickles") from error


def read_card(path: Path) -> DatasetCard:
    """The card in a JSON file. Raises :class:`ParameterError`."""
    try:
        return DatasetCard.model_validate_json(_read_text(path))
    except ValidationError as error:
        raise ParameterError(f"{path}: {first_problem(error)}") from error


def read_licence(path: Path) -> Licence:
    """The licence in a JSON file; ``measurements`` in hexadecimal. Raises :class:`ParameterError`."""
    try:
        values: Any = json.loads(_read_text(path))
        measurements = values.pop("measurements", None)
        licence = Licence.model_validate_json(json.dumps(values))
        if measurements is None:
            return licence
        return Licence(**dict(licence) | {"measurements": tuple(map(bytes.fromhex, measurements))})
    except ValidationError as error:
        raise ParameterError(f"{path}: {first_problem(error)}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ParameterError(f"{path}: expected a licence as a JSON object, measurements in hexadecimal") from error


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_MAX_JSON_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"cannot read {path}") from error


def _ledger(found: Budget) -> Table:
    title = f"{found.dataset}: ε {found.epsilon_spent:.4g} of {found.epsilon:g} spent at δ {found.delta:g}"
    table = Table(title=f"{title}, {found.epsilon_remaining:.4g} left")
    for column in ("when", "job", "submitter", "ε of the job", "state"):
        table.add_column(column)
    for line in found.lines:
        when = datetime.fromtimestamp(line.at / 1000, UTC).isoformat(timespec="seconds")
        state = "committed" if line.committed is not None else "reserved"
        table.add_row(when, line.job_id, printable(line.submitter), f"{line.epsilon:.4g}", state)
    return table
