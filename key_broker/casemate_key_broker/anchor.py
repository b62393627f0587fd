"""Has this state been set back, or does it have a copy? The heads that others have seen tell.

After each decision the state's :class:`LedgerHead`, signed, is anchored in NATS and goes to whoever was answered. A key
broker that meets a head of its own signature that is not part of its past was restored from an older copy, or another
copy of it is at work. It then gives no keys and decides nothing, until a steward or admin of an owner endorses the state
that there is. What is not protected is what nobody shows: ``docs/decisions/0013-rollback.md``.
"""

from __future__ import annotations

from typing import Any, Final

from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import (
    AuthenticationError,
    AuthorisationError,
    CasemateError,
    ConflictError,
    RolledBackError,
    StateError,
)
from casemate_schemas.grant import AuditEntry
from casemate_schemas.identity import Delegation
from casemate_schemas.requests import LedgerHead, StateShown
from casemate_schemas.signatures import Signed

from . import audit_log, ledger
from .database import Transaction, get_meta, set_meta
from .party import Party, full_name

_AHEAD: Final = "anchor-ahead"
_ENDORSED: Final = "anchor-endorsed"


def head(tx: Transaction, party: Party, now: int) -> LedgerHead:
    """Where the state stands in this transaction."""
    entries, newest = ledger.newest_entry(tx)
    size = audit_log.size(tx)
    return LedgerHead(
        consortium=party.consortium.id,
        key_broker=party.id,
        branch=len(_endorsed(tx)),
        entries=entries,
        ledger=newest,
        audit_size=size,
        audit_root=audit_log.root(tx, size),
        at=now,
    )


def observe(tx: Transaction, party: Party, signed: Signed) -> None:
    """Holds a head that somebody shows against this state, and remembers the furthest one that is not part of its past.

    1. It is signed by this key broker, and about it. Raises :class:`AuthenticationError`: of others nothing follows.
    2. Ledger and audit log of this state begin with those that the head names; or
    3. the head is of a state that an owner's endorsement gave up.
    """
    shown = _opened(party, signed)  # 1
    if _is_past(tx, shown) or _is_given_up(tx, shown):  # 2, 3
        return
    known = get_meta(tx, _AHEAD)
    if known is None or _reach(shown) > _reach(_opened(party, decode(Signed, known))):
        set_meta(tx, _AHEAD, encode(signed))


def check_current(tx: Transaction) -> None:
    """Raises :class:`RolledBackError` while a head was seen that is not part of this state's past."""
    if get_meta(tx, _AHEAD) is not None:
        raise RolledBackError(
            "this key broker's state is older than one that was seen, or a copy: its owners must restore the newer state "
            "or endorse this one (casemate key-broker endorse)"
        )


def check_officer(party: Party, person: Delegation) -> None:
    """Raises :class:`AuthorisationError` unless ``person`` is a steward or admin of a member that is served here."""
    if person.member not in party.serves or not {"steward", "admin"} & set(person.roles):
        raise AuthorisationError(f"only stewards and admins of the members that {party.id} serves may do this")


def show(tx: Transaction, party: Party, now: int) -> StateShown:
    """Where the state stands, and the head it is behind of."""
    ahead = get_meta(tx, _AHEAD)
    return StateShown(head=head(tx, party, now), ahead=None if ahead is None else decode(Signed, ahead))


def endorse(tx: Transaction, party: Party, person: Delegation, ahead: bytes, now: int) -> StateShown:
    """Gives up the newer head of digest ``ahead``, and what came before it, and goes on from this state.

    Raises :class:`StateError` if no newer head is known, and :class:`ConflictError` if it is another one by now.
    """
    known = get_meta(tx, _AHEAD)
    if known is None:
        raise StateError("no head is known that is newer than this state")
    signed = decode(Signed, known)
    if signed.digest != ahead:
        raise ConflictError("another newer head was seen since: look at the state again")
    branch, entries, audit_size = _reach(_opened(party, signed))
    set_meta(tx, _ENDORSED, (*_endorsed(tx), (branch, entries, audit_size)))
    tx.execute("DELETE FROM meta WHERE name = ?", (_AHEAD,))
    entry = AuditEntry(
        key_broker=party.id,
        event="state_endorsed",
        at=now,
        subject=f"instead of ledger {entries}, audit log {audit_size}",
        person=full_name(person),
    )
    audit_log.append(tx, entry)
    return show(tx, party, now)


def _opened(party: Party, signed: Signed) -> LedgerHead:
    try:
        shown = signed.verify(LedgerHead, party.keys.signing.public)
    except CasemateError as error:
        raise AuthenticationError("the head shown is not signed by this key broker") from error
    if (shown.consortium, shown.key_broker) != (party.consortium.id, party.id):
        raise AuthenticationError("the head shown is another key broker's")
    return shown


def _is_past(tx: Transaction, shown: LedgerHead) -> bool:
    if shown.branch > len(_endorsed(tx)) or shown.audit_size > audit_log.size(tx):
        return False
    ours = ledger.hash_at(tx, shown.entries), audit_log.root(tx, shown.audit_size)
    return ours == (shown.ledger, shown.audit_root)


def _is_given_up(tx: Transaction, shown: LedgerHead) -> bool:
    """Whether an endorsement gave up a head of that branch or a later one that reached as far, in both logs."""
    branch, *logs = _reach(shown)
    return any(
        branch <= ended and all(a <= b for a, b in zip(logs, reached, strict=True)) for ended, *reached in _endorsed(tx)
    )


def _reach(shown: LedgerHead) -> tuple[int, int, int]:
    return shown.branch, shown.entries, shown.audit_size


def _endorsed(tx: Transaction) -> tuple[Any, ...]:
    return tuple(get_meta(tx, _ENDORSED) or ())
