"""Small files that programs keep: whole or not there, whenever the power fails."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Writes or replaces a file that only its owner can read; durable, with its name, once this returns.

    It is written as ``<name>.new`` beside it and renamed, so that a reader finds the old content or the new. One writer at
    a time. Raises :class:`OSError`; what stood there before then still stands.
    """
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
