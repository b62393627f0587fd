"""A hosted key broker: keys made inside and bound to one consortium, evidence first, then a manifest; and its time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from casemate_attestation.key_broker import verify_key_broker
from casemate_key_broker.__main__ import Program, move_state, open_key_broker, open_state
from casemate_key_broker.clock import MonotoneClock
from casemate_key_broker.database import State
from casemate_key_broker.sealed_database import FILE_NAME
from casemate_key_broker.settings import Settings
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import ConsortiumManifest, ManifestChain, sign_manifest
from casemate_schemas.errors import (
    AuthenticationError,
    IntegrityError,
    LicenceError,
    MalformedError,
    SetupError,
    UnavailableError,
)
from casemate_schemas.key_broker_evidence import EvidenceRequest, HandOver, HandOverOrder, KeyBrokerEvidence
from casemate_schemas.requests import ListDatasets, Refusal, TellTime, TimeTold
from casemate_schemas.signatures import sign
from pydantic import ValidationError
from support.key_brokers import DAY_MS, KEY_BROKER_MEASUREMENT, MEMBERS, Bench, Worker, chip

HOUR_MS = 3600 * 1000


class Enclave:
    """North's hosted key broker over one folder, started and stopped as its host likes."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self.manifest_file = folder / "manifest"
        self.settings = Settings(
            key_broker="north",
            nats_url="nats://127.0.0.1:1",
            nats_seed_file=folder / "unused",
            consortium=bench.consortium.id.hex(),
            manifest_file=self.manifest_file,
            state_dir=folder / "state",
            guest="simulated",
            simulated_chip_socket=folder / "unused",
        )
        self.offer(bench.chain)
        self._open: list[State] = []

    def offer(self, chain: ManifestChain) -> None:
        self.manifest_file.write_bytes(encode(chain))

    def start(self, measurement: bytes = KEY_BROKER_MEASUREMENT, **settings: Any) -> Program:
        self.stop()
        guest = chip().launch(measurement)
        database, clock = open_state(self.settings.model_copy(update=settings), guest)
        self._open.append(database)
        return open_key_broker(self.settings.model_copy(update=settings), database, guest, clock)

    def stop(self) -> None:
        while self._open:
            self._open.pop().close()

    def evidence(self, program: Program, nonce: bytes = b"\x07" * 32) -> KeyBrokerEvidence:
        assert program.attester is not None
        return decode(KeyBrokerEvidence, program.attester.evidence(encode(EvidenceRequest(nonce=nonce))))

    def listed(self, evidence: KeyBrokerEvidence, **changed: Any) -> ManifestChain:
        """The chain with the next manifest, in which the attested keys stand."""
        newest = self.bench.consortium.manifest
        fields: dict[str, Any] = {
            "hosted": "enclave",
            "signing_key": evidence.claims.signing_key,
            "sealing_key": evidence.claims.sealing_key,
        } | changed
        following = newest.model_copy(
            update={
                "number": newest.number + 1,
                "previous": self.bench.consortium.digest,
                "key_brokers": tuple(b.model_copy(update=fields) if b.id == "north" else b for b in newest.key_brokers),
            }
        )
        signed = sign_manifest(following, {name: keys.signing for name, keys in self.bench.members.items()})
        return ManifestChain(manifests=(*self.bench.chain.manifests, signed))


@pytest.fixture
def enclave(bench: Bench, tmp_path: Path) -> Iterator[Enclave]:
    made = Enclave(bench, tmp_path)
    yield made
    made.stop()


def test_it_gives_evidence_first_and_serves_once_a_manifest_lists_its_keys(enclave: Enclave) -> None:
    program = enclave.start()
    evidence = enclave.evidence(program, nonce := os.urandom(32))
    policy = enclave.bench.consortium.manifest.attestation
    assert verify_key_broker(evidence, policy, datetime.now(UTC)).ok
    consortium = enclave.bench.consortium
    claims = evidence.claims
    assert (claims.consortium, claims.manifest, claims.manifest_number) == (consortium.id, consortium.digest, 1)
    assert (claims.key_broker, claims.nonce) == ("north", nonce)
    with pytest.raises(UnavailableError, match="no manifest lists"):
        program.serving()
    chain = enclave.listed(evidence)
    assert program.manifests.offer_chain(chain)
    program.serving()
    assert enclave.evidence(program).claims.manifest_number == 2
    enclave.offer(chain)
    again = enclave.start()
    again.serving()
    assert enclave.evidence(again).claims.sealing_key == claims.sealing_key, "the same keys at every start"
    assert {path.name for path in enclave.settings.state_dir.iterdir()} == {FILE_NAME, "lock", "manifests"}


def test_its_keys_are_of_one_consortium_and_one_image(enclave: Enclave, tmp_path: Path) -> None:
    first = enclave.evidence(enclave.start())
    stranger = Bench(tmp_path / "stranger")
    enclave.offer(stranger.chain)
    (enclave.settings.state_dir / "manifests").unlink()
    with pytest.raises(SetupError, match="another consortium"):
        enclave.start(consortium=stranger.consortium.id.hex())
    with pytest.raises(IntegrityError, match="another image"):
        enclave.start(b"\x4f" * 48)
    enclave.offer(enclave.bench.chain)
    (enclave.settings.state_dir / "manifests").unlink()
    assert enclave.evidence(enclave.start()).claims.signing_key == first.claims.signing_key
    (enclave.settings.state_dir / FILE_NAME).unlink()
    assert enclave.evidence(enclave.start()).claims.signing_key != first.claims.signing_key, (
        "nobody else makes its keys"
    )


def test_manifest_and_program_must_agree_on_where_it_runs(enclave: Enclave) -> None:
    program = enclave.start()
    enclave.offer(enclave.listed(enclave.evidence(program), hosted="member"))
    with pytest.raises(SetupError, match="disagree on whether this key broker runs"):
        enclave.start()
    with pytest.raises(SetupError, match="disagree on whether this is a simulation"):
        enclave.start(guest="sev-guest")


def test_replaced_by_other_keys_it_ends(enclave: Enclave) -> None:
    evidence = enclave.evidence(enclave.start())
    chain = enclave.listed(evidence)
    enclave.offer(chain)
    program = enclave.start()
    program.serving()
    second = program.manifests.current
    back = second.manifest.model_copy(
        update={
            "number": 3,
            "previous": second.digest,
            "key_brokers": enclave.bench.consortium.manifest.key_brokers,
        }
    )
    signed = sign_manifest(back, {name: keys.signing for name, keys in enclave.bench.members.items()})
    with pytest.raises(SetupError, match="other keys"):
        program.manifests.offer(signed)


def test_the_program_hands_its_state_over_to_the_next_enclave(
    enclave: Enclave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casemate_key_broker.hosted.guest_of", lambda _: chip().launch(KEY_BROKER_MEASUREMENT))
    first = enclave.evidence(enclave.start()).claims
    chain = enclave.listed(enclave.evidence(enclave.start()))
    enclave.offer(chain)
    before, after = (enclave.settings.model_copy(update={"state_dir": tmp_path / name}) for name in ("state", "next"))
    enclave.start().serving()
    successor = enclave.evidence(enclave.start(state_dir=after.state_dir))
    enclave.stop()
    nora = enclave.bench.stewards["north"]
    word = HandOver(
        consortium=enclave.bench.consortium.id, key_broker="north", successor=successor, at=enclave.bench.clock()
    )
    order, sealed = tmp_path / "order", tmp_path / "sealed"
    signed = HandOverOrder(hand_over=sign(word, nora.keys.signing), delegation=nora.delegation)
    order.write_bytes(encode(signed))
    move_state(before, order, sealed, None)
    with pytest.raises(SetupError, match="handed over"):
        enclave.start()
    enclave.stop()
    move_state(after, None, None, sealed)
    program = enclave.start(state_dir=after.state_dir)
    program.serving()
    assert enclave.evidence(program).claims.signing_key == first.signing_key


def test_only_requests_for_evidence_are_answered_with_it(enclave: Enclave) -> None:
    program = enclave.start()
    assert program.attester is not None
    for payload in (b"", b"\x80", encode(EvidenceRequest(nonce=bytes(32))) + b"\0"):
        with pytest.raises(MalformedError):
            program.attester.evidence(payload)


def test_settings_name_one_origin_of_keys(tmp_path: Path, enclave: Enclave) -> None:
    fields = enclave.settings.model_dump()
    for changed in (
        {"keys_file": tmp_path / "keys"},
        {"guest": None},
        {"simulated_chip_socket": None},
        {"guest": "sev-guest"},
    ):
        with pytest.raises(ValidationError):
            Settings(**(fields | changed))


def test_a_founding_manifest_lists_no_hosted_key_broker(bench: Bench) -> None:
    first = bench.consortium.manifest
    hosted = tuple(broker.model_copy(update={"hosted": "enclave"}) for broker in first.key_brokers)
    with pytest.raises(ValidationError, match="for a consortium that is there already"):
        ConsortiumManifest(**(dict(first) | {"key_brokers": hosted}))
    policy = first.attestation.model_copy(update={"key_broker_measurements": ()})
    following = {"number": 2, "previous": bytes(32), "key_brokers": hosted, "attestation": policy}
    with pytest.raises(ValidationError, match="needs an accepted image"):
        ConsortiumManifest(**(dict(first) | following))


# --- time -------------------------------------------------------------------------------------------------------------

hosted = pytest.mark.parametrize("bench", [MEMBERS], ids=["hosted"], indirect=True)


def told(bench: Bench, at: int) -> Any:
    """North's steward says that it is ``at``."""
    nora = bench.stewards["north"]
    return bench.answer(
        "north", nora, bench.broker("north").message(bench.request("north", nora, TellTime(), created=at))
    )


@hosted
def test_a_clock_set_back_revives_nothing(bench: Bench) -> None:
    dataset = bench.register(expires=bench.clock() + 60_000)
    job = bench.accepted_job(dataset.use())
    bench.clock.advance(61)
    with pytest.raises(LicenceError):
        bench.grant("north", Worker(job))
    bench.clock.advance(-61)
    for _ in range(2):
        with pytest.raises(LicenceError):
            bench.grant("north", Worker(job))
        bench.restart("north")


def test_on_a_members_own_machine_the_clock_is_its_owners(bench: Bench) -> None:
    job = bench.accepted_job(bench.register(expires=bench.clock() + 60_000).use())
    bench.clock.advance(61)
    with pytest.raises(LicenceError):
        bench.grant("north", Worker(job))
    bench.clock.advance(-61)
    bench.grant("north", Worker(job))


@hosted
def test_what_an_owner_says_is_the_least_that_it_is_from_then_on(bench: Bench) -> None:
    """The host's clock stands still from the start; nora's does not."""
    job = bench.accepted_job(bench.register(expires=bench.clock() + HOUR_MS).use())
    later = bench.clock() + HOUR_MS
    assert told(bench, later) == TimeTold(at=later)
    assert told(bench, bench.clock()) == TimeTold(at=later), "what was said before is no news"
    bench.restart("north")
    with pytest.raises(LicenceError):
        bench.grant("north", Worker(job))


@hosted
def test_only_an_owners_officer_tells_the_time_and_only_as_far_as_their_delegation(bench: Bench) -> None:
    start = bench.clock()
    beyond = start + 40 * DAY_MS
    with pytest.raises(AuthenticationError, match="not valid at this time"):
        told(bench, beyond)
    stranger = bench.person("south", "sven", ("steward",))
    scientist = bench.person("north", "sam", ("scientist",))
    for person in (stranger, scientist):
        request = bench.request("north", person, TellTime(), created=start + DAY_MS)
        answer = bench.answer("north", person, bench.broker("north").message(request))
        assert isinstance(answer, Refusal) and answer.reason == "not_allowed"
    assert told(bench, start) == TimeTold(at=start)


@hosted
def test_nothing_but_the_time_may_come_from_the_future(bench: Bench) -> None:
    nora = bench.stewards["north"]
    request = bench.request("north", nora, ListDatasets(), created=bench.clock() + DAY_MS)
    with pytest.raises(AuthenticationError, match="too old"):
        bench.broker("north").message(request)


def test_it_is_the_newest_of_all_that_was_said() -> None:
    times: Iterator[int] = iter((5, 3, 9, 1))
    clock = MonotoneClock(times.__next__)
    assert [clock(), clock(), clock()] == [5, 5, 9]
    clock.raise_to(20)
    assert clock() == 20
