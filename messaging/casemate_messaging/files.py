"""Files, as programs and people need them: read whole but bounded; written whole or not there, whenever the power fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from casemate_schemas.errors import SetupError

_PIPE_BYTES: Final = 1 << 20
"""What is read of something that does not say how large it is."""


def read_file(path: Path, max_bytes: int, *, private: bool = False) -> bytes:
    """A whole file. Raises :class:`SetupError` if it is larger, or if others can read what must be ``private``."""
    try:
        with path.open("rb") as file:
            if private:
                check_private(path)
            most = min(max_bytes, max(os.fstat(file.fileno()).st_size, _PIPE_BYTES))  # Python reserves all it may read
            data = file.read(most + 1)
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > most:
        raise SetupError(f"expected at most {most} bytes in {path}")
    return data


def check_private(path: Path) -> None:
    """Raises :class:`SetupError` if others than its owner may read the file, or if there is none."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from error
    if mode & 0o077:
        raise SetupError(f"{path} can be read by others than its owner: chmod 600")


def create_private(path: Path, content: bytes) -> None:
    """Writes a new file that only its owner can read; its content is on the disk once this returns.

    Raises :class:`OSError`, also if there is anything of that name, a link included.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_durably(path: Path, content: bytes) -> None:
    """Writes or replaces a file that only its owner can read; durable, with its name, once this returns.

    It is written as ``<name>.new`` beside it and renamed, so that a reader finds the old content or the new. One writer at
    a time. Raises :class:`OSError`; what stood there before then still stands.
    """
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    create_private(draft, content)
    draft.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's names, are on the disk. Raises :class:`OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
