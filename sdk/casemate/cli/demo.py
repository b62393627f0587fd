"""``casemate demo``: everything on this machine, once, in under a minute."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from casemate_schemas.errors import CasemateError, SetupError
from rich.console import Console

if TYPE_CHECKING:
    from casemate.demo.scenario import Outcome

DEFAULT_FOLDER: Final = Path(".casemate-demo")


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the outcome as data.")
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_FOLDER, show_default=True
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Which records are held out."
)
@click.option("--workers", type=click.IntRange(1, 8), default=2, show_default=True)
@click.option("--keep", is_flag=True, help="Keep the folder with keys, ledgers, NATS' store and logs.")
def demo(json_file: Path | None, folder: Path, seed: int, workers: int, keep: bool) -> None:
    """Three hospitals train one model on real patient records (SIMULATED attestation).

    Everything runs on this machine and inside one folder, which is removed at the end.
    """
    from casemate.datasets import SIMULATED
    from casemate.demo.report import as_json, show

    if folder.exists():
        raise SetupError(f"{folder} exists: remove it, or choose another with --dir")
    console = Console()
    console.print(f"[bold yellow]{SIMULATED}[/]. NATS, encryption, licences, ledgers and privacy are real.")
    try:
        outcome = asyncio.run(_interruptible(folder.resolve(), seed=seed, workers=workers, console=console))
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    show(outcome, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(outcome), indent=2) + "\n")


async def _interruptible(folder: Path, **options: Any) -> Outcome:
    """Runs the scenario; Ctrl-C and SIGTERM end it in order, programs first."""
    from casemate.demo.scenario import run

    task = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await run(folder, **options)
    except asyncio.CancelledError as error:
        raise Interrupted("interrupted; every program was ended") from error


class Interrupted(CasemateError):
    """The user pressed Ctrl-C."""

    reason = "interrupted"
