"""A gateway runs on a NATS that syncs before it acknowledges, and on another one only if it is told to."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from casemate_messaging.connection import connect
from casemate_messaging.durability import check_durability, servers_with_streams
from casemate_schemas.errors import SetupError
from nats.aio.client import Client
from support.operator_site import OperatorSite


@asynccontextmanager
async def served(folder: Path, alter: Callable[[dict[str, Any]], None]) -> AsyncIterator[tuple[OperatorSite, Client]]:
    site = OperatorSite(folder)
    async with site.server(alter) as server:
        site.values["gateway"]["nats_url"] = server.url
        client = await connect(server.url, site.seeds["gateway"], user="gateway")
        try:
            yield site, client
        finally:
            await client.close()


def every_two_minutes(config: dict[str, Any]) -> None:
    del config["jetstream"]["sync_interval"]


def silent(config: dict[str, Any]) -> None:
    config["accounts"]["CASEMATE"]["imports"].pop()


def forbidden(config: dict[str, Any]) -> None:
    (gateway,) = config["accounts"]["CASEMATE"]["users"]
    gateway["permissions"]["publish"]["allow"].remove("$SYS.REQ.SERVER.PING.JSZ")


async def test_the_embedded_server_says_that_it_syncs(tmp_path: Path) -> None:
    async with served(tmp_path, lambda _: None) as (_, client):
        await check_durability(client)
        (server,) = await servers_with_streams(client)
    assert server.syncs_always and server.is_recent
    assert server.cluster_size == 1 and server.max_bytes > 0


@pytest.mark.parametrize(
    ("alter", "says"),
    [(every_two_minutes, 'sync_interval: "always"'), (silent, "consortium init"), (forbidden, "consortium init")],
)
async def test_what_is_unsafe_or_unknown_is_refused(
    tmp_path: Path, alter: Callable[[dict[str, Any]], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casemate_messaging.durability.REQUEST_TIMEOUT_S", 1.0)
    async with served(tmp_path, alter) as (_, client):
        with pytest.raises(SetupError, match="--allow-unsafe-durability") as refused:
            await check_durability(client)
    assert says in str(refused.value)


async def test_the_program_refuses_and_runs_if_it_is_told_to(tmp_path: Path) -> None:
    async with served(tmp_path, every_two_minutes) as (site, _):
        settings = dict(site.given().settings)["gateway"]
        command = [sys.executable, "-m", "casemate_gateway", "--settings", str(settings)]
        refused = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, told = await asyncio.wait_for(refused.communicate(), 60)
        assert refused.returncode == 2
        assert "sync_interval" in told.decode() and "--allow-unsafe-durability" in told.decode()
        process = await asyncio.create_subprocess_exec(
            *command, "--allow-unsafe-durability", stderr=asyncio.subprocess.PIPE
        )
        said = b""
        try:
            async with asyncio.timeout(60):
                while b'"event":"ready"' not in said:
                    line = await process.stderr.readline()
                    assert line, said
                    said += line
        finally:
            process.kill()
            await process.communicate()
    assert b'"event":"unsafe_durability"' in said


async def test_a_worker_cannot_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casemate_messaging.durability.REQUEST_TIMEOUT_S", 1.0)
    async with served(tmp_path, lambda _: None) as (site, _):
        worker = await connect(site.values["gateway"]["nats_url"], site.seeds["worker"], user="worker-1")
        try:
            assert await servers_with_streams(worker) == []
        finally:
            await worker.close()
