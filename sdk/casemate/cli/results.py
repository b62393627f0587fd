"""``casemate results get|verify|events``."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from casemate.client import Consortium
from casemate.identity import Identity
from casemate.results import Result, load
from casemate.verification import Verification

from .common import connected, identity_option, say_simulated, write_events


@click.group()
def results() -> None:
    """Get a result, or verify one offline."""


@results.command()
@click.argument("job_id")
@click.option(
    "--output", "-o", required=True, type=click.Path(file_okay=False), help="A folder for weights and proofs."
)
@click.option("--submitter", help="PERSON@MEMBER whose job it must be, if not your own.")
@connected
async def get(consortium: Consortium, console: Console, job_id: str, output: str, submitter: str | None) -> None:
    """Fetch, verify and open a result; weights and everything that proves them are written to a folder."""
    result = await (await consortium.job(job_id, submitter=submitter)).result()
    result.save(output)
    show(console, result)
    console.print(f"written to {output}", markup=False)


@results.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@identity_option
@click.option("--submitter", help="PERSON@MEMBER whose job it must be, if not your own.")
@click.option("--json", "as_json", is_flag=True, help="The provenance as JSON.")
def verify(folder: str, identity: str, submitter: str | None, as_json: bool) -> None:
    """Verify a result saved by 'results get' again: offline, every step."""
    result = load(folder, Identity.of(identity), submitter=submitter)
    if as_json:
        click.echo(json.dumps(result.provenance(), indent=2))
        return
    console = Console()
    say_simulated(console, result.simulation)
    show(console, result)


@results.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@identity_option
@click.option("--submitter", help="PERSON@MEMBER whose job it must be, if not your own.")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="A file for 'casemate epsilon --events'.")
def events(folder: str, identity: str, submitter: str | None, out: str) -> None:
    """Write down, as JSON without secrets, what the epsilons of a saved result follow from. Verifies it first."""
    result = load(folder, Identity.of(identity), submitter=submitter)
    write_events(result.privacy_events(), out)


def show(console: Console, result: Result) -> None:
    """A result and who verified what."""
    console.print(checklist(result.verification))
    console.print(str(result), markup=False, highlight=False)


def checklist(verification: Verification) -> Table:
    """The twelve steps as a table; the demo shows the same."""
    simulated = "  [bold white on red] SIMULATED [/]" if verification.simulation else ""
    table = Table(title=f"who verified what{simulated}")
    for column in ("", "step", "on whose word", "finding"):
        table.add_column(column)
    for step in verification.steps:
        table.add_row(f"✓ {step.number}", step.name, step.by, step.finding)
    return table
