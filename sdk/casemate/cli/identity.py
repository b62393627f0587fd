"""``casemate identity revoke``: what a member says about its people's keys."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console

from casemate.client import Consortium
from casemate.identity import load_keys, now_ms

from .common import connected


@click.group()
def identity() -> None:
    """Look after the people who act for your member."""


@identity.command()
@click.argument("person")
@click.option(
    "--key",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The member's private key file.",
)
@click.option(
    "--before",
    type=click.DateTime(["%Y-%m-%dT%H:%M:%SZ"]),
    help="Delegations that begin before this time (UTC) end; now if not given. A later one covers delegations made ahead.",
)
@connected
async def revoke(consortium: Consortium, console: Console, person: str, *, key: Path, before: datetime | None) -> None:
    """End every delegation that PERSON of your member has: a lost key, or one who left. It cannot be taken back.

    They go on, if they may, under a new delegation that begins later.
    """
    at = now_ms() if before is None else int(before.replace(tzinfo=UTC).timestamp() * 1000)
    revoked = await consortium.revoke(person, member_keys=load_keys(key), before=at)
    when = datetime.fromtimestamp(revoked.before / 1000, UTC).isoformat(timespec="seconds")
    console.print(
        f"delegations of {revoked.person}@{revoked.member} that begin before {when} are revoked", highlight=False
    )
