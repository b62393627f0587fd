"""What the C library does with memory that nobody holds (glibc; elsewhere nothing is changed)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

_TRIM_THRESHOLD: Final = -1, 2**31 - 1
_MMAP_THRESHOLD: Final = -3, 1 << 25
"""Parameters of ``mallopt`` (``malloc.h``), each with the largest value that it takes."""


def keep_freed() -> None:
    """From now on keep what is freed, for this whole process.

    Each step frees and takes hundreds of MiB. To give pages back and to have them mapped and cleared anew takes up to a tenth
    of a step (docs/decisions/0030); at its peak the process is as large either way.
    """
    if (mallopt := _function("mallopt")) is not None:
        for parameter, value in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(parameter, value)


def give_back() -> None:
    """Give back to the system what is free now, also between blocks still in use.

    What comes next has other sizes: it would lie beside what is free, not in it.
    """
    if (trim := _function("malloc_trim")) is not None:
        trim(0)


def _function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None)
