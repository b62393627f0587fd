"""Outside simulation no GPU: the worker does not start beside one, and the training process does not train with one."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from casemate_messaging.logs import ProgramLog
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import SetupError, error_from_reason
from casemate_worker import __main__ as program
from casemate_worker import accelerators, child
from casemate_worker.accelerators import refuse_accelerators, refuse_devices
from casemate_worker.child import Child
from casemate_worker.frames import Failure, Start, frame, read_frame


@pytest.mark.parametrize("name", ["nvidia0", "nvidiactl", "nvidia-uvm", "kfd"])
def test_a_gpus_device_file_is_refused_outside_simulation(tmp_path: Path, name: str) -> None:
    for harmless in ("null", "sev-guest", "tpmrm0"):
        (tmp_path / harmless).touch()
    refuse_devices(simulation=False, folder=tmp_path)
    (tmp_path / name).touch()
    refuse_devices(simulation=True, folder=tmp_path)
    with pytest.raises(SetupError, match=name):
        refuse_devices(simulation=False, folder=tmp_path)


@pytest.mark.parametrize("library", [torch.cuda, torch.accelerator])
def test_torch_with_an_accelerator_is_refused_outside_simulation(
    monkeypatch: pytest.MonkeyPatch, library: object
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    refuse_accelerators(simulation=False)
    monkeypatch.setattr(library, "is_available", lambda: True)
    refuse_accelerators(simulation=True)
    with pytest.raises(SetupError, match="CUDA"):
        refuse_accelerators(simulation=False)


def first_frame(monkeypatch: pytest.MonkeyPatch, *, simulation: bool) -> tuple[bytes, bytes]:
    """What the training process says once it is told to start, without cutting this process off."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the child sets, and the test takes back
    monkeypatch.setattr(child, "isolate", lambda: "not cut off")
    sink = io.BytesIO()
    Child(io.BytesIO(frame(b"S", encode(Start(threads=1, simulation=simulation)))), sink).run()
    sink.seek(0)
    return read_frame(sink)


def test_the_training_process_says_so_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert first_frame(monkeypatch, simulation=True) == (b"R", b"not cut off")
    tag, payload = first_frame(monkeypatch, simulation=False)
    failure = decode(Failure, payload)
    assert tag == b"E" and isinstance(error_from_reason(failure.reason, failure.message), SetupError)
    assert "CUDA" in failure.message


@pytest.mark.parametrize("simulation", [True, False])
async def test_the_worker_does_not_start_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, simulation: bool
) -> None:
    (tmp_path / "nvidia0").touch()
    manifests = SimpleNamespace(current=SimpleNamespace(manifest=SimpleNamespace(simulation=simulation)))
    monkeypatch.setattr(program.TrustedManifests, "open", lambda _: manifests)
    monkeypatch.setattr(accelerators.refuse_devices, "__kwdefaults__", {"folder": tmp_path})
    settings: Any = SimpleNamespace(guest="configfs" if simulation else "simulated")
    with pytest.raises(SetupError, match="'guest' disagree" if simulation else "without a GPU"):
        await program._serve([settings], ProgramLog("worker"))
