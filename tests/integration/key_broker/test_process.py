"""The program over a real nats-server: served, killed at any moment, started again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from casemate_key_broker import audit_log, ledger
from casemate_key_broker.database import FILE_NAME, Database
from casemate_messaging.rpc import call
from casemate_schemas import subjects
from casemate_schemas.admission import PrecheckAnswer
from casemate_schemas.codec import decode, encode
from casemate_schemas.custody import PrepareDataset
from casemate_schemas.errors import (
    CasemateError,
    CommitConflictError,
    NonceError,
    RolledBackError,
    SetupError,
    UnavailableError,
)
from casemate_schemas.grant import CommitReceipt, Grant, NonceReply, NonceRequest
from casemate_schemas.licence import MemberIs, Permission
from casemate_schemas.requests import Budget, DatasetRegistered, ShowBudget
from casemate_schemas.signatures import Signed
from nats.aio.client import Client
from support.key_broker_process import KeyBrokerProcess
from support.key_brokers import Bench, Dataset, Job, Worker
from support.nats import NatsStack


class Road:
    """A running key broker of north, which also looks after the jobs of north's scientist, and who asks it."""

    def __init__(self, bench: Bench, process: KeyBrokerProcess, gateway: Client, worker: Client) -> None:
        self.bench = bench
        self.process = process
        self._gateway = gateway
        self._worker = worker

    async def ask(self, op: str, payload: bytes) -> bytes:
        client = self._gateway if op in subjects.GATEWAY_OPS else self._worker
        return await call(client, subjects.key_broker("north") + f".{op}", payload, timeout_s=30.0)

    async def ask_until_answered(self, op: str, payload: bytes) -> bytes:
        """As gateway and workers do: what could not be answered is asked again, unless people have to mend the state first."""
        while True:
            try:
                return await self.ask(op, payload)
            except RolledBackError:
                raise
            except UnavailableError:
                await asyncio.sleep(0.05)

    async def sealed(self) -> bytes:
        """Signed head of a dataset envelope, sealed to the key that the key broker prepares for it."""
        steward = self.bench.stewards["north"]
        request = self.bench.request("north", steward, PrepareDataset(owner="north"))
        prepared = self.bench.answer("north", steward, await self.ask("message", request))
        return self.bench.seal_dataset(to=prepared.sealing_key)

    async def register(self, dataset: Dataset) -> None:
        steward = self.bench.stewards["north"]
        request = self.bench.request("north", steward, self.bench.registration(dataset))
        answer = self.bench.answer("north", steward, await self.ask("message", request))
        assert isinstance(answer, DatasetRegistered)

    async def budget(self, dataset: Dataset) -> Budget:
        steward = self.bench.stewards["north"]
        request = self.bench.request("north", steward, ShowBudget(dataset=dataset.card.id))
        answer = self.bench.answer("north", steward, await self.ask_until_answered("message", request))
        assert isinstance(answer, Budget)
        return answer

    async def grant_request(self, worker: Worker) -> bytes:
        claims = worker.job.terms
        request = NonceRequest(job_id=claims.job_id, terms=worker.job.digest, attempt=worker.attempt)
        nonce = decode(NonceReply, await self.ask_until_answered("nonce", encode(request))).nonce
        return worker.request(worker.evidence(worker.claims(self.bench.consortium, {"north": nonce})))

    async def grant(self, worker: Worker) -> Grant:
        """A Grant, however often the key broker has to be asked."""
        while True:
            try:
                payload = await self.ask_until_answered("grant", await self.grant_request(worker))
            except NonceError:
                continue
            return decode(Signed, payload).verify(Grant, self.bench.key_brokers["north"].signing.public)


@pytest.fixture
async def road(nats_stack: NatsStack, tmp_path: Path) -> AsyncIterator[Road]:
    bench = Bench(tmp_path)
    process = KeyBrokerProcess(bench, "north", nats_stack.url, nats_stack.seeds["north"])
    await process.start()
    try:
        yield Road(bench, process, await nats_stack.connect("gateway"), await nats_stack.connect("worker-1"))
    finally:
        await process.kill()


async def _accepted(road: Road, dataset: Dataset) -> Job:
    """A job of one of north's own people, so that one key broker is all there is to ask."""
    scientist = road.bench.person("north", "sam", ("scientist",))
    job = road.bench.job(dataset.use(), terms={"job_key_broker": "north"}, by=scientist)
    answer = await road.ask_until_answered("precheck", encode(job.precheck))
    assert await road.ask_until_answered("precheck", encode(job.precheck)) == answer
    decision = decode(Signed, answer).verify(PrecheckAnswer, road.bench.key_brokers["north"].signing.public)
    assert decision.decision == "yes", decision.reason
    return job


async def _open_to_north(road: Road) -> Dataset:
    train = Permission(action="train", rule=MemberIs(principal="submitter", member="north"))
    read = Permission(action="read_result", rule=MemberIs(principal="recipient", member="clara"))
    return road.bench.dataset("north", head=await road.sealed(), permissions=(train, read))


async def test_ready_then_served_then_stopped_by_sigterm(road: Road) -> None:
    dataset = await _open_to_north(road)
    await road.register(dataset)
    job = await _accepted(road, dataset)
    worker = Worker(job)
    grant = await road.grant(worker)
    assert set(grant.header.envelopes) == {dataset.envelope, job.routing.job_envelope}
    result = os.urandom(32)
    receipt = decode(Signed, await road.ask("commit", worker.commit(result)))
    assert receipt.verify(CommitReceipt, road.bench.key_brokers["north"].signing.public).result == result
    with pytest.raises(CasemateError) as refused:
        await road.ask("commit", worker.commit(os.urandom(32)))
    assert refused.value.reason == "another_result_committed"
    assert await road.process.stop() == 0
    assert [event["event"] for event in road.process.events if event["event"] in ("ready", "refused")] == [
        "ready",
        "refused",
    ]
    with Database(road.process.state_dir).transaction() as tx:
        ledger.verify(tx)
        audit_log.verify(tx)


async def _kill_at_write(road: Road, request: asyncio.Task[bytes], nth: int) -> None:
    """kill -9 as soon as the request makes the write-ahead log grow for the ``nth`` time, or ends."""
    log = road.process.state_dir / f"{FILE_NAME}-wal"
    size = log.stat().st_size
    while nth and not request.done():
        await asyncio.sleep(0)
        if (grown := log.stat().st_size) > size:
            size, nth = grown, nth - 1
    await road.process.kill()
    request.cancel()
    await road.process.start()


async def test_killed_at_its_writes_it_charges_each_job_once_and_keeps_one_commit(road: Road) -> None:
    dataset = await _open_to_north(road)
    await road.register(dataset)
    writes = (1, 2, 3)
    """A Grant's: the nonce used up, the verdict on the worker, then the reservation with its audit entry."""
    workers = [Worker(await _accepted(road, dataset)) for _ in writes]
    for worker, nth in zip(workers, writes, strict=True):
        request = asyncio.create_task(road.ask("grant", await road.grant_request(worker)))
        await _kill_at_write(road, request, nth)
        assert (await road.grant(worker)).header.reservation == (await road.grant(worker)).header.reservation
    result, payload = os.urandom(32), workers[0].commit
    request = asyncio.create_task(road.ask("commit", payload(result)))
    await _kill_at_write(road, request, 1)
    assert await road.ask_until_answered("commit", payload(result)) == await road.ask("commit", payload(result))
    with pytest.raises(CommitConflictError):
        await road.ask("commit", payload(os.urandom(32)))
    lines = (await road.budget(dataset)).lines
    assert [(line.terms, line.committed) for line in lines] == [
        (workers[0].job.digest, result),
        *((worker.job.digest, None) for worker in workers[1:]),
    ]


async def test_a_broken_ledger_is_not_served(road: Road) -> None:
    dataset = await _open_to_north(road)
    await road.register(dataset)
    await road.grant(Worker(await _accepted(road, dataset)))
    await road.process.stop()
    database = Database(road.process.state_dir)
    with database.transaction() as tx:
        tx.execute("DELETE FROM spent")
    database.close()
    await road.process.start()
    assert await road.process.wait() == 1
    (told,) = road.process.told
    assert road.process.events == [] and told.startswith("casemate-key-broker: ") and told.endswith("[state_broken]\n")


async def test_only_one_process_opens_a_state(road: Road) -> None:
    assert (road.process.state_dir / FILE_NAME).stat().st_mode & 0o077 == 0
    with pytest.raises(SetupError, match="another process"):
        Database(road.process.state_dir)
