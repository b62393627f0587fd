"""The doctor on running servers: a real nats-server, set up wrongly in one way after the other, and a real gateway."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from casemate.doctor import live
from casemate.doctor.findings import Finding
from casemate_gateway.app import running
from casemate_gateway.settings import Settings
from casemate_messaging import connection
from casemate_messaging.connection import connect
from casemate_messaging.logs import ProgramLog
from casemate_messaging.manifests import ManifestStore
from casemate_messaging.server import ServerTls, create_user_key
from casemate_messaging.setup import ensure_streams
from casemate_schemas import subjects
from nats.aio.client import Client
from nats.js.api import RetentionPolicy
from support.consortium import amended
from support.operator_site import OperatorSite
from support.tls import Authority


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OperatorSite:
    monkeypatch.setattr(live, "CONNECT_S", 1.0)
    return OperatorSite(tmp_path)


@asynccontextmanager
async def served(site: OperatorSite, alter: Callable[[dict[str, Any]], None]) -> AsyncIterator[Client]:
    """A server for the site, with one more user who may do anything; that one's connection."""
    operator = create_user_key(site.folder / "operator.nk")

    def altered(config: dict[str, Any]) -> None:
        config["accounts"]["CASEMATE"]["users"].append({"nkey": operator})
        alter(config)

    async with site.server(altered) as server:
        for values in site.values.values():
            values["nats_url"] = server.url
        client = await connect(server.url, site.folder / "operator.nk", user="operator")
        try:
            yield client
        finally:
            await client.close()


async def _wrong(site: OperatorSite, **options: Any) -> list[Finding]:
    return await site.wrong(live=True, now_ms=options.get("now_ms", now_ms))


def _has(wrong: list[Finding], check: str, fix: str) -> bool:
    return any(finding.check.startswith(check) and fix in finding.fix for finding in wrong)


async def test_what_runs_wrongly_is_found(site: OperatorSite, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(site, lambda _: None) as operator:
        js = operator.jetstream()
        await ensure_streams(js)
        gateway = await connect(site.values["gateway"]["nats_url"], site.seeds["gateway"], user="gateway")
        settings = Settings(**site.values["gateway"])
        async with running(settings, gateway, log=ProgramLog("gateway")) as (origin, _):
            site.values["gateway"]["public_url"] = origin
            assert [str(finding) for finding in await _wrong(site)] == []

            skewed = await _wrong(site, now_ms=lambda: now_ms() + 3_600_000)
            assert _has(skewed, "its clock", "NTP") and _has(skewed, "the gateway's clock", "NTP")

            kept = dict(site.values["worker"])
            site.values["worker"]["name"] = "worker-2"
            assert _has(await _wrong(site), "NATS user", "the seed that was made for worker-2")
            site.values["worker"] = {**kept, "nats_seed_file": str(site.folder / "stranger.nk")}
            create_user_key(site.folder / "stranger.nk")
            assert _has(await _wrong(site), "NATS", "in its section of accounts")
            site.values["worker"] = {**kept, "nats_url": "nats://127.0.0.1:1"}
            assert _has(await _wrong(site), "NATS", "start nats-server")
            site.values["worker"] = kept

            site.values["gateway"]["stream_replicas"] = 3
            assert _has(await _wrong(site), "stream BLOBS", "start the gateway again")
            site.values["gateway"]["stream_replicas"] = 1

            await js.delete_stream(subjects.work_stream("cpu"))
            assert _has(await _wrong(site), "stream WORK_cpu", "casemate-gateway --settings")
            await js.add_stream(name="WORK_cpu", subjects=["casemate.work.cpu.*"], retention=RetentionPolicy.LIMITS)
            assert _has(await _wrong(site), "stream WORK_cpu", "nats stream rm")

            await ManifestStore(operator).put(2, amended(site.keys).chain.manifests[1])
            assert _has(await _wrong(site), "manifest_file", "fetch the newer chain")

            monkeypatch.setattr(connection, "MIN_SERVER_VERSION", (99, 0))
            assert _has(await _wrong(site), "NATS", "update nats-server")
        await gateway.close()
    assert _has(await _wrong(site), "public address", "start it (casemate-gateway")


async def test_a_server_that_may_lose_what_it_acknowledged(site: OperatorSite) -> None:
    def alter(config: dict[str, Any]) -> None:
        config["jetstream"]["sync_interval"] = "10s"
        config["max_payload"] = 65536

    async with served(site, alter):
        wrong = await _wrong(site)
        assert _has(wrong, "durability", 'sync_interval: "always"')
        assert _has(wrong, "max_payload", "max_payload: 1048576")


async def test_a_server_that_does_not_say_and_one_without_jetstream(site: OperatorSite) -> None:
    def alter(config: dict[str, Any]) -> None:
        config["accounts"]["SYS"]["exports"].clear()
        config["accounts"]["CASEMATE"]["imports"].pop()
        del config["jetstream"]
        del config["accounts"]["CASEMATE"]["jetstream"]

    async with served(site, alter):
        wrong = await _wrong(site)
        assert _has(wrong, "durability", "consortium init")
        assert _has(wrong, "stream BLOBS", "jetstream in NATS' configuration")


async def test_a_server_that_speaks_before_the_handshake(site: OperatorSite) -> None:
    ours = Authority(site.folder, "ours")
    tls = ServerTls(*ours.issue("server"))
    async with site.server(lambda config: config["tls"].pop("handshake_first"), tls) as server:
        for values in site.values.values():
            values |= {"nats_url": server.url, "nats_ca_file": str(ours.file)}
        assert _has(await _wrong(site), "NATS", "handshake_first")
