"""``casemate epsilon --events FILE``: every stated figure once more, from the events alone. Offline; needs no identity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
from casemate_messaging.files import read_file
from casemate_privacy.events import MAX_EPSILON
from casemate_privacy.prv import EpsilonInterval
from casemate_privacy.recorded import MAX_FILE_BYTES, StatedGuarantee, read_events
from casemate_schemas.errors import ParameterError
from rich.console import Console
from rich.table import Table

from casemate._http import printable

RELATIVE_TOLERANCE: Final = 1e-6
"""Between machines, the last digits of floating-point results differ."""

PLD_TOLERANCE: Final = 2e-3
"""How far above the truth the first accountant may be where it is tight: up to epsilon 100 (docs/privacy-accounting.md)."""


@dataclass(frozen=True)
class Recomputed:
    """One stated figure, and what was found. ``charged`` is ``None`` where another delta was asked for."""

    of: str
    job_id: str | None
    rule: str
    delta: float
    charged: float | None
    epsilon: float
    checked: EpsilonInterval | None

    @property
    def holds(self) -> bool:
        """Whether the figure charged is the one that follows, and that one the truth as the second accountant finds it."""
        is_charged = self.charged is None or math.isclose(self.charged, self.epsilon, rel_tol=RELATIVE_TOLERANCE)
        if self.checked is None:
            return is_charged
        is_tight = self.epsilon <= self.checked.upper * (1 + PLD_TOLERANCE) or self.epsilon > MAX_EPSILON
        return is_charged and is_tight and self.checked.lower <= self.epsilon


@click.command()
@click.option(
    "--events",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    help="What 'casemate results events' or 'casemate budget events' wrote.",
)
@click.option("--delta", type=click.FloatRange(1e-10, 0.5), help="Another delta than the stated one: compares nothing.")
@click.option("--check", is_flag=True, help="Ask the second accountant too: seconds for each figure.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def epsilon(events: str, delta: float | None, check: bool, as_json: bool) -> int:
    """Recompute the epsilon of recorded privacy events, and compare it with what was charged. Exit status 1 if they differ."""
    found = list(recompute(read_file(Path(events), MAX_FILE_BYTES), delta, check=check))
    if as_json:
        click.echo(json.dumps([_plain(item) for item in found], indent=2))
    else:
        Console().print(_table(found))
    return 0 if all(item.holds for item in found) else 1


def recompute(data: bytes, delta: float | None, *, check: bool) -> Iterator[Recomputed]:
    """Each figure of a file, in order; under another delta those that depend on a budget's own are left out.

    Raises :class:`~casemate_schemas.errors.MalformedError`, and :class:`ParameterError` that names the figure.
    """
    for stated in read_events(data).guarantees:
        if delta is not None and stated.rule == "adaptive":
            continue
        try:
            yield _recomputed(stated, delta, check=check)
        except ParameterError as error:
            raise ParameterError(f"{printable(stated.of)}: {error}") from error


def _recomputed(stated: StatedGuarantee, delta: float | None, *, check: bool) -> Recomputed:
    value = stated.recomputed(delta)
    error = min(max(value * 1e-3, 1e-4), 1.0)
    return Recomputed(
        of=stated.of,
        job_id=stated.job_id,
        rule=stated.rule,
        delta=stated.delta if delta is None else delta,
        charged=stated.epsilon if delta is None else None,
        epsilon=value,
        checked=stated.checked(delta, error) if check else None,
    )


def _plain(item: Recomputed) -> dict[str, Any]:
    return {**asdict(item), "holds": item.holds}


def _table(found: list[Recomputed]) -> Table:
    table = Table(title="ε once more, from the events")
    for column in ("", "of", "job", "rule", "δ", "ε charged", "ε recomputed", "ε lies in (second accountant)"):
        table.add_column(column, overflow="fold")
    for item in found:
        charged = "" if item.charged is None else f"{item.charged:.6g}"
        interval = "" if item.checked is None else f"{item.checked.lower:.5g} to {item.checked.upper:.5g}"
        mark, job = "✓" if item.holds else "✗", item.job_id or ""
        table.add_row(
            mark, printable(item.of), job, item.rule, f"{item.delta:g}", charged, f"{item.epsilon:.6g}", interval
        )
    return table
