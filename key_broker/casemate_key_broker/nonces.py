"""Nonces that make evidence fresh: random, good once, for a short time, for one attempt at one job."""

from __future__ import annotations

import secrets

from casemate_schemas.errors import NonceError, UnavailableError
from casemate_schemas.evidence import NONCE_BYTES, WorkerClaims
from casemate_schemas.grant import NonceReply, NonceRequest

from .database import Transaction


def issue(tx: Transaction, request: NonceRequest, *, now: int, ttl_ms: int, max_outstanding: int) -> NonceReply:
    """A fresh nonce for the job, terms and attempt of ``request``.

    Raises :class:`UnavailableError` while ``max_outstanding`` nonces of these terms are neither used nor expired.
    """
    tx.execute("DELETE FROM nonces WHERE expires <= ?", (now,))
    (outstanding,) = tx.execute("SELECT count(*) FROM nonces WHERE terms = ?", (request.terms,)).fetchone()
    if outstanding >= max_outstanding:
        raise UnavailableError(f"{outstanding} nonces of these terms are out; ask again when one has expired")
    reply = NonceReply(nonce=secrets.token_bytes(NONCE_BYTES), expires=now + ttl_ms)
    row = (reply.nonce, request.job_id, request.terms, request.attempt, reply.expires)
    tx.execute("INSERT INTO nonces VALUES (?, ?, ?, ?, ?)", row)
    return reply


def consume(tx: Transaction, claims: WorkerClaims, *, key_broker: str, now: int) -> None:
    """Uses up ``key_broker``'s nonce in ``claims``: of any number of requests with it, one at most passes.

    Raises :class:`NonceError` unless it is outstanding, not expired, and was given for the very job, terms and attempt
    that are claimed. (Whoever merely guesses or mixes up nonces uses up none.)
    """
    found = tx.execute(
        "DELETE FROM nonces WHERE nonce = ? AND job_id = ? AND terms = ? AND attempt = ? AND expires > ?"
        " RETURNING nonce",
        (claims.nonce_of(key_broker), claims.job_id, claims.terms, claims.attempt, now),
    ).fetchall()
    if len(found) != 1:
        raise NonceError("the nonce is unknown, used, expired, or was given for another job, terms or attempt")
