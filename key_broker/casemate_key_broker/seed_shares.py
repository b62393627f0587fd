"""This key broker's share of a job's randomness: one secret per epoch, one share per terms.

A reservation names its epoch, so that a new secret changes the share of no job already granted.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
from pathlib import Path
from typing import Final, Self

from casemate_messaging.files import write_durably
from casemate_schemas.errors import IntegrityError

from .database import State, get_meta, set_meta

SECRET_BYTES: Final = 32
_PREFIX: Final = "seed-secret-"
_META: Final = "seed-secrets"
_EPOCH: Final = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)


class SeedSecrets:
    """The secrets in a state folder, one file of 32 bytes (mode 0600) each. They do not show themselves."""

    def __init__(self, folder: Path, *, needed: set[int]) -> None:
        """Load every secret; make the first one in a new folder.

        Raises :class:`IntegrityError` if the secret of a ``needed`` epoch is missing or broken: with another one the
        checkpoints and uploads of jobs under way could never be opened again.
        """
        self._store: Path | State = folder
        self._lock = threading.Lock()
        found = {path.name[len(_PREFIX) :]: path for path in folder.glob(f"{_PREFIX}*")}
        self._secrets = {int(epoch): _read(path) for epoch, path in found.items() if _EPOCH.fullmatch(epoch)}
        if not self._secrets and not needed:
            self._secrets[1] = _create(folder / f"{_PREFIX}1")
        if missing := sorted(needed - self._secrets.keys()):
            raise IntegrityError(f"the seed secret of epoch {missing[0]} is missing from {folder}")

    @classmethod
    def in_state(cls, database: State) -> Self:
        """The secrets of a key broker whose disk is not to be trusted, kept in its sealed state; made at its first start."""
        kept = cls.__new__(cls)
        with database.transaction() as tx:
            known = get_meta(tx, _META)
            if known is None:
                set_meta(tx, _META, known := ((1, secrets.token_bytes(SECRET_BYTES)),))
        kept._store, kept._lock = database, threading.Lock()
        kept._secrets = dict(known)
        return kept

    def rotate(self) -> int:
        """Makes the secret of another epoch, durably, for reservations from now on; that epoch. Earlier ones stay.

        Raises :class:`IntegrityError` if it cannot be written.
        """
        with self._lock:
            epoch = self.epoch + 1
            if isinstance(self._store, Path):
                secret = _create(self._store / f"{_PREFIX}{epoch}")
            else:
                secret = secrets.token_bytes(SECRET_BYTES)
                with self._store.transaction() as tx:
                    set_meta(tx, _META, tuple(sorted((self._secrets | {epoch: secret}).items())))
            self._secrets = self._secrets | {epoch: secret}
            return epoch

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
    secret = secrets.token_bytes(SECRET_BYTES)
    try:
        write_durably(path, secret)
    except OSError as error:
        raise IntegrityError(f"cannot write {path}: {error.strerror}") from error
    return secret
