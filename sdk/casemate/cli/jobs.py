"""``casemate jobs weigh|submit|status|watch|cancel|list``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import click
from casemate_privacy.owners import Choice
from casemate_schemas.admission import Priority
from casemate_schemas.api import JobStatus
from casemate_schemas.errors import CasemateError, SetupError
from casemate_schemas.pipeline import Loss
from rich.console import Console
from rich.table import Table

from casemate._http import printable
from casemate.client import Consortium
from casemate.parameters import Privacy

from .common import connected
from .plan_file import read_plan

_MODEL_HELP = (
    "Your own file and the function in it that returns the torch.nn.Module. "
    "It is run here, like any script of yours; its code is never sent."
)


@click.group()
def jobs() -> None:
    """Submit, watch, list and cancel jobs."""


@jobs.command()
@click.option("--dataset", "datasets", required=True, multiple=True, metavar="NAME@OWNER")
@click.option("--epsilon", required=True, type=float)
@click.option("--delta", required=True, type=float)
@click.option("--unit", default="record", show_default=True, type=click.Choice(["record", "subject"]))
@click.option("--batch-size", required=True, type=int)
@click.option("--epochs", type=float)
@click.option("--steps", type=int)
@connected
async def weigh(
    consortium: Consortium,
    console: Console,
    *,
    datasets: tuple[str, ...],
    epsilon: float,
    delta: float,
    unit: Literal["record", "subject"],
    batch_size: int,
    epochs: float | None,
    steps: int | None,
) -> None:
    """What each owner's own budget is worth to a training job, against one budget for all. Spends nothing."""
    choices = await consortium.weigh_budgets(
        datasets, privacy=Privacy(epsilon, delta, 1.0, unit), batch_size=batch_size, epochs=epochs, steps=steps
    )
    console.print(choices_table(choices))


def choices_table(choices: Sequence[Choice]) -> Table:
    """One row a choice; owners in the order of its names."""
    table = Table(title="what budgets cost in signal")
    for column in ("choice", "σ", "noise / signal", "ε and samples a step, by owner"):
        table.add_column(column, overflow="fold")
    for choice in choices:
        owners = zip(choice.names, choice.plan.epsilons, choice.samples, strict=True)
        shares = "\n".join(f"{name}: ε {epsilon:.3g}, {samples:.1f}" for name, epsilon, samples in owners)
        table.add_row(choice.name, f"{choice.plan.noise_multiplier:.4g}", f"{choice.noise_to_signal:.3g}", shares)
    return table


@jobs.command()
@click.option(
    "--model",
    required=True,
    metavar="FILE.py:FUNCTION",
    help=_MODEL_HELP,
)
@click.option(
    "--plan",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.toml",
    help="Everything that Consortium.train takes, under the same names; options below go before it.",
)
@click.option("--dataset", "datasets", multiple=True, metavar="NAME@OWNER")
@click.option("--target", help="The column to predict.")
@click.option("--feature", "features", multiple=True, help="All columns but the target if not given.")
@click.option("--epsilon", type=float)
@click.option("--delta", type=float)
@click.option("--clipping-norm", type=float, help="1 if not given.")
@click.option("--batch-size", type=int)
@click.option("--epochs", type=float)
@click.option("--steps", type=int)
@click.option("--optimizer", type=click.Choice(["sgd", "adam"]), help="sgd if not given.")
@click.option("--lr", type=float)
@click.option("--loss", type=click.Choice(get_args(Loss)))
@click.option("--purpose", help="research if not given.")
@click.option("--deadline-s", type=float, help="Seconds from now until it expires; a day if not given.")
@click.option(
    "--not-before",
    metavar="TIME",
    type=datetime.fromisoformat,
    help="No worker begins it before: 2026-12-01T22:00:00+01:00.",
)
@click.option("--priority", type=click.Choice(get_args(Priority)), help="Beside your member's other jobs.")
@click.option("--audit", type=int, metavar="CANARIES", help="Release no weights but an audit's report.")
@click.option("--confidence", type=float, help="Of the audit's bounds; 0.95 if not given.")
@click.option("--job-id", help="32 hexadecimal digits; the same job again under its id is the same job.")
@click.option("--watch/--no-watch", "watching", default=False, help="Stay until it ends.")
@connected
async def submit(
    consortium: Consortium,
    console: Console,
    *,
    model: str,
    plan: Path | None,
    job_id: str | None,
    watching: bool,
    **options: Any,
) -> int:
    """Plan, seal and submit a training job, or an audit of one; prints its id."""
    asked = read_plan(plan, options)
    job = await consortium.train(model=load_model(model), job_id=job_id, **asked.arguments)
    click.echo(job.id)
    return _outcome(await job.watch(console=console)) if watching else 0


@jobs.command()
@click.argument("job_id")
@connected
async def status(consortium: Consortium, console: Console, job_id: str) -> int:
    """Where a job is, and what each key broker said."""
    job = await consortium.job(job_id)
    found = await job.status()
    console.print(_table([found]))
    for name, words in job.awaited(found).items():
        console.print(f"{name}: {words}", markup=False)
    for name, words in job.refusals(found).items():
        console.print(f"{name} refused: {words}", markup=False)
    return _outcome(found)


@jobs.command()
@click.argument("job_id")
@connected
async def watch(consortium: Consortium, console: Console, job_id: str) -> int:
    """Follow a job until it ends."""
    return _outcome(await (await consortium.job(job_id)).watch(console=console))


@jobs.command()
@click.argument("job_id")
@connected
async def cancel(consortium: Consortium, console: Console, job_id: str) -> None:
    """Call a job off."""
    console.print(_table([await (await consortium.job(job_id)).cancel()]))


@jobs.command("list")
@connected
async def list_(consortium: Consortium, console: Console) -> None:
    """The jobs that your member submitted, newest first."""
    console.print(_table(list(await consortium.jobs())))


def load_model(where: str) -> Any:
    """What the user's own function in the user's own file returns. Raises :class:`SetupError`.

    This runs the file, as ``python FILE.py`` would: it is the user's own code on the user's own machine.
    """
    file, _, function = where.rpartition(":")
    path = Path(file)
    if not function.isidentifier() or path.suffix != ".py" or not path.is_file():
        raise SetupError(f"--model: expected FILE.py:FUNCTION of a file that exists, got {where!r}")
    spec = importlib.util.spec_from_file_location(f"_casemate_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SetupError(f"--model: {path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        return getattr(module, function)()
    except CasemateError:
        raise
    except Exception as error:
        raise SetupError(f"--model: {where} failed: {type(error).__name__}: {error}") from error


def _outcome(found: JobStatus) -> int:
    return 1 if found.state in ("refused", "failed", "cancelled", "expired") else 0


def _table(found: list[JobStatus]) -> Table:
    table = Table()
    for column in ("job", "state", "step", "planned ε", "attempt", "key brokers", "reason", "created"):
        table.add_column(column)
    for job in found:
        approvals = ", ".join(f"{printable(a.key_broker)} {printable(a.verdict)}" for a in job.approvals)
        table.add_row(
            job.job_id,
            job.state,
            f"{job.step}/{job.steps}" if job.step is not None else "",
            f"{job.epsilon:.3f}" if job.epsilon is not None else "",
            str(job.attempt),
            approvals,
            printable(job.reason or ""),
            datetime.fromtimestamp(job.created / 1000, UTC).isoformat(timespec="seconds"),
        )
    return table
