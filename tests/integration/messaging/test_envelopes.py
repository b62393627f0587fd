from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.heads import HeadStore
from casemate_schemas.envelope import open_head, split_envelope
from casemate_schemas.errors import IntegrityError, MalformedError, NotFoundError, SealError, SignatureError
from casemate_schemas.sealing import SealingKey, open_envelope, seal_envelope
from casemate_schemas.signatures import SigningKey
from support.nats import NatsStack

CONSORTIUM = bytes(32)
SENDER = SigningKey.generate()
RECIPIENT = SealingKey.generate()


def envelope(plaintext: bytes) -> bytes:
    return seal_envelope("job", plaintext, [RECIPIENT.public], consortium=CONSORTIUM, key=SENDER, created=1)


async def pieces(data: bytes | memoryview, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield bytes(data[start : start + size])


async def stores(stack: NatsStack) -> tuple[EnvelopeStore, EnvelopeStore]:
    """The gateway's and a worker's."""
    clients = [await stack.connect("gateway"), await stack.connect("worker-1")]
    return EnvelopeStore(clients[0], BlobStore(clients[0], may_purge=True)), EnvelopeStore(
        clients[1], BlobStore(clients[1])
    )


async def test_what_one_stores_the_other_reads_and_opens(nats_stack: NatsStack) -> None:
    gateway, worker = await stores(nats_stack)
    plaintext = os.urandom(3_000_000)
    whole = envelope(plaintext)
    signed_head, ciphertext = split_envelope(whole, max_bytes=len(whole))
    assert await gateway.put(bytes(signed_head), pieces(ciphertext))
    assert not await worker.put(bytes(signed_head), pieces(ciphertext))
    stored = await worker.head(open_head(signed_head).header.digest)
    read = stored.framing + b"".join([piece async for piece in worker.ciphertext(stored)])
    assert read == whole
    opened = open_envelope(read, RECIPIENT, kind="job", consortium=CONSORTIUM, sender=SENDER.public, max_bytes=1 << 24)
    assert opened[1] == plaintext


async def test_a_head_is_visible_only_behind_its_whole_ciphertext(nats_stack: NatsStack) -> None:
    gateway, _ = await stores(nats_stack)
    whole = envelope(os.urandom(700_000))
    signed_head, ciphertext = split_envelope(whole, max_bytes=len(whole))
    digest = open_head(signed_head).header.digest
    changed = bytearray(ciphertext)
    changed[5] ^= 1
    for wrong, error in ((ciphertext[:-1], MalformedError), (bytes(changed), SealError)):
        with pytest.raises(error):
            await gateway.put(bytes(signed_head), pieces(wrong))
        with pytest.raises(NotFoundError):
            await gateway.head(digest)
    with pytest.raises((MalformedError, SignatureError)):
        await gateway.put(bytes(signed_head[:-1]), pieces(ciphertext))


async def test_another_envelopes_head_is_not_taken_for_the_one_asked_for(nats_stack: NatsStack) -> None:
    gateway, _ = await stores(nats_stack)
    client = await nats_stack.connect("gateway")
    signed_head, _ = split_envelope(envelope(b"one"), max_bytes=1 << 20)
    for name, stored in ((b"\x01" * 32, bytes(signed_head)), (b"\x02" * 32, b"junk")):
        await HeadStore(client).put(name, stored)
        with pytest.raises(IntegrityError):
            await gateway.head(name)
