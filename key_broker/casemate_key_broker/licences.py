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
from casemate_schemas.identity import Delegation
from casemate_schemas.licence import Licence
from casemate_schemas.requests import DatasetRegistered, RegisterDataset
from casemate_schemas.sealing import check_consortium, unseal_content_key
from casemate_schemas.signatures import Signed

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


def check_registration(party: Party, request: RegisterDataset, person: Delegation, now: int) -> Licence:
    """The licence in a registration that holds together.

    1. The person is a steward of the card's owner.
    2. The licence is signed by that person, is about this dataset, has not expired, and its budget can be accounted.
    3. The envelope is a dataset envelope of this consortium from that person, and its content key opens here.

    Raises what is wrong with it, in words for the steward.
    """
    card = request.card
    check_steward(party, person, card.owner)  # 1
    if len(encode(card)) > MAX_CARD_BYTES:
        raise TooLargeError(f"a dataset card holds at most {MAX_CARD_BYTES} bytes")
    if request.licence.signer != person.signing_key:  # 2
        raise AuthenticationError("the licence must be signed by the steward who registers it")
    licence = request.licence.verify(Licence, person.signing_key)
    if licence.dataset != card.id:
        raise ParameterError(f"the licence is for {licence.dataset}, the card for {card.id}")
    if now >= licence.expires:
        raise ParameterError("the licence has expired already")
    RenyiFilter(licence.epsilon, licence.delta)
    head = open_head(request.head, kind="dataset", sender=person.signing_key)  # 3
    check_consortium(head, party.consortium.id)
    unseal_content_key(head, party.sealing)
    return licence


def register(
    tx: Transaction, request: RegisterDataset, licence: Licence, person: Delegation, now: int
) -> DatasetRegistered:
    """Puts the version and the licence of a checked registration in force; what is in force already changes nothing.

    Raises :class:`ConflictError` for a licence number that is not above the newest one's, or an envelope that belongs
    to another dataset or is an older version.
    """
    dataset, envelope = request.card.id, open_head(request.head).header.digest
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
    _add_licence(tx, request.licence, licence, full_name(person), now)
    values = (envelope, request.licence.digest, dataset)
    tx.execute("UPDATE datasets SET envelope = ?, licence = ? WHERE dataset = ?", values)
    return DatasetRegistered(dataset=dataset, lineage=lineage, envelope=envelope, licence=request.licence.digest)


def find(tx: Transaction, dataset: str) -> Registered:
    """The dataset as it is in force now. Raises :class:`NotFoundError`."""
    row = tx.execute(f"{_IN_FORCE} WHERE datasets.dataset = ?", (dataset,)).fetchone()
    if row is None:
        raise NotFoundError(f"no dataset {dataset} is registered with this key broker")
    return _registered(row)


def all_in_force(tx: Transaction) -> list[Registered]:
    """Every dataset as it is in force now, by name."""
    return [_registered(row) for row in tx.execute(f"{_IN_FORCE} ORDER BY datasets.dataset").fetchall()]


def find_version(tx: Transaction, dataset: str, envelope: bytes) -> tuple[DatasetCard, EnvelopeHead]:
    """Card and envelope head of a version, in force or superseded. Raises :class:`NotFoundError`."""
    query = "SELECT card, head FROM versions WHERE dataset = ? AND envelope = ?"
    row = tx.execute(query, (dataset, envelope)).fetchone()
    if row is None:
        raise NotFoundError(f"{dataset} never had this version")
    return decode(DatasetCard, row[0]), open_head(row[1])


_IN_FORCE: Final = (
    "SELECT card, lineage, datasets.envelope, signed FROM datasets"
    " JOIN versions ON versions.envelope = datasets.envelope JOIN licences ON licences.licence = datasets.licence"
)


def _registered(row: tuple[bytes, bytes, bytes, bytes]) -> Registered:
    card, lineage, envelope, signed = row
    licence = decode(Signed, signed)
    return Registered(decode(DatasetCard, card), lineage, envelope, licence, licence.peek(Licence))


def _check_room(tx: Transaction) -> None:
    (count,) = tx.execute("SELECT count(*) FROM datasets").fetchone()
    if count >= MAX_DATASETS_KEPT:
        raise TooLargeError(f"this key broker holds {count} datasets already, the most it can")


def _add_version(tx: Transaction, request: RegisterDataset, envelope: bytes, person: str, now: int) -> None:
    if tx.execute("SELECT 1 FROM versions WHERE envelope = ?", (envelope,)).fetchone() is not None:
        raise ConflictError("this envelope is registered already, under another name or as an older version")
    row = (envelope, request.card.id, encode(request.card), request.head, person, now)
    tx.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", row)


def _add_licence(tx: Transaction, signed: Signed, licence: Licence, person: str, now: int) -> None:
    query = "SELECT licence, number FROM licences WHERE dataset = ? ORDER BY number DESC LIMIT 1"
    newest = tx.execute(query, (licence.dataset,)).fetchone()
    if newest is not None and newest[0] == signed.digest:
        return
    if newest is not None and licence.number <= newest[1]:
        raise ConflictError(f"licence numbers only go up: the newest is {newest[1]}, this one {licence.number}")
    row = (signed.digest, licence.dataset, licence.number, encode(signed), person, now)
    tx.execute("INSERT INTO licences VALUES (?, ?, ?, ?, ?, ?)", row)
