"""What an image should measure to: the expected launch measurement, and the reference value that says so."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from casemate_schemas.errors import MalformedError, MissingExtraError, ParameterError, SetupError
from casemate_schemas.reference_value import Launch, MeasuredInput, ReferenceValue, Vmm

from .entry import missing_extra_line

MAX_OVMF_BYTES: Final = 64 << 20
MAX_FILE_BYTES: Final = 4 << 30

_VMM_NAMES: Final[dict[Vmm, str]] = {"qemu": "QEMU", "ec2": "ec2", "gce": "gce"}


@dataclass(frozen=True)
class Image:
    """The files of a measured image. ``kernel`` None: only the firmware is measured."""

    ovmf: Path
    kernel: Path | None = None
    initrd: Path | None = None


def measure_image(image: Image, launch: Launch, *, revision: str, created: int) -> ReferenceValue:
    """The reference value of an SEV-SNP image, by ``sev-snp-measure``.

    Args:
        revision: the git commit that the image was built from.
        created: Unix ms.

    Raises :class:`MissingExtraError` without that library, :class:`ParameterError` for an unknown vCPU type or parts
    that do not go together, :class:`SetupError` for a file that cannot be read, and :class:`MalformedError` for firmware
    that cannot be measured so.

    Source: AMD 56860, "SNP_LAUNCH_UPDATE" (the page-by-page digest).
    """
    if image.kernel is None and (image.initrd is not None or launch.command_line is not None):
        raise ParameterError("an initrd and a command line are measured with a kernel only")
    if image.kernel is not None and launch.command_line is None:
        raise ParameterError("with a kernel, its command line is measured: give it, be it empty")
    files = {"ovmf": image.ovmf, "kernel": image.kernel, "initrd": image.initrd}
    inputs = tuple(MeasuredInput(name=name, sha384=_digest(name, path)) for name, path in files.items() if path)
    return ReferenceValue(
        kind="sev-snp",
        measurement=_launch_digest(image, launch),
        inputs=inputs,
        launch=launch,
        revision=revision,
        created=created,
    )


def measure_simulated(*, created: int, revision: str | None = None) -> ReferenceValue:
    """The reference value of the SIMULATED worker image: the sources that this Python would import.

    Raises :class:`SetupError` if a package of the image is not installed.
    """
    from casemate_attestation.simulated_chip import WORKER_PACKAGES, measure_packages

    folders = {name: _package_folder(name) for name in WORKER_PACKAGES}
    return ReferenceValue(
        kind="simulated",
        measurement=measure_packages(folders),
        inputs=tuple(MeasuredInput(name=n, sha384=measure_packages({n: folder})) for n, folder in folders.items()),
        launch=None,
        revision=revision,
        created=created,
    )


def _launch_digest(image: Image, launch: Launch) -> bytes:
    try:
        from sevsnpmeasure.guest import snp_calc_launch_digest
        from sevsnpmeasure.vcpu_types import CPU_SIGS
        from sevsnpmeasure.vmm_types import VMMType
    except ImportError as error:
        raise MissingExtraError(missing_extra_line("measure")) from error
    if (signature := CPU_SIGS.get(launch.vcpu_type)) is None:
        raise ParameterError(f"expected a vCPU type of {', '.join(CPU_SIGS)}, got {launch.vcpu_type!r}")
    try:
        digest = snp_calc_launch_digest(
            launch.vcpus,
            signature,
            str(image.ovmf),
            str(image.kernel or ""),
            str(image.initrd or ""),
            launch.command_line or "",
            launch.guest_features,
            "",
            VMMType[_VMM_NAMES[launch.vmm]],
        )
    except Exception as error:  # what the library raises for firmware that it cannot take apart has no common class
        raise MalformedError(f"{image.ovmf} cannot be measured as an SEV-SNP firmware: {error}") from error
    return bytes(digest)


def _digest(name: str, path: Path) -> bytes:
    bound = MAX_OVMF_BYTES if name == "ovmf" else MAX_FILE_BYTES
    try:
        with path.open("rb") as file:
            if path.stat().st_size > bound:
                raise SetupError(f"expected {path} to have at most {bound} bytes")
            return hashlib.file_digest(file, "sha384").digest()
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from error


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(f"expected the package {package} of the worker image to be installed")
    return Path(spec.submodule_search_locations[0])
