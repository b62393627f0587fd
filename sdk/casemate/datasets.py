"""Datasets: what a scientist may list, what a steward pushes, and what is left of a privacy budget."""

from __future__ import annotations

import asyncio
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

import numpy as np
from casemate_schemas import dataset as _wire_dataset
from casemate_schemas import licence as _wire_licence
from casemate_schemas.codec import digest_of, encode
from casemate_schemas.consortium import KeyBroker
from casemate_schemas.custody import DatasetPrepared, PrepareDataset
from casemate_schemas.dataset import Column, DatasetCard
from casemate_schemas.envelope import PREFIX_BYTES, EnvelopeHead, EnvelopeKind, frame_head
from casemate_schemas.errors import DatasetError, LicenceError, ManifestError, UnavailableError
from casemate_schemas.job import DATASET_SECTIONS
from casemate_schemas.licence import Licence
from casemate_schemas.licence_check import sign_licence
from casemate_schemas.licence_text import describe
from casemate_schemas.requests import (
    Budget,
    BudgetRenewed,
    DatasetListing,
    DatasetOffer,
    DatasetRegistered,
    ListDatasets,
    RegisterDataset,
    RenewBudget,
    ShowBudget,
    TellTime,
    TimeTold,
)
from casemate_schemas.sealing import EnvelopeSealer
from casemate_schemas.sections import pack_sections

from ._http import printable
from ._session import Session
from ._transfers import upload
from .parameters import to_wire

Array = np.ndarray[Any, np.dtype[Any]]

SIMULATED: Final = "SIMULATED attestation: no real chip protects this consortium"

_FEED_BYTES: Final = 4 << 20
_MAX_TERMS_CHARS: Final = 8_000
_LINE_CHARS: Final = 110


@dataclass(frozen=True)
class Dataset:
    """A dataset that the person may list: its card, its licence and what is left of its budget."""

    offer: DatasetOffer
    licence: Licence
    simulation: bool
    members: Mapping[str, str]
    """The members' names by id."""

    @property
    def id(self) -> str:
        """``name@owner``."""
        return self.card.id

    @property
    def card(self) -> DatasetCard:
        """What its owner declares."""
        return self.offer.card

    @property
    def epsilon_remaining(self) -> float:
        """What the owner's filter leaves of the licence's epsilon."""
        return self.offer.epsilon_remaining

    @property
    def terms(self) -> str:
        """The licence as one plain paragraph."""
        return printable(describe(self.licence, self.members), _MAX_TERMS_CHARS)

    def __str__(self) -> str:
        card, licence = self.card, self.licence
        lines = [
            f"{card.id}   {printable(card.description, 100)}".rstrip(),
            f"  at most {card.row_bound:,} rows, one privacy unit a {card.privacy_unit}",
            f"  ε {self.epsilon_remaining:.4g} of {licence.epsilon:g} left at δ {licence.delta:g}, "
            f"at most {licence.epsilon_per_job:g} a job",
            *textwrap.wrap(self.terms, _LINE_CHARS, initial_indent="  ", subsequent_indent="  "),
            *(f"  {_describe(column)}" for column in card.columns),
        ]
        return "\n".join([*lines, f"  {SIMULATED}"] if self.simulation else lines)


@dataclass(frozen=True)
class Datasets(Sequence[Dataset]):
    """The datasets that could be listed, by id; ``unavailable`` says of which key brokers nothing was heard, and why."""

    items: tuple[Dataset, ...]
    unavailable: Mapping[str, str]

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Dataset]:
        return iter(self.items)

    def __str__(self) -> str:
        missing = [f"(key broker {name} did not answer: {why})" for name, why in sorted(self.unavailable.items())]
        return "\n".join([*map(str, self.items), *missing]) or "no datasets"


async def list_datasets(session: Session, brokers: Iterable[KeyBroker] | None = None) -> Datasets:
    """What all key brokers (or these) let the person list. They are asked at once; each listing is checked by itself.

    A key broker that is away is named in the answer. Raises the typed error of one that answers wrongly.
    """
    asked = tuple(session.consortium.manifest.key_brokers if brokers is None else brokers)
    answers, unavailable = await session.ask_all(asked, ListDatasets(), DatasetListing)
    found = [_checked(session, broker, offer) for broker, listing in answers for offer in listing.datasets]
    return Datasets(tuple(sorted(found, key=lambda item: item.id)), unavailable)


async def find_datasets(session: Session, ids: Sequence[str]) -> tuple[Dataset, ...]:
    """The datasets of these ids, sorted by id. Raises :class:`DatasetError` for one that may not be listed."""
    manifest = session.consortium.manifest
    owners = {dataset_id.partition("@")[2] for dataset_id in ids}
    brokers = {broker.id: broker for broker in map(manifest.key_broker_of, sorted(owners))}
    listed = await list_datasets(session, brokers.values())
    if listed.unavailable:
        raise UnavailableError(f"no answer from key broker {', '.join(listed.unavailable)}")
    by_id = {item.id: item for item in listed}
    if missing := sorted(set(ids) - by_id.keys()):
        raise DatasetError(f"no dataset {missing[0]!r} that you may list; there are: {', '.join(by_id) or 'none'}")
    return tuple(by_id[dataset_id] for dataset_id in sorted(set(ids)))


async def push(
    session: Session, columns: Mapping[str, Array], card: DatasetCard, licence: Licence
) -> DatasetRegistered:
    """Seal a dataset to its owner's key broker, upload the ciphertext and register it under the licence.

    1. The licence is for this dataset and says what it seems to. The columns fit the card: names, dtypes, shapes, rows.
    2. A key broker in an enclave is attested, now, and told the time.
    3. Card and columns are sealed chunk by chunk into a temporary file of ciphertext, to a key that the key broker makes
       for this version alone, and uploaded.
    4. The key broker takes version and signed licence.

    Raises :class:`DatasetError`, :class:`LicenceError`, :class:`ParameterError`, or what the key broker refuses with.
    """
    from casemate_models.pipeline import write_columns

    card, licence = to_wire(_wire_dataset.DatasetCard, card), to_wire(_wire_licence.Licence, licence)
    if licence.dataset != card.id:  # 1
        raise LicenceError(f"the licence is for {licence.dataset}, the card for {card.id}")
    signed = sign_licence(licence, session.identity.keys.signing, now=session.clock())
    if odd := sorted(columns.keys() ^ {column.name for column in card.columns}):
        raise DatasetError(f"column '{odd[0]}' is on the card or in the data, but not in both")
    broker = session.consortium.manifest.key_broker_of(card.owner)
    data = await asyncio.to_thread(write_columns, {name: np.asarray(a) for name, a in columns.items()}, card)
    sections = dict(zip(DATASET_SECTIONS, (encode(card), data), strict=True))
    if broker.hosted == "enclave":  # 2
        await session.attest(broker, fresh=True)
        await session.ask(broker, TellTime(), TimeTold)
    prepared = await session.ask(broker, PrepareDataset(owner=card.owner), DatasetPrepared)  # 3
    uploaded = await upload_sealed(session, "dataset", sections, broker, to=prepared.sealing_key)
    register = RegisterDataset(card=card, licence=signed, head=uploaded.signed_head)
    return await session.ask(broker, register, DatasetRegistered)  # 4


@dataclass(frozen=True)
class Uploaded:
    """An envelope that the gateway has stored: its signed head and the digest that names it."""

    signed_head: bytes
    digest: bytes


async def upload_sealed(
    session: Session, kind: EnvelopeKind, sections: Mapping[str, bytes], broker: KeyBroker, *, to: bytes | None = None
) -> Uploaded:
    """Seal sections to a key broker (to the sealing key ``to`` of it, or its own) and upload the envelope. Only ciphertext
    meets the disk.

    A large one goes in pieces, and goes on where it broke off. Raises as :func:`._transfers.upload` and
    :meth:`Session.attest`.
    """
    await session.attest(broker)
    with tempfile.TemporaryFile() as file:
        sealing_key = broker.sealing_key if to is None else to
        framed, digest = await asyncio.to_thread(_seal_to_file, session, kind, sections, sealing_key, file)
        await upload(session.gateway, framed, file, digest)
    return Uploaded(framed[PREFIX_BYTES:], digest)


def _seal_to_file(
    session: Session, kind: EnvelopeKind, sections: Mapping[str, bytes], sealing_key: bytes, file: IO[bytes]
) -> tuple[bytes, bytes]:
    """Ciphertext into ``file``; returns all that precedes it in the envelope, and the envelope's digest."""
    keys = session.identity.keys
    sealer = EnvelopeSealer(kind, consortium=session.consortium.id, sender=keys.signing.public, created=session.clock())
    plaintext = memoryview(pack_sections(sections))
    for start in range(0, len(plaintext), _FEED_BYTES):
        for chunk in sealer.update(plaintext[start : start + _FEED_BYTES]):
            file.write(chunk)
    file.write(sealer.finish())
    header = sealer.header()
    sealed = (sealer.content_key.seal_to(sealing_key, header),)
    return frame_head(EnvelopeHead(header=header, sealed_keys=sealed), keys.signing), header.digest


async def show_budget(session: Session, dataset_id: str) -> Budget:
    """The owner's view of a dataset's ledger. Raises the typed error of the key broker's refusal."""
    owner = dataset_id.partition("@")[2]
    broker = session.consortium.manifest.key_broker_of(owner)
    return await session.ask(broker, ShowBudget(dataset=dataset_id), Budget)


async def renew_budget(session: Session, dataset_id: str, lineage: bytes) -> BudgetRenewed:
    """Gives a dataset a fresh budget in the place of that of ``lineage``. Raises the typed error of the refusal."""
    broker = session.consortium.manifest.key_broker_of(dataset_id.partition("@")[2])
    return await session.ask(broker, RenewBudget(dataset=dataset_id, lineage=lineage), BudgetRenewed)


def _checked(session: Session, broker: KeyBroker, offer: DatasetOffer) -> Dataset:
    """The offer, if this key broker may make it and card, licence and digests agree."""
    card = offer.card
    if card.owner not in broker.serves or offer.key_broker != broker.id:
        raise ManifestError(f"key broker {broker.id} offers {card.id}, whose owner it does not serve")
    if digest_of(card) != offer.card_digest:
        raise DatasetError(f"the card of {card.id} does not have the digest its key broker says")
    licence = offer.licence.verify(Licence, offer.licence.signer)
    if licence.dataset != card.id:
        raise LicenceError(f"the licence offered with {card.id} is for {licence.dataset}")
    names = {member.id: member.name for member in session.consortium.manifest.members}
    return Dataset(offer, licence, session.simulation, names)


def _describe(column: Column) -> str:
    shape = f"[{', '.join(map(str, column.shape))}]" if column.shape else ""
    unit = f" {printable(column.unit)}" if column.unit else ""
    return f"{column.name}: {column.dtype}{shape} in [{column.lower:g}, {column.upper:g}]{unit}"
