"""``casemate approvals list|show|approve|deny``: the jobs that wait for people."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import click
from casemate_schemas.job import Plan
from rich.console import Console
from rich.table import Table

from casemate._http import printable
from casemate.approvals import ApprovalRequest, Decision, PendingApprovals
from casemate.client import Consortium

from .common import connected

_JOB = click.argument("job")
_YES = click.option("--yes", is_flag=True, help="Do not ask; for scripts.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


@click.group()
def approvals() -> None:
    """The jobs that wait for people's approval. For approvers, and for stewards and admins of the data's owner.

    JOB is the id of a job that waits, or the digest of its terms.
    """


@approvals.command("list")
@_JSON
@connected
async def list_(consortium: Consortium, console: Console, *, as_json: bool) -> None:
    """The jobs that wait, those first whose deadline comes first."""
    found = await consortium.approvals()
    if as_json:
        rows = [{"key_broker": name} | _plain(item.model_dump()) for name, item in found]
        click.echo(json.dumps({"pending": rows, "unavailable": dict(found.unavailable)}))
        return
    console.print(_table(found))
    for name, why in found.unavailable.items():
        console.print(f"no answer from key broker {name}: {printable(why)}", markup=False)


@approvals.command()
@_JOB
@_JSON
@connected
async def show(consortium: Consortium, console: Console, job: str, *, as_json: bool) -> None:
    """All about one job: who asks, for what, at which price, and who has approved."""
    _print(console, await consortium.approval(job), as_json)


@approvals.command()
@_JOB
@_YES
@_JSON
@connected
async def approve(consortium: Consortium, console: Console, job: str, *, yes: bool, as_json: bool) -> None:
    """Approve a job, after showing what that means."""
    await _decide(consortium, console, job, "approve", yes, as_json)


@approvals.command()
@_JOB
@_YES
@_JSON
@connected
async def deny(consortium: Consortium, console: Console, job: str, *, yes: bool, as_json: bool) -> None:
    """Deny a job, which ends it for ever."""
    await _decide(consortium, console, job, "deny", yes, as_json)


async def _decide(
    consortium: Consortium, console: Console, job: str, decision: Decision, yes: bool, as_json: bool
) -> None:
    requests = await consortium.approval(job)
    if not yes:
        _print(console, requests, as_json=False)
        if not click.confirm(f"{decision.capitalize()} it as {consortium.person}?", err=as_json):
            raise click.ClickException("nothing was signed")
    say = consortium.approve if decision == "approve" else consortium.deny
    counted = [request for request in requests if request.licences] or requests
    decided = tuple([await say(request) for request in counted])
    _print(console, decided, as_json)


def _print(console: Console, requests: tuple[ApprovalRequest, ...], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([_facts(request) for request in requests]))
        return
    for request in requests:
        console.print(str(request), markup=False, highlight=False, soft_wrap=True)


def _facts(request: ApprovalRequest) -> dict[str, Any]:
    terms, shown = request.terms.terms, request.shown
    return {
        "key_broker": request.key_broker,
        "job_id": request.job_id,
        "terms": request.terms.digest.hex(),
        "state": request.state,
        "submitter": f"{request.terms.submitter.person}@{request.terms.submitter.member}",
        "purpose": terms.plan.purpose,
        "datasets": [use.dataset for use in terms.plan.datasets],
        "deadline": terms.deadline,
        "plan": _plain(_asked(terms.plan)),
        "uses": [_plain(use.model_dump(exclude={"licence"})) for use in shown.uses],
        "given": [_plain(given.model_dump()) for given in shown.given],
        "text": str(request),
    }


def _asked(plan: Plan) -> dict[str, Any]:
    """All that changes what the job costs in privacy, or what leaves."""
    training = plan.training
    return {
        "kind": plan.kind,
        "privacy": plan.privacy.model_dump(),
        "mechanism": training.mechanism,
        "clipping_norm": training.clipping_norm,
        "noise": [{"steps": steps, "noise_multiplier": sigma} for steps, sigma in training.noise_phases],
        "sample_rates": {use.dataset: str(use.sample_rate.fraction) for use in plan.datasets},
        "subjects": {use.dataset: use.subjects.model_dump() for use in plan.datasets if use.subjects is not None},
        "padded_batch": training.padded_batch,
        "averaging": training.averaging and training.averaging.model_dump(),
        "metrics": plan.metrics and plan.metrics.model_dump(),
        "audit": plan.audit and plan.audit.model_dump(),
        "release": list(plan.release),
    }


def _table(found: PendingApprovals) -> Table:
    table = Table()
    for column in ("job", "key broker", "who asks", "purpose", "data", "until"):
        table.add_column(column)
    for name, item in found:
        table.add_row(
            item.job_id,
            name,
            printable(item.submitter),
            item.purpose,
            ", ".join(item.datasets),
            datetime.fromtimestamp(item.deadline / 1000, UTC).isoformat(timespec="seconds"),
        )
    return table


def _plain(value: Any) -> Any:
    """Bytes as hexadecimal digits."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
