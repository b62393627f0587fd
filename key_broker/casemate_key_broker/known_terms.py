"""Terms this key broker has judged: its answers for ever, the terms it said yes to, and the workers it gave keys to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from casemate_schemas.admission import Routing
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import ConflictError, NotFoundError, UnavailableError
from casemate_schemas.evidence import WorkerClaims
from casemate_schemas.signatures import Signed

from .database import Transaction

_DAY_MS: Final = 24 * 3600 * 1000


@dataclass(frozen=True)
class KnownTerms:
    """Signed terms that were answered yes; ``job_head`` only where this key broker opens the job itself."""

    job_id: str
    signed: Signed
    job_head: bytes | None


def find_answer(tx: Transaction, routing: bytes) -> bytes | None:
    """The signed answer given to a submission with this routing digest, if there is one."""
    row = tx.execute("SELECT answer FROM answers WHERE routing = ?", (routing,)).fetchone()
    return None if row is None else bytes(row[0])


def check_rate(tx: Transaction, submitter: bytes, *, now: int, max_per_day: int) -> None:
    """Raises :class:`UnavailableError` if this submitter had as many answers within a day as one may."""
    query = "SELECT count(*) FROM answers WHERE submitter = ? AND at > ?"
    (count,) = tx.execute(query, (submitter, now - _DAY_MS)).fetchone()
    if count >= max_per_day:
        raise UnavailableError(f"{count} submissions within a day; come back tomorrow")


def check_new(tx: Transaction, terms: bytes) -> None:
    """Raises :class:`ConflictError` if these terms were accepted with another routing."""
    if tx.execute("SELECT 1 FROM terms WHERE terms = ?", (terms,)).fetchone() is not None:
        raise ConflictError("these terms were submitted before, with another routing")


def store_answer(tx: Transaction, routing: Signed, answer: bytes, now: int) -> None:
    """Keep the answer to a submission."""
    row = (routing.digest, routing.peek(Routing).terms, routing.signer, answer, now)
    tx.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", row)


def accept(tx: Transaction, routing: Signed, signed: Signed, job_head: bytes | None) -> None:
    """Keep terms that were answered yes."""
    row = (signed.digest, routing.peek(Routing).job_id, routing.digest, encode(signed), job_head)
    tx.execute("INSERT INTO terms VALUES (?, ?, ?, ?, ?)", row)


def find(tx: Transaction, terms: bytes, job_id: str) -> KnownTerms:
    """Terms that were answered yes. Raises :class:`NotFoundError` for others, or if the job has another id."""
    query = "SELECT job_id, signed, job_head FROM terms WHERE terms = ? AND job_id = ?"
    row = tx.execute(query, (terms, job_id)).fetchone()
    if row is None:
        raise NotFoundError("this key broker did not say yes to these terms")
    return KnownTerms(row[0], decode(Signed, row[1]), row[2])


def record_worker(tx: Transaction, claims: WorkerClaims, evidence: bytes, now: int) -> None:
    """Keep which attested key was given a Grant, for which attempt."""
    row = (claims.terms, claims.attempt, claims.signing_key, evidence, now)
    tx.execute("INSERT OR REPLACE INTO grants VALUES (?, ?, ?, ?, ?)", row)


def holds_grant(tx: Transaction, terms: bytes, attempt: int, worker_key: bytes) -> bool:
    """Whether a Grant for that attempt was given to that key."""
    query = "SELECT 1 FROM grants WHERE terms = ? AND attempt = ? AND worker_key = ?"
    return tx.execute(query, (terms, attempt, worker_key)).fetchone() is not None
