"""A hosted key broker's state, moved to another enclave: another image of the program, or another chip.

Run without NATS, first by the old enclave and then by the new one, over an envelope that the host carries and cannot open.
Keys, ledger and audit log go along, so no manifest changes and no budget begins anew.
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from typing import Final

from casemate_attestation.key_broker import verify_key_broker
from casemate_schemas.codec import decode
from casemate_schemas.consortium import MAX_CLOCK_SKEW_MS, Consortium, verify_delegation
from casemate_schemas.errors import AppraisalError, AuthenticationError, ConflictError, SetupError
from casemate_schemas.grant import AuditEntry
from casemate_schemas.identity import Delegation
from casemate_schemas.key_broker_evidence import HandOver, HandOverOrder
from casemate_schemas.keyring import KeyRing
from casemate_schemas.sealing import open_envelope, seal_envelope

from . import anchor, audit_log
from .database import State, get_meta, set_meta
from .party import Party, full_name
from .sealed_database import SealedDatabase

MAX_ORDER_AGE_MS: Final = 24 * 3600 * 1000
MAX_STATE_BYTES: Final = 1 << 30
_GIVEN_AWAY: Final = "handed-over"


def check_here(database: State) -> None:
    """Raises :class:`SetupError` if this state was handed over: another enclave goes on with it."""
    with database.transaction() as tx:
        if get_meta(tx, _GIVEN_AWAY) is not None:
            raise SetupError("this state was handed over to another enclave: start that one")


def hand_over(database: SealedDatabase, party: Party, order: bytes, now: int) -> bytes:
    """The whole state in an envelope that the successor opens and nobody else. From now on it is not served here.

    1. A steward or admin of a member served signed the order, for this key broker, within the last day.
    2. The successor's evidence is genuine, and its image one that the newest manifest accepts for key brokers.
    3. It is of this key broker in this consortium at this manifest, and has keys of its own.
    4. The audit log says so, and the state that it was given away, before anything leaves. The same order may be given again.

    Raises :class:`AuthenticationError`, :class:`AuthorisationError`, :class:`AttestationError`, :class:`RolledBackError` or
    :class:`ConflictError` if it was handed over to another one.
    """
    person, asked = _opened(order, party, now)  # 1
    successor = asked.successor.claims
    at = datetime.fromtimestamp(now / 1000, UTC)
    verdict = verify_key_broker(asked.successor, party.consortium.manifest.attestation, at)  # 2
    verdict.raise_for_failure()
    expected = (party.consortium.id, party.consortium.digest, party.id)
    if (successor.consortium, successor.manifest, successor.key_broker) != expected:  # 3
        raise AppraisalError("the successor is of another key broker, or at another manifest")
    if successor.sealing_key == party.keys.sealing.public:
        raise AppraisalError("the successor's keys are this key broker's own")
    with database.transaction() as tx:  # 4
        anchor.check_current(tx)
        given = get_meta(tx, _GIVEN_AWAY)
        if given not in (None, successor.signing_key):
            raise ConflictError("this state was handed over to another enclave before")
        if given is None:
            set_meta(tx, _GIVEN_AWAY, successor.signing_key)
            subject = f"to the enclave of key {successor.signing_key.hex()}"
            entry = AuditEntry(
                key_broker=party.id, event="state_handed_over", at=now, subject=subject, person=full_name(person)
            )
            audit_log.append(tx, entry)
    return seal_envelope(
        "state",
        database.snapshot(),
        (successor.sealing_key,),
        consortium=party.consortium.id,
        key=party.keys.signing,
        created=now,
    )


def take_over(database: SealedDatabase, consortium: Consortium, key_broker: str, own: KeyRing, envelope: bytes) -> None:
    """The state in the envelope in the place of this enclave's, which decided nothing: no manifest lists its keys.

    1. It is from the key broker that the manifest lists, to this enclave's ``own`` keys.
    2. It is the state of that key broker and this consortium, given away to this enclave.

    Raises :class:`MalformedError`, :class:`CryptographyError` or :class:`AuthenticationError`.
    """
    listed = consortium.manifest.key_broker(key_broker).signing_key
    _, snapshot = open_envelope(  # 1
        envelope, own.sealing, kind="state", consortium=consortium.id, sender=listed, max_bytes=MAX_STATE_BYTES
    )
    scratch = sqlite3.connect(":memory:")
    try:
        scratch.deserialize(snapshot)
        given = get_meta(scratch, "key-broker"), get_meta(scratch, _GIVEN_AWAY)
        if given != ((key_broker, consortium.id), own.signing.public):  # 2
            raise AuthenticationError("the state is another key broker's, or was given to another enclave")
        scratch.execute("DELETE FROM meta WHERE name = ?", (_GIVEN_AWAY,))
        scratch.commit()
        database.replace(scratch.serialize())
    finally:
        scratch.close()


def _opened(order: bytes, party: Party, now: int) -> tuple[Delegation, HandOver]:
    received = decode(HandOverOrder, order)
    person = verify_delegation(received.delegation, party.consortium, at=now)
    asked = received.hand_over.verify(HandOver, person.signing_key)
    anchor.check_officer(party, person)
    if (asked.consortium, asked.key_broker) != (party.consortium.id, party.id):
        raise AuthenticationError("the order is for another key broker")
    if not -MAX_CLOCK_SKEW_MS <= now - asked.at <= MAX_ORDER_AGE_MS:
        raise AuthenticationError("the order is older than a day, or a clock is wrong")
    return person, asked
