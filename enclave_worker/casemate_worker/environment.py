"""What a training process has in its environment: libraries whose kernels give a number the same bits each time.

Apart from :mod:`.training.rows`, which says why, because the worker itself never loads torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

MOST_THREADS: Final = 2
"""With more, shares of rows could only be alike in batches of many hundred rows."""


def reproducible_kernels() -> dict[str, str]:
    """Variables that must be set before a library is loaded: MKL reproducible, numbers of threads fixed, nothing shortened."""
    return {
        "MKL_CBWR": "AVX2,STRICT" if _has_avx2() else "COMPATIBLE",
        "MKL_DYNAMIC": "FALSE",
        "OMP_DYNAMIC": "FALSE",
        "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    }


def _has_avx2() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return " avx2 " in flags.replace("\n", " ")
