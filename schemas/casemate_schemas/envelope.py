"""The one container for everything encrypted, as far as anyone can see it without a key.

::

    "CASEMATE" | u32 length | canonical Signed[EnvelopeHead] | ciphertext

The *preamble* (kind, consortium, sender, time, id, chunk size, nonce prefix, key commitment) is known before the first
byte is encrypted; its digest is the associated data of every chunk. The *header* adds size and digest of the ciphertext;
its digest names the envelope, and every sealed content key is bound to it. The *head* adds the sealed keys, and is signed.
(Why three steps: docs/decisions/0001-envelope-layers.md.)

Ciphertext is a STREAM of AES-256-GCM chunks (Hoang, Reyhanitabar, Rogaway, Vizár 2015): nonce = 7-byte prefix, 4-byte
counter, 1-byte last flag; each full chunk is ``chunk_bytes`` of plaintext and 16 bytes of tag.
"""

from __future__ import annotations

import struct
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from .codec import Digest, UnixMs, WireModel, decode, digest_of, encode, unpack
from .errors import MalformedError, SealError, TooLargeError, UnsupportedVersionError
from .keys import PublicSigningKey
from .signatures import Signed, SigningKey, sign

MAGIC: Final = b"CASEMATE"
PREFIX_BYTES: Final = len(MAGIC) + 4
MAX_HEAD_BYTES: Final = 256 << 10
TAG_BYTES: Final = 16
CHUNK_BYTES: Final = 1 << 20
MAX_CHUNKS: Final = 1 << 20
"""With 1 MiB chunks an envelope holds at most 1 TiB, far below GCM's bounds for one key."""

EnvelopeKind = Literal["dataset", "job", "terms", "checkpoint", "result", "request", "response", "state"]


class EnvelopePreamble(WireModel):
    """What is fixed before encryption. ``key_commitment`` stops one ciphertext from opening under two keys."""

    KIND: ClassVar[str] = "envelope-preamble"

    version: Literal[1] = 1
    kind: EnvelopeKind
    consortium: Digest
    sender: PublicSigningKey
    created: UnixMs
    id: Annotated[bytes, Field(min_length=16, max_length=16)]
    chunk_bytes: Annotated[int, Field(ge=1 << 10, le=CHUNK_BYTES)]
    nonce_prefix: Annotated[bytes, Field(min_length=7, max_length=7)]
    key_commitment: Digest


class EnvelopeHeader(WireModel):
    """Preamble and ciphertext. Its digest is the envelope's name everywhere: in terms, Grants and receipts."""

    KIND: ClassVar[str] = "envelope-header"

    preamble: EnvelopePreamble
    ciphertext_digest: Digest
    ciphertext_bytes: Annotated[int, Field(ge=TAG_BYTES, le=(CHUNK_BYTES + TAG_BYTES) * MAX_CHUNKS)]

    @model_validator(mode="after")
    def _chunks_are_whole(self) -> Self:
        full, rest = divmod(self.ciphertext_bytes, self.preamble.chunk_bytes + TAG_BYTES)
        if 0 < rest < TAG_BYTES or full + (rest > 0) > MAX_CHUNKS:
            raise ValueError("ciphertext_bytes does not fit the chunk size")
        return self

    @property
    def digest(self) -> bytes:
        """The envelope's name: SHA-256 of the canonical header in its domain."""
        return digest_of(self)


class SealedKey(WireModel):
    """The content key for one addressee: HPKE to a sealing key, or AES-256-GCM under a key both sides derive."""

    method: Literal["hpke", "aes-256-gcm"]
    recipient: Digest
    ciphertext: Annotated[bytes, Field(min_length=16, max_length=2048)]


class EnvelopeHead(WireModel):
    """Header and sealed keys: what the sender signs."""

    KIND: ClassVar[str] = "envelope-head"

    header: EnvelopeHeader
    sealed_keys: Annotated[tuple[SealedKey, ...], Field(max_length=64)]

    def sealed_key_for(self, recipient: bytes) -> SealedKey:
        """The sealed key for that key id. Raises :class:`SealError` if the envelope is not addressed to it."""
        for sealed in self.sealed_keys:
            if sealed.recipient == recipient:
                return sealed
        raise SealError("the envelope is not addressed to this key")


def frame_head(head: EnvelopeHead, key: SigningKey) -> bytes:
    """Magic, length and the signed head: all that precedes the ciphertext. The key must be the preamble's sender."""
    body = encode(sign(head, key))
    return MAGIC + struct.pack(">I", len(body)) + body


def head_bytes(prefix: bytes) -> int:
    """Length of the signed head announced by the first :data:`PREFIX_BYTES` of an envelope.

    Raises :class:`MalformedError`, :class:`TooLargeError` or :class:`UnsupportedVersionError`: nothing is allocated yet.
    """
    if len(prefix) < PREFIX_BYTES or prefix[: len(MAGIC)] != MAGIC:
        raise MalformedError("not an envelope: wrong magic")
    (length,) = struct.unpack(">I", prefix[len(MAGIC) : PREFIX_BYTES])
    if length > MAX_HEAD_BYTES:
        raise TooLargeError(f"expected an envelope head of at most {MAX_HEAD_BYTES} bytes, got {length}")
    return int(length)


def open_head(
    signed_head: bytes | memoryview, *, kind: EnvelopeKind | None = None, sender: bytes | None = None
) -> EnvelopeHead:
    """The head, if its preamble's sender signed it; optionally of one kind and from one sender only.

    Raises :class:`MalformedError`, :class:`UnsupportedVersionError` or :class:`SignatureError`.
    """
    signed = decode(Signed, signed_head, max_bytes=MAX_HEAD_BYTES)
    _refuse_unknown_version(signed.payload)
    head = signed.peek(EnvelopeHead)
    preamble = head.header.preamble
    signed.verify(EnvelopeHead, preamble.sender)
    if kind is not None and preamble.kind != kind:
        raise MalformedError(f"expected a {kind} envelope, got a {preamble.kind} envelope")
    if sender is not None and preamble.sender != sender:
        raise SealError(f"the {preamble.kind} envelope is from another sender than expected")
    return head


def split_envelope(envelope: bytes | memoryview, *, max_bytes: int) -> tuple[memoryview, memoryview]:
    """A whole small envelope as (signed head, ciphertext). Raises :class:`MalformedError` or :class:`TooLargeError`."""
    view = memoryview(envelope)
    if len(view) > max_bytes:
        raise TooLargeError(f"expected an envelope of at most {max_bytes} bytes, got {len(view)}")
    length = head_bytes(bytes(view[:PREFIX_BYTES]))
    if len(view) < PREFIX_BYTES + length:
        raise MalformedError("envelope ends within its head")
    return view[PREFIX_BYTES : PREFIX_BYTES + length], view[PREFIX_BYTES + length :]


def _refuse_unknown_version(payload: bytes) -> None:
    value = unpack(payload)
    try:
        version = value["header"]["preamble"]["version"]
    except (TypeError, KeyError, IndexError) as error:
        raise MalformedError("envelope head has no version") from error
    if version != 1:
        raise UnsupportedVersionError(f"expected envelope version 1, got {version!r:.20}")
