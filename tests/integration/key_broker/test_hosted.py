"""A hosted key broker's program over a real nats-server and a simulated chip's process, on a host that is not its friend."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from casemate_attestation.key_broker import verify_key_broker
from casemate_attestation.simulated_chip import measure_key_broker_image
from casemate_key_broker.sealed_database import FILE_NAME
from casemate_messaging.rpc import call
from casemate_schemas import subjects
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import CommitConflictError, NotFoundError, RolledBackError, UnavailableError
from casemate_schemas.key_broker_evidence import EvidenceRequest, KeyBrokerEvidence
from casemate_schemas.requests import EndorseState, LedgerHead, ShowState, StateShown
from support.key_broker_process import KeyBrokerProcess
from support.key_brokers import Bench, Worker, chip
from support.nats import NatsStack
from support.simulated_chip import chip_process

from .test_process import Road, _accepted, _open_to_north


async def _evidence(road: Road) -> KeyBrokerEvidence:
    return decode(KeyBrokerEvidence, await road.ask("evidence", encode(EvidenceRequest(nonce=os.urandom(32)))))


async def _provision(road: Road) -> None:
    """Attested by its owner, then listed by the members; returns when it serves."""
    evidence = await _evidence(road)
    policy = road.bench.consortium.manifest.attestation
    verify_key_broker(evidence, policy, datetime.now(UTC)).raise_for_failure()
    with pytest.raises(UnavailableError):
        await road.ask("nonce", b"")
    claims = evidence.claims
    public: Any = SimpleNamespace(
        sealing=SimpleNamespace(public=claims.sealing_key), signing=SimpleNamespace(public=claims.signing_key)
    )
    road.bench.list_hosted({"north": public})
    road.process.offer_manifests()
    while claims.manifest_number < 2:
        claims = (await _evidence(road)).claims


@pytest.fixture
async def road(nats_stack: NatsStack, tmp_path: Path) -> AsyncIterator[Road]:
    bench = Bench(tmp_path, key_broker_image=measure_key_broker_image())
    async with AsyncExitStack() as exits:
        sockets = await exits.enter_async_context(chip_process(chip(), tmp_path / "c"))
        process = KeyBrokerProcess(
            bench, "north", nats_stack.url, nats_stack.seeds["north"], chip_socket=sockets.key_broker
        )
        await process.start()
        exits.push_async_callback(process.kill)
        made = Road(bench, process, await nats_stack.connect("gateway"), await nats_stack.connect("worker-1"))
        await _provision(made)
        yield made


async def test_attested_listed_served_and_killed_at_its_writes(road: Road) -> None:
    assert road.process.events[0]["hosted"] is True and road.process.events[0]["simulation"] is True
    keys = (await _evidence(road)).claims.sealing_key
    dataset = await _open_to_north(road)
    await road.register(dataset)
    worker = Worker(await _accepted(road, dataset))
    for _ in range(2):
        request = asyncio.create_task(road.ask("grant", await road.grant_request(worker)))
        await _kill_at_write(road, request)
    first = await road.grant(worker)
    assert first.header.reservation == (await road.grant(worker)).header.reservation
    result = os.urandom(32)
    request = asyncio.create_task(road.ask("commit", worker.commit(result)))
    await _kill_at_write(road, request)
    await road.ask_until_answered("commit", worker.commit(result))
    with pytest.raises(CommitConflictError):
        await road.ask("commit", worker.commit(os.urandom(32)))
    assert [(line.terms, line.committed) for line in (await road.budget(dataset)).lines] == [
        (worker.job.digest, result)
    ]
    assert (await _evidence(road)).claims.sealing_key == keys
    assert await road.process.stop() == 0


async def _kill_at_write(road: Road, request: asyncio.Task[bytes]) -> None:
    """kill -9 as soon as the request makes the sealed state grow, or ends."""
    state = road.process.state_dir / FILE_NAME
    size = before = state.stat().st_size
    while not request.done() and size == before:
        await asyncio.sleep(0)
        size = state.stat().st_size
    await road.process.kill()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await road.process.start()


async def test_a_state_set_back_by_its_host_releases_nothing_until_an_owner_endorses_it(road: Road) -> None:
    dataset = await _open_to_north(road)
    await road.register(dataset)
    jobs = [await _accepted(road, dataset) for _ in range(2)]
    state = road.process.state_dir / FILE_NAME
    await road.process.stop()
    old = state.read_bytes()
    await road.process.start()
    await road.grant(Worker(jobs[0]))
    assert [line.terms for line in (await road.budget(dataset)).lines] == [jobs[0].digest]

    await road.process.kill()
    state.write_bytes(old)
    await road.process.start()
    for worker in (Worker(jobs[0], 2), Worker(jobs[1])):
        with pytest.raises(RolledBackError):
            await road.ask("grant", await road.grant_request(worker))
    assert (await road.budget(dataset)).lines == (), "what it had released is forgotten, and that is known"
    shown = await _state_of(road, ShowState())
    assert shown.ahead is not None and shown.ahead.peek(LedgerHead).entries == 1 and shown.head.entries == 0

    await road.process.kill()
    await road.process.start()
    with pytest.raises(RolledBackError):
        await road.ask("grant", await road.grant_request(Worker(jobs[1])))
    endorsed = await _state_of(road, EndorseState(ahead=shown.ahead.digest))
    assert endorsed.ahead is None and endorsed.head.branch == 1
    await road.grant(Worker(jobs[1]))
    assert [line.terms for line in (await road.budget(dataset)).lines] == [jobs[1].digest]


async def _state_of(road: Road, question: ShowState | EndorseState) -> StateShown:
    steward = road.bench.stewards["north"]
    request = road.bench.request("north", steward, question)
    answer = road.bench.answer("north", steward, await road.ask("message", request))
    assert isinstance(answer, StateShown), answer
    return answer


async def test_a_workers_launch_does_not_open_its_state(road: Road, tmp_path: Path) -> None:
    await road.process.stop()
    settings = road.process.settings_file.read_text()
    road.process.settings_file.write_text(settings.replace("/run/kb", "/run/worker"))
    await road.process.start()
    assert await road.process.wait() == 1
    (told,) = road.process.told
    assert road.process.events == [] and told.startswith("casemate-key-broker: ") and told.endswith("[state_broken]\n")
    road.process.settings_file.write_text(settings)
    await road.process.start()
    assert [event["event"] for event in road.process.events] == ["ready"]


async def test_a_member_run_key_broker_gives_no_evidence(nats_stack: NatsStack, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    process = KeyBrokerProcess(bench, "south", nats_stack.url, nats_stack.seeds["south"])
    await process.start()
    try:
        subject = subjects.key_broker_op("south", "evidence")
        with pytest.raises(NotFoundError):
            await call(await nats_stack.connect("gateway"), subject, encode(EvidenceRequest(nonce=bytes(32))), 30.0)
    finally:
        await process.kill()
