"""A cluster of three servers as ``consortium init`` writes it: any one may be killed, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from casemate.deployment import read_plan, write_deployment
from casemate.doctor.examination import examine
from casemate.doctor.programs import Given
from casemate_gateway.settings import Settings as GatewaySettings
from casemate_key_broker.settings import Settings as KeyBrokerSettings
from casemate_messaging.blobs import BlobStore
from casemate_messaging.connection import connect
from casemate_messaging.durability import check_durability, servers_with_streams
from casemate_messaging.jobs import JobStore
from casemate_messaging.queue import WorkQueue
from casemate_messaging.setup import StreamSettings, ensure_streams
from casemate_schemas import subjects
from casemate_schemas.errors import NotFoundError, SetupError, UnavailableError
from casemate_schemas.job_state import JobRecord, advance
from casemate_worker.settings import Settings as WorkerSettings
from nats.aio.client import Client
from support.consortium import consortium_for_tests
from support.nats_cluster import NAMES, all_current, deploy, plan_file, running_cluster
from support.tls import Authority

T = TypeVar("T")

EVERY_SERVER = "CASEMATE_EVERY_SERVER" in os.environ
"""``make cluster``: each server in turn, and not only the one that decides about job records."""


@pytest.fixture
def deployed(tmp_path: Path) -> Path:
    ours = Authority(tmp_path, "ours")
    return deploy(plan_file(tmp_path, consortium_for_tests(), ours), tmp_path / "out")


async def persistent(action: Callable[[], Awaitable[T]]) -> T:
    """Tried again while a new leader is chosen, as programs do; the job may also not have reached every replica yet."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await action()
            except (UnavailableError, NotFoundError):
                await asyncio.sleep(0.1)


async def _connected(settings: GatewaySettings | WorkerSettings, user: str) -> Client:
    return await connect(settings.nats_url, settings.nats_seed_file, user=user, tls=settings.nats_tls(), timeout_s=30)


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


class _Work:
    """What was acknowledged so far, and another round of it."""

    def __init__(self, gateway: Client, worker: Client) -> None:
        self._jobs, self._blobs, self._queue = JobStore(gateway), BlobStore(gateway), WorkQueue(gateway)
        self._read_jobs, self._read_blobs, self._pulled = JobStore(worker), BlobStore(worker), WorkQueue(worker)
        self._stored: dict[str, bytes] = {}

    async def one_more(self) -> None:
        """A blob, its record and its message; the worker pulls the message and acknowledges it."""
        job, data = secrets.token_hex(16), secrets.token_bytes(700_000)
        digest = hashlib.sha256(data).digest()
        await persistent(lambda: self._blobs.put(digest, len(data), _pieces(data)))
        record = JobRecord(
            job_id=job,
            routing=b"routing",
            job_envelope=digest,
            submission=digest,
            approvals={},
            created=1000,
            updated=1000,
        )
        await persistent(lambda: self._jobs.create(record))
        await persistent(lambda: self._jobs.change(job, lambda found: advance(found, "queued", now_ms=2000)))
        self._stored[job] = data
        await persistent(lambda: self._queue.publish(job))
        delivery = None
        while delivery is None:
            delivery = await persistent(lambda: self._pulled.pull(1))
        assert delivery.job_id == job
        await delivery.ack()

    async def nothing_is_lost(self) -> None:
        """Every record and blob, as the worker reads them."""
        for job, data in self._stored.items():
            record, _ = await persistent(lambda job=job: self._read_jobs.get(job))
            assert record.state == "queued"
            assert b"".join([chunk async for chunk in self._read_blobs.get(record.job_envelope)]) == data
        assert (await persistent(self._queue.backlog)).undelivered == 0


async def test_any_one_server_may_be_killed(deployed: Path) -> None:
    settings = GatewaySettings.load(deployed / "gateways/gateway-1/settings.toml")
    worker_settings = WorkerSettings.load(deployed / "workers/worker-1/settings.toml")
    assert settings.nats_url.count("tls://") == 3
    async with running_cluster(deployed) as cluster:
        gateway = await _connected(settings, "gateway-1")
        worker = await _connected(worker_settings, "worker-1")
        try:
            replicated = StreamSettings(replicas=settings.stream_replicas)
            await persistent(lambda: ensure_streams(gateway.jetstream(), replicated))
            await check_durability(gateway)
            assert {server.name for server in await servers_with_streams(gateway)} == set(NAMES)
            work = _Work(gateway, worker)
            await work.one_more()
            for name in NAMES if EVERY_SERVER else [await _leader(gateway)]:
                await cluster.kill(name)
                await work.one_more()
                await work.nothing_is_lost()
                await cluster.start(name)
                await all_current(gateway)
            found = [finding async for finding in examine(_given(deployed), clock_ms=lambda: time.time_ns() // 10**6)]
            assert {f.check for f in found if not f.ok} <= {"keys_file", "open files", "public address", *_RENEWED}
        finally:
            await gateway.close()
            await worker.close()


_RENEWED = {"cert_file", "nats_ca_file"}
"""The test's certificates last a day, which the doctor says."""


def _given(deployed: Path) -> Given:
    given = Given()
    given.add_folder(deployed)
    assert len(given.nats_configs) == 3
    assert sorted(kind for kind, _ in given.settings) == ["gateway"] * 2 + ["key-broker"] * 4 + ["worker"]
    return given


async def _leader(client: Client) -> str:
    info = await client.jetstream().stream_info(subjects.JOB_STREAMS[0])
    assert info.cluster is not None and info.cluster.leader in NAMES
    return info.cluster.leader


def test_what_is_written(deployed: Path, tmp_path: Path) -> None:
    seeds = sorted(deployed.rglob("nats.seed"))
    assert len(seeds) == 7
    for path in deployed.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    configs = [path.read_text() for path in deployed.rglob("nats-server.json")]
    assert not any(seed.read_text() in config for seed in seeds for config in configs)
    for path in deployed.glob("key-brokers/*/settings.toml"):
        assert KeyBrokerSettings.load(path).key_broker == path.parent.name
    assert GatewaySettings.load(deployed / "gateways/gateway-2/settings.toml").stream_replicas == 3
    before = {path: path.read_bytes() for path in deployed.rglob("*") if path.is_file()}
    with pytest.raises(SetupError, match="must not exist yet"):
        write_deployment(read_plan(tmp_path / "plan.toml"), deployed)
    assert before == {path: path.read_bytes() for path in deployed.rglob("*") if path.is_file()}
