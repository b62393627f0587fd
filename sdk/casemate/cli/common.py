"""What the commands share: where the gateway is, who asks, and the word that must stand on every simulated screen."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from casemate_schemas.errors import SetupError
from rich.console import Console

from casemate.client import Consortium, connect

if TYPE_CHECKING:
    from casemate_privacy.recorded import RecordedEvents

_T = TypeVar("_T")

SIMULATED = "[bold white on red] SIMULATED [/] attestation: no real chip protects this consortium"


def connected(command: Callable[..., Awaitable[int | None]]) -> Callable[..., int | None]:
    """Gives a command the connection options, and calls it with ``consortium`` and ``console`` first."""

    @click.option("--url", envvar="CASEMATE_URL", required=True, help="The gateway's URL (CASEMATE_URL).")
    @identity_option
    @click.option(
        "--consortium", "consortium_id", envvar="CASEMATE_CONSORTIUM", help="The consortium's id, to insist on."
    )
    @click.option(
        "--state-dir", envvar="CASEMATE_STATE_DIR", type=click.Path(file_okay=False), help="Where pins are kept."
    )
    @wraps(command)
    def run(
        *args: Any, url: str, identity: str, consortium_id: str | None, state_dir: str | None, **options: Any
    ) -> int | None:
        async def body() -> int | None:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", UserWarning)
                async with connect(url, identity=identity, consortium=consortium_id, state_dir=state_dir) as consortium:
                    console = _greet(consortium, [str(item.message) for item in told], bool(options.get("as_json")))
                    return await command(consortium, console, *args, **options)

        return asyncio.run(body())

    return run


def identity_option(command: Callable[..., _T]) -> Callable[..., _T]:
    """``--identity``, a private key file."""
    option = click.option(
        "--identity",
        envvar="CASEMATE_IDENTITY",
        required=True,
        type=click.Path(exists=True, dir_okay=False),
        help="Your private key file (CASEMATE_IDENTITY).",
    )
    return option(command)


def write_events(events: RecordedEvents, out: str) -> None:
    """For ``casemate epsilon --events``. Raises :class:`SetupError`."""
    try:
        Path(out).write_text(events.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot write to {out}: {error.strerror}") from error
    click.echo(f"{len(events.guarantees)} figures and what they follow from: {out}")


def say_simulated(console: Console, simulation: bool) -> None:
    """The word, in plain sight."""
    if simulation:
        console.print(SIMULATED)


def _greet(consortium: Consortium, told: list[str], as_json: bool) -> Console:
    """What must be known first; beside the output where that is for machines, which are told in it."""
    notices = Console(stderr=True)
    for message in told:
        notices.print(message, style="yellow", markup=False)
    console = Console(width=None if os.isatty(1) else 160)
    say_simulated(notices if as_json else console, consortium.simulation)
    return console
