"""Who can read it: HPKE-sealed content keys and chunked AES-256-GCM. Rooms that must never open anything may not import this.

HPKE (RFC 9180) is single-shot base mode with the hybrid KEM ML-KEM-768 + X25519, HKDF-SHA256 and AES-256-GCM. It seals
32-byte keys and short secrets only; what they belong to is bound through ``info``. Everything longer is chunked
AES-256-GCM under a content key of its own (:mod:`.envelope` draws the bytes).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import struct
from collections.abc import Iterable, Iterator
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .codec import digest_of
from .envelope import (
    CHUNK_BYTES,
    MAX_CHUNKS,
    TAG_BYTES,
    EnvelopeHead,
    EnvelopeHeader,
    EnvelopeKind,
    EnvelopePreamble,
    SealedKey,
    frame_head,
    open_head,
    split_envelope,
)
from .errors import MalformedError, SealError, TooLargeError
from .keys import MLKEM_PUBLIC_BYTES, SEALING_PUBLIC_BYTES, sealing_key_id
from .signatures import SigningKey

_SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_MLKEM_SEED_BYTES: Final = 64
SEALING_PRIVATE_BYTES: Final = _MLKEM_SEED_BYTES + 32
KEY_BYTES: Final = 32


class SealingKey:
    """A hybrid HPKE private key that does not show itself."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEALING_PRIVATE_BYTES:
            raise MalformedError(f"expected a sealing key of {SEALING_PRIVATE_BYTES} bytes, got {len(seed)}")
        self._seed = seed
        mlkem = MLKEM768PrivateKey.from_seed_bytes(seed[:_MLKEM_SEED_BYTES])
        x25519 = X25519PrivateKey.from_private_bytes(seed[_MLKEM_SEED_BYTES:])
        self._private_key = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public: bytes = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        self.id: bytes = sealing_key_id(self.public)

    @classmethod
    def generate(cls) -> Self:
        """A fresh key from the operating system's random source."""
        return cls(os.urandom(SEALING_PRIVATE_BYTES))

    def to_bytes(self) -> bytes:
        """ML-KEM seed ‖ X25519 scalar (96 bytes), for a private key file only."""
        return self._seed

    def open_secret(self, sealed: bytes, *, info: bytes) -> bytes:
        """What :func:`seal_secret` sealed to this key under the same ``info``. Raises :class:`SealError`."""
        try:
            return _SUITE.decrypt(sealed, self._private_key, info=info)
        except (InvalidTag, ValueError) as error:
            raise SealError("sealed to another key, for another purpose, or changed") from error

    def __repr__(self) -> str:
        return f"SealingKey(id={self.id.hex()[:16]}…)"


def seal_secret(secret: bytes, public: bytes, *, info: bytes) -> bytes:
    """HPKE: encapsulated key ‖ ciphertext of a short ``secret``, bound to ``info``. Raises :class:`MalformedError`."""
    if len(public) != SEALING_PUBLIC_BYTES:
        raise MalformedError(f"expected a sealing public key of {SEALING_PUBLIC_BYTES} bytes, got {len(public)}")
    try:
        key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public[:MLKEM_PUBLIC_BYTES]),
            X25519PublicKey.from_public_bytes(public[MLKEM_PUBLIC_BYTES:]),
        )
        return _SUITE.encrypt(secret, key, info=info)
    except ValueError as error:
        raise MalformedError("not a usable sealing public key") from error


class ContentKey:
    """The 256-bit key of one envelope. It can be sealed to addressees, and never shows itself."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise SealError("a content key has 32 bytes")
        self._key = key

    @classmethod
    def generate(cls) -> Self:
        """A fresh key from the operating system's random source."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def to_bytes(self) -> bytes:
        """The raw key, to put it inside another seal only."""
        return self._key

    def seal_to(self, public: bytes, header: EnvelopeHeader) -> SealedKey:
        """This key for the holder of a sealing key, usable with that envelope only."""
        sealed = seal_secret(self._key, public, info=_content_key_info(header))
        return SealedKey(method="hpke", recipient=sealing_key_id(public), ciphertext=sealed)

    def wrap_under(self, symmetric_key: bytes, header: EnvelopeHeader) -> SealedKey:
        """This key for whoever derives the same 32-byte ``symmetric_key``, usable with that envelope only."""
        nonce = os.urandom(12)
        wrapped = AESGCM(symmetric_key).encrypt(nonce, self._key, _content_key_info(header))
        return SealedKey(method="aes-256-gcm", recipient=symmetric_key_id(symmetric_key), ciphertext=nonce + wrapped)

    def commitment(self, envelope_id: bytes) -> bytes:
        """What the preamble publishes so that the ciphertext opens under this key only."""
        return _derive(self._key, b"casemate/v1/key-commitment", envelope_id)

    def cipher(self, envelope_id: bytes) -> AESGCM:
        """The AEAD under which this envelope's chunks stand."""
        return AESGCM(_derive(self._key, b"casemate/v1/chunk-key", envelope_id))

    def __repr__(self) -> str:
        return "ContentKey(…)"


def symmetric_key_id(symmetric_key: bytes) -> bytes:
    """The 32-byte name of a derived symmetric key; it tells nothing about the key."""
    return _derive(symmetric_key, b"casemate/v1/symmetric-key-id", b"")


def unseal_content_key(head: EnvelopeHead, key: SealingKey | bytes) -> ContentKey:
    """The envelope's content key, for one of its addressees: a sealing key, or a derived symmetric key.

    Raises :class:`SealError` if the envelope is not addressed to the key or was changed.
    """
    if isinstance(key, SealingKey):
        sealed = head.sealed_key_for(key.id)
        return unseal_key(sealed, head.header, key)
    return unseal_key(head.sealed_key_for(symmetric_key_id(key)), head.header, key)


def unseal_key(sealed: SealedKey, header: EnvelopeHeader, key: SealingKey | bytes) -> ContentKey:
    """The content key in one sealed key of the envelope that ``header`` describes. Raises :class:`SealError`."""
    info = _content_key_info(header)
    if isinstance(key, SealingKey):
        if sealed.method != "hpke":
            raise SealError("expected an HPKE-sealed content key")
        content_key = ContentKey(key.open_secret(sealed.ciphertext, info=info))
    else:
        if sealed.method != "aes-256-gcm":
            raise SealError("expected a content key wrapped under a derived key")
        try:
            plain = AESGCM(key).decrypt(sealed.ciphertext[:12], sealed.ciphertext[12:], info)
        except (InvalidTag, ValueError) as error:
            raise SealError("wrapped under another key, for another envelope, or changed") from error
        content_key = ContentKey(plain)
    check_commitment(content_key, header)
    return content_key


def check_commitment(content_key: ContentKey, header: EnvelopeHeader) -> None:
    """Raises :class:`SealError` unless the header's preamble commits to this very key."""
    preamble = header.preamble
    if not hmac.compare_digest(content_key.commitment(preamble.id), preamble.key_commitment):
        raise SealError("the content key is not the one the envelope commits to")


class EnvelopeSealer:
    """Encrypts one plaintext as it streams by. Feed :meth:`update`, end with :meth:`finish`, then take :meth:`header`."""

    def __init__(
        self, kind: EnvelopeKind, *, consortium: bytes, sender: bytes, created: int, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.content_key = ContentKey.generate()
        envelope_id = os.urandom(16)
        self.preamble = EnvelopePreamble(
            kind=kind,
            consortium=consortium,
            sender=sender,
            created=created,
            id=envelope_id,
            chunk_bytes=chunk_bytes,
            nonce_prefix=os.urandom(7),
            key_commitment=self.content_key.commitment(envelope_id),
        )
        self._stream = _ChunkStream(self.content_key, self.preamble)
        self._pending = bytearray()
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._finished = False

    def update(self, plaintext: bytes | memoryview) -> Iterator[bytes]:
        """Ciphertext chunks that are complete and known not to be the last."""
        self._pending += plaintext
        size = self.preamble.chunk_bytes
        while len(self._pending) > size:
            chunk = bytes(self._pending[:size])
            del self._pending[:size]
            yield self._emit(chunk, last=False)

    def finish(self) -> bytes:
        """The last ciphertext chunk (that of an empty plaintext is a tag alone)."""
        chunk = self._emit(bytes(self._pending), last=True)
        self._pending.clear()
        self._finished = True
        return chunk

    def header(self) -> EnvelopeHeader:
        """The header, once finished."""
        if not self._finished:
            raise SealError("an envelope has a header only when its ciphertext is finished")
        return EnvelopeHeader(
            preamble=self.preamble, ciphertext_digest=self._digest.digest(), ciphertext_bytes=self._bytes
        )

    def _emit(self, chunk: bytes, *, last: bool) -> bytes:
        sealed = self._stream.seal(chunk, last=last)
        self._digest.update(sealed)
        self._bytes += len(sealed)
        return sealed


class EnvelopeOpener:
    """Decrypts one ciphertext as it streams by; each chunk it returns is authentic and in its place.

    The plaintext is whole only once :meth:`finish` returned.
    """

    def __init__(self, header: EnvelopeHeader, content_key: ContentKey) -> None:
        check_commitment(content_key, header)
        self._header = header
        self._stream = _ChunkStream(content_key, header.preamble)
        self._pending = bytearray()
        self._digest = hashlib.sha256()
        self._bytes = 0

    def update(self, ciphertext: bytes | memoryview) -> Iterator[bytes]:
        """Plaintext of the chunks that are complete and known not to be the last. Raises :class:`SealError`."""
        self._digest.update(ciphertext)
        self._bytes += len(ciphertext)
        if self._bytes > self._header.ciphertext_bytes:
            raise SealError("ciphertext is longer than its header says")
        self._pending += ciphertext
        size = self._header.preamble.chunk_bytes + TAG_BYTES
        while len(self._pending) > size:
            chunk = bytes(self._pending[:size])
            del self._pending[:size]
            yield self._stream.open(chunk, last=False)

    def finish(self) -> bytes:
        """The last chunk's plaintext. Raises :class:`SealError` unless the whole ciphertext was seen."""
        if self._bytes != self._header.ciphertext_bytes:
            raise SealError("ciphertext is shorter than its header says")
        if not hmac.compare_digest(self._digest.digest(), self._header.ciphertext_digest):
            raise SealError("ciphertext does not have the digest its header says")
        return self._stream.open(bytes(self._pending), last=True)


def seal_envelope(
    kind: EnvelopeKind,
    plaintext: bytes,
    recipients: Iterable[bytes],
    *,
    consortium: bytes,
    key: SigningKey,
    created: int,
) -> bytes:
    """A whole small envelope, signed by ``key`` and addressed to sealing public keys ``recipients``."""
    sealer = EnvelopeSealer(kind, consortium=consortium, sender=key.public, created=created)
    ciphertext = b"".join(sealer.update(plaintext)) + sealer.finish()
    header = sealer.header()
    sealed_keys = tuple(sealer.content_key.seal_to(public, header) for public in recipients)
    return frame_head(EnvelopeHead(header=header, sealed_keys=sealed_keys), key) + ciphertext


def open_envelope(
    envelope: bytes | memoryview,
    key: SealingKey | bytes,
    *,
    kind: EnvelopeKind,
    consortium: bytes,
    sender: bytes | None = None,
    max_bytes: int,
) -> tuple[EnvelopeHead, bytes]:
    """Head and plaintext of a whole small envelope of that kind and consortium, addressed to ``key``.

    Raises :class:`MalformedError`, :class:`SignatureError` or :class:`SealError`.
    """
    signed_head, ciphertext = split_envelope(envelope, max_bytes=max_bytes)
    head = open_head(signed_head, kind=kind, sender=sender)
    check_consortium(head, consortium)
    return head, open_ciphertext(head.header, unseal_content_key(head, key), ciphertext)


def open_ciphertext(header: EnvelopeHeader, content_key: ContentKey, ciphertext: bytes | memoryview) -> bytes:
    """The plaintext of a whole ciphertext in memory. Raises :class:`SealError`."""
    opener = EnvelopeOpener(header, content_key)
    return b"".join(opener.update(ciphertext)) + opener.finish()


def check_consortium(head: EnvelopeHead, consortium: bytes) -> None:
    """Raises :class:`SealError` unless the envelope belongs to that consortium."""
    if head.header.preamble.consortium != consortium:
        raise SealError("the envelope belongs to another consortium")


class _ChunkStream:
    """STREAM: nonces count up, and the last one says that it is the last."""

    def __init__(self, content_key: ContentKey, preamble: EnvelopePreamble) -> None:
        self._cipher = content_key.cipher(preamble.id)
        self._prefix = preamble.nonce_prefix
        self._associated_data = digest_of(preamble)
        self._counter = 0

    def seal(self, chunk: bytes, *, last: bool) -> bytes:
        return self._cipher.encrypt(self._nonce(last), chunk, self._associated_data)

    def open(self, chunk: bytes, *, last: bool) -> bytes:
        try:
            return self._cipher.decrypt(self._nonce(last), chunk, self._associated_data)
        except (InvalidTag, ValueError) as error:
            raise SealError("a chunk is not authentic, or not in its place") from error

    def _nonce(self, last: bool) -> bytes:
        if self._counter >= MAX_CHUNKS:
            raise TooLargeError(f"an envelope has at most {MAX_CHUNKS} chunks")
        nonce = self._prefix + struct.pack(">IB", self._counter, last)
        self._counter += 1
        return nonce


def _content_key_info(header: EnvelopeHeader) -> bytes:
    return b"casemate/v1/content-key\x00" + header.preamble.kind.encode("ascii") + b"\x00" + header.digest


def _derive(key: bytes, info: bytes, salt: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt or None, info=info).derive(key)
