"""Envelopes in the blob store: the ciphertext under its own digest, then the signed head under the header's digest.

The head is written last and never replaced, so a head that can be found belongs to a complete ciphertext. Nothing is
opened here, and nothing could be.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from dataclasses import dataclass

from casemate_schemas.envelope import MAGIC, EnvelopeHead, open_head
from casemate_schemas.errors import CasemateError, IntegrityError, NotFoundError
from nats.aio.client import Client

from .blobs import BlobStore
from .direct import Stored
from .heads import HeadStore


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

    def __init__(self, client: Client, blobs: BlobStore, *, patience_s: float = 0.0) -> None:
        """``patience_s`` is how long to look for the head of an envelope that a replica may not have yet."""
        self._heads = HeadStore(client, patience_s=patience_s)
        self._blobs = blobs

    async def put(self, signed_head: bytes, ciphertext: AsyncIterable[bytes]) -> bool:
        """Stores an envelope, ciphertext first; True if it was not there before.

        Raises :class:`MalformedError` or :class:`SignatureError` for a head that is none, and as
        :meth:`BlobStore.put` for a ciphertext that is not the one the header describes. Then nothing is visible.
        """
        header = open_head(signed_head).header
        await self._blobs.put(header.ciphertext_digest, header.ciphertext_bytes, ciphertext)
        return await self._heads.put(header.digest, signed_head)

    async def put_head(self, signed_head: bytes) -> bool:
        """Stores the head of an envelope whose ciphertext is a blob already; True if it was not there before."""
        return await self._heads.put(open_head(signed_head).header.digest, signed_head)

    async def has(self, digest: bytes) -> bool:
        """Whether there is such an envelope. Raises :class:`UnavailableError`."""
        try:
            await self._heads.get(digest)
        except NotFoundError:
            return False
        return True

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

    def ciphertext(self, stored: StoredHead) -> AsyncGenerator[bytes]:
        """The envelope's ciphertext in order; its last piece comes only after the digest was checked."""
        return self._blobs.get(stored.head.header.ciphertext_digest)

    def part(self, stored: StoredHead, start: int, stop: int) -> AsyncGenerator[bytes]:
        """Bytes ``start`` to before ``stop`` of the ciphertext, as :meth:`BlobStore.get_range`."""
        return self._blobs.get_range(stored.head.header.ciphertext_digest, start, stop)

    async def delete(self, stored: StoredHead) -> None:
        """Removes an envelope, its head first. The gateway only."""
        header = stored.head.header
        await self._heads.delete(header.digest)
        await self._blobs.delete(header.ciphertext_digest)

    async def delete_head(self, digest: bytes, *, sequence: int) -> None:
        """Removes the head that :meth:`heads` told of with this sequence. The gateway only."""
        await self._heads.delete(digest, sequence=sequence)

    def heads(self) -> AsyncIterator[tuple[bytes, Stored]]:
        """Every envelope's digest and signed head as they are stored, the oldest first. The gateway only."""
        return self._heads.list()
