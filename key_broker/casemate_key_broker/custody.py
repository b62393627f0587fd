"""What an owner does with a dataset that is registered: prepare the next version, look, amend the licence, erase."""

from __future__ import annotations

from casemate_schemas.codec import decode
from casemate_schemas.custody import (
    MAX_HISTORY,
    AmendLicence,
    DatasetErased,
    DatasetPrepared,
    DatasetShown,
    EraseDataset,
    LicenceAmended,
    LicenceLine,
    PrepareDataset,
    ShowDataset,
    VersionLine,
)
from casemate_schemas.dataset import DatasetCard
from casemate_schemas.errors import ConflictError, DatasetError
from casemate_schemas.grant import AuditEntry
from casemate_schemas.identity import Delegation
from casemate_schemas.licence import Licence

from . import audit_log, dataset_keys, licences
from .database import Transaction
from .party import Party, full_name


def prepare(tx: Transaction, party: Party, person: Delegation, request: PrepareDataset, now: int) -> DatasetPrepared:
    """A sealing key for the next version of one of the owner's datasets. Raises :class:`AuthorisationError`."""
    licences.check_steward(party, person, request.owner)
    return DatasetPrepared(sealing_key=dataset_keys.prepare(tx, request.owner, now))


def show(tx: Transaction, party: Party, person: Delegation, request: ShowDataset) -> DatasetShown:
    """A dataset and its history, for a steward of its owner. Raises :class:`AuthorisationError`, :class:`NotFoundError`."""
    licences.check_steward(party, person, request.dataset.partition("@")[2])
    found = licences.find(tx, request.dataset)
    held = set(dataset_keys.held(tx, found.id))
    versions = tx.execute(
        "SELECT envelope, card, person, at FROM versions WHERE dataset = ? ORDER BY rowid DESC LIMIT ?",
        (found.id, MAX_HISTORY),
    ).fetchall()
    history = tx.execute(
        "SELECT licence, number, person, at FROM licences WHERE dataset = ? ORDER BY number DESC LIMIT ?",
        (found.id, MAX_HISTORY),
    ).fetchall()
    return DatasetShown(
        card=found.card,
        lineage=found.lineage,
        licence=found.signed_licence,
        envelope=found.envelope,
        erased=found.erased,
        versions=tuple(
            VersionLine(
                envelope=envelope,
                at=at,
                person=who,
                row_bound=decode(DatasetCard, card).row_bound,
                erased=envelope not in held,
            )
            for envelope, card, who, at in reversed(versions)
        ),
        licences=tuple(
            LicenceLine(licence=digest, number=number, at=at, person=who)
            for digest, number, who, at in reversed(history)
        ),
    )


def amend(
    tx: Transaction, party: Party, person: Delegation, request: AmendLicence, licence: Licence, now: int
) -> LicenceAmended:
    """Puts a checked licence in force: from the next request for keys on, for all jobs that have committed nothing yet.

    Raises :class:`ConflictError` for a number that is not above the newest one's, :class:`NotFoundError`, and
    :class:`DatasetError` for a dataset that was erased.
    """
    found = licences.find(tx, licence.dataset)
    if found.erased:
        raise DatasetError(f"{found.id} was erased")
    if licences.put_licence(tx, request.licence, licence, full_name(person), now):
        _record(tx, party, person, now, event="amended", subject=found.id, licence=request.licence.digest)
    return LicenceAmended(dataset=found.id, licence=request.licence.digest)


def erase(tx: Transaction, party: Party, person: Delegation, request: EraseDataset, now: int) -> DatasetErased:
    """Destroys the keys of all versions, or of all but the one in force, each with its audit entry.

    Those of uploads that were never registered go with them. What is left is the card, the licences, the ledger and the
    audit log. The state must be scrubbed afterwards. Raises :class:`AuthorisationError`, :class:`NotFoundError`, or
    :class:`ConflictError` if another version is in force by now.
    """
    licences.check_steward(party, person, request.dataset.partition("@")[2])
    found = licences.find(tx, request.dataset)
    if found.envelope != request.envelope:
        raise ConflictError(f"{found.id} has another version now: look at it again")
    kept = {found.envelope} if request.keep_current else set[bytes]()
    gone = [envelope for envelope in dataset_keys.held(tx, found.id) if envelope not in kept]
    dataset_keys.forget_unused(tx, found.card.owner)
    for envelope in gone:
        dataset_keys.destroy(tx, envelope)
        _record(tx, party, person, now, event="erased", subject=found.id, envelope=envelope)
    return DatasetErased(dataset=found.id, envelopes=tuple(gone))


def _record(tx: Transaction, party: Party, person: Delegation, now: int, **fields: object) -> None:
    about = {"key_broker": party.id, "at": now, "person": full_name(person)} | fields
    audit_log.append(tx, AuditEntry.model_validate(about))
