"""One sealing key for each dataset version: made here, kept in the state alone, and destroyed with the version.

A version's content key is sealed to its own key and to nothing else. Once that key is destroyed, whoever holds a copy of
all that was ever sent or stored elsewhere, and every key that is left, holds ciphertext
(docs/decisions/0016-crypto-erasure.md).
"""

from __future__ import annotations

from typing import Final

from casemate_schemas.custody import MAX_VERSIONS
from casemate_schemas.envelope import EnvelopeHead
from casemate_schemas.errors import ConflictError, DatasetError, SealError, TooLargeError
from casemate_schemas.sealing import SealingKey

from .database import Transaction

MAX_UNUSED: Final = 64
"""Keys of one owner that no version uses yet; of more, the oldest are forgotten."""


def prepare(tx: Transaction, owner: str, now: int) -> bytes:
    """The public half of a fresh key, for the next version of one of the owner's datasets."""
    key = SealingKey.generate()
    tx.execute("INSERT INTO dataset_keys VALUES (?, ?, ?, NULL, ?)", (key.id, owner, key.to_bytes(), now))
    tx.execute(
        "DELETE FROM dataset_keys WHERE owner = ? AND envelope IS NULL AND id NOT IN"
        " (SELECT id FROM dataset_keys WHERE owner = ? AND envelope IS NULL ORDER BY at DESC, id LIMIT ?)",
        (owner, owner, MAX_UNUSED),
    )
    return key.public


def find(tx: Transaction, head: EnvelopeHead, owner: str) -> SealingKey:
    """The key that was prepared for this owner, and that the envelope's content key is sealed to, alone.

    Raises :class:`SealError` if it is sealed to others, or to several: then erasing this key would not be enough.
    """
    if len(head.sealed_keys) != 1:
        raise SealError("a dataset's content key is sealed to the one key that was prepared for it")
    recipient = head.sealed_keys[0].recipient
    row = tx.execute("SELECT private FROM dataset_keys WHERE id = ? AND owner = ?", (recipient, owner)).fetchone()
    if row is None:
        raise SealError(
            "the content key is sealed to no key that is prepared here: prepare one, and seal the data anew"
        )
    return SealingKey(row[0])


def claim(tx: Transaction, head: EnvelopeHead, dataset: str) -> None:
    """Makes the key this version's. Raises :class:`ConflictError` if it is another's, :class:`TooLargeError`."""
    recipient, envelope = head.sealed_keys[0].recipient, head.header.digest
    changed = tx.execute(
        "UPDATE dataset_keys SET envelope = ? WHERE id = ? AND (envelope IS NULL OR envelope = ?)",
        (envelope, recipient, envelope),
    )
    if changed.rowcount != 1:
        raise ConflictError("this key belongs to another version: prepare one for each")
    if len(held(tx, dataset)) > MAX_VERSIONS:
        raise TooLargeError(f"{dataset} has {MAX_VERSIONS} versions already; erase those that are superseded")


def load(tx: Transaction, envelope: bytes, dataset: str) -> SealingKey:
    """The key of a registered version. Raises :class:`DatasetError` if it was erased."""
    row = tx.execute("SELECT private FROM dataset_keys WHERE envelope = ?", (envelope,)).fetchone()
    if row is None:
        raise DatasetError(f"this version of {dataset} was erased by its owner")
    return SealingKey(row[0])


def held(tx: Transaction, dataset: str) -> list[bytes]:
    """The versions of a dataset whose keys are held, oldest first."""
    query = "SELECT envelope FROM dataset_keys JOIN versions USING (envelope) WHERE dataset = ? ORDER BY versions.rowid"
    return [envelope for (envelope,) in tx.execute(query, (dataset,)).fetchall()]


def destroy(tx: Transaction, envelope: bytes) -> None:
    """From the state; from the disk once it is scrubbed."""
    tx.execute("DELETE FROM dataset_keys WHERE envelope = ?", (envelope,))


def forget_unused(tx: Transaction, owner: str) -> None:
    """Destroys the owner's keys that no version uses: what was uploaded and never registered may hold the same data."""
    tx.execute("DELETE FROM dataset_keys WHERE owner = ? AND envelope IS NULL", (owner,))
