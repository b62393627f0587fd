"""This key broker's share of a job's randomness: one secret per epoch, one share per terms.

A reservation names its epoch, so that a new secret changes the share of no job already granted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path
from typing import Final

from casemate_schemas.errors import IntegrityError

SECRET_BYTES: Final = 32
_PREFIX: Final = "seed-secret-"
_EPOCH: Final = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)


class SeedSecrets:
    """The secrets in a state folder, one file of 32 bytes (mode 0600) each. They do not show themselves."""

    def __init__(self, folder: Path, *, needed: set[int]) -> None:
        """Load every secret; make the first one in a new folder.

        Raises :class:`IntegrityError` if the secret of a ``needed`` epoch is missing or broken: with another one the
        checkpoints and uploads of jobs under way could never be opened again.
        """
        found = {path.name[len(_PREFIX) :]: path for path in folder.glob(f"{_PREFIX}*")}
        self._secrets = {int(epoch): _read(path) for epoch, path in found.items() if _EPOCH.fullmatch(epoch)}
        if not self._secrets and not needed:
            self._secrets[1] = _create(folder / f"{_PREFIX}1")
        if missing := sorted(needed - self._secrets.keys()):
            raise IntegrityError(f"the seed secret of epoch {missing[0]} is missing from {folder}")

    @property
    def epoch(self) -> int:
        """The epoch of new reservations."""
        return max(self._secrets)

    def share(self, epoch: int, terms: bytes) -> bytes:
        """HMAC-SHA256 of the terms digest under that epoch's secret: the same 32 bytes for every attempt."""
        return hmac.digest(self._secrets[epoch], terms, hashlib.sha256)

    def __repr__(self) -> str:
        return f"SeedSecrets(epochs={sorted(self._secrets)})"


def _read(path: Path) -> bytes:
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"cannot read {path}: {error.strerror}") from error
    if len(secret) != SECRET_BYTES or path.stat().st_mode & 0o077:
        raise IntegrityError(f"expected {SECRET_BYTES} bytes in {path}, readable by this user alone")
    return secret


def _create(path: Path) -> bytes:
    """Written under another name first: under its own, a file is whole or not there, whenever the power fails."""
    secret = secrets.token_bytes(SECRET_BYTES)
    new = path.with_name(f"new-{path.name}")
    new.unlink(missing_ok=True)
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise IntegrityError(f"cannot write {path}: {error.strerror}") from error
    return secret
