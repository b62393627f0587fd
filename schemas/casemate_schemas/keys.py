"""What a public key looks like on the wire. No private key and no way to use one is here."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from .codec import domain_digest

MLKEM_PUBLIC_BYTES: Final = 1184
SEALING_PUBLIC_BYTES: Final = MLKEM_PUBLIC_BYTES + 32

PublicSigningKey = Annotated[bytes, Field(min_length=32, max_length=32)]
"""A raw Ed25519 public key (RFC 8032); it is its own key id."""

SealingPublicKey = Annotated[bytes, Field(min_length=SEALING_PUBLIC_BYTES, max_length=SEALING_PUBLIC_BYTES)]
"""ML-KEM-768 encapsulation key (1184 bytes) ‖ X25519 public key (32 bytes)."""


def sealing_key_id(public: bytes) -> bytes:
    """The 32-byte name of a sealing public key."""
    return domain_digest("sealing-key", public)
