"""Private key files, and delegations: who a person is and for which member they act."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from casemate_messaging.files import create_private
from casemate_schemas.codec import UnixMs
from casemate_schemas.errors import AuthenticationError, SetupError
from casemate_schemas.identity import MAX_DELEGATION_MS, Delegation, Role
from casemate_schemas.keyring import MAX_FILE_BYTES, KeyRing
from casemate_schemas.signatures import Signed, sign

from .parameters import parameter_errors


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Identity:
    """A person's private keys and the delegation they act under. Nothing of the keys shows in its ``repr``."""

    keys: KeyRing
    signed_delegation: Signed
    delegation: Delegation

    @property
    def name(self) -> str:
        """``person@member``."""
        return f"{self.delegation.person}@{self.delegation.member}"

    @classmethod
    def of(cls, source: Identity | KeyRing | str | os.PathLike[str]) -> Identity:
        """The identity in a private key file, or of keys at hand.

        Raises :class:`SetupError` for a file that is missing or that others can read, and :class:`AuthenticationError`
        if the keys come without a delegation, or with one for other keys.
        """
        if isinstance(source, Identity):
            return source
        keys = source if isinstance(source, KeyRing) else load_keys(source)
        if keys.delegation is None:
            raise AuthenticationError("these keys come without a delegation: ask the member for one")
        delegation = keys.delegation.peek(Delegation)
        if (delegation.signing_key, delegation.sealing_key) != (keys.signing.public, keys.sealing.public):
            raise AuthenticationError("the delegation in the key file is for other keys")
        return cls(keys, keys.delegation, delegation)


def load_keys(path: str | os.PathLike[str]) -> KeyRing:
    """The keys in a private key file. Raises :class:`SetupError` or :class:`~casemate_schemas.errors.MalformedError`."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            if os.name == "posix" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise SetupError(f"others can read the private key file {path}: run 'chmod 600 {path}'")
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SetupError(f"cannot read the private key file {path}: {error.strerror}") from error
    return KeyRing.from_text(text)


def save_keys(path: str | os.PathLike[str], keys: KeyRing) -> None:
    """Write a new private key file that only its owner can read. Never overwrites: raises :class:`SetupError`."""
    try:
        create_private(Path(path), keys.to_text().encode("ascii"))
    except OSError as error:
        raise SetupError(f"cannot write the private key file {path}: {error.strerror}") from error


def new_person(
    member_keys: KeyRing,
    *,
    consortium: bytes,
    member: str,
    person: str,
    roles: tuple[Role, ...],
    not_before: UnixMs | None = None,
    lasts_ms: int = MAX_DELEGATION_MS,
) -> KeyRing:
    """Fresh keys for a person, with their delegation by the member whose keys these are.

    Args:
        consortium: the consortium's id, 32 bytes.
        roles: of ``scientist``, ``steward``, ``admin``.
        not_before: Unix ms; now if not given.
        lasts_ms: at most 92 days.

    Raises :class:`~casemate_schemas.errors.ParameterError`.
    """
    keys = KeyRing.generate()
    start = now_ms() if not_before is None else not_before
    with parameter_errors("delegation"):
        delegation = Delegation(
            consortium=consortium,
            member=member,
            person=person,
            signing_key=keys.signing.public,
            sealing_key=keys.sealing.public,
            roles=roles,
            not_before=start,
            expires=start + lasts_ms,
        )
    return KeyRing(keys.signing, keys.sealing, sign(delegation, member_keys.signing))
