"""``casemate consortium init|show|new-member|amend|sign|publish``: what the members agreed on, and how they change it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final, get_args

import click
from casemate_messaging.files import read_file
from casemate_schemas.attestation_policy import Product, TcbVersion
from casemate_schemas.codec import M, WireModel, decode, encode
from casemate_schemas.consortium import Member
from casemate_schemas.errors import MissingExtraError, ParameterError, SetupError
from casemate_schemas.keyring import KeyRing
from rich.console import Console
from rich.table import Table

from casemate._http import printable
from casemate.amendments import (
    Proposal,
    combine,
    complete,
    differences,
    propose,
    sign_proposal,
    with_floor,
    with_measurements,
    with_member,
)
from casemate.client import Consortium
from casemate.entry import is_missing_extra, missing_extra_line
from casemate.hosting import with_hosted_key_broker, with_key_broker_measurement
from casemate.identity import load_keys, now_ms, save_keys
from casemate.parameters import parameter_errors

from .common import connected

_MAX_FILE_BYTES: Final = 512 << 10
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW_FILE: Final = click.Path(dir_okay=False, path_type=Path)


@click.group()
def consortium() -> None:
    """Show what the members agreed on, and change it by their quorum."""


@consortium.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
@connected
async def show(found: Consortium, console: Console, *, as_json: bool) -> None:
    """The newest manifest: members, key brokers, and which workers are accepted."""
    if as_json:
        verified = found.verified
        facts = {"id": verified.id.hex(), "digest": verified.digest.hex(), "simulation": found.simulation}
        click.echo(json.dumps(facts | {"manifest": _json(found.manifest.model_dump())}))
        return
    _print_manifest(console, found)


@consortium.command()
@click.argument("plan", type=_FILE)
@click.option("--out", required=True, type=_NEW_FILE, help="A new folder for what is written.")
def init(plan: Path, out: Path) -> None:
    """Write what PLAN (TOML) needs: NATS configurations, a NATS user for each program, and its settings."""
    try:
        from casemate.deployment import read_plan, write_deployment
    except ImportError as error:
        if not is_missing_extra(error):
            raise
        raise MissingExtraError(missing_extra_line("gateway")) from error
    for folder in write_deployment(read_plan(plan), out):
        click.echo(f"{folder}")
    click.echo(
        "Bring each folder to the machine it is for, and nowhere else: nats.seed is a secret. Then: casemate doctor"
    )


@consortium.command("new-member")
@click.argument("name")
@click.option("--key", required=True, type=_NEW_FILE, help="Where to write the new member's private keys.")
@click.option("--out", required=True, type=_NEW_FILE, help="Where to write the public part, for 'amend --add-member'.")
def new_member(name: str, key: Path, out: Path) -> None:
    """Make keys for a member to be, NAME. The private ones never leave its machine."""
    keys = KeyRing.generate()
    with parameter_errors("member"):
        member = Member(id=name, name=name, signing_key=keys.signing.public, sealing_key=keys.sealing.public)
    save_keys(key, keys)
    _write(out, member)


@consortium.command()
@click.option("--add-measurement", "added", multiple=True, metavar="HEX", help="Accept this worker image as well.")
@click.option("--remove-measurement", "removed", multiple=True, metavar="HEX", help="Accept it no longer.")
@click.option(
    "--min-tcb", "floors", multiple=True, metavar="PRODUCT:PART=N,…", help="E.g. Milan:bl=4,snp=24,ucode=219."
)
@click.option("--add-member", "member_file", type=_FILE, help="The file that 'new-member' wrote.")
@click.option("--served-by", metavar="KEY_BROKER", help="Which key broker serves the new member.")
@click.option(
    "--add-key-broker-measurement", "key_broker_images", multiple=True, metavar="HEX", help="Accept this image too."
)
@click.option("--host", "hosted", multiple=True, metavar="KEY_BROKER", help="Move it to its enclave, attested now.")
@click.option("--out", required=True, type=_NEW_FILE, help="Where to write the proposal.")
@connected
async def amend(
    found: Consortium,
    console: Console,
    *,
    added: tuple[str, ...],
    removed: tuple[str, ...],
    floors: tuple[str, ...],
    member_file: Path | None,
    served_by: str | None,
    key_broker_images: tuple[str, ...],
    hosted: tuple[str, ...],
    out: Path,
) -> None:
    """Write a proposal: the newest manifest with some things changed, for the members to sign."""
    manifest = found.manifest
    policy = with_measurements(
        manifest.attestation, added=map(_measurement, added), removed=list(map(_measurement, removed))
    )
    for floor in floors:
        policy = with_floor(policy, *_floor(floor))
    for image in key_broker_images:
        policy = with_key_broker_measurement(policy, _measurement(image))
    changed: dict[str, object] = {"attestation": policy}
    if (member_file is None) != (served_by is None):
        raise click.UsageError("--add-member and --served-by go together")
    if member_file is not None and served_by is not None:
        changed |= with_member(manifest, _read(Member, member_file), served_by=served_by)
    for name in hosted:
        attested = await found.attest_key_broker(name, policy=policy)
        changed |= with_hosted_key_broker(manifest.model_copy(update=changed), attested.claims)
    proposal = propose(found.verified, created=now_ms(), **changed)
    _print_changes(console, found, proposal)
    _write(out, proposal)


@consortium.command()
@click.argument("proposal", type=_FILE)
@click.option("--key", required=True, type=_FILE, help="The member's private key file.")
@connected
async def sign(found: Consortium, console: Console, proposal: Path, *, key: Path) -> None:
    """Sign PROPOSAL for a member, after showing what it changes. Members may sign one file in turn, or copies of it."""
    offered = _read(Proposal, proposal)
    _print_changes(console, found, offered)
    signed, member = sign_proposal(offered, found.verified, load_keys(key))
    _write(proposal, signed, replace=True)
    count, quorum = len(signed.signatures), found.manifest.quorum
    console.print(f"signed by {member}: {count} of {quorum} signatures", highlight=False)


@consortium.command()
@click.argument("proposals", nargs=-1, required=True, type=_FILE)
@connected
async def publish(found: Consortium, console: Console, proposals: tuple[Path, ...]) -> None:
    """Publish a manifest that a quorum has signed (in one of PROPOSALS, or in copies of it). For admins."""
    offered = combine([_read(Proposal, path) for path in proposals])
    published = await found.publish_manifest(complete(offered, found.verified))
    console.print(f"manifest {published.number} is published: {published.digest}", highlight=False)


def _print_manifest(console: Console, found: Consortium) -> None:
    manifest, policy = found.manifest, found.manifest.attestation
    serving = {member: broker.id for broker in manifest.key_brokers for member in broker.serves}
    console.print(printable(manifest.name), markup=False, highlight=False)
    table = Table(show_header=False)
    table.add_row("consortium", found.id)
    table.add_row("manifest", f"{manifest.number}, {found.verified.digest.hex()}")
    table.add_row("quorum", f"{manifest.quorum} of {len(manifest.members)} members")
    for member in manifest.members:
        table.add_row(f"member {member.id}", f"key broker {serving[member.id]}")
    for measurement in policy.measurements:
        table.add_row("measurement", measurement.hex())
    for measurement in policy.key_broker_measurements:
        table.add_row("key broker image", measurement.hex())
    for accepted in policy.products:
        floor = ", ".join(f"{part} {least}" for part, least in dict(accepted.min_tcb).items())
        table.add_row(accepted.product, f"TCB at least {floor}")
    console.print(table)


def _print_changes(console: Console, found: Consortium, proposal: Proposal) -> None:
    """What a proposal changes against the manifest that was verified here, in full."""
    after = proposal.open(found.verified)
    console.print(f"manifest {after.number} would change:", highlight=False)
    for line in differences(found.manifest, after) or ["nothing"]:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _measurement(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise ParameterError(f"expected a measurement of 96 hexadecimal digits, got {printable(text)!r}") from error


def _floor(text: str) -> tuple[Product, TcbVersion]:
    product, _, parts = text.partition(":")
    try:
        numbers = {name: int(number) for name, _, number in (part.partition("=") for part in parts.split(","))}
    except ValueError as error:
        raise ParameterError(f"expected PRODUCT:PART=N,…, got {printable(text)!r}") from error
    for known in get_args(Product):
        if known == product:
            with parameter_errors("TCB"):
                return known, TcbVersion(**numbers)
    raise ParameterError(f"expected one of {', '.join(get_args(Product))}, got {printable(product)!r}")


def _json(value: object) -> object:
    """Bytes as hexadecimal digits."""
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value


def _read(model: type[M], path: Path) -> M:
    return decode(model, read_file(path, _MAX_FILE_BYTES), max_bytes=_MAX_FILE_BYTES)


def _write(path: Path, message: WireModel, *, replace: bool = False) -> None:
    target = path.with_name(f".{path.name}.new") if replace else path
    try:
        with target.open("wb" if replace else "xb") as file:
            file.write(encode(message))
        if replace:
            os.replace(target, path)
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}") from error
