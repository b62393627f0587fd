"""``casemate budget DATASET``, ``budget events`` and ``budget renew``: where the privacy budget went, and a fresh one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import click
from casemate_schemas.requests import Budget, LedgerLine
from rich.console import Console
from rich.table import Table
from rich.text import Text

from casemate._http import printable
from casemate.client import Consortium

from .common import connected, write_events

PLOT_COLUMNS: Final = 64
PLOT_ROWS: Final = 10


class BudgetGroup(click.Group):
    """``casemate budget name@owner`` is short for ``casemate budget show name@owner``: no command has an @ in its name."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, ["show", *args] if "@" in args[0] else args)


@click.group(cls=BudgetGroup)
def budget() -> None:
    """Explain the privacy ledger of a dataset (casemate budget NAME@OWNER), or give it a fresh budget. For stewards."""


@budget.command()
@click.argument("dataset")
@click.option("--json", "as_json", is_flag=True, help="For machines; digests in hexadecimal.")
@connected
async def show(consortium: Consortium, console: Console, dataset: str, as_json: bool) -> None:
    """What DATASET (name@owner) has spent, what is left, and every charge that brought it there."""
    found = await consortium.budget(dataset)
    if as_json:
        click.echo(json.dumps(_plain(found.model_dump()), indent=2))
        return
    console.print(_summary(found))
    console.print(plot(found))
    console.print(_ledger(found))


@budget.command()
@click.argument("dataset")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="A file for 'casemate epsilon --events'.")
@connected
async def events(consortium: Consortium, console: Console, dataset: str, out: str) -> None:
    """Write down, as JSON, every charge of DATASET (name@owner) and what its epsilon follows from."""
    from casemate_privacy.recorded import events_of_ledger

    write_events(events_of_ledger(await consortium.budget(dataset)), out)


@budget.command()
@click.argument("dataset")
@click.option("--confirm", help="The dataset's id once more, instead of being asked for it.")
@connected
async def renew(consortium: Consortium, console: Console, dataset: str, confirm: str | None) -> None:
    """Give DATASET (name@owner) a fresh budget. What was promised before adds to what is promised from now on."""
    found = await consortium.budget(dataset)
    console.print(_warning(found), highlight=False)
    typed = confirm if confirm is not None else click.prompt("Type the dataset's id to go on", default="")
    if typed != dataset:
        raise click.ClickException("that is not the dataset's id: nothing was changed")
    renewed = await consortium.renew_budget(dataset, lineage=found.lineage)
    console.print(f"{renewed.dataset} goes on under lineage {renewed.lineage.hex()}", highlight=False)


def _warning(found: Budget) -> str:
    both, delta = found.epsilon_spent + found.epsilon, 2 * found.delta
    return (
        f"{found.dataset} has spent ε {found.epsilon_spent:.4g} of {found.epsilon:g} (δ {found.delta:g}). A fresh budget "
        f"promises the people in it up to ε {both:.4g} (δ {delta:g}) in all, and cannot be taken back."
    )


def plot(found: Budget) -> Text:
    """Spent epsilon of the running period, as the filter proves it, over time; the top row is the licence's epsilon."""
    period = len(found.renewals)
    points = [(line.at, line.epsilon_after) for line in found.lines if line.period == period and line.epsilon_after]
    if not points:
        return Text("nothing spent yet")
    top = max(found.epsilon, *(value for _, value in points))
    heights = [round(value / top * PLOT_ROWS) for value in _over_time(points)]
    lines = []
    for row in range(PLOT_ROWS, 0, -1):
        label = f"{top * row / PLOT_ROWS:8.3g} "
        lines.append(label + "".join("█" if height >= row else " " for height in heights).rstrip())
    first, last = (_when(at) for at in (points[0][0], points[-1][0]))
    lines.append(" " * 9 + first + last.rjust(PLOT_COLUMNS - len(first)))
    return Text("\n".join(lines))


def _over_time(points: Sequence[tuple[int, float]]) -> list[float]:
    """What was spent at each column's time: the last point not after it."""
    start, end = points[0][0], max(points[-1][0], points[0][0] + 1)
    values, position = [], 0
    for column in range(PLOT_COLUMNS):
        at = start + (end - start) * column / (PLOT_COLUMNS - 1)
        while position + 1 < len(points) and points[position + 1][0] <= at:
            position += 1
        values.append(points[position][1])
    return values


def _summary(found: Budget) -> Text:
    spent = f"ε {found.epsilon_spent:.4g} of {found.epsilon:g} spent at δ {found.delta:g}"
    lines = [
        f"{found.dataset}: {spent}, {found.epsilon_remaining:.4g} left for one more job; one {found.privacy_unit} protected"
    ]
    if found.epsilon_estimate is not None:
        lines.append(f"had its jobs been fixed in advance: ε {found.epsilon_estimate:.4g} (an estimate, no promise)")
    for renewal in found.renewals:
        lines.append(
            f"renewed {_when(renewal.at)} by {printable(renewal.person)}, after ε {renewal.epsilon_spent:.4g}: both promises add"
        )
    if found.n_charges > len(found.lines):
        lines.append(f"the newest {len(found.lines)} of {found.n_charges} charges")
    return Text("\n".join(lines))


def _ledger(found: Budget) -> Table:
    table = Table(title="every charge")
    for column in ("when", "job", "purpose", "submitter", "what", "ε of the job", "ε of the whole", "state"):
        table.add_column(column, overflow="fold")
    for line in found.lines:
        whole = "…" if line.epsilon_after is None else f"{line.epsilon_after:.4g}"
        who = printable(line.submitter)
        table.add_row(
            _when(line.at), line.job_id, line.purpose, who, _mechanism(line), f"{line.epsilon:.4g}", whole, line.state
        )
    return table


def _mechanism(line: LedgerLine) -> str:
    rate = line.sample_rate.numerator / line.sample_rate.denominator
    further = sum(phase.steps for phase in line.further)
    more = f", and {further} more under other noise" if further else ""
    return f"{line.kind}: σ {line.noise_multiplier:g}, q {rate:.3g}, {line.steps} releases{more}"


def _when(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    """With bytes in hexadecimal."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
