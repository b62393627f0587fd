"""A sealed state moves to another image by an owner's order, whole and to that enclave alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from casemate_key_broker import audit_log, handover, ledger
from casemate_key_broker.clock import MonotoneClock
from casemate_key_broker.hosted import STATE_KEY_CONTEXT, own_keys
from casemate_key_broker.party import Party, pin_consortium
from casemate_key_broker.sealed_database import SealedDatabase
from casemate_key_broker.seed_shares import SeedSecrets
from casemate_key_broker.service import KeyBroker
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import (
    AppraisalError,
    AuthenticationError,
    AuthorisationError,
    CasemateError,
    ConflictError,
    ManifestError,
    SealError,
    SetupError,
    SignatureError,
)
from casemate_schemas.key_broker_evidence import HandOver, HandOverOrder, KeyBrokerClaims, KeyBrokerEvidence
from casemate_schemas.keyring import KeyRing
from casemate_schemas.sealing import seal_envelope
from casemate_schemas.signatures import sign
from support.key_brokers import DAY_MS, KEY_BROKER_MEASUREMENT, MEMBERS, Bench, Person, Worker, chip

pytestmark = pytest.mark.parametrize("bench", [MEMBERS], ids=["hosted"], indirect=True)


@dataclass
class Successor:
    """North's next enclave: an empty state, and keys of its own."""

    bench: Bench
    database: SealedDatabase
    keys: KeyRing
    clock: MonotoneClock

    def evidence(self, image: bytes = KEY_BROKER_MEASUREMENT, **changed: Any) -> KeyBrokerEvidence:
        consortium = self.bench.consortium
        fields: dict[str, Any] = {
            "consortium": consortium.id,
            "manifest": consortium.digest,
            "manifest_number": consortium.manifest.number,
            "key_broker": "north",
            "sealing_key": self.keys.sealing.public,
            "signing_key": self.keys.signing.public,
            "nonce": bytes(32),
        }
        claims = KeyBrokerClaims(**(fields | changed))
        return KeyBrokerEvidence(claims=claims, component=chip().launch(image).attest(claims.report_data))

    def order(self, by: Person | None = None, evidence: KeyBrokerEvidence | None = None, **changed: Any) -> bytes:
        person = by or self.bench.stewards["north"]
        fields: dict[str, Any] = {
            "consortium": self.bench.consortium.id,
            "key_broker": "north",
            "successor": evidence or self.evidence(),
            "at": self.bench.clock(),
        }
        word = sign(HandOver(**(fields | changed)), person.keys.signing)
        return encode(HandOverOrder(hand_over=word, delegation=person.delegation))

    def take_over(self, envelope: bytes) -> None:
        handover.take_over(self.database, self.bench.consortium, "north", self.keys, envelope)


def opened(bench: Bench, folder: Path, image: bytes = b"\x4c" * 48) -> Successor:
    clock = MonotoneClock(bench.clock)
    database = SealedDatabase(folder, chip().launch(image).derive_key(STATE_KEY_CONTEXT), clock)
    pin_consortium(database, "north", bench.consortium.id, bench.chain, bench.clock())
    return Successor(bench, database, own_keys(database), clock)


@pytest.fixture
def successor(bench: Bench, tmp_path: Path) -> Iterator[Successor]:
    made = opened(bench, tmp_path / "successor")
    yield made
    made.database.close()


def given(bench: Bench, order: bytes) -> bytes:
    database = bench.database("north")
    assert isinstance(database, SealedDatabase)
    return handover.hand_over(
        database, Party("north", bench.key_brokers["north"], bench.consortium), order, bench.clock()
    )


def test_ledger_keys_and_time_go_along_and_nothing_is_served_twice(bench: Bench, successor: Successor) -> None:
    job = bench.accepted_job(bench.register().use())
    before, secrets = bench.grant("north", Worker(job))
    envelope = given(bench, successor.order())
    assert b"SQLite" not in envelope
    with pytest.raises(SetupError, match="handed over"):
        handover.check_here(bench.database("north"))
    bench.clock.advance(-3600)
    successor.take_over(envelope)
    handover.check_here(successor.database)
    assert successor.clock() > bench.clock(), "its time goes on from the old one's"
    keys = own_keys(successor.database)
    assert keys.signing.public == bench.key_brokers["north"].signing.public
    with successor.database.transaction() as tx:
        ledger.verify(tx)
        audit_log.verify(tx)
        assert audit_log.entries(tx)[-1].event == "state_handed_over"
    party = Party("north", keys, bench.consortium)
    broker = KeyBroker(party, successor.database, SeedSecrets.in_state(successor.database), clock=successor.clock)
    evidence_of = bench.evidence(again := Worker(job, 2))
    bench._open["north"][0].close()
    bench._open["north"] = successor.database, broker
    after, same = bench.grant("north", again, evidence_of)
    assert (after.header.reservation, same) == (before.header.reservation, secrets), (
        "charged once, the same keys and seeds"
    )


def test_the_same_order_may_be_given_again_and_another_not(bench: Bench, successor: Successor, tmp_path: Path) -> None:
    given(bench, successor.order())
    successor.take_over(given(bench, successor.order()))
    other = opened(bench, tmp_path / "other")
    with pytest.raises(ConflictError):
        given(bench, other.order())
    other.database.close()


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"evidence": {"image": b"\x4c" * 48}}, AppraisalError),
        ({"evidence": {"key_broker": "south"}}, AppraisalError),
        ({"evidence": {"manifest": bytes(32)}}, AppraisalError),
        ({"evidence": {"consortium": bytes(32)}}, AppraisalError),
        ({"key_broker": "south"}, AuthenticationError),
        ({"consortium": bytes(32)}, AuthenticationError),
    ],
    ids=str,
)
def test_an_order_for_another_place_moves_nothing(
    bench: Bench, successor: Successor, changed: dict[str, Any], error: type[CasemateError]
) -> None:
    changed = dict(changed)
    evidence = successor.evidence(**changed.pop("evidence", {}))
    with pytest.raises(error):
        given(bench, successor.order(evidence=evidence, **changed))
    handover.check_here(bench.database("north"))


def test_only_an_owners_officer_orders_it_and_for_a_day(bench: Bench, successor: Successor) -> None:
    for person in (bench.person("south", "sven", ("steward",)), bench.person("north", "sam", ("scientist",))):
        with pytest.raises(AuthorisationError):
            given(bench, successor.order(person))
    nora, stranger = bench.stewards["north"], bench.person("north", "eve", ("steward",))
    forged = decode(HandOverOrder, successor.order(stranger)).model_copy(update={"delegation": nora.delegation})
    with pytest.raises(SignatureError):
        given(bench, encode(forged))
    for at in (bench.clock() - DAY_MS - 1, bench.clock() + DAY_MS):
        with pytest.raises(AuthenticationError, match="older than a day"):
            given(bench, successor.order(at=at))
    handover.check_here(bench.database("north"))


def test_its_own_keys_are_no_successors(bench: Bench, successor: Successor) -> None:
    successor.keys = bench.key_brokers["north"]
    with pytest.raises(AppraisalError, match="own"):
        given(bench, successor.order())


def test_only_the_enclave_it_was_given_to_takes_it(bench: Bench, successor: Successor, tmp_path: Path) -> None:
    envelope = given(bench, successor.order())
    other = opened(bench, tmp_path / "other")
    with pytest.raises(SealError):
        other.take_over(envelope)
    ours = other.database.snapshot()
    made_up = seal_envelope(
        "state",
        ours,
        (successor.keys.sealing.public,),
        consortium=bench.consortium.id,
        key=other.keys.signing,
        created=bench.clock(),
    )
    with pytest.raises(SealError, match="another sender"):
        successor.take_over(made_up)
    not_given = seal_envelope(
        "state",
        ours,
        (successor.keys.sealing.public,),
        consortium=bench.consortium.id,
        key=bench.key_brokers["north"].signing,
        created=bench.clock(),
    )
    with pytest.raises(AuthenticationError, match="given to another"):
        successor.take_over(not_given)
    with pytest.raises(ManifestError):
        handover.take_over(successor.database, bench.consortium, "west", successor.keys, envelope)
    other.database.close()
    successor.take_over(envelope)
