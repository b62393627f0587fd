"""Who says so: Ed25519 signatures over domain-separated digests of canonical bytes (RFC 8032)."""

from __future__ import annotations

from typing import Annotated, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, StringConstraints

from .codec import MAX_MESSAGE_BYTES, M, WireModel, decode, domain_digest, encode
from .errors import SignatureError
from .keys import PublicSigningKey

SIGNED_KINDS_PATTERN = r"^[a-z0-9-]{1,40}$"

Signature = Annotated[bytes, Field(min_length=64, max_length=64)]


class SigningKey:
    """An Ed25519 private key that does not show itself."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.public: bytes = private_key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Self:
        """A fresh key from the operating system's random source."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, seed: bytes) -> Self:
        """The key of a 32-byte RFC 8032 seed."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def to_bytes(self) -> bytes:
        """The 32-byte seed, for a private key file only."""
        return self._private_key.private_bytes_raw()

    def sign_bytes(self, message: bytes) -> bytes:
        """A signature over raw bytes, for protocols with a domain of their own (RFC 9421)."""
        return self._private_key.sign(message)

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public.hex()[:16]}…)"


class Signed(WireModel):
    """Canonical bytes of one message, its kind, and a signature over the digest of both.

    ``payload`` is kept as bytes, so whoever relays it cannot change it by re-encoding.
    """

    KIND = "signed"

    kind: Annotated[str, StringConstraints(pattern=SIGNED_KINDS_PATTERN)]
    payload: Annotated[bytes, Field(max_length=MAX_MESSAGE_BYTES)]
    signer: PublicSigningKey
    signature: Signature

    @property
    def digest(self) -> bytes:
        """Digest of the signed message (:func:`~.codec.digest_of` of it), whoever signed it."""
        return domain_digest(self.kind, self.payload)

    def verify(self, model: type[M], signer: bytes) -> M:
        """The message, if ``signer`` signed it as a ``model``.

        Raises :class:`SignatureError` for another signer, another kind or a wrong signature, :class:`MalformedError`
        for a payload that is no ``model``.
        """
        if self.kind != model.KIND:
            raise SignatureError(f"expected a signed {model.KIND}, got a signed {self.kind}")
        if self.signer != signer:
            raise SignatureError(f"{self.kind} is signed by another key than expected")
        verify_bytes(signer, _to_be_signed(self.digest), self.signature)
        return decode(model, self.payload)

    def peek(self, model: type[M]) -> M:
        """The message **without** checking who signed it, to learn which key should have. Never act on it alone."""
        if self.kind != model.KIND:
            raise SignatureError(f"expected a signed {model.KIND}, got a signed {self.kind}")
        return decode(model, self.payload)


def sign(message: WireModel, key: SigningKey) -> Signed:
    """``message`` signed by ``key``, in the domain of the message's kind."""
    payload = encode(message)
    digest = domain_digest(message.KIND, payload)
    return Signed(
        kind=message.KIND, payload=payload, signer=key.public, signature=key.sign_bytes(_to_be_signed(digest))
    )


def verify_bytes(public: bytes, message: bytes, signature: bytes) -> None:
    """Raises :class:`SignatureError` unless ``signature`` is ``public``'s Ed25519 signature over ``message``."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise SignatureError("signature does not verify") from error


def _to_be_signed(digest: bytes) -> bytes:
    return b"casemate-signature-v1\x00" + digest
