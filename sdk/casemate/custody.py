"""What a steward does with a dataset once it is registered: look back, amend or revoke its licence, erase it."""

from __future__ import annotations

from dataclasses import dataclass

from casemate_schemas import api
from casemate_schemas import licence as _wire_licence
from casemate_schemas.consortium import KeyBroker
from casemate_schemas.custody import (
    AmendLicence,
    DatasetErased,
    DatasetShown,
    EraseDataset,
    LicenceAmended,
    ShowDataset,
)
from casemate_schemas.errors import AuthorisationError, DatasetError, NotFoundError
from casemate_schemas.licence import AllOf, Licence, MemberIs, Permission, RoleIs
from casemate_schemas.licence_check import Change, compare, sign_licence

from ._http import MAX_JSON_BYTES
from ._session import Session
from .parameters import to_wire


@dataclass(frozen=True)
class Amendment:
    """The licence in force and the one that is to follow it. Nothing is signed or sent yet."""

    before: Licence
    after: Licence
    change: Change
    """Whether the one after allows less (``stricter``), more (``looser``), the same, or both or neither (``changed``)."""


async def show_dataset(session: Session, dataset: str) -> DatasetShown:
    """A dataset's owner's view of it. Raises the typed error of the key broker's refusal, or :class:`DatasetError`."""
    shown = await session.ask(_broker(session, dataset), ShowDataset(dataset=dataset), DatasetShown)
    if shown.card.id != dataset or shown.licence.peek(Licence).dataset != dataset:
        raise DatasetError("the key broker shows another dataset than asked for")
    return shown


async def compare_licence(session: Session, licence: Licence) -> Amendment:
    """``licence`` beside the one in force of the same dataset."""
    licence = to_wire(_wire_licence.Licence, licence)
    before = (await show_dataset(session, licence.dataset)).licence.peek(Licence)
    return Amendment(before, licence, compare(before, licence, now=session.clock()))


async def revocation_of(session: Session, dataset: str) -> Amendment:
    """The strictest licence that there is: nobody may do anything, and only the owner's stewards still list the dataset."""
    before = (await show_dataset(session, dataset)).licence.peek(Licence)
    rules = (
        MemberIs(principal="submitter", member=dataset.partition("@")[2]),
        RoleIs(principal="submitter", role="steward"),
    )
    nothing = (Permission(action="list", rule=AllOf(rules=rules)),)
    changed = {"number": before.number + 1, "permissions": nothing, "purposes": ()}
    after = Licence(**dict(before) | changed)
    return Amendment(before, after, compare(before, after, now=session.clock()))


async def amend(session: Session, licence: Licence) -> LicenceAmended:
    """Signs a licence and puts it in force, for all that is asked for from then on.

    Raises :class:`~casemate_schemas.errors.ParameterError` for a licence that nobody should sign, or the typed error of the
    key broker's refusal.
    """
    licence = to_wire(_wire_licence.Licence, licence)
    signed = sign_licence(licence, session.identity.keys.signing, now=session.clock())
    return await session.ask(_broker(session, licence.dataset), AmendLicence(licence=signed), LicenceAmended)


@dataclass(frozen=True)
class Erased:
    """What was erased: versions that nobody can open any more, and those whose ciphertext the gateway would not remove."""

    envelopes: tuple[bytes, ...]
    left: tuple[bytes, ...]


async def erase(session: Session, dataset: str, *, envelope: bytes, keep_current: bool) -> Erased:
    """Has the keys destroyed, and then the ciphertext, which nothing opens any more, removed.

    The first is what counts. The second is the gateway's to do, and only for whoever uploaded it.
    """
    request = EraseDataset(dataset=dataset, envelope=envelope, keep_current=keep_current)
    erased = await session.ask(_broker(session, dataset), request, DatasetErased)
    left = [found for found in erased.envelopes if not await _remove(session, found)]
    return Erased(erased.envelopes, tuple(left))


async def _remove(session: Session, envelope: bytes) -> bool:
    try:
        await session.gateway.request("DELETE", f"{api.ENVELOPES_PATH}/{envelope.hex()}", max_bytes=MAX_JSON_BYTES)
    except NotFoundError:
        return True
    except AuthorisationError:
        return False
    return True


def _broker(session: Session, dataset: str) -> KeyBroker:
    return session.consortium.manifest.key_broker_of(dataset.partition("@")[2])
