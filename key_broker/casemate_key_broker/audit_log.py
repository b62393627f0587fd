"""What was asked and what was decided, refusals included: an append-only log whose entries are leaves of a Merkle tree.

Inclusion proofs are those of RFC 6962, so whoever holds a receipt can check offline that its entry was in the log that
had this root. Each row also carries a running hash over all before it, which is checked when the state is opened.
"""

from __future__ import annotations

from typing import Final

from casemate_schemas.codec import decode, domain_digest, encode
from casemate_schemas.errors import CasemateError, IntegrityError
from casemate_schemas.grant import AuditEntry, InclusionProof
from casemate_schemas.merkle import inclusion_path, leaf_hash, root_hash

from .database import Transaction, get_meta, set_meta

_HEAD: Final = "audit-head"
_START: Final = bytes(32)


def append(tx: Transaction, entry: AuditEntry) -> int:
    """Add ``entry``; its index (from 0). It stands once the transaction is committed."""
    size, head = get_meta(tx, _HEAD) or (0, _START)
    payload = encode(entry)
    leaf = leaf_hash(payload)
    following = _chained(head, leaf)
    tx.execute("INSERT INTO audit VALUES (?, ?, ?, ?)", (size, payload, leaf, following))
    set_meta(tx, _HEAD, (size + 1, following))
    return int(size)


def prove(tx: Transaction, index: int) -> InclusionProof:
    """That entry ``index`` stands in the log as it is in this transaction. Raises :class:`IntegrityError`."""
    leaves = [leaf for (leaf,) in tx.execute("SELECT leaf FROM audit ORDER BY number")]
    row = tx.execute("SELECT entry FROM audit WHERE number = ?", (index,)).fetchone()
    if row is None:
        raise IntegrityError(f"the audit log has no entry {index}")
    path, root = inclusion_path(leaves, index), root_hash(leaves)
    return InclusionProof(entry=row[0], index=index, size=len(leaves), path=path, root=root)


def verify(tx: Transaction) -> None:
    """That the log is whole, in order and unchanged since it was written. Raises :class:`IntegrityError`."""
    head, size = _START, 0
    for number, payload, leaf, stored in tx.execute("SELECT number, entry, leaf, head FROM audit ORDER BY number"):
        head = _chained(head, leaf_hash(payload))
        if (number, leaf, stored) != (size, leaf_hash(payload), head):
            raise IntegrityError(f"audit entry {size} was changed or is missing")
        size += 1
    if (get_meta(tx, _HEAD) or (0, _START)) != (size, head):
        raise IntegrityError("the audit log ends before its last entry")


def entries(tx: Transaction) -> list[AuditEntry]:
    """All entries, oldest first. Raises :class:`IntegrityError`."""
    try:
        return [decode(AuditEntry, payload) for (payload,) in tx.execute("SELECT entry FROM audit ORDER BY number")]
    except CasemateError as error:
        raise IntegrityError("an audit entry does not decode") from error


def _chained(head: bytes, leaf: bytes) -> bytes:
    return domain_digest("audit-head", head + leaf)
