"""Nonces that make evidence fresh: unguessable, good once, for a short time, for one attempt at one job.

A nonce is a random part, its expiry and a MAC by this key broker over both and over what it was given for. So nothing is
kept for a nonce that is out, and nobody can use up room that others need: only nonces that were *used* are remembered.

::

    random (8) | expiry, Unix ms, big-endian (6) | HMAC-SHA-256, first 18 bytes
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Final

from casemate_schemas.codec import pack
from casemate_schemas.errors import NonceError
from casemate_schemas.evidence import NONCE_BYTES, WorkerClaims
from casemate_schemas.grant import NonceReply, NonceRequest

from .database import Transaction, get_meta, set_meta

_RANDOM_BYTES: Final = 8
_EXPIRY_BYTES: Final = 6
_HEAD_BYTES: Final = _RANDOM_BYTES + _EXPIRY_BYTES
_KEPT_MS: Final = 24 * 3600 * 1000
"""How long a used nonce is remembered after it expired: no clock is set back by more."""

_DOMAIN: Final = b"casemate/v1/nonce\x00"


def load_key(tx: Transaction) -> bytes:
    """The key that makes this key broker's nonces its own; made once."""
    key = get_meta(tx, "nonce-key")
    if key is None:
        key = secrets.token_bytes(32)
        set_meta(tx, "nonce-key", key)
    return bytes(key)


def issue(key: bytes, request: NonceRequest, *, now: int, ttl_ms: int) -> NonceReply:
    """A fresh nonce for the job, terms and attempt of ``request``, good for ``ttl_ms``."""
    expires = now + ttl_ms
    head = secrets.token_bytes(_RANDOM_BYTES) + expires.to_bytes(_EXPIRY_BYTES, "big")
    return NonceReply(nonce=head + _mac(key, head, request), expires=expires)


def consume(tx: Transaction, key: bytes, claims: WorkerClaims, *, key_broker: str, now: int) -> None:
    """Uses up ``key_broker``'s nonce in ``claims``: of any number of requests with it, one at most passes.

    1. It is one that this key broker gave for the very job, terms and attempt that are claimed.
    2. It has not expired.
    3. It was never used. From here on it is, once the transaction is committed.

    Raises :class:`NonceError`.
    """
    nonce = claims.nonce_of(key_broker) or b""
    head, mac = nonce[:_HEAD_BYTES], nonce[_HEAD_BYTES:]
    request = NonceRequest(job_id=claims.job_id, terms=claims.terms, attempt=claims.attempt)
    if not hmac.compare_digest(mac, _mac(key, head, request)):  # 1
        raise NonceError("expected a nonce that was given here for this job, terms and attempt")
    expires = int.from_bytes(head[_RANDOM_BYTES:], "big")
    if expires <= now:  # 2
        raise NonceError("the nonce has expired")
    tx.execute("DELETE FROM used_nonces WHERE expires <= ?", (now - _KEPT_MS,))
    used = tx.execute("INSERT OR IGNORE INTO used_nonces VALUES (?, ?) RETURNING nonce", (nonce, expires)).fetchall()
    if len(used) != 1:  # 3
        raise NonceError("the nonce was used before")


def _mac(key: bytes, head: bytes, request: NonceRequest) -> bytes:
    covered = pack([head, request.job_id, request.terms, request.attempt])
    return hmac.digest(key, _DOMAIN + covered, hashlib.sha256)[: NONCE_BYTES - _HEAD_BYTES]
