"""Merkle tree hashes and inclusion proofs of RFC 6962 (section 2.1): was this entry in the log that has this root?"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from .errors import ReleaseError


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256(0x00 ‖ entry)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def root_hash(leaves: Sequence[bytes]) -> bytes:
    """Merkle tree hash over leaf hashes; that of no leaf is SHA-256 of nothing."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    split = split_of(len(leaves))
    return node_hash(root_hash(leaves[:split]), root_hash(leaves[split:]))


def inclusion_path(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """The audit path of leaf ``index``, lowest first."""
    if not 0 <= index < len(leaves):
        raise IndexError(index)
    if len(leaves) == 1:
        return ()
    split = split_of(len(leaves))
    if index < split:
        return (*inclusion_path(leaves[:split], index), root_hash(leaves[split:]))
    return (*inclusion_path(leaves[split:], index - split), root_hash(leaves[:split]))


def check_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Raises :class:`ReleaseError` unless ``path`` leads from ``leaf`` at ``index`` to ``root`` of a tree of ``size``.

    The algorithm of RFC 9162, section 2.1.3.2.
    """
    if not 0 <= index < size:
        raise ReleaseError("inclusion proof: the index is outside the log")
    node, position, last = leaf, index, size - 1
    for sibling in path:
        if last == 0:
            raise ReleaseError("inclusion proof: the path is too long")
        if position & 1 or position == last:
            node = node_hash(sibling, node)
            while position and not position & 1:
                position, last = position >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        position, last = position >> 1, last >> 1
    if last != 0 or not hmac.compare_digest(node, root):
        raise ReleaseError("inclusion proof: the path does not lead to the root")


def split_of(size: int) -> int:
    """The largest power of two smaller than ``size``, which is at least 2: how many leaves the left subtree holds."""
    return 1 << ((size - 1).bit_length() - 1)


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 ‖ left ‖ right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()
