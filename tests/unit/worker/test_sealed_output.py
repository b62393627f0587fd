"""Commit and release: which receipts count, and that the host can swap nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from casemate_messaging.envelopes import StoredHead
from casemate_schemas.codec import decode, encode
from casemate_schemas.envelope import open_head
from casemate_schemas.errors import CommitConflictError, ReleaseError, SealError, SignatureError, UnavailableError
from casemate_schemas.grant import CommitReceipt, CommitRequest
from casemate_schemas.sealing import unseal_content_key
from casemate_schemas.signatures import Signed, SigningKey, sign
from casemate_schemas.terms import VerifiedTerms, verify_terms
from casemate_worker.attempt import Attempt
from casemate_worker.sealed_output import SealedOutput, commit
from support.reports import in_pieces
from support.results import JOB_ID, Edits, World
from support.results import Worker as Keeper

RESULT, RIVAL = b"\x0c" * 32, b"\x0d" * 32
BROKERS = ("lab", "north", "south")


def an_attempt(number: int = 1) -> Any:
    keys = Keeper(number).keys

    class Fake:
        job_id, signing, sealing = JOB_ID, keys.signing, keys.sealing

    Fake.number = number  # type: ignore[attr-defined]
    return Fake


@dataclass
class Brokers:
    """Key brokers that sign receipts for whatever they are asked to hold; ``instead`` replaces single answers."""

    w: World
    terms: Signed
    instead: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, CommitRequest, bytes]] = field(default_factory=list)

    def receipt(self, name: str, result: bytes = RESULT, **changed: Any) -> Signed:
        signed = self.w.receipt(name, self.terms, result, Edits())
        return sign(signed.peek(CommitReceipt).model_copy(update=changed), self.w.brokers[name].signing)

    async def ask(self, name: str, op: str, payload: bytes) -> bytes:
        signed = decode(Signed, payload)
        assert op == "commit"
        self.asked.append((name, signed.verify(CommitRequest, signed.signer), signed.signer))
        answer = self.instead.get(name)
        if isinstance(answer, Exception):
            raise answer
        return encode(answer or self.receipt(name))

    async def commit(self, attempt: Attempt) -> tuple[Signed, ...]:
        return await commit(self.verified, attempt, RESULT, self.w.consortium, self.ask)

    @property
    def verified(self) -> VerifiedTerms:
        return verify_terms(self.terms, self.w.consortium)


@pytest.fixture
def brokers(w: World) -> Brokers:
    return Brokers(w, w.terms())


async def test_all_are_asked_in_order_and_shown_the_first_receipt(brokers: Brokers) -> None:
    attempt = an_attempt(3)
    receipts = await brokers.commit(attempt)
    assert [receipt.peek(CommitReceipt).key_broker for receipt in receipts] == list(BROKERS)
    assert [name for name, *_ in brokers.asked] == list(BROKERS)
    for name, request, signer in brokers.asked:
        assert (request.job_id, request.terms, request.attempt) == (JOB_ID, brokers.terms.digest, 3)
        assert (request.result, signer) == (RESULT, attempt.signing.public)
        assert request.first_receipt == (None if name == "lab" else receipts[0])


@pytest.mark.parametrize("name", BROKERS)
async def test_a_receipt_that_is_about_something_else_is_none(brokers: Brokers, name: str) -> None:
    """Another result's, terms' or key broker's; signed by another; or no receipt at all. Nobody further is asked."""
    another = next(other for other in BROKERS if other != name)
    by_another = sign(brokers.receipt(name).peek(CommitReceipt), brokers.w.brokers[another].signing)
    cases: list[tuple[type[Exception], Signed]] = [
        (ReleaseError, brokers.receipt(name, RIVAL)),
        (ReleaseError, brokers.receipt(name, terms=RIVAL)),
        (ReleaseError, brokers.receipt(name, consortium=RIVAL)),
        (ReleaseError, brokers.receipt(name, job_id="f" * 32)),
        (ReleaseError, brokers.receipt(name, key_broker=another)),
        (SignatureError, brokers.receipt(another)),
        (SignatureError, by_another),
        (SignatureError, sign(brokers.receipt(name).peek(CommitReceipt), SigningKey.generate())),
        (SignatureError, sign(brokers.w.plan(), brokers.w.brokers[name].signing)),
    ]
    for error, receipt in cases:
        brokers.instead, brokers.asked = {name: receipt}, []
        with pytest.raises(error):
            await brokers.commit(an_attempt())
        assert len(brokers.asked) == BROKERS.index(name) + 1


async def test_a_rivals_commit_ends_it(brokers: Brokers) -> None:
    brokers.instead = {"north": CommitConflictError("another")}
    with pytest.raises(CommitConflictError):
        await brokers.commit(an_attempt())
    assert [name for name, *_ in brokers.asked] == ["lab", "north"]


# --- what is uploaded -----------------------------------------------------------------------------------------------


class Store:
    """Envelopes in memory, under a host that may swap them."""

    def __init__(self) -> None:
        self.heads: dict[bytes, StoredHead] = {}
        self.bodies: dict[bytes, bytes] = {}

    async def put(self, signed_head: bytes, ciphertext: Any) -> bool:
        head = open_head(signed_head)
        self.heads[head.header.digest] = StoredHead(head, signed_head)
        self.bodies[head.header.ciphertext_digest] = b"".join([piece async for piece in ciphertext])
        return True

    async def head(self, digest: bytes) -> StoredHead:
        return self.heads[digest]

    async def ciphertext(self, stored: StoredHead) -> Any:
        yield self.bodies[stored.head.header.ciphertext_digest]


KEY, OTHER_KEY = b"\x07" * 32, b"\x08" * 32


async def read(output: SealedOutput, digest: bytes) -> bytes:
    return b"".join([piece async for piece in await output.open(digest, "checkpoint", KEY)])


async def test_what_changes_after_it_was_looked_at_is_no_checkpoint_and_no_end(w: World, tmp_path: Path) -> None:
    store: Any = Store()
    output = SealedOutput(store, w.consortium.id, tmp_path)
    digest = await output.put("checkpoint", in_pieces(bytes(3 << 20), 1 << 20), an_attempt(), KEY, created=w.now)
    pieces = await output.open(digest, "checkpoint", KEY)
    body = store.heads[digest].head.header.ciphertext_digest
    store.bodies[body] = store.bodies[body][:-1] + b"x"
    with pytest.raises(UnavailableError):
        [piece async for piece in pieces]


async def test_only_the_resume_key_opens_an_upload(w: World, tmp_path: Path) -> None:
    store: Any = Store()
    output = SealedOutput(store, w.consortium.id, tmp_path)
    digest = await output.put("checkpoint", in_pieces(b"state", 2), an_attempt(), KEY, created=w.now)
    assert await read(output, digest) == b"state"
    head = store.heads[digest].head
    assert len(head.sealed_keys) == 1 and b"state" not in b"".join(store.bodies.values())
    for key in (OTHER_KEY, w.clara.keys.sealing, w.brokers["north"].sealing):
        with pytest.raises(SealError):
            unseal_content_key(head, key)
    with pytest.raises(SealError):
        await output.open(digest, "checkpoint", OTHER_KEY)


async def test_a_checkpoint_is_no_result_and_a_swapped_one_does_not_open(w: World, tmp_path: Path) -> None:
    """Another kind, another consortium, other bytes under the same head, or a head that names another's sealed key."""
    store: Any = Store()
    output = SealedOutput(store, w.consortium.id, tmp_path)
    first, second = [
        await output.put("checkpoint", in_pieces(text), an_attempt(), KEY, created=w.now) for text in (b"one", b"two")
    ]
    with pytest.raises(ReleaseError):
        await output.content_key(first, "result", KEY)
    ours, theirs = (store.heads[digest].head for digest in (first, second))
    store.bodies[ours.header.ciphertext_digest] = store.bodies[theirs.header.ciphertext_digest]
    with pytest.raises(SealError):
        await output.open(first, "checkpoint", KEY)
    swapped = ours.model_copy(update={"sealed_keys": theirs.sealed_keys})
    store.heads[first] = StoredHead(swapped, b"")
    with pytest.raises(SealError):
        await output.open(first, "checkpoint", KEY)
    foreign = SealedOutput(store, RIVAL, tmp_path)
    with pytest.raises(SealError):
        await foreign.open(second, "checkpoint", KEY)
    assert await read(output, second) == b"two"
