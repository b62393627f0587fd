"""``casemate datasets``: list, show, explain, push; and for stewards history, amend, revoke, delete."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import numpy as np
from casemate_messaging.files import read_file
from casemate_schemas.custody import VersionLine
from casemate_schemas.dataset import DatasetCard
from casemate_schemas.errors import MalformedError, NotFoundError, ParameterError
from casemate_schemas.licence import Licence
from casemate_schemas.licence_check import Change, check_sound
from casemate_schemas.licence_text import describe
from pydantic import ValidationError
from rich.console import Console

from casemate._http import printable
from casemate.client import Consortium
from casemate.custody import Amendment
from casemate.datasets import Array
from casemate.identity import now_ms
from casemate.parameters import first_problem

from .common import connected

_MAX_JSON_BYTES: Final = 1 << 20
_MAX_COLUMNS_BYTES: Final = 64 << 30


@click.group()
def datasets() -> None:
    """List datasets and read their licences; for stewards: push, amend, revoke and delete them."""


@datasets.command("list")
@connected
async def list_(consortium: Consortium, console: Console) -> None:
    """The datasets you may list, what they declare and what is left of their budgets."""
    console.print(str(await consortium.datasets()), markup=False, highlight=False)


@datasets.command()
@click.argument("dataset")
@connected
async def show(consortium: Consortium, console: Console, dataset: str) -> None:
    """DATASET (name@owner): what it declares, its licence in words and as JSON."""
    listed = await consortium.datasets()
    found = next((item for item in listed if item.id == dataset), None)
    if found is None:
        raise NotFoundError(f"no dataset {printable(dataset)} that you may list")
    lines = f"{found}\n{found.licence.model_dump_json(indent=2)}".splitlines()
    console.print("\n".join(map(printable, lines)), markup=False, highlight=False, soft_wrap=True)


@datasets.command()
@click.argument("licence_file", type=click.Path(exists=True, dir_okay=False))
def explain(licence_file: str) -> None:
    """The licence in a JSON file as one plain paragraph, or why nobody should sign it. Nothing is sent."""
    licence = read_licence(Path(licence_file))
    check_sound(licence, now=now_ms())
    click.echo(printable(describe(licence, {}), 8_000))


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


@datasets.command()
@click.argument("dataset")
@connected
async def history(consortium: Consortium, console: Console, dataset: str) -> None:
    """Which version and licence of DATASET were in force since when, and what was erased. For stewards."""
    shown = await consortium.dataset_history(dataset)
    for title, lines in (
        ("version", [(line.at, line.person, _version(line)) for line in shown.versions]),
        ("licence", [(line.at, line.person, f"{line.number}, {line.licence.hex()}") for line in shown.licences]),
    ):
        for at, person, what in lines:
            console.print(f"{_when(at)}  {title} {what}  by {printable(person)}", markup=False, highlight=False)
    if shown.erased:
        console.print(f"{shown.card.id} is erased: nobody can open it any more", highlight=False)


@datasets.command()
@click.argument("dataset")
@click.option("--licence", "licence_file", required=True, type=click.Path(exists=True, dir_okay=False), help="JSON")
@click.option("--yes", is_flag=True, help="Do not ask.")
@connected
async def amend(consortium: Consortium, console: Console, dataset: str, licence_file: str, yes: bool) -> None:
    """Put another licence of DATASET in force, after showing what it changes. For stewards."""
    licence = read_licence(Path(licence_file))
    if licence.dataset != dataset:
        raise ParameterError(f"{licence_file} is a licence of {licence.dataset}")
    found = await consortium.compare_licence(licence)
    await _put_in_force(consortium, console, found, _CHANGES[found.change], yes)


@datasets.command()
@click.argument("dataset")
@click.option("--yes", is_flag=True, help="Do not ask.")
@connected
async def revoke(consortium: Consortium, console: Console, dataset: str, yes: bool) -> None:
    """Allow nobody anything with DATASET from now on. For stewards. An amendment can allow it again."""
    words = "It allows nobody anything; the owner's own stewards still see it in their list."
    await _put_in_force(consortium, console, await consortium.revocation_of(dataset), words, yes)


@datasets.command()
@click.argument("dataset")
@click.option("--old-versions", is_flag=True, help="Keep the version in force, and delete those before it.")
@click.option("--confirm", help="The dataset's id, which would be asked for.")
@connected
async def delete(
    consortium: Consortium, console: Console, dataset: str, old_versions: bool, confirm: str | None
) -> None:
    """Destroy the keys of DATASET, for good: no copy of its ciphertext opens any more. For stewards.

    Ledger and audit log stay. Backups of the key broker that were made before still hold the keys: delete those too.
    """
    shown = await consortium.dataset_history(dataset)
    what = "all versions before the one in force" if old_versions else "all versions"
    console.print(f"{what} of {shown.card.id} will be lost for good", highlight=False)
    typed = confirm if confirm is not None else click.prompt("Type the dataset's id to go on", default="")
    if typed != dataset:
        raise click.ClickException("that is not the dataset's id: nothing was changed")
    erased = await consortium.erase(dataset, envelope=shown.envelope, keep_current=old_versions)
    count = len(erased.envelopes)
    console.print(f"erased for good: {count} version{'s' * (count != 1)} of {shown.card.id}", highlight=False)
    for envelope in erased.left:
        console.print(f"{envelope.hex()}: another steward uploaded the ciphertext, so it stays", highlight=False)


async def _put_in_force(consortium: Consortium, console: Console, found: Amendment, words: str, yes: bool) -> None:
    """Says what changes, asks, and signs."""
    names = {member.id: member.name for member in consortium.manifest.members}
    for title, licence in (("in force", found.before), ("to be in force", found.after)):
        console.print(f"{title}: {printable(describe(licence, names), 8_000)}", markup=False, highlight=False)
    console.print(words, highlight=False)
    if not yes:
        click.confirm("Sign it?", abort=True)
    amended = await consortium.amend(found.after)
    console.print(f"licence {found.after.number} of {amended.dataset} is in force", highlight=False)


_CHANGES: Final[dict[Change, str]] = {
    "same": "It allows the same.",
    "stricter": "It is stricter: it allows nothing that was not allowed before.",
    "looser": "It is looser: it forbids nothing that was allowed before.",
    "changed": "It is neither stricter nor looser: read both.",
}


def _version(line: VersionLine) -> str:
    state = " (erased)" if line.erased else ""
    return f"{line.envelope.hex()}, at most {line.row_bound:,} rows{state}"


def _when(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def read_columns(path: Path) -> dict[str, Array]:
    """The columns in an ``.npz`` (no pickles) or ``.safetensors`` file. Raises :class:`MalformedError`."""
    from casemate_models.tensors import read_tensors
    from casemate_schemas.dataset import MAX_COLUMNS

    if path.suffix == ".safetensors":
        return read_tensors(read_file(path, _MAX_COLUMNS_BYTES), max_bytes=_MAX_COLUMNS_BYTES, max_tensors=MAX_COLUMNS)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, AttributeError) as error:
        raise MalformedError(f"{path} is neither .safetensors nor an .npz without pickles") from error


def read_card(path: Path) -> DatasetCard:
    """The card in a JSON file. Raises :class:`ParameterError`."""
    try:
        return DatasetCard.model_validate_json(read_file(path, _MAX_JSON_BYTES))
    except ValidationError as error:
        raise ParameterError(f"{path}: {first_problem(error)}") from error


def read_licence(path: Path) -> Licence:
    """The licence in a JSON file; digests in hexadecimal, times in ISO 8601. Raises :class:`ParameterError`."""
    try:
        return Licence.model_validate_json(read_file(path, _MAX_JSON_BYTES))
    except ValidationError as error:
        raise ParameterError(f"{path}: {first_problem(error)}") from error
