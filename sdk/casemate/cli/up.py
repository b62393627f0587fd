"""``casemate up`` and ``casemate down``: a whole consortium on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from casemate_schemas.errors import SetupError, UnavailableError
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from casemate.local_stack.layout import Layout

DEFAULT_FOLDER: Final = Path(".casemate")
DEFAULT_MEMBERS: Final = ("north", "south", "east", "university")
_START_TIMEOUT_S: Final = 120.0
_STOP_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.05

folder_option = click.option(
    "--dir", "folder", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_FOLDER, show_default=True
)


@click.command()
@folder_option
@click.option("--workers", type=click.IntRange(1, 16), default=2, show_default=True, help="How many workers to run.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="The gateway's port; 0 takes a free one.")
@click.option(
    "--worker-python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another Python for the workers, as their image: docs/verify-it-yourself.md.",
)
@click.option(
    "--hosted",
    multiple=True,
    metavar="MEMBER",
    help="Run this member's key broker in a SIMULATED enclave, on the first start. It protects nothing.",
)
@click.option("--detach", is_flag=True, help="Run in the background, until 'casemate down'.")
def up(
    folder: Path, workers: int, port: int, worker_python: Path | None, hosted: tuple[str, ...], detach: bool
) -> None:
    """Start a local consortium (SIMULATED attestation) and keep it running.

    The first start founds it: three hospitals (north, south, east) and a university, each with a steward
    and admin (sam), the university with a scientist (clara). Later starts go on with the same keys, data and ledgers.
    """
    from casemate.local_stack.founding import found
    from casemate.local_stack.layout import Layout
    from casemate.local_stack.supervisor import running_supervisor

    layout = Layout(folder.resolve())
    if running_supervisor(layout) is not None:
        raise SetupError(f"the stack in {folder} is running already")
    if not layout.facts_file.exists():
        people = {f"sam@{name}": ("steward", "admin") for name in DEFAULT_MEMBERS} | {
            "clara@university": ("scientist",)
        }
        found(layout.folder, members=DEFAULT_MEMBERS, people=people, workers=workers, hosted=hosted)  # type: ignore[arg-type]
    elif hosted and set(hosted) != set(layout.read_facts().hosted):
        raise SetupError("which key brokers are hosted is settled when a stack is founded: start another folder")
    if worker_python is not None and layout.read_facts().hosted:
        raise SetupError("with --worker-python the simulated chip measures no key broker: it does not go with --hosted")
    if detach:
        _start_in_background(layout, port, worker_python)
    else:
        asyncio.run(_run(layout, port, worker_python))


@click.command()
@folder_option
def down(folder: Path) -> None:
    """End the local consortium that 'casemate up' started; its data stays."""
    from casemate.local_stack.layout import Layout
    from casemate.local_stack.supervisor import process_start, running_supervisor

    pid = running_supervisor(Layout(folder.resolve()))
    if pid is None:
        raise SetupError(f"no stack runs in {folder}")
    started = process_start(pid)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while process_start(pid) == started:
        if time.monotonic() > deadline:
            raise UnavailableError(f"the stack in {folder} did not end within {_STOP_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)
    Console().print(f"The stack in {folder} has ended.")


async def _run(layout: Layout, port: int, worker_python: Path | None) -> None:
    from casemate.local_stack.supervisor import LocalStack, run_until_told

    python = (
        None if worker_python is None else worker_python.absolute()
    )  # a symbolic link says which environment it is of
    async with LocalStack(layout, gateway_port=port, worker_python=python) as stack:
        show(layout)
        Console().print("Ctrl-C, or 'casemate down' elsewhere, ends it.")
        await run_until_told(stack)


def show(layout: Layout) -> None:
    """Where the stack is, and who may talk to it."""
    facts = layout.read_facts()
    table = Table(title="Local consortium: SIMULATED attestation, real everything else", title_justify="left")
    table.add_column("what")
    table.add_column("where")
    table.add_row("gateway", facts.url)
    table.add_row("consortium", facts.consortium)
    for person in facts.people:
        table.add_row(person, str(layout.person_keys(person)))
    for member in facts.hosted:
        table.add_row(f"key broker of {member}", "in an enclave (SIMULATED: it protects nothing)")
    table.add_row("logs", str(layout.logs))
    console = Console()
    console.print(table)
    if facts.people:
        keys = layout.person_keys(facts.people[-1])
        console.print(f"export CASEMATE_URL={facts.url} CASEMATE_IDENTITY={keys}", soft_wrap=True)
        console.print("casemate datasets list", soft_wrap=True)


def _start_in_background(layout: Layout, port: int, worker_python: Path | None) -> None:
    from casemate.local_stack.supervisor import running_supervisor

    command = [sys.executable, "-I", "-m", "casemate", "up", "--dir", str(layout.folder), "--port", str(port)]
    if worker_python is not None:
        command += ["--worker-python", str(worker_python.absolute())]
    with (layout.logs / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=layout.folder
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while running_supervisor(layout) is None:
        if process.poll() is not None:
            raise SetupError(f"the stack did not start: see {layout.logs / 'supervisor.log'}")
        if time.monotonic() > deadline:
            process.terminate()
            raise UnavailableError(f"the stack was not up within {_START_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)
    show(layout)
    Console().print(f"It runs in the background; 'casemate down --dir {layout.folder}' ends it.")
