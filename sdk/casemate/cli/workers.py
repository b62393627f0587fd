"""``casemate workers``: which workers pass the policy, as one's own key broker judged their evidence, and why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import click
from casemate_schemas.requests import WorkerList, WorkerVerdict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from casemate._http import printable
from casemate.client import Consortium

from .common import connected


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
@connected
async def workers(consortium: Consortium, console: Console, *, as_json: bool) -> None:
    """The workers that asked your key broker for keys: accepted or refused, and which check refused them.

    For stewards and admins. What refused evidence says that is not genuine is anyone's word.
    """
    found = await consortium.workers()
    if as_json:
        listed = [_as_json(worker) for worker in found.workers]
        facts = {"key_broker": found.key_broker, "manifest": found.manifest_number, "simulation": consortium.simulation}
        click.echo(json.dumps(facts | {"workers": listed}))
        return
    console.print(_table(found))
    for line in _reasons(found):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _table(found: WorkerList) -> Table:
    table = Table(title=f"workers at key broker {found.key_broker}, now at manifest {found.manifest_number}")
    for column in ("worker", "chip", "measurement", "TCB", "last seen", "manifest", "verdict"):
        table.add_column(column, overflow="fold")
    for worker in found.workers:
        table.add_row(
            _short(worker.worker),
            f"{worker.product or '?'} {_short(worker.chip)}",
            _short(worker.measurement),
            "?" if worker.tcb is None else " ".join(f"{part} {level}" for part, level in dict(worker.tcb).items()),
            datetime.fromtimestamp(worker.at / 1000, UTC).isoformat(timespec="seconds"),
            str(worker.manifest_number),
            Text("✓ accepted", style="green") if worker.accepted else Text("✗ refused", style="bold red"),
        )
    return table


def _reasons(found: WorkerList) -> Iterator[str]:
    """Why not, a line for each check that failed; and the owner's licences that may not want an accepted one."""
    for worker in found.workers:
        name = _short(worker.worker)
        if not worker.genuine:
            yield f"✗ {name}: not genuine, so what it says of itself is anyone's word"
        for check in worker.failed:
            yield f"✗ {name}: {check.name}: expected {check.expected}, got {check.got}"
        for dataset in worker.unnamed_by if worker.accepted else ():
            yield f"· {name}: the licence of {dataset} names other measurements"


def _as_json(worker: WorkerVerdict) -> dict[str, object]:
    fields = worker.model_dump()
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}


def _short(value: bytes | None) -> str:
    return f"{value.hex()[:12]}…" if value else "?"
