"""What was asked and what was decided, refusals included: an append-only log whose entries are leaves of a Merkle tree.

Inclusion proofs are those of RFC 6962, so whoever holds a receipt can check offline that its entry was in the log that
had this root. The hashes of all complete subtrees are kept, so appending and proving take steps in the logarithm of the
log's size. Each row also carries a running hash over all before it, which is checked when the state is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

from casemate_schemas.codec import decode, domain_digest, encode
from casemate_schemas.errors import CasemateError, IntegrityError
from casemate_schemas.grant import AuditEntry, InclusionProof
from casemate_schemas.merkle import leaf_hash, node_hash, split_of

from .database import Transaction, get_meta, set_meta

_HEAD: Final = "audit-head"
_START: Final = bytes(32)


def append(tx: Transaction, entry: AuditEntry) -> int:
    """Add ``entry``; its index (from 0). It stands once the transaction is committed."""
    size, head = get_meta(tx, _HEAD) or (0, _START)
    payload = encode(entry)
    leaf = leaf_hash(payload)
    following = _chained(head, leaf)
    tx.execute("INSERT INTO audit VALUES (?, ?, ?)", (size, payload, following))
    tx.executemany("INSERT INTO audit_tree VALUES (?, ?, ?)", _completed(size, leaf, lambda *at: _node(tx, *at)))
    set_meta(tx, _HEAD, (size + 1, following))
    return int(size)


def size(tx: Transaction) -> int:
    """Number of entries."""
    return int((get_meta(tx, _HEAD) or (0, _START))[0])


def root(tx: Transaction, size: int) -> bytes:
    """The Merkle tree hash of the first ``size`` entries, of which there must be as many."""
    return _range_hash(tx, 0, size) if size else hashlib.sha256().digest()


def prove(tx: Transaction, index: int) -> InclusionProof:
    """That entry ``index`` stands in the log as it is in this transaction. Raises :class:`IntegrityError`."""
    total = size(tx)
    row = tx.execute("SELECT entry FROM audit WHERE number = ?", (index,)).fetchone()
    if row is None:
        raise IntegrityError(f"the audit log has no entry {index}")
    path = _path(tx, 0, total, index)
    return InclusionProof(entry=row[0], index=index, size=total, path=path, root=root(tx, total))


def verify(tx: Transaction) -> None:
    """That the log is whole, in order and unchanged since it was written. Raises :class:`IntegrityError`."""
    head, number, tree = _START, 0, dict[tuple[int, int], bytes]()
    for stored_number, payload, stored in tx.execute("SELECT number, entry, head FROM audit ORDER BY number"):
        leaf = leaf_hash(payload)
        head = _chained(head, leaf)
        if (stored_number, stored) != (number, head):
            raise IntegrityError(f"audit entry {number} was changed or is missing")
        for level, position, node in _completed(number, leaf, lambda *at: tree[at]):
            tree[level, position] = node
        number += 1
    if (get_meta(tx, _HEAD) or (0, _START)) != (number, head):
        raise IntegrityError("the audit log ends before its last entry")
    if {(level, position): node for level, position, node in tx.execute("SELECT * FROM audit_tree")} != tree:
        raise IntegrityError("the audit log's tree is not that of its entries")


def entries(tx: Transaction) -> list[AuditEntry]:
    """All entries, oldest first. Raises :class:`IntegrityError`."""
    try:
        return [decode(AuditEntry, payload) for (payload,) in tx.execute("SELECT entry FROM audit ORDER BY number")]
    except CasemateError as error:
        raise IntegrityError("an audit entry does not decode") from error


def _chained(head: bytes, leaf: bytes) -> bytes:
    return domain_digest("audit-head", head + leaf)


def _completed(index: int, leaf: bytes, node_at: Callable[[int, int], bytes]) -> list[tuple[int, int, bytes]]:
    """The subtrees that are complete once leaf ``index`` is there: (level, position, hash), the leaf itself first."""
    completed = [(0, index, leaf)]
    level, position, node = 0, index, leaf
    while position & 1:
        node = node_hash(node_at(level, position - 1), node)
        level, position = level + 1, position >> 1
        completed.append((level, position, node))
    return completed


def _node(tx: Transaction, level: int, position: int) -> bytes:
    row = tx.execute("SELECT hash FROM audit_tree WHERE level = ? AND position = ?", (level, position)).fetchone()
    if row is None:
        raise IntegrityError("the audit log's tree has a hole")
    return bytes(row[0])


def _range_hash(tx: Transaction, start: int, count: int) -> bytes:
    """The hash over ``count`` leaves from ``start``, as the tree's shape has them: a complete subtree, or two parts."""
    if count & (count - 1) == 0:
        level = count.bit_length() - 1
        return _node(tx, level, start >> level)
    left = split_of(count)
    return node_hash(_range_hash(tx, start, left), _range_hash(tx, start + left, count - left))


def _path(tx: Transaction, start: int, count: int, index: int) -> tuple[bytes, ...]:
    """The siblings on the way from leaf ``start + index`` to the root over ``count`` leaves, lowest first."""
    if count == 1:
        return ()
    left = split_of(count)
    if index < left:
        return (*_path(tx, start, left, index), _range_hash(tx, start + left, count - left))
    return (*_path(tx, start + left, count - left, index - left), _range_hash(tx, start, left))
