"""A training process computes with kernels that give a number the same bits each time, on two threads at most, or not at all."""

from __future__ import annotations

import ctypes
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import ParameterError, SetupError, error_from_reason
from casemate_worker import child
from casemate_worker.child import Child
from casemate_worker.environment import reproducible_kernels
from casemate_worker.frames import Failure, Start, frame, read_frame
from casemate_worker.training.rows import check_libraries, in_rows

AUTO, COMPATIBLE, AVX2, AVX512, STRICT = 2, 3, 10, 12, 0x10000
"""Of ``MKL_CBWR``, in the order of mkl_service.h."""

ASK = "from casemate_worker.training.rows import check_libraries; check_libraries()"


@pytest.fixture(autouse=True)
def _threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the child sets, and the test takes back
    yield
    torch.set_num_threads(before)


def _mkl_says(monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    library = SimpleNamespace(mkl_serv_cbwr_get=lambda branch: mode if branch == -1 else 0)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)


@pytest.mark.parametrize("mode", [AVX2 | STRICT, AUTO | STRICT, COMPATIBLE])
def test_reproducible_modes_are_accepted(monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    _mkl_says(monkeypatch, mode)
    check_libraries()


@pytest.mark.parametrize("mode", [AUTO, AVX2, AVX512, AVX512 | STRICT, 1, -2, STRICT])
def test_any_other_mode_is_refused(monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    _mkl_says(monkeypatch, mode)
    with pytest.raises(SetupError, match="MKL_CBWR must be set"):
        check_libraries()


def test_an_mkl_that_does_not_tell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _mkl_says(monkeypatch, COMPATIBLE)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    with pytest.raises(SetupError, match="tells its reproducibility mode"):
        check_libraries()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
@pytest.mark.parametrize(("variables", "refused"), [({}, True), (reproducible_kernels(), False)])
def test_the_library_itself_is_asked(variables: dict[str, str], refused: bool) -> None:
    done = subprocess.run([sys.executable, "-I", "-c", ASK], env=variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode != 0) == refused == ("SetupError: expected MKL in its reproducible mode" in done.stderr)


def _first_frame(monkeypatch: pytest.MonkeyPatch, threads: int) -> tuple[bytes, bytes]:
    """What the training process says once it is told to start, without cutting this process off."""
    monkeypatch.setattr(child, "isolate", lambda: "not cut off")
    sink = io.BytesIO()
    Child(io.BytesIO(frame(b"S", encode(Start(threads=threads, simulation=True)))), sink).run()
    sink.seek(0)
    return read_frame(sink)


def test_the_training_process_says_so_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    _mkl_says(monkeypatch, AUTO)
    tag, payload = _first_frame(monkeypatch, 1)
    failure = decode(Failure, payload)
    assert tag == b"E" and isinstance(error_from_reason(failure.reason, failure.message), SetupError)
    assert "MKL_CBWR" in failure.message


@pytest.mark.parametrize(("asked", "used"), [(1, 1), (2, 2), (3, 2), (256, 2)])
def test_more_than_two_threads_count_as_two(monkeypatch: pytest.MonkeyPatch, asked: int, used: int) -> None:
    assert _first_frame(monkeypatch, asked) == (b"R", b"not cut off")
    assert torch.get_num_threads() == used and os.environ["OMP_NUM_THREADS"] == str(used)
    assert len(in_rows(torch.ones(1, 3))) == 32 * used


def test_training_elsewhere_with_more_than_two_threads_is_refused() -> None:
    torch.set_num_threads(3)
    with pytest.raises(ParameterError, match="at most 2 threads"):
        in_rows(torch.ones(1, 3))
