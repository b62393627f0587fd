"""Commit: one result digest for these terms, for ever, and the receipt that says so."""

from __future__ import annotations

from casemate_schemas.codec import decode
from casemate_schemas.errors import AuthorisationError, CasemateError, CommitConflictError, SignatureError
from casemate_schemas.grant import AuditEntry, CommitReceipt, CommitRequest
from casemate_schemas.terms import Terms

from . import audit_log, ledger
from .database import Transaction
from .party import Party


def check_first_receipt(request: CommitRequest, terms: Terms, party: Party) -> None:
    """That the first key broker of the terms, who decides between rivals, has committed this very result.

    1. The first key broker itself needs nobody's receipt.
    2. There is a receipt, signed by the first key broker's key in the manifest.
    3. It is by that key broker, about these terms and this result.
    4. It proves that this commit stands in that key broker's audit log.

    Raises :class:`AuthorisationError`, :class:`SignatureError`, :class:`CommitConflictError` or :class:`ReleaseError`.
    """
    first = terms.key_brokers[0]
    if first == party.id:  # 1
        return
    if request.first_receipt is None:  # 2
        raise AuthorisationError(f"the receipt of key broker {first} comes first")
    receipt = request.first_receipt.verify(CommitReceipt, party.consortium.manifest.key_broker(first).signing_key)
    about = (receipt.consortium, receipt.key_broker, receipt.job_id, receipt.terms)  # 3
    if about != (party.consortium.id, first, request.job_id, request.terms):
        raise AuthorisationError("the first receipt is about another job")
    if receipt.result != request.result:
        raise CommitConflictError(f"key broker {first} committed another result")
    entry = _proven_entry(receipt)  # 4
    proven = (entry.key_broker, entry.event, entry.subject, entry.terms, entry.result)
    if proven != (first, "committed", request.job_id, request.terms, request.result):
        raise AuthorisationError("the first receipt proves another entry")


def find_receipt(tx: Transaction, terms: bytes) -> bytes | None:
    """The signed receipt given for these terms."""
    row = tx.execute("SELECT receipt FROM receipts WHERE terms = ?", (terms,)).fetchone()
    return None if row is None else bytes(row[0])


def commit(tx: Transaction, request: CommitRequest, party: Party, now: int) -> bytes:
    """The signed receipt for the request's result: the one given before, or that of a commit made now.

    Raises :class:`CommitConflictError` if another result holds the commit.
    """
    is_new = ledger.commit(tx, request.terms, request.result, now=now)
    if not is_new and (existing := find_receipt(tx, request.terms)) is not None:
        return existing
    entry = AuditEntry(
        key_broker=party.id,
        event="committed",
        at=now,
        subject=request.job_id,
        terms=request.terms,
        result=request.result,
    )
    index = audit_log.append(tx, entry)
    receipt = CommitReceipt(
        consortium=party.consortium.id,
        key_broker=party.id,
        job_id=request.job_id,
        terms=request.terms,
        result=request.result,
        ledger_head=ledger.head(tx),
        proof=audit_log.prove(tx, index),
        at=now,
    )
    signed = party.signed(receipt)
    tx.execute("INSERT INTO receipts VALUES (?, ?)", (request.terms, signed))
    return signed


def _proven_entry(receipt: CommitReceipt) -> AuditEntry:
    receipt.proof.check()
    try:
        return decode(AuditEntry, receipt.proof.entry)
    except CasemateError as error:
        raise SignatureError("the first receipt proves no audit entry") from error
