"""A party's own private keys as one value, and their file form. Only the party itself ever holds one."""

from __future__ import annotations

import base64
import binascii
import textwrap
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field

from .codec import WireModel, decode, encode
from .errors import MalformedError
from .sealing import SEALING_PRIVATE_BYTES, SealingKey
from .signatures import Signed, SigningKey

_BEGIN: Final = "-----BEGIN CASEMATE PRIVATE KEYS-----"
_END: Final = "-----END CASEMATE PRIVATE KEYS-----"
MAX_FILE_BYTES: Final = 64 << 10


class _PrivateKeys(WireModel):
    KIND: ClassVar[str] = "private-keys"

    version: Literal[1] = 1
    signing: Annotated[bytes, Field(min_length=32, max_length=32, repr=False)]
    sealing: Annotated[bytes, Field(min_length=SEALING_PRIVATE_BYTES, max_length=SEALING_PRIVATE_BYTES, repr=False)]
    delegation: Signed | None


@dataclass(frozen=True)
class KeyRing:
    """Signing and sealing key of a member, a key broker or a person; a person's comes with its signed delegation."""

    signing: SigningKey
    sealing: SealingKey
    delegation: Signed | None = field(default=None)

    @classmethod
    def generate(cls) -> Self:
        """Fresh keys."""
        return cls(SigningKey.generate(), SealingKey.generate())

    def to_text(self) -> str:
        """The private key file's text; write it to a file that only its owner can read."""
        keys = _PrivateKeys(
            signing=self.signing.to_bytes(), sealing=self.sealing.to_bytes(), delegation=self.delegation
        )
        body = textwrap.fill(base64.b64encode(encode(keys)).decode("ascii"), 64)
        return f"{_BEGIN}\n{body}\n{_END}\n"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The keys in a private key file's text. Raises :class:`MalformedError`, which shows nothing of it."""
        lines = text.strip().splitlines()
        if len(text) > MAX_FILE_BYTES or len(lines) < 3 or lines[0] != _BEGIN or lines[-1] != _END:
            raise MalformedError("not a Casemate private key file")
        try:
            body = base64.b64decode("".join(lines[1:-1]), validate=True)
        except binascii.Error as error:
            raise MalformedError("not a Casemate private key file") from error
        keys = decode(_PrivateKeys, body)
        return cls(SigningKey.from_bytes(keys.signing), SealingKey(keys.sealing), keys.delegation)
