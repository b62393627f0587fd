"""Expected measurements and reference values, at the command line and below it."""

from __future__ import annotations

import hashlib
import struct
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from casemate import measure as measure_module
from casemate.cli.attestation import attestation
from casemate.identity import save_keys
from casemate.measure import Image, measure_image, measure_simulated
from casemate_attestation.simulated_chip import measure_worker_image
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import (
    MalformedError,
    MissingExtraError,
    ParameterError,
    SetupError,
    SignatureError,
)
from casemate_schemas.keyring import KeyRing
from casemate_schemas.reference_value import Launch, ReferenceValue, verify_reference_value
from casemate_schemas.signatures import Signed, sign
from click.testing import CliRunner, Result
from pydantic import ValidationError
from sevsnpmeasure import cli as library
from support.command_line import casemate
from support.key_brokers import MEASUREMENT, Bench

REVISION = "ab" * 20
LAUNCH = Launch(vcpus=2, vcpu_type="EPYC-Milan", guest_features=0x21, vmm="qemu", command_line="console=ttyS0")


def entry(guid: str, data: bytes) -> bytes:
    """One row of the table that ends 32 bytes before the end of an OVMF image."""
    return data + struct.pack("<H", len(data) + 18) + uuid.UUID(guid).bytes_le


def ovmf(*, kernel_hashes: bool = True, fill: bytes = b"\x90") -> bytes:
    """A firmware of 8 KiB with what SEV needs to know: reset vector, hash table, and its sections' addresses."""
    sections = [(0x800000, 0x2000, 1), (0x80A000, 0x1000, 2), (0x80B000, 0x1000, 3)]
    sections += [(0x80C000, 0x1000, 0x10)] if kernel_hashes else []
    metadata = b"ASEV" + struct.pack("<III", 16 + 12 * len(sections), 1, len(sections))
    metadata += b"".join(struct.pack("<III", *section) for section in sections)
    table = entry("dc886566-984a-4798-a75e-5585a7bf67cc", struct.pack("<I", 0x1000))
    table += entry("7255371f-3a3b-4b04-927b-1da6efa8d454", struct.pack("<II", 0x80CC00, 0x400))
    table += entry("00f771de-1a7e-4fcb-890e-68c77e2fb44e", struct.pack("<I", 0xFFFFF0D0))
    footer = struct.pack("<H", len(table) + 18) + uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    image = bytearray(fill * 0x2000)
    image[0x1000 : 0x1000 + len(metadata)] = metadata
    end = 0x2000 - 32
    image[end - len(table) - len(footer) : end] = table + footer
    return bytes(image)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    files = {"ovmf": ovmf(), "kernel": b"a kernel", "initrd": b"an initrd"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return Image(tmp_path / "ovmf", tmp_path / "kernel", tmp_path / "initrd")


def measured(image: Image, launch: Launch = LAUNCH) -> ReferenceValue:
    return measure_image(image, launch, revision=REVISION, created=1)


def by_the_library(image: Image, launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """What its own command prints."""
    arguments = ["--mode", "snp", "--vcpus", str(launch.vcpus), "--vcpu-type", launch.vcpu_type]
    arguments += ["--guest-features", hex(launch.guest_features), "--ovmf", str(image.ovmf)]
    arguments += ["--vmm-type", {"qemu": "QEMU", "ec2": "ec2", "gce": "gce"}[launch.vmm]]
    if image.kernel is not None:
        arguments += ["--kernel", str(image.kernel), "--append", launch.command_line or ""]
    if image.initrd is not None:
        arguments += ["--initrd", str(image.initrd)]
    monkeypatch.setattr(sys, "argv", ["sev-snp-measure", *arguments])
    capsys.readouterr()
    assert library.main() == 0
    return str(capsys.readouterr().out.strip())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"vcpus": 1},
        {"vcpu_type": "EPYC-Genoa"},
        {"guest_features": 1},
        {"vmm": "ec2"},
        {"vmm": "gce"},
        {"command_line": ""},
    ],
)
def test_a_measurement_is_the_librarys_own(
    image: Image, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = LAUNCH.model_copy(update=changed)
    value = measured(image, launch)
    assert value.measurement.hex() == by_the_library(image, launch, monkeypatch, capsys)
    assert (value.measurement != measured(image).measurement) == bool(changed)


def test_firmware_alone(image: Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    alone, launch = Image(image.ovmf), LAUNCH.model_copy(update={"command_line": None})
    value = measured(alone, launch)
    assert value.measurement.hex() == by_the_library(alone, launch, monkeypatch, capsys)
    assert [item.name for item in value.inputs] == ["ovmf"]


@pytest.mark.parametrize("part", ["ovmf", "kernel", "initrd"])
def test_one_changed_byte_of_any_file_is_another_measurement_and_another_digest(image: Image, part: str) -> None:
    before = measured(image)
    path: Path = getattr(image, part)
    path.write_bytes(b"\x91" + path.read_bytes()[1:])
    after = measured(image)
    assert after.measurement != before.measurement
    changed = [b.name for a, b in zip(before.inputs, after.inputs, strict=True) if a != b]
    assert changed == [part]
    assert after.inputs[-1].sha384 == hashlib.sha384((image.initrd or path).read_bytes()).digest()


def test_images_that_cannot_be_measured(image: Image) -> None:
    with pytest.raises(ParameterError, match="with a kernel only"):
        measured(replace(image, kernel=None))
    with pytest.raises(ParameterError, match="its command line is measured"):
        measured(image, LAUNCH.model_copy(update={"command_line": None}))
    with pytest.raises(ParameterError, match="vCPU type of EPYC"):
        measured(image, LAUNCH.model_copy(update={"vcpu_type": "Xeon"}))
    with pytest.raises(SetupError, match="cannot read"):
        measured(replace(image, initrd=image.ovmf.parent / "nothing"))
    for content in (b"", b"short", ovmf(kernel_hashes=False), ovmf().replace(b"ASEV", b"ASEW")):
        image.ovmf.write_bytes(content)
        with pytest.raises(MalformedError, match="cannot be measured"):
            measured(image)


def test_firmware_over_the_bound_is_not_read(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "MAX_OVMF_BYTES", 8191)
    with pytest.raises(SetupError, match="at most 8191 bytes"):
        measured(image)


def test_without_the_library_it_says_what_to_install(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sevsnpmeasure.guest", None)
    with pytest.raises(MissingExtraError, match=r"casemate\[measure\]"):
        measured(image)


def test_the_simulated_image_is_what_the_simulated_chip_measures() -> None:
    value = measure_simulated(created=1)
    assert value.kind == "simulated"
    assert value.measurement == measure_worker_image()
    assert "casemate_worker" in [item.name for item in value.inputs]


# --- reference values -------------------------------------------------------------------------------------------------


def reference(**changed: Any) -> ReferenceValue:
    return measure_simulated(created=1).model_copy(update={"measurement": MEASUREMENT, **changed})


def test_a_members_word_and_nobody_elses(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    manifest = bench.consortium.manifest
    signed = sign(reference(), bench.members["north"].signing)
    value, member = verify_reference_value(signed, manifest)
    assert (value, member.id) == (reference(), "north")
    with pytest.raises(SignatureError, match="no member"):
        verify_reference_value(sign(reference(), bench.key_brokers["north"].signing), manifest)
    stolen = signed.model_copy(update={"payload": encode(reference(measurement=b"\x4e" * 48))})
    with pytest.raises(SignatureError, match="does not verify"):
        verify_reference_value(stolen, manifest)
    other_kind = signed.model_copy(update={"kind": "terms"})
    with pytest.raises(SignatureError, match="expected a signed reference-value"):
        verify_reference_value(other_kind, manifest)


def test_a_real_value_is_not_for_a_simulated_consortium(tmp_path: Path, image: Image) -> None:
    bench = Bench(tmp_path / "bench")
    with pytest.raises(SignatureError, match="sev-snp one"):
        verify_reference_value(sign(measured(image), bench.members["north"].signing), bench.consortium.manifest)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "sev-snp"},
        {"launch": LAUNCH},
        {"revision": "main"},
        {"inputs": ()},
        {"inputs": measure_simulated(created=1).inputs[:1] * 2},
        {"measurement": bytes(47)},
    ],
)
def test_values_that_say_too_little_or_too_much(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ReferenceValue(**(dict(reference()) | wrong))


# --- the command line -------------------------------------------------------------------------------------------------


def attestation_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(attestation, [str(argument) for argument in arguments])


def test_the_command_prints_a_measurement_for_scripts(image: Image) -> None:
    files = ("--ovmf", image.ovmf, "--kernel", str(image.kernel), "--initrd", str(image.initrd))
    machine = ("--vcpus", 2, "--vcpu-type", "EPYC-Milan", "--guest-features", "0x21", "--revision", REVISION)
    result = attestation_command("measure", *files, "--command-line", "console=ttyS0", *map(str, machine))
    assert result.stdout.strip() == measured(image).measurement.hex(), result.output


def test_the_command_says_simulated(image: Image) -> None:
    result = attestation_command("measure", "--simulated")
    assert result.stdout.strip() == measure_worker_image().hex()
    assert "SIMULATED" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--simulated", "--vcpus", "1"),
        ("--simulated", "--out", "x"),
        ("--ovmf", __file__, "--vcpus", "1"),
        ("--ovmf", __file__, "--revision", REVISION),
    ],
)
def test_arguments_that_do_not_go_together(arguments: tuple[str, ...]) -> None:
    assert attestation_command("measure", *arguments).exit_code == 2


def test_a_branch_is_no_revision(capsys: pytest.CaptureFixture[str]) -> None:
    assert casemate("attestation", "measure", "--simulated", "--revision", "main") == 1
    assert "revision" in capsys.readouterr().err


def test_a_reference_value_from_making_to_checking(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "bench")
    keys, chain, file = tmp_path / "north.key", tmp_path / "manifest", tmp_path / "worker.reference"
    save_keys(keys, bench.members["north"])
    chain.write_bytes(encode(bench.chain))
    made = attestation_command("measure", "--simulated", "--revision", REVISION, "--sign-with", keys, "--out", file)
    assert made.exit_code == 0, made.output

    shown = attestation_command("reference", "show", file).stdout
    for text in ("SIMULATED", measure_worker_image().hex(), REVISION, "casemate_worker", "not verified"):
        assert text in shown

    unlisted = attestation_command("reference", "verify", file, "--manifest", chain)
    assert (unlisted.exit_code, "✗ not listed in manifest 1" in unlisted.stdout) == (1, True)
    file.write_bytes(encode(sign(reference(), bench.members["north"].signing)))
    listed = attestation_command(
        "reference", "verify", file, "--manifest", chain, "--consortium", bench.consortium.id.hex()
    )
    assert listed.exit_code == 0, listed.output
    assert "✓ signed by member north" in listed.stdout
    assert "✓ listed in manifest 1\n" in listed.stdout

    signed = decode(Signed, file.read_bytes())
    file.write_bytes(encode(sign(signed.peek(ReferenceValue), KeyRing.generate().signing)))
    stranger = attestation_command("reference", "verify", file, "--manifest", chain)
    assert isinstance(stranger.exception, SignatureError)
