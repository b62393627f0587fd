"""``casemate attestation measure`` and ``casemate attestation reference``: expected measurements, and who vouches for them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Final, cast

import click
from casemate_attestation.policy_file import read_bounded
from casemate_schemas.codec import MAX_MESSAGE_BYTES, decode, encode
from casemate_schemas.consortium import ConsortiumManifest, ManifestChain, verify_chain
from casemate_schemas.errors import SetupError
from casemate_schemas.reference_value import Launch, ReferenceValue, Vmm, verify_reference_value
from casemate_schemas.signatures import Signed, sign

from casemate.identity import load_keys, now_ms
from casemate.measure import Image, measure_image, measure_simulated
from casemate.parameters import parameter_errors

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_MAX_CHAIN_BYTES: Final = 64 << 20
_SIMULATED: Final = "SIMULATED: the measurement of this Python's worker sources; it says nothing about hardware."


@click.command()
@click.option("--simulated", is_flag=True, help="Measure the worker sources that this Python would import.")
@click.option("--ovmf", type=_FILE, help="The firmware.")
@click.option("--kernel", type=_FILE)
@click.option("--initrd", type=_FILE)
@click.option("--command-line", help="The kernel's, exactly.")
@click.option("--vcpus", type=click.IntRange(1, 4096), help="How many virtual CPUs the guest has.")
@click.option("--vcpu-type", default="EPYC-v4", show_default=True, help="As QEMU names it.")
@click.option("--guest-features", default="0x1", show_default=True, help="SEV_FEATURES, as a number.")
@click.option("--vmm", type=click.Choice(["qemu", "ec2", "gce"]), default="qemu", show_default=True)
@click.option("--revision", metavar="COMMIT", help="The git commit that the image was built from.")
@click.option("--sign-with", type=_FILE, help="A member's private key file, to sign the reference value.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the reference value.")
def measure(
    simulated: bool,
    ovmf: Path | None,
    kernel: Path | None,
    initrd: Path | None,
    command_line: str | None,
    vcpus: int | None,
    vcpu_type: str,
    guest_features: str,
    vmm: str,
    revision: str | None,
    sign_with: Path | None,
    out: Path | None,
) -> None:
    """Print the expected launch measurement of an image; with --out and --sign-with, write a signed reference value."""
    if (sign_with is None) != (out is None):
        raise click.UsageError("--out and --sign-with go together")
    if simulated:
        if ovmf or kernel or initrd or command_line is not None or vcpus:
            raise click.UsageError("--simulated takes no image")
        click.echo(_SIMULATED, err=True)
        with parameter_errors("reference value"):
            value = measure_simulated(created=now_ms(), revision=revision)
    else:
        if ovmf is None or vcpus is None or revision is None:
            raise click.UsageError("expected --ovmf, --vcpus and --revision, or --simulated")
        with parameter_errors("reference value"):
            launch = Launch(
                vcpus=vcpus,
                vcpu_type=vcpu_type,
                guest_features=_number(guest_features),
                vmm=cast(Vmm, vmm),
                command_line=command_line,
            )
            value = measure_image(Image(ovmf, kernel, initrd), launch, revision=revision, created=now_ms())
    if sign_with is not None and out is not None:
        _write(out, encode(sign(value, load_keys(sign_with).signing)))
    click.echo(value.measurement.hex())


@click.group()
def reference() -> None:
    """Show reference values, and verify who signed them."""


@reference.command()
@click.argument("file", type=_FILE)
def show(file: Path) -> None:
    """Print what a reference value says. Who signed it is not checked."""
    signed = _read(file)
    _print(signed.peek(ReferenceValue))
    click.echo(f"signer       {signed.signer.hex()}, not verified")


@reference.command()
@click.argument("file", type=_FILE)
@click.option("--manifest", "manifest_file", type=_FILE, required=True, help="The consortium's manifest chain.")
@click.option("--consortium", metavar="ID", help="The consortium's id, to insist on.")
@click.pass_context
def verify(context: click.Context, file: Path, manifest_file: Path, consortium: str | None) -> None:
    """Check that a member signed a reference value, and that the newest manifest lists its measurement.

    Exits 0 if both hold, 1 if not.
    """
    manifest = _manifest(manifest_file, consortium)
    value, member = verify_reference_value(_read(file), manifest)
    _print(value)
    click.echo(f"✓ signed by member {member.id}")
    listed = value.measurement in manifest.attestation.measurements
    where = f"listed in manifest {manifest.number}"
    click.echo(f"✓ {where}" if listed else f"✗ not {where}: its workers get no keys")
    context.exit(0 if listed else 1)


def _manifest(file: Path, consortium: str | None) -> ConsortiumManifest:
    chain = read_chain(file)
    try:
        expected = None if consortium is None else bytes.fromhex(consortium)
    except ValueError as error:
        raise click.UsageError("--consortium: expected hexadecimal digits") from error
    return verify_chain(chain, consortium=expected).manifest


def read_chain(file: Path) -> ManifestChain:
    """The manifest chain in a file, not verified. Raises :class:`~casemate_schemas.errors.MalformedError`."""
    return decode(ManifestChain, read_bounded(file, _MAX_CHAIN_BYTES), max_bytes=_MAX_CHAIN_BYTES)


def _read(file: Path) -> Signed:
    return decode(Signed, read_bounded(file, MAX_MESSAGE_BYTES))


def _write(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise SetupError(f"cannot write {file}: {error.strerror}") from error


def _print(value: ReferenceValue) -> None:
    if value.kind == "simulated":
        click.echo("SIMULATED: this says nothing about hardware")
    lines = {"kind": value.kind, "measurement": value.measurement.hex(), "revision": value.revision or "none given"}
    lines["created"] = datetime.fromtimestamp(value.created / 1000, UTC).isoformat(timespec="seconds")
    if (launch := value.launch) is not None:
        lines["launch"] = f"{launch.vcpus} × {launch.vcpu_type} on {launch.vmm}, features {launch.guest_features:#x}"
        lines["command line"] = "not measured" if launch.command_line is None else repr(launch.command_line)
    for name, text in lines.items():
        click.echo(f"{name:12} {text}")
    for item in value.inputs:
        click.echo(f"input        {item.name}: SHA-384 {item.sha384.hex()}")


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError as error:
        raise click.UsageError(f"--guest-features: expected a number, got {text!r}") from error
