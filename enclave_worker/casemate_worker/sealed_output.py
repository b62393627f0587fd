"""What leaves the enclave: checkpoints and results under the resume key, and after the commit the recipients' keys."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import IO, Final

from casemate_messaging.envelopes import EnvelopeStore
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import Consortium
from casemate_schemas.envelope import PREFIX_BYTES, EnvelopeHead, EnvelopeHeader, EnvelopeKind, frame_head
from casemate_schemas.errors import IntegrityError, NotFoundError, ReleaseError, SealError, UnavailableError
from casemate_schemas.evidence import Evidence
from casemate_schemas.grant import CommitReceipt, CommitRequest
from casemate_schemas.result import Release
from casemate_schemas.sealing import (
    ContentKey,
    EnvelopeOpener,
    EnvelopeSealer,
    check_consortium,
    unseal_content_key,
)
from casemate_schemas.signatures import Signed, sign
from casemate_schemas.terms import Terms, VerifiedTerms

from .attempt import Attempt
from .evidence import AskKeyBroker
from .keys import Keys

_IN_MEMORY_BYTES: Final = 8 << 20
_PIECE_BYTES: Final = 512 << 10
_MAX_CHECKPOINT_BYTES: Final = 16 << 30


class SealedOutput:
    """Envelopes that one attempt makes for itself, its successors and the recipients."""

    def __init__(self, store: EnvelopeStore, consortium: bytes, scratch: Path) -> None:
        """``consortium`` is its id."""
        self._store = store
        self._consortium = consortium
        self._scratch = scratch

    async def put(
        self, kind: EnvelopeKind, parts: AsyncIterator[bytes], attempt: Attempt, resume_key: bytes, *, created: int
    ) -> bytes:
        """Seals and stores an envelope that only the resume key opens; its header's digest.

        Only ciphertext is buffered, in memory or in the scratch directory.
        """
        sealer = EnvelopeSealer(kind, consortium=self._consortium, sender=attempt.signing.public, created=created)
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES, dir=str(self._scratch)) as buffer:
            async for part in parts:
                buffer.writelines(sealer.update(part))
            buffer.write(sealer.finish())
            header = sealer.header()
            sealed = sealer.content_key.wrap_under(resume_key, header)
            head = frame_head(EnvelopeHead(header=header, sealed_keys=(sealed,)), attempt.signing)
            buffer.seek(0)
            await self._store.put(head[PREFIX_BYTES:], _read(buffer))
        return header.digest

    async def open(self, digest: bytes, kind: EnvelopeKind, resume_key: bytes) -> AsyncIterator[bytes]:
        """The plaintext of an envelope that an attempt at the same terms made, once all of it was seen to be right.

        It is read twice and held nowhere; :class:`UnavailableError` if it is not the same the second time. Raises
        :class:`SealError` and the like.
        """
        head, content_key, ciphertext = await self._found(digest, kind, resume_key)
        async for _ in opened(head.header, content_key, ciphertext):
            pass
        return self._again(digest, kind, resume_key)

    async def _again(self, digest: bytes, kind: EnvelopeKind, resume_key: bytes) -> AsyncIterator[bytes]:
        try:
            head, content_key, ciphertext = await self._found(digest, kind, resume_key)
            async for plain in opened(head.header, content_key, ciphertext):
                yield plain
        except (SealError, NotFoundError, IntegrityError, ReleaseError) as error:
            raise UnavailableError("a stored envelope changed while it was read") from error

    async def content_key(
        self, digest: bytes, kind: EnvelopeKind, resume_key: bytes
    ) -> tuple[EnvelopeHeader, ContentKey]:
        """Header and content key of such an envelope, without reading its ciphertext."""
        head, content_key, _ = await self._found(digest, kind, resume_key)
        return head.header, content_key

    async def _found(
        self, digest: bytes, kind: EnvelopeKind, resume_key: bytes
    ) -> tuple[EnvelopeHead, ContentKey, AsyncIterator[bytes]]:
        stored = await self._store.head(digest)
        check_consortium(stored.head, self._consortium)
        preamble = stored.head.header.preamble
        if preamble.kind != kind or stored.head.header.ciphertext_bytes > _MAX_CHECKPOINT_BYTES:
            raise ReleaseError(f"expected a {kind} envelope, got a {preamble.kind} envelope")
        return stored.head, unseal_content_key(stored.head, resume_key), self._store.ciphertext(stored)


async def commit(
    terms: VerifiedTerms, attempt: Attempt, result: bytes, consortium: Consortium, ask: AskKeyBroker
) -> tuple[Signed, ...]:
    """Every key broker's receipt for ``result``, asked for in sorted order; the first one decides between rivals.

    Raises :class:`CommitConflictError` if another result holds the commit, :class:`SignatureError` or
    :class:`ReleaseError` for a receipt that is none.
    """
    receipts: list[Signed] = []
    for name in terms.terms.key_brokers:
        request = CommitRequest(
            job_id=attempt.job_id,
            terms=terms.digest,
            attempt=attempt.number,
            result=result,
            first_receipt=receipts[0] if receipts else None,
        )
        signed = decode(Signed, await ask(name, "commit", encode(sign(request, attempt.signing))))
        receipt = signed.verify(CommitReceipt, consortium.manifest.key_broker(name).signing_key)
        about = (receipt.consortium, receipt.key_broker, receipt.job_id, receipt.terms, receipt.result)
        if about != (consortium.id, name, attempt.job_id, terms.digest, result):
            raise ReleaseError("a receipt is about another result than the one to commit")
        receipts.append(signed)
    return tuple(receipts)


def release(
    terms: VerifiedTerms,
    attempt: Attempt,
    evidence: Evidence,
    keys: Keys,
    receipts: tuple[Signed, ...],
    header: EnvelopeHeader,
    content_key: ContentKey,
    *,
    at: int,
) -> Signed:
    """The recipients' keys to the committed result, with all that shows they may have them."""
    return sign(
        Release(
            consortium=terms.terms.consortium,
            job_id=attempt.job_id,
            terms=terms.digest,
            result=header.digest,
            evidence=evidence,
            grants=granted(keys, terms.terms),
            receipts=receipts,
            sealed_keys=tuple(content_key.seal_to(person.sealing_key, header) for person in terms.recipients),
            at=at,
        ),
        attempt.signing,
    )


def granted(keys: Keys, terms: Terms) -> tuple[Signed, ...]:
    """All Grants in the order of key broker ids."""
    return tuple(keys.grants[name] for name in terms.key_brokers)


async def opened(
    header: EnvelopeHeader, content_key: ContentKey, ciphertext: AsyncIterator[bytes]
) -> AsyncGenerator[bytes]:
    """The plaintext as it comes out of its ciphertext; whole only when the iterator has ended. Raises :class:`SealError`."""
    opener = EnvelopeOpener(header, content_key)
    async for piece in ciphertext:
        for plain in opener.update(piece):
            yield plain
    yield opener.finish()


async def _read(file: IO[bytes]) -> AsyncIterator[bytes]:
    while piece := file.read(_PIECE_BYTES):
        yield piece
