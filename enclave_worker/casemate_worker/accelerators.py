"""No GPU outside simulation: SEV-SNP encrypts the guest's memory, and none that a device has of its own.

Until evidence of a GPU is appraised, the worker refuses to start beside one, and the training process refuses to train
where its libraries could use one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from casemate_schemas.errors import SetupError

DEVICES: Final = Path("/dev")
_PATTERNS: Final = ("nvidia*", "kfd")
"""Device files of NVIDIA's driver and of AMD's (CUDA and ROCm)."""


def refuse_devices(*, simulation: bool, folder: Path = DEVICES) -> None:
    """Raises :class:`SetupError` outside simulation where there is a GPU's device file."""
    found = sorted(path.name for pattern in _PATTERNS for path in folder.glob(pattern))
    if found and not simulation:
        raise SetupError(f"expected a guest without a GPU, whose memory SEV-SNP does not cover; got {', '.join(found)}")


def refuse_accelerators(*, simulation: bool) -> None:
    """Raises :class:`SetupError` outside simulation where torch could put a tensor anywhere but into main memory."""
    import torch

    if not simulation and (torch.cuda.is_available() or torch.accelerator.is_available()):
        raise SetupError("expected torch without CUDA or another accelerator, whose memory SEV-SNP does not cover")
