"""The datasets this key broker holds keys to: their lineages, versions and licences.

A dataset's name keeps its lineage, made when the name is first registered: another version, a re-upload or a changed byte
spends from the same budget. Versions and licences are kept for ever; the newest of each is in force.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final

from casemate_privacy.renyi_filter import RenyiFilter
from casemate_schemas.codec import decode, digest_of, encode
from casemate_schemas.dataset import DatasetCard
from casemate_schemas.envelope import EnvelopeHead, open_head
from casemate_schemas.errors import (
    AuthenticationError,
    AuthorisationError,
    ConflictError,
    NotFoundError,
    ParameterError,
    TooLargeError,
)
from casemate_schemas.grant import AuditEntry
from casemate_schemas.identity import Delegation
from casemate_schemas.licence import Licence
from casemate_schemas.licence_check import check_sound
from casemate_schemas.requests import BudgetRenewed, DatasetRegistered, RegisterDataset, RenewBudget
from casemate_schemas.sealing import check_consortium, unseal_content_key
from casemate_schemas.signatures import Signed

from . import audit_log, dataset_keys, ledger
from .database import Transaction
from .party import Party, full_name

MAX_CARD_BYTES: Final = 256 << 10
MAX_DATASETS_KEPT: Final = 1024


@dataclass(frozen=True)
class Registered:
    """A dataset as it is in force now."""

    card: DatasetCard
    lineage: bytes
    envelope: bytes
    signed_licence: Signed
    licence: Licence
    erased: bool = False
    """The key of this version is destroyed, and no job can use the dataset."""

    @property
    def id(self) -> str:
        """``name@owner``."""
        return self.card.id

    @property
    def card_digest(self) -> bytes:
        """Digest of the card."""
        return digest_of(self.card)

    @property
    def licence_digest(self) -> bytes:
        """Digest of the licence, whoever signed it."""
        return self.signed_licence.digest


def check_steward(party: Party, person: Delegation, owner: str) -> None:
    """Raises :class:`AuthorisationError` unless ``person`` is a steward of ``owner``, whom this key broker serves."""
    if person.member != owner or "steward" not in person.roles:
        raise AuthorisationError(f"only a steward of {owner} may do this")
    if owner not in party.serves:
        raise AuthorisationError(f"key broker {party.id} does not serve {owner}")


def check_registration(
    tx: Transaction, party: Party, request: RegisterDataset, person: Delegation, now: int
) -> Licence:
    """The licence in a registration that holds together.

    1. The person is a steward of the card's owner.
    2. The licence is signed by that person, is about this dataset, says what it seems to, and its budget can be accounted.
    3. The envelope is a dataset envelope of this consortium from that person, and its content key opens with the key that
       was prepared for it.

    Raises what is wrong with it, in words for the steward.
    """
    card = request.card
    check_steward(party, person, card.owner)  # 1
    if len(encode(card)) > MAX_CARD_BYTES:
        raise TooLargeError(f"a dataset card holds at most {MAX_CARD_BYTES} bytes")
    licence = check_licence(request.licence, person, now)  # 2
    if licence.dataset != card.id:
        raise ParameterError(f"the licence is for {licence.dataset}, the card for {card.id}")
    head = open_head(request.head, kind="dataset", sender=person.signing_key)  # 3
    check_consortium(head, party.consortium.id)
    unseal_content_key(head, dataset_keys.find(tx, head, card.owner))
    return licence


def check_licence(signed: Signed, person: Delegation, now: int) -> Licence:
    """A licence that this person signed, that says what it seems to and whose budget can be accounted.

    Raises :class:`AuthenticationError`, :class:`SignatureError` or :class:`ParameterError`.
    """
    if signed.signer != person.signing_key:
        raise AuthenticationError("the licence must be signed by the steward who registers it")
    licence = signed.verify(Licence, person.signing_key)
    check_sound(licence, now=now)
    RenyiFilter(licence.epsilon, licence.delta)
    return licence


def register(
    tx: Transaction, request: RegisterDataset, licence: Licence, person: Delegation, now: int
) -> DatasetRegistered:
    """Puts the version and the licence of a checked registration in force; what is in force already changes nothing.

    Raises :class:`ConflictError` for a licence number that is not above the newest one's, or an envelope that belongs
    to another dataset or is an older version.
    """
    head = open_head(request.head)
    dataset, envelope = request.card.id, head.header.digest
    row = tx.execute("SELECT lineage, envelope FROM datasets WHERE dataset = ?", (dataset,)).fetchone()
    if row is None:
        _check_room(tx)
        lineage, current = secrets.token_bytes(32), None
        tx.execute("INSERT INTO datasets VALUES (?, ?, ?, ?)", (dataset, lineage, envelope, request.licence.digest))
    else:
        lineage, current = row
    if envelope != current:
        _add_version(tx, request, envelope, full_name(person), now)
    elif find_version(tx, dataset, envelope)[0] != request.card:
        raise ConflictError("this envelope is registered with another card; seal the data anew under the new one")
    dataset_keys.claim(tx, head, dataset)
    tx.execute("UPDATE datasets SET envelope = ? WHERE dataset = ?", (envelope, dataset))
    put_licence(tx, request.licence, licence, full_name(person), now)
    return DatasetRegistered(dataset=dataset, lineage=lineage, envelope=envelope, licence=request.licence.digest)


def put_licence(tx: Transaction, signed: Signed, licence: Licence, person: str, now: int) -> bool:
    """Puts a checked licence in force; whether it was another before.

    Raises :class:`ConflictError` for a number that is not above the newest one's.
    """
    query = "SELECT licence, number FROM licences WHERE dataset = ? ORDER BY number DESC LIMIT 1"
    newest = tx.execute(query, (licence.dataset,)).fetchone()
    if newest is not None and newest[0] == signed.digest:
        return False
    if newest is not None and licence.number <= newest[1]:
        raise ConflictError(f"licence numbers only go up: the newest is {newest[1]}, this one {licence.number}")
    row = (signed.digest, licence.dataset, licence.number, encode(signed), person, now)
    tx.execute("INSERT INTO licences VALUES (?, ?, ?, ?, ?, ?)", row)
    tx.execute("UPDATE datasets SET licence = ? WHERE dataset = ?", (signed.digest, licence.dataset))
    return True


def renew_budget(tx: Transaction, party: Party, person: Delegation, request: RenewBudget, now: int) -> BudgetRenewed:
    """Puts the dataset under a new lineage, of which nothing is spent; ledger and audit log say who wanted it.

    Raises :class:`AuthorisationError` unless ``person`` is a steward or admin of its owner, :class:`NotFoundError`, and
    :class:`ConflictError` if it is under another lineage than the one to be ended.
    """
    owner = request.dataset.partition("@")[2]
    if person.member != owner or owner not in party.serves or not {"steward", "admin"} & set(person.roles):
        raise AuthorisationError(f"only a steward or an admin of {owner} may renew its budgets, at its own key broker")
    dataset, begun = find(tx, request.dataset), secrets.token_bytes(32)
    if dataset.lineage != request.lineage:
        raise ConflictError(f"the budget of {dataset.id} was renewed already: look at it again")
    ledger.renew(tx, dataset.id, dataset.lineage, begun, person=full_name(person), now=now)
    tx.execute("UPDATE datasets SET lineage = ? WHERE dataset = ?", (begun, dataset.id))
    entry = AuditEntry(
        key_broker=party.id, event="budget_renewed", at=now, subject=dataset.id, person=full_name(person)
    )
    audit_log.append(tx, entry)
    return BudgetRenewed(dataset=dataset.id, lineage=begun)


def find(tx: Transaction, dataset: str) -> Registered:
    """The dataset as it is in force now. Raises :class:`NotFoundError`."""
    row = tx.execute(f"{_IN_FORCE} WHERE datasets.dataset = ?", (dataset,)).fetchone()
    if row is None:
        raise NotFoundError(f"no dataset {dataset} is registered with this key broker")
    return _registered(row)


def all_in_force(tx: Transaction) -> list[Registered]:
    """Every dataset as it is in force now, by name; those that were erased are left out."""
    found = [_registered(row) for row in tx.execute(f"{_IN_FORCE} ORDER BY datasets.dataset").fetchall()]
    return [dataset for dataset in found if not dataset.erased]


def find_version(tx: Transaction, dataset: str, envelope: bytes) -> tuple[DatasetCard, EnvelopeHead]:
    """Card and envelope head of a version, in force or superseded. Raises :class:`NotFoundError`."""
    query = "SELECT card, head FROM versions WHERE dataset = ? AND envelope = ?"
    row = tx.execute(query, (dataset, envelope)).fetchone()
    if row is None:
        raise NotFoundError(f"{dataset} never had this version")
    return decode(DatasetCard, row[0]), open_head(row[1])


_IN_FORCE: Final = (
    "SELECT card, lineage, datasets.envelope, signed,"
    " (SELECT 1 FROM dataset_keys WHERE dataset_keys.envelope = datasets.envelope) IS NULL FROM datasets"
    " JOIN versions ON versions.envelope = datasets.envelope JOIN licences ON licences.licence = datasets.licence"
)


def _registered(row: tuple[bytes, bytes, bytes, bytes, int]) -> Registered:
    card, lineage, envelope, signed, erased = row
    licence = decode(Signed, signed)
    return Registered(decode(DatasetCard, card), lineage, envelope, licence, licence.peek(Licence), bool(erased))


def _check_room(tx: Transaction) -> None:
    (count,) = tx.execute("SELECT count(*) FROM datasets").fetchone()
    if count >= MAX_DATASETS_KEPT:
        raise TooLargeError(f"this key broker holds {count} datasets already, the most it can")


def _add_version(tx: Transaction, request: RegisterDataset, envelope: bytes, person: str, now: int) -> None:
    if tx.execute("SELECT 1 FROM versions WHERE envelope = ?", (envelope,)).fetchone() is not None:
        raise ConflictError("this envelope is registered already, under another name or as an older version")
    row = (envelope, request.card.id, encode(request.card), request.head, person, now)
    tx.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", row)
