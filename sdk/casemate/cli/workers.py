"""``casemate workers list|drain``: which workers there are, which pass the policy and why not, and ending one in peace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import click
from casemate_schemas.api import PresentWorker
from casemate_schemas.errors import AuthorisationError
from casemate_schemas.requests import WorkerList, WorkerVerdict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from casemate._http import printable
from casemate.client import Consortium

from .common import connected


@click.group()
def workers() -> None:
    """List the workers and which pass the policy, or drain one."""


@workers.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
@connected
async def list_workers(consortium: Consortium, console: Console, *, as_json: bool) -> None:
    """The workers that say they are there; for stewards and admins also those that asked their key broker for keys.

    Of those: accepted or refused, and which check refused them. What refused evidence says that is not genuine is anyone's
    word, as is what a worker announces.
    """
    present = await consortium.present_workers()
    found = await _verdicts(consortium)
    if as_json:
        facts: dict[str, object] = {"simulation": consortium.simulation, "present": [w.model_dump() for w in present]}
        if found is not None:
            facts |= {"key_broker": found.key_broker, "manifest": found.manifest_number}
            facts |= {"workers": [_as_json(worker) for worker in found.workers]}
        click.echo(json.dumps(facts))
        return
    console.print(_present(present))
    if found is None:
        return
    console.print(_table(found))
    for line in _reasons(found):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


@workers.command()
@click.argument("worker")
@connected
async def drain(consortium: Consortium, console: Console, worker: str) -> None:
    """Have WORKER end its job, take no other, and end. For admins. It takes jobs again once it is started again."""
    drained = await consortium.drain_worker(worker)
    console.print(f"{drained.worker} was {drained.state}: it takes no more jobs within ten seconds", highlight=False)


async def _verdicts(consortium: Consortium) -> WorkerList | None:
    """The key broker's, for those who may know them."""
    try:
        return await consortium.workers()
    except AuthorisationError:
        return None


def _present(workers: tuple[PresentWorker, ...]) -> Table:
    table = Table(title="workers that announced themselves")
    for column in ("worker", "state", "running since", "last heard", "manifest"):
        table.add_column(column, overflow="fold")
    for worker in workers:
        times = (_time(at) for at in (worker.since, worker.heard))
        table.add_row(printable(worker.worker), printable(worker.state), *times, str(worker.manifest_number))
    return table


def _time(at_ms: int) -> str:
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return "?"


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
