"""Batches whose rows are rounded alike wherever they stand: shape, memory and libraries.

A record's own part of a sum is clipped whatever its rounding. What may not happen is that *other* records' parts change with
it: a hostile model makes anything of one bit that depends on the batch. Float32 kernels round a row by where it stands (the last
few rows go through other code than the rest), by how its memory is aligned, and by how many rows there are. So:

1. every batch has a multiple of :func:`row_step` rows: with 32, PyTorch's vector loops (two registers of 16 floats) have no
   rest, and neither have the libraries' row blocks. Each of two threads gets such a share, too, with 64;
2. it lies in memory of its own, contiguous, aligned to 64 bytes; rows beyond its records are zeros, and what comes of them is cut
   off before anything is summed;
3. MKL runs in its reproducible mode (:mod:`casemate_worker.environment`), which is independent of alignment and of threads;
4. :mod:`.kernels` looks, for the shapes of the very model, before a record is touched.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Final

import torch
from casemate_schemas.errors import ParameterError, SetupError
from torch import Tensor

from casemate_worker.environment import MOST_THREADS

_ALIGNMENT: Final = 64
_VECTOR_ROWS: Final = 32
_STRICT: Final = 0x10000
_MODES: Final = (10 | _STRICT, 2 | _STRICT, 3)
"""What MKL may answer: AVX2, strict; on AMD's processors, where no branch goes by its name, automatic, strict; compatible."""


def check_libraries() -> None:
    """Raises :class:`SetupError` unless MKL, where PyTorch was built with it, is in one of its reproducible modes.

    MKL is asked what it does, not the environment. Without MKL (arm64) there is :mod:`.kernels` alone.
    """
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return
    folder = Path(torch.__file__).parent / "lib"
    library = ctypes.CDLL(str(folder / ("libtorch_cpu.dylib" if platform.system() == "Darwin" else "libtorch_cpu.so")))
    try:
        mode = library.mkl_serv_cbwr_get(-1)
    except AttributeError as error:
        raise SetupError("expected an MKL that tells its reproducibility mode") from error
    if mode not in _MODES:
        raise SetupError("expected MKL in its reproducible mode: MKL_CBWR must be set before it is first used")


def row_step() -> int:
    """What numbers of rows are multiples of: 32 for one thread, 64 for two. :class:`ParameterError` with more."""
    threads = torch.get_num_threads()
    if threads > MOST_THREADS:
        raise ParameterError(f"expected at most {MOST_THREADS} threads: torch.set_num_threads")
    return _VECTOR_ROWS * threads


def most_rows(limit: int) -> int:
    """The largest fitting number of rows of at most ``limit``; at least the least there is."""
    step = row_step()
    return max(step, limit // step * step)


def in_rows(rows: Tensor) -> Tensor:
    """``rows`` (``[n, ...]``, n >= 1) and as many of zeros as are missing to a multiple, in aligned memory of its own."""
    step, count = row_step(), rows.shape[0]
    missing = -count % step
    if not missing and rows.is_contiguous() and rows.data_ptr() % _ALIGNMENT == 0:
        return rows
    found = rows.new_empty(count + missing, *rows.shape[1:])
    found[:count] = rows
    found[count:] = 0
    return found
