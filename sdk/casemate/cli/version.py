"""``casemate version``."""

from __future__ import annotations

from importlib.metadata import version as _installed

import click


@click.command()
def version() -> None:
    """Show the installed version."""
    click.echo(f"casemate {_installed('casemate')}")
