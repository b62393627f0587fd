"""Revocation lists at a key broker: fetched in the background, and no keys without a fresh one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from casemate_attestation.https import HttpsFetch
from casemate_key_broker.revocation import RevocationLists
from casemate_key_broker.settings import Settings
from casemate_messaging.logs import ProgramLog
from casemate_schemas.errors import SetupError, UnavailableError, VerificationError
from support.kds import Answer, SimulatedKds
from support.key_brokers import Bench, Worker, authority, chip


@pytest.fixture
def kds(monkeypatch: pytest.MonkeyPatch) -> SimulatedKds:
    """The service, in place of HTTPS."""
    kds = SimulatedKds((authority(), chip()))
    monkeypatch.setattr(HttpsFetch, "__call__", lambda _, url, max_bytes: kds.fetch(url, max_bytes))
    return kds


def lists(bench: Bench, **changed: Any) -> RevocationLists:
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
    return RevocationLists.of(Settings(**(fields | changed)), bench.consortium.manifest.attestation)


async def fetched(lists: RevocationLists, capsys: pytest.CaptureFixture[str], events: int = 1) -> list[dict[str, Any]]:
    """What the background task logged, up to so many events."""
    task = asyncio.create_task(lists.keep_fresh(lambda: ("Milan",), ProgramLog("key-broker")))
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
    await none.keep_fresh(lambda: ("Milan",), ProgramLog("key-broker"))
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
    assert [(line["event"], line["product"]) for line in logged] == [("revocation_list_fetched", "Milan")]
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


def test_offline_lists_are_the_operators(tmp_path: Path, kds: SimulatedKds) -> None:
    bench = Bench(tmp_path)
    folder = tmp_path / "kds"
    offline = lists(bench, kds_cache_dir=folder)
    for name, content in (
        ("ark_milan.der", authority().ark),
        ("ask_milan.der", authority().ask),
        ("crl_milan.der", kds.crls["Milan"]),
    ):
        with pytest.raises(UnavailableError):
            grant(bench, offline)
        (folder / name).write_bytes(content)
    assert grant(bench, offline)
    assert kds.requests == []
