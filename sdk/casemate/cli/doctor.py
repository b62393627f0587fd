"""``casemate doctor``: what is wrong with an operator's files and servers, and what mends it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Final

import click

from casemate._http import printable
from casemate.doctor.examination import examine
from casemate.doctor.findings import Finding
from casemate.doctor.programs import Given
from casemate.identity import now_ms

_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--gateway", "gateways", multiple=True, type=_FILE, help="A gateway's settings.")
@click.option("--worker", "workers", multiple=True, type=_FILE, help="A worker's settings.")
@click.option("--key-broker", "key_brokers", multiple=True, type=_FILE, help="A key broker's settings.")
@click.option("--nats-config", "nats_configs", multiple=True, type=_FILE, help="A NATS server's configuration (JSON).")
@click.option("--offline", is_flag=True, help="Look at files alone, and ask no server.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def doctor(
    folder: Path | None,
    gateways: tuple[Path, ...],
    workers: tuple[Path, ...],
    key_brokers: tuple[Path, ...],
    nats_configs: tuple[Path, ...],
    offline: bool,
    as_json: bool,
) -> int:
    """Check settings, keys, certificates and NATS before anyone relies on them. Exits 1 if something is wrong.

    FOLDER is one that 'casemate consortium init' or 'casemate up' wrote. Run it as the user that runs the programs.
    """
    given = Given(nats_configs=list(nats_configs))
    given.settings += [("gateway", path) for path in gateways]
    given.settings += [("worker", path) for path in workers]
    given.settings += [("key-broker", path) for path in key_brokers]
    if folder is not None:
        given.add_folder(folder)
    if not given.settings and not given.nats_configs:
        raise click.UsageError("name settings files, NATS configurations, or a folder that has some")
    findings = asyncio.run(_show(given, live=not offline, as_json=as_json))
    wrong = sum(not finding.ok for finding in findings)
    if as_json:
        click.echo(json.dumps({"wrong": wrong, "findings": [finding.as_json() for finding in findings]}))
    else:
        click.echo(f"{wrong} wrong, {len(findings) - wrong} ok")
    return 1 if wrong else 0


async def _show(given: Given, *, live: bool, as_json: bool) -> list[Finding]:
    findings = []
    async for finding in examine(given, clock_ms=now_ms, live=live):
        findings.append(finding)
        if not as_json:
            click.echo(printable(str(finding)))
    return findings
