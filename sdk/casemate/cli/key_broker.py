"""``casemate key-broker``: was its state set back, and may it go on; and, of one in an enclave, what it is and its time."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click
from casemate_schemas.errors import AppraisalError
from casemate_schemas.requests import LedgerHead, StateShown
from rich.console import Console

from casemate.client import Consortium
from casemate.hosting import check_listed

from .common import connected


@click.group("key-broker")
def key_broker() -> None:
    """Your member's key broker. For its stewards and admins."""


@key_broker.command()
@connected
async def state(consortium: Consortium, console: Console) -> int:
    """Where its ledger and audit log stand. Exits 1 if a newer state of it was seen."""
    shown = await consortium.key_broker_state()
    console.print(_described(shown), highlight=False)
    return 0 if shown.ahead is None else 1


@key_broker.command()
@click.option("--confirm", help="The word that would be asked for.")
@connected
async def endorse(consortium: Consortium, console: Console, confirm: str | None) -> None:
    """Let it go on from an older state than was seen. What only the newer one knew is forgotten."""
    shown = await consortium.key_broker_state()
    console.print(_described(shown), highlight=False)
    if shown.ahead is None:
        return
    console.print(
        "Restore the newer state if there is any copy of it. Otherwise its charges are forgotten, and the people in the data "
        "may lose more privacy than any ledger says."
    )
    word = confirm if confirm is not None else click.prompt("Type 'forget' to go on", default="")
    if word != "forget":
        raise click.ClickException("nothing was changed")
    console.print(_described(await consortium.endorse_key_broker(shown.ahead.digest)), highlight=False)


@key_broker.command("rotate-seeds")
@connected
async def rotate_seeds(consortium: Consortium, console: Console) -> None:
    """Draw the seed shares of jobs to come from a new secret. Jobs that were granted keys already go on as before."""
    console.print(f"new jobs are reserved in epoch {await consortium.rotate_seeds()}", highlight=False)


@key_broker.command()
@connected
async def backup(consortium: Consortium, console: Console) -> None:
    """Have it copy its state, as it is now, into its backup folder. The copy holds the keys to your datasets."""
    made = await consortium.back_up_key_broker()
    console.print(f"backup {made.name}: the state up to {made.audit_size} audit entries", highlight=False)


@key_broker.command()
@click.argument("name")
@connected
async def attest(consortium: Consortium, console: Console, name: str) -> int:
    """Have the key broker NAME, which runs in an enclave, show what it is. Exits 1 if the manifest lists other keys."""
    found = await consortium.attest_key_broker(name)
    for check in found.verdict.checks:
        console.print(str(check), markup=False, highlight=False, soft_wrap=True)
    listed = consortium.manifest.key_broker(name)
    if listed.hosted == "enclave":
        try:
            check_listed(listed, found.claims)
        except AppraisalError as error:
            console.print(str(error), markup=False, highlight=False)
            return 1
        console.print("accepted, and the manifest lists the keys that it holds", highlight=False)
    else:
        console.print("accepted; no manifest lists its keys yet: casemate consortium amend --host", highlight=False)
    return 0


@key_broker.command("hand-over")
@click.argument("name")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Where to write the order.")
@connected
async def hand_over(consortium: Consortium, console: Console, name: str, out: Path) -> None:
    """Order the key broker NAME to hand its state over to the enclave that answers in its name now."""
    order = await consortium.order_hand_over(name)
    with out.open("xb") as file:
        file.write(order)
    console.print(f"the order, good for a day: {out}", highlight=False)


@key_broker.command("tell-time")
@connected
async def tell_time(consortium: Consortium, console: Console) -> None:
    """Tell your member's key broker what time it is. In an enclave it never goes back behind that."""
    broker = consortium.manifest.key_broker_of(consortium.person.rpartition("@")[2])
    at = datetime.fromtimestamp(await consortium.tell_time(broker.id) / 1000, UTC)
    console.print(f"{broker.id}: {at:%Y-%m-%d %H:%M:%S} UTC", highlight=False)


def _described(shown: StateShown) -> str:
    lines = [f"{shown.head.key_broker}: {_place(shown.head)}"]
    if shown.ahead is not None:
        lines.append(f"SET BACK: {_place(shown.ahead.peek(LedgerHead))} was seen. It gives no keys.")
    return "\n".join(lines)


def _place(head: LedgerHead) -> str:
    return f"ledger entry {head.entries}, {head.audit_size} audit entries, endorsed {head.branch} times"
