"""Nothing is sealed to a hosted key broker that does not show, in that call, that its enclave holds the very keys."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import casemate as cm
import numpy as np
import pytest
from casemate.amendments import Proposal
from casemate.hosting import with_hosted_key_broker, with_key_broker_measurement
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import ConsortiumManifest, ManifestChain
from casemate_schemas.custody import DatasetPrepared, PrepareDataset
from casemate_schemas.errors import (
    AppraisalError,
    AttestationError,
    CasemateError,
    ManifestError,
    NonceError,
    ParameterError,
    UnavailableError,
    VerificationError,
)
from casemate_schemas.key_broker_evidence import (
    EvidenceRequest,
    HandOver,
    HandOverOrder,
    KeyBrokerClaims,
    KeyBrokerEvidence,
)
from casemate_schemas.keyring import KeyRing
from casemate_schemas.requests import DatasetRegistered, PersonRequest, RegisterDataset, TellTime, TimeTold
from support.command_line import casemate, signed_in
from support.fake_gateway import FakeGateway, serving
from support.results import MEASUREMENT, World

from .conftest import card_of, licence_of

IMAGE = b"\x4b" * 48
COLUMNS = {
    "age": np.array([40.0], np.float32),
    "pulse": np.array([60.0], np.float32),
    "outcome": np.array([1], np.int64),
}


class HostedNorth:
    """North's key broker in an enclave, behind the gateway; every part of its evidence can be wrong."""

    def __init__(self, w: World) -> None:
        self.w = w
        self.keys = w.brokers["north"]
        self.image = IMAGE
        self.claims: dict[str, Any] = {}
        self.replayed: KeyBrokerEvidence | None = None
        self.asked: list[str] = []
        self.consortium = w.consortium
        manifest = w.consortium.manifest
        claims = self.claim(bytes(32))
        policy = with_key_broker_measurement(manifest.attestation, IMAGE)
        changed = with_hosted_key_broker(manifest, claims) | {"attestation": policy}
        self.chain = ManifestChain(manifests=(*w.chain.manifests, w.next_manifest(**changed)))
        second = self.chain.manifests[1]
        self.consortium = dataclasses.replace(
            w.consortium, digest=second.digest, manifest=second.open(), earlier=(w.consortium.digest,)
        )

    def claim(self, nonce: bytes) -> KeyBrokerClaims:
        fields: dict[str, Any] = {
            "consortium": self.consortium.id,
            "manifest": self.consortium.digest,
            "manifest_number": self.consortium.manifest.number,
            "key_broker": "north",
            "sealing_key": self.keys.sealing.public,
            "signing_key": self.keys.signing.public,
            "nonce": nonce,
        }
        return KeyBrokerClaims(**(fields | self.claims))

    def evidence(self, payload: bytes) -> bytes:
        self.asked.append("evidence")
        claims = self.claim(decode(EvidenceRequest, payload).nonce)
        component = self.w.chip.launch(self.image).attest(claims.report_data)
        return encode(self.replayed or KeyBrokerEvidence(claims=claims, component=component))

    def answer(self, _: str, request: PersonRequest) -> Any:
        self.asked.append(request.body.op)
        if isinstance(request.body, TellTime):
            return TimeTold(at=request.created)
        if isinstance(request.body, PrepareDataset):
            return DatasetPrepared(sealing_key=KeyRing.generate().sealing.public)
        assert isinstance(request.body, RegisterDataset)
        card = request.body.card
        return DatasetRegistered(dataset=card.id, lineage=bytes(32), envelope=bytes(32), licence=bytes(32))


@pytest.fixture
def north(w: World) -> HostedNorth:
    return HostedNorth(w)


@pytest.fixture
async def hosted_gateway(w: World, north: HostedNorth, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeGateway]:
    async def no_pause(self: object, _: float) -> None:
        return None

    monkeypatch.setattr("casemate._http.Gateway.wait", no_pause)
    gateway = FakeGateway(w, north.answer, chain=encode(north.chain), evidence=north.evidence)
    async with serving(gateway):
        yield gateway


async def _push(gateway: FakeGateway, options: dict[str, Any]) -> DatasetRegistered:
    async with cm.connect(gateway.url, **options) as consortium:
        return await consortium.push(COLUMNS, card_of("north"), licence=licence_of("north"))


async def test_it_is_attested_and_told_the_time_before_the_dataset_is_sealed(
    hosted_gateway: FakeGateway, north: HostedNorth, options: dict[str, Any]
) -> None:
    await _push(hosted_gateway, options)
    assert north.asked[:2] == ["evidence", "tell_time"] and north.asked[-1] == "register_dataset"
    paths = [request.rpartition("/")[2] for request in hosted_gateway.requests]
    assert paths.index("evidence") < paths.index("envelopes") < len(paths) - 1


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"image": MEASUREMENT}, AppraisalError),
        ({"image": b"\x4f" * 48}, AppraisalError),
        ({"claims": {"nonce": bytes(32)}}, NonceError),
        ({"claims": {"consortium": bytes(32)}}, AppraisalError),
        ({"claims": {"key_broker": "south"}}, AppraisalError),
        ({"claims": {"manifest": bytes(32)}}, ManifestError),
        ({"claims": {"manifest_number": 3}}, UnavailableError),
        ({"keys": KeyRing.generate()}, AppraisalError),
    ],
    ids=lambda value: ",".join(value.get("claims", value)) if isinstance(value, dict) else "",
)
async def test_nothing_leaves_for_one_that_is_not_what_the_manifest_says(
    hosted_gateway: FakeGateway,
    north: HostedNorth,
    options: dict[str, Any],
    changed: dict[str, Any],
    error: type[CasemateError],
) -> None:
    for name, value in changed.items():
        setattr(north, name, value)
    with pytest.raises(error):
        await _push(hosted_gateway, options)
    assert not hosted_gateway.envelopes and set(north.asked) == {"evidence"}


async def test_one_that_has_not_seen_the_newest_manifest_is_not_sealed_to(
    hosted_gateway: FakeGateway, north: HostedNorth, options: dict[str, Any], w: World
) -> None:
    north.consortium = w.consortium
    with pytest.raises(UnavailableError, match="not accepted manifest 2"):
        await _push(hosted_gateway, options)
    assert not hosted_gateway.envelopes


async def test_evidence_of_yesterday_is_none_of_today(
    hosted_gateway: FakeGateway, north: HostedNorth, options: dict[str, Any]
) -> None:
    async with cm.connect(hosted_gateway.url, **options) as consortium:
        found = await consortium.attest_key_broker("north")
    assert found.verdict.ok
    north.replayed = found.evidence
    with pytest.raises(NonceError):
        await _push(hosted_gateway, options)
    report = found.evidence.component.report
    forged = found.evidence.component.model_copy(update={"report": report[:-600] + bytes(600)})
    north.replayed = found.evidence.model_copy(update={"component": forged})
    with pytest.raises(AttestationError):
        await _push(hosted_gateway, options)


async def test_a_report_that_was_tampered_with(
    hosted_gateway: FakeGateway, north: HostedNorth, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = north.evidence

    def tampered(payload: bytes) -> bytes:
        evidence = decode(KeyBrokerEvidence, genuine(payload))
        report = bytearray(evidence.component.report)
        report[0x90] ^= 1
        component = evidence.component.model_copy(update={"report": bytes(report)})
        return encode(evidence.model_copy(update={"component": component}))

    hosted_gateway.evidence = tampered
    with pytest.raises(VerificationError):
        await _push(hosted_gateway, options)
    assert not hosted_gateway.envelopes


async def test_in_one_session_questions_attest_it_once(
    hosted_gateway: FakeGateway, north: HostedNorth, options: dict[str, Any]
) -> None:
    async with cm.connect(hosted_gateway.url, **options) as consortium:
        for _ in range(2):
            assert await consortium.tell_time("north") > 0
    assert north.asked == ["evidence", "tell_time", "tell_time"]


async def test_member_run_key_brokers_are_asked_for_no_evidence(gateway: FakeGateway, options: dict[str, Any]) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.datasets()
    assert not any(request.endswith("/evidence") for request in gateway.requests)


async def test_the_commands_attest_and_tell_the_time(
    hosted_gateway: FakeGateway,
    north: HostedNorth,
    options: dict[str, Any],
    tmp_path: Path,
    w: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signed_in(monkeypatch, hosted_gateway.url, w.clara.keys, tmp_path)

    async def command(*arguments: str) -> tuple[int, str]:
        return await asyncio.to_thread(casemate, *arguments), capsys.readouterr().out

    status, told = await command("key-broker", "attest", "north")
    assert status == 0 and "✓ measurement" in told and "lists the keys that it holds" in told
    north.keys = KeyRing.generate()
    status, told = await command("key-broker", "attest", "north")
    assert status == 1 and "other keys" in told
    status, told = await command("consortium", "amend", "--host", "north", "--out", str(tmp_path / "proposal"))
    assert status == 0
    proposed = decode(Proposal, (tmp_path / "proposal").read_bytes()).open(north.consortium)
    assert proposed.key_broker("north").sealing_key == north.keys.sealing.public
    north.image = MEASUREMENT
    assert (await command("key-broker", "attest", "north"))[0] == 1
    assert (await command("consortium", "amend", "--host", "north", "--out", str(tmp_path / "other")))[0] == 1
    assert not (tmp_path / "other").exists()


async def test_an_order_to_hand_over_names_the_attested_successor(
    hosted_gateway: FakeGateway, north: HostedNorth, options: dict[str, Any], w: World
) -> None:
    async with cm.connect(hosted_gateway.url, **options) as consortium:
        with pytest.raises(AppraisalError, match="start its successor"):
            await consortium.order_hand_over("north")
        north.keys = KeyRing.generate()
        order = decode(HandOverOrder, await consortium.order_hand_over("north"))
        north.image = MEASUREMENT
        with pytest.raises(AppraisalError):
            await consortium.order_hand_over("north")
    word = order.hand_over.verify(HandOver, w.clara.keys.signing.public)
    assert (word.consortium, word.key_broker) == (w.consortium.id, "north")
    assert word.successor.claims.sealing_key == north.keys.sealing.public
    assert order.delegation == w.clara.signed_delegation


def test_the_next_manifest_takes_the_attested_keys_and_keeps_whom_it_serves(north: HostedNorth, w: World) -> None:
    before = w.consortium.manifest.key_broker("north")
    after = north.consortium.manifest.key_broker("north")
    assert (after.serves, after.hosted, before.hosted) == (before.serves, "enclave", "member")
    assert (after.sealing_key, after.signing_key) == (north.keys.sealing.public, north.keys.signing.public)
    assert [b for b in north.consortium.manifest.key_brokers if b.id != "north"] == [
        b for b in w.consortium.manifest.key_brokers if b.id != "north"
    ]
    with pytest.raises(ManifestError):
        with_hosted_key_broker(w.consortium.manifest, north.claim(bytes(32)).model_copy(update={"key_broker": "west"}))
    with pytest.raises(ParameterError):
        with_key_broker_measurement(w.consortium.manifest.attestation, MEASUREMENT)
    assert isinstance(north.consortium.manifest, ConsortiumManifest)
