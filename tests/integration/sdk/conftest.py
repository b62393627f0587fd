"""The whole road in one process around a real nats-server: gateway, three key brokers, one worker on a simulated chip."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from casemate.identity import Identity
from casemate_gateway.app import running
from casemate_gateway.settings import Settings as GatewaySettings
from casemate_key_broker.handlers import Handlers
from casemate_messaging.logs import ProgramLog
from casemate_messaging.rpc import serve
from casemate_schemas import subjects
from casemate_schemas.codec import encode
from casemate_schemas.evidence import SevSnp
from casemate_schemas.keyring import KeyRing
from casemate_worker.settings import Settings as WorkerSettings
from casemate_worker.turns import serve_in_turn
from casemate_worker.worker import Worker
from support.key_brokers import MEASUREMENT, MEMBERS, Bench, Person, chip
from support.nats import NatsStack, nats_stack

__all__ = ["nats_stack", "road"]


@dataclass(frozen=True)
class Road:
    """Where the gateway is, and everybody's keys."""

    bench: Bench
    url: str

    def identity(self, person: Person) -> Identity:
        """Someone with their delegation."""
        return Identity.of(KeyRing(person.keys.signing, person.keys.sealing, person.delegation))


class Guest:
    """The simulated chip, reached without a socket."""

    def attest(self, report_data: bytes) -> SevSnp:
        return chip().launch(MEASUREMENT).attest(report_data)


async def _no_news() -> bool:
    return False


class _Now:
    def __call__(self) -> int:
        return time.time_ns() // 1_000_000


@pytest.fixture
async def road(tmp_path: Path, nats_stack: NatsStack) -> AsyncIterator[Road]:
    """Everything runs until the test ends."""
    bench = Bench(tmp_path / "key-brokers")
    bench.clock = _Now()  # type: ignore[assignment] - time passes here
    manifest_file, scratch = tmp_path / "consortium", tmp_path / "scratch"
    manifest_file.write_bytes(encode(bench.chain))
    scratch.mkdir()
    consortium, stop = bench.consortium.id.hex(), asyncio.Event()
    async with AsyncExitStack() as exits:
        exits.callback(bench.close)
        for name in MEMBERS:
            handlers = Handlers(partial(bench.broker, name), _no_news, ProgramLog("key-broker"), asyncio.Event())
            client = await nats_stack.connect(name)
            await exits.enter_async_context(await serve(client, subjects.key_broker(name), handlers.by_op))
        gateway = GatewaySettings(
            nats_url=nats_stack.url,
            nats_seed_file=nats_stack.seeds["gateway"],
            consortium=consortium,
            manifest_file=manifest_file,
            port=0,
            precheck_retry_s=0.05,
        )
        client = await nats_stack.connect("gateway")
        url, _ = await exits.enter_async_context(running(gateway, client, log=ProgramLog("gateway")))
        settings = WorkerSettings(
            name="worker-1",
            nats_url=nats_stack.url,
            nats_seed_file=nats_stack.seeds["worker-1"],
            consortium=consortium,
            manifest_file=manifest_file,
            guest="simulated",
            scratch_dir=scratch,
        )
        client = await nats_stack.connect("worker-1")
        worker = Worker(settings, client, lambda: bench.consortium, Guest(), clock=_Now(), log=ProgramLog("worker"))
        running_worker = asyncio.create_task(serve_in_turn([worker], stop, asyncio.Event()))
        try:
            yield Road(bench, url)
        finally:
            stop.set()
            await running_worker
