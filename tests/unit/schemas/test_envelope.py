from __future__ import annotations

import itertools
import os
import struct

import pytest
from casemate_schemas.codec import decode, encode, pack, unpack
from casemate_schemas.envelope import (
    MAGIC,
    MAX_HEAD_BYTES,
    PREFIX_BYTES,
    EnvelopeHead,
    frame_head,
    head_bytes,
    open_head,
    split_envelope,
)
from casemate_schemas.errors import (
    CasemateError,
    MalformedError,
    SealError,
    SignatureError,
    TooLargeError,
    UnsupportedVersionError,
)
from casemate_schemas.sealing import (
    ContentKey,
    EnvelopeOpener,
    EnvelopeSealer,
    SealingKey,
    open_envelope,
    seal_envelope,
    seal_secret,
    unseal_content_key,
)
from casemate_schemas.signatures import Signed, SigningKey, sign
from hypothesis import given, settings
from hypothesis import strategies as st

CONSORTIUM = bytes(range(32))
SENDER = SigningKey.generate()
NORTH, SOUTH, STRANGER = SealingKey.generate(), SealingKey.generate(), SealingKey.generate()
MAX = 1 << 24


def make(plaintext: bytes = b"secret", *, kind: str = "job") -> bytes:
    recipients = [NORTH.public, SOUTH.public]
    return seal_envelope(kind, plaintext, recipients, consortium=CONSORTIUM, key=SENDER, created=7)  # type: ignore[arg-type]


def opened(envelope: bytes, key: SealingKey = NORTH) -> bytes:
    return open_envelope(envelope, key, kind="job", consortium=CONSORTIUM, sender=SENDER.public, max_bytes=MAX)[1]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_every_addressee_opens_it_and_nobody_else(size: int) -> None:
    plaintext = os.urandom(size)
    envelope = make(plaintext)
    assert opened(envelope) == opened(envelope, SOUTH) == plaintext
    with pytest.raises(SealError, match="not addressed"):
        opened(envelope, STRANGER)


def test_the_ciphertext_does_not_hold_the_plaintext() -> None:
    plaintext = b"CANARY" * 100
    assert b"CANARY" not in make(plaintext)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_changed_byte_goes_unnoticed(data: st.DataObject) -> None:
    envelope = bytearray(make(b"some plaintext of a job"))
    position = data.draw(st.integers(0, len(envelope) - 1))
    envelope[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CasemateError):
        opened(bytes(envelope))


@pytest.mark.parametrize("cut", [0, 4, 11, 12, 500, -1])
def test_a_truncated_envelope_is_refused(cut: int) -> None:
    with pytest.raises(CasemateError):
        opened(make()[:cut])


def test_chunks_cannot_be_reordered_dropped_or_repeated() -> None:
    sealer = EnvelopeSealer("job", consortium=CONSORTIUM, sender=SENDER.public, created=7, chunk_bytes=1024)
    chunks = [*sealer.update(os.urandom(3000)), sealer.finish()]
    header, key = sealer.header(), sealer.content_key
    assert len(chunks) == 3

    def opened_in(order: tuple[int, ...]) -> list[bytes]:
        stream = EnvelopeOpener(header, key)._stream
        return [stream.open(chunks[index], last=place == 2) for place, index in enumerate(order)]

    assert len(b"".join(opened_in((0, 1, 2)))) == 3000
    for order in set(itertools.product(range(3), repeat=3)) - {(0, 1, 2)}:
        with pytest.raises(SealError):
            opened_in(order)
    short = EnvelopeOpener(header, key)
    list(short.update(chunks[0] + chunks[1]))
    with pytest.raises(SealError, match="shorter"):
        short.finish()


def test_more_ciphertext_than_announced_is_refused_while_it_streams() -> None:
    sealer = EnvelopeSealer("job", consortium=CONSORTIUM, sender=SENDER.public, created=7)
    sealer.finish()
    opener = EnvelopeOpener(sealer.header(), sealer.content_key)
    with pytest.raises(SealError, match="longer"):
        list(opener.update(bytes(17)))


def test_a_content_key_fits_its_own_envelope_only() -> None:
    first, second = make(b"one"), make(b"two")
    heads = [open_head(split_envelope(e, max_bytes=MAX)[0]) for e in (first, second)]
    mixed = EnvelopeHead(header=heads[0].header, sealed_keys=heads[1].sealed_keys)
    with pytest.raises(SealError):
        unseal_content_key(mixed, NORTH)
    with pytest.raises(SealError, match="commits"):
        EnvelopeOpener(heads[0].header, ContentKey.generate())


def test_a_derived_key_opens_what_was_wrapped_under_it() -> None:
    resume, other = os.urandom(32), os.urandom(32)
    sealer = EnvelopeSealer("checkpoint", consortium=CONSORTIUM, sender=SENDER.public, created=7)
    sealer.finish()
    header = sealer.header()
    head = EnvelopeHead(header=header, sealed_keys=(sealer.content_key.wrap_under(resume, header),))
    assert unseal_content_key(head, resume).to_bytes() == sealer.content_key.to_bytes()
    with pytest.raises(SealError):
        unseal_content_key(head, other)


def test_sender_kind_and_consortium_are_checked() -> None:
    envelope = make()
    with pytest.raises(MalformedError, match="expected a dataset"):
        open_envelope(envelope, NORTH, kind="dataset", consortium=CONSORTIUM, max_bytes=MAX)
    with pytest.raises(SealError, match="another consortium"):
        open_envelope(envelope, NORTH, kind="job", consortium=bytes(32), max_bytes=MAX)
    with pytest.raises(SealError, match="another sender"):
        open_envelope(envelope, NORTH, kind="job", consortium=CONSORTIUM, sender=bytes(32), max_bytes=MAX)


def test_somebody_else_cannot_sign_in_the_senders_name() -> None:
    head = open_head(split_envelope(make(), max_bytes=MAX)[0])
    forged = frame_head(head, SigningKey.generate())
    with pytest.raises(SignatureError):
        open_head(forged[PREFIX_BYTES:])


def test_sealed_keys_cannot_be_added_without_the_sender() -> None:
    signed_head, _ = split_envelope(make(), max_bytes=MAX)
    signed = decode(Signed, signed_head)
    head = signed.peek(EnvelopeHead)
    fewer = EnvelopeHead(header=head.header, sealed_keys=head.sealed_keys[:1])
    with pytest.raises(SignatureError):
        open_head(encode(Signed(**{**signed.model_dump(), "payload": encode(fewer)})))


def test_an_unknown_version_is_named_as_such() -> None:
    signed_head, _ = split_envelope(make(), max_bytes=MAX)
    signed = decode(Signed, signed_head)
    value = unpack(signed.payload)
    value["header"]["preamble"]["version"] = 2
    with pytest.raises(UnsupportedVersionError, match="expected envelope version 1, got 2"):
        open_head(encode(Signed(**{**signed.model_dump(), "payload": pack(value)})))


def test_a_huge_head_is_refused_before_it_is_read() -> None:
    with pytest.raises(TooLargeError):
        head_bytes(MAGIC + struct.pack(">I", MAX_HEAD_BYTES + 1))
    with pytest.raises(MalformedError, match="magic"):
        head_bytes(b"CASEMATF" + struct.pack(">I", 1))
    with pytest.raises(TooLargeError):
        split_envelope(make(bytes(100)), max_bytes=50)


def test_secrets_are_bound_to_their_purpose() -> None:
    sealed = seal_secret(b"k" * 32, NORTH.public, info=b"grant")
    assert NORTH.open_secret(sealed, info=b"grant") == b"k" * 32
    for key, info in ((NORTH, b"other"), (SOUTH, b"grant")):
        with pytest.raises(SealError):
            key.open_secret(sealed, info=info)
    with pytest.raises(MalformedError):
        seal_secret(b"k" * 32, NORTH.public[:-1], info=b"grant")


def test_private_keys_do_not_show_themselves() -> None:
    content = ContentKey.generate()
    for key, secret in ((SENDER, SENDER.to_bytes()), (NORTH, NORTH.to_bytes()), (content, content.to_bytes())):
        assert secret.hex()[:12] not in repr(key)
        assert repr(secret)[2:10] not in repr(key)


def test_a_signature_is_about_one_kind_of_message() -> None:
    head = open_head(split_envelope(make(), max_bytes=MAX)[0])
    signed = sign(head, SENDER)
    with pytest.raises(SignatureError, match="expected a signed"):
        signed.verify(type(head.header), SENDER.public)
    with pytest.raises(SignatureError):
        Signed(**{**signed.model_dump(), "kind": "envelope-header"}).verify(type(head.header), SENDER.public)
    with pytest.raises(SignatureError, match="another key"):
        signed.verify(EnvelopeHead, NORTH.public[:32])
