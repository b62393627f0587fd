"""Envelopes in the blob store: the ciphertext under its own digest, then the signed head under the header's digest.

The head is written last and never replaced, so a head that can be found belongs to a complete ciphertext. Nothing is
opened here, and nothing could be.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from typing import Final

from casemate_schemas.envelope import MAGIC, EnvelopeHead, open_head, split_envelope
from casemate_schemas.errors import CasemateError, IntegrityError
from nats.aio.client import Client

from .blobs import BlobStore
from .heads import HeadStore

MAX_SMALL_ENVELOPE_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class StoredHead:
    """A stored envelope's head, whose signature was checked, and the very bytes that the sender signed."""

    head: EnvelopeHead
    signed: bytes

    @property
    def framing(self) -> bytes:
        """What precedes the ciphertext on a wire: magic, length, signed head."""
        return MAGIC + len(self.signed).to_bytes(4, "big") + self.signed


class EnvelopeStore:
    """Envelopes by header digest over one connection."""

    def __init__(self, client: Client, blobs: BlobStore) -> None:
        self._heads = HeadStore(client)
        self._blobs = blobs

    async def put(self, signed_head: bytes, ciphertext: AsyncIterable[bytes]) -> bool:
        """Stores an envelope, ciphertext first; True if it was not there before.

        Raises :class:`MalformedError` or :class:`SignatureError` for a head that is none, and as
        :meth:`BlobStore.put` for a ciphertext that is not the one the header describes. Then nothing is visible.
        """
        header = open_head(signed_head).header
        await self._blobs.put(header.ciphertext_digest, header.ciphertext_bytes, ciphertext)
        return await self._heads.put(header.digest, signed_head)

    async def put_bytes(self, envelope: bytes) -> bytes:
        """Stores a small envelope that is whole in memory; returns its header's digest. Raises as :meth:`put`."""
        signed_head, ciphertext = split_envelope(envelope, max_bytes=MAX_SMALL_ENVELOPE_BYTES)
        await self.put(bytes(signed_head), _once(bytes(ciphertext)))
        return open_head(signed_head).header.digest

    async def head(self, digest: bytes) -> StoredHead:
        """The head of a complete envelope.

        Raises :class:`NotFoundError`, :class:`IntegrityError` if what is stored is another envelope's head or none, and
        :class:`UnavailableError`.
        """
        stored = await self._heads.get(digest)
        try:
            head = open_head(stored)
        except CasemateError as error:
            raise IntegrityError("the stored envelope head is broken") from error
        if head.header.digest != digest:
            raise IntegrityError("the stored envelope head is another envelope's")
        return StoredHead(head, stored)

    def ciphertext(self, stored: StoredHead) -> AsyncIterator[bytes]:
        """The envelope's ciphertext in order; its last piece comes only after the digest was checked."""
        return self._blobs.get(stored.head.header.ciphertext_digest)

    async def small(self, digest: bytes) -> bytes:
        """A whole envelope of at most :data:`MAX_SMALL_ENVELOPE_BYTES`. Raises as :meth:`head`."""
        stored = await self.head(digest)
        if stored.head.header.ciphertext_bytes > MAX_SMALL_ENVELOPE_BYTES:
            raise IntegrityError("the stored envelope is larger than one of its kind may be")
        return stored.framing + b"".join([piece async for piece in self.ciphertext(stored)])


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
