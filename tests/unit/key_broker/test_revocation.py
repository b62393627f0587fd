"""Revocation lists at a key broker: fetched in the background, and no keys without a fresh one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from casemate_attestation.https import HttpsFetch
from casemate_key_broker.revocation import ListName, RevocationLists, lists_for
from casemate_key_broker.settings import Settings
from casemate_messaging.logs import ProgramLog
from casemate_schemas.attestation_policy import AttestationPolicy
from casemate_schemas.errors import SetupError, UnavailableError, VerificationError
from support.kds import Answer, SimulatedKds
from support.key_brokers import Bench, Worker, authority, chip


@pytest.fixture
def kds(monkeypatch: pytest.MonkeyPatch) -> SimulatedKds:
    """The service, in place of HTTPS."""
    kds = SimulatedKds((authority(), chip()))
    monkeypatch.setattr(HttpsFetch, "__call__", lambda _, url, max_bytes: kds.fetch(url, max_bytes))
    return kds


def lists(bench: Bench, policy: AttestationPolicy | None = None, **changed: Any) -> RevocationLists:
    fields: dict[str, Any] = {
        "key_broker": "north",
        "nats_url": "nats://127.0.0.1:4222",
        "nats_seed_file": bench.folder / "seed",
        "consortium": bench.consortium.id.hex(),
        "manifest_file": bench.folder / "manifest",
        "keys_file": bench.folder / "keys",
        "state_dir": bench.folder / "state",
        "kds_interval_s": 0.0,
    }
    return RevocationLists.of(Settings(**(fields | changed)), policy or bench.consortium.manifest.attestation)


async def fetched(lists: RevocationLists, capsys: pytest.CaptureFixture[str], events: int = 1) -> list[dict[str, Any]]:
    """What the background task logged, up to so many events."""
    task = asyncio.create_task(lists.keep_fresh(lambda: (("Milan", "vcek"),), ProgramLog("key-broker")))
    logged: list[dict[str, Any]] = []
    async with asyncio.timeout(20):
        while len(logged) < events:
            await asyncio.sleep(0)
            logged += map(json.loads, capsys.readouterr().err.splitlines())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return logged


def grant(bench: Bench, revocation: RevocationLists) -> bytes:
    """A worker's request for keys at north, whose lists are these."""
    broker = bench.broker("north")
    broker._crl = revocation.for_evidence
    job = bench.job(bench.register("north", name=f"d{len(list(bench.folder.iterdir()))}").use())
    bench.precheck("north", job)
    worker = Worker(job)
    claims = worker.claims(bench.consortium, {"north": bench.nonce("north", job)})
    return broker.grant(worker.request(worker.evidence(claims)))


def test_online_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="kds_cache_dir"):
        lists(Bench(tmp_path), kds="online")


async def test_without_a_folder_nothing_is_asked_for(tmp_path: Path, kds: SimulatedKds) -> None:
    bench = Bench(tmp_path)
    none = lists(bench)
    await none.keep_fresh(lambda: (("Milan", "vcek"),), ProgramLog("key-broker"))
    assert grant(bench, none)
    assert kds.requests == []


async def test_no_keys_until_a_list_was_fetched_in_the_background(
    tmp_path: Path, kds: SimulatedKds, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    online = lists(bench, kds="online", kds_cache_dir=tmp_path / "kds")
    with pytest.raises(UnavailableError, match="no revocation list"):
        grant(bench, online)
    assert kds.requests == []  # a request for keys waits for nobody
    logged = await fetched(online, capsys)
    (line,) = logged
    assert (line["event"], line["product"], line["kind"]) == ("revocation_list_fetched", "Milan", "vcek")
    assert grant(bench, online)


async def test_a_revoked_authority_is_refused(
    tmp_path: Path, kds: SimulatedKds, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    kds.crls["Milan"] = authority().issue_crl(revoked=[0x10001])
    online = lists(bench, kds="online", kds_cache_dir=tmp_path / "kds")
    await fetched(online, capsys)
    with pytest.raises(VerificationError, match="revoked: 'SEV-Milan'"):
        grant(bench, online)


async def test_a_service_that_does_not_answer_is_logged_and_nothing_is_given(
    tmp_path: Path, kds: SimulatedKds, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    kds.twist = lambda _, __: Answer(500)
    online = lists(bench, kds="online", kds_cache_dir=tmp_path / "kds")
    (line,) = await fetched(online, capsys)
    assert (line["event"], line["reason"]) == ("revocation_list_not_fetched", "unavailable")
    with pytest.raises(UnavailableError):
        grant(bench, online)


def test_a_root_that_no_lists_are_kept_for_is_refused(tmp_path: Path, kds: SimulatedKds) -> None:
    """As in simulation after a manifest that brings one: the evidence is good, but for the list that is missing."""
    bench = Bench(tmp_path)
    policy = bench.consortium.manifest.attestation
    (milan,) = policy.products
    before = policy.model_copy(update={"products": (milan.model_copy(update={"ark_sha256": (bytes(32),)}),)})
    with pytest.raises(VerificationError, match=r"^✗ revocation: [^;]*$"):
        grant(bench, lists(bench, before, kds_cache_dir=tmp_path / "kds"))


async def test_a_product_that_is_no_longer_accepted_is_forgotten(
    tmp_path: Path, kds: SimulatedKds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time to be fetched goes by and never comes again: nobody waits for it."""
    accepted: list[ListName] = [("Milan", "vcek"), ("Genoa", "vcek")]
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        accepted[1:] = []
        if len(waits) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr("casemate_key_broker.revocation.asyncio.sleep", sleep)
    online = lists(Bench(tmp_path), kds="online", kds_cache_dir=tmp_path / "kds")

    async def refresh(_: Any, name: ListName, __: ProgramLog) -> float:
        return 3600.0 if name == ("Milan", "vcek") else 0.0

    monkeypatch.setattr(online, "_refresh", refresh)
    with pytest.raises(asyncio.CancelledError):
        await online.keep_fresh(lambda: accepted, ProgramLog("key-broker"))
    assert waits == [0.0, 60.0, 60.0]


def _files_of_milan(kds: SimulatedKds) -> dict[str, bytes]:
    """What an operator puts into the cache by hand."""
    return {"ark_milan.der": authority().ark, "ask_milan.der": authority().ask, "crl_milan.der": kds.crls["Milan"]}


def test_offline_lists_are_the_operators(tmp_path: Path, kds: SimulatedKds) -> None:
    bench = Bench(tmp_path)
    folder = tmp_path / "kds"
    offline = lists(bench, kds_cache_dir=folder)
    for name, content in _files_of_milan(kds).items():
        with pytest.raises(UnavailableError):
            grant(bench, offline)
        (folder / name).write_bytes(content)
    assert grant(bench, offline)
    assert kds.requests == []


def test_a_vleks_evidence_needs_the_list_of_its_own_authority(tmp_path: Path, kds: SimulatedKds) -> None:
    """Also where the list of VCEKs is at hand, and good."""
    bench = Bench(tmp_path)
    folder = tmp_path / "kds"
    offline = lists(bench, kds_cache_dir=folder)
    for name, content in _files_of_milan(kds).items():
        (folder / name).write_bytes(content)
    worker = Worker(bench.accepted_job(bench.register().use()))
    evidence = bench.evidence(worker)
    assert offline.for_evidence(evidence) == kds.crls["Milan"]
    (component,) = evidence.components
    report = bytearray(component.report)
    report[0x48] = 1 << 2  # SIGNER_INFO: SIGNING_KEY is VLEK
    by_vlek = component.model_copy(update={"report": bytes(report)})
    with pytest.raises(UnavailableError, match=r"crl_vlek_milan\.der"):
        offline.for_evidence(evidence.model_copy(update={"components": (by_vlek,)}))


def test_lists_are_kept_for_the_keys_that_the_policy_lets_in(tmp_path: Path) -> None:
    policy = Bench(tmp_path).consortium.manifest.attestation
    both = (("Milan", "vcek"), ("Milan", "vlek"))
    some_chips, some_providers = {"chip_ids": (bytes(64),)}, {"csp_ids": ("cloud",)}
    for restricted, expected in (({}, both), (some_chips, both[:1]), (some_providers, both[1:])):
        assert lists_for(policy.model_copy(update=restricted)) == expected
    assert lists_for(policy.model_copy(update=some_chips | some_providers)) == both
