"""Nonces and keys against real key broker processes: what is fresh for one job, attempt and key broker is for no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from casemate_messaging.rpc import call
from casemate_schemas import subjects
from casemate_schemas.admission import PrecheckAnswer
from casemate_schemas.codec import decode, encode
from casemate_schemas.custody import PrepareDataset
from casemate_schemas.errors import CasemateError
from casemate_schemas.evidence import Evidence
from casemate_schemas.grant import Grant, GrantRequest, NonceReply, NonceRequest
from casemate_schemas.keyring import KeyRing
from casemate_schemas.licence import MemberIs, Permission
from casemate_schemas.requests import DatasetRegistered
from casemate_schemas.signatures import Signed, sign
from nats.aio.client import Client
from support.key_broker_process import KeyBrokerProcess
from support.key_brokers import Bench, Dataset, Job, Worker
from support.nats import NatsStack

NAMES = ("north", "south")
RIVALS = 50


class Brokers:
    """Two running key brokers, and a worker's and the gateway's way to ask them."""

    def __init__(self, bench: Bench, gateway: Client, worker: Client) -> None:
        self.bench = bench
        self._clients = {**dict.fromkeys(subjects.GATEWAY_OPS, gateway), **dict.fromkeys(subjects.WORKER_OPS, worker)}

    async def ask(self, name: str, op: str, payload: bytes) -> bytes:
        return await call(self._clients[op], f"{subjects.key_broker(name)}.{op}", payload, timeout_s=60.0)

    async def register(self, owner: str) -> Dataset:
        train = Permission(action="train", rule=MemberIs(principal="submitter", member="north"))
        read = Permission(action="read_result", rule=MemberIs(principal="recipient", member="clara"))
        steward = self.bench.stewards[owner]
        request = self.bench.request(owner, steward, PrepareDataset(owner=owner))
        prepared = self.bench.answer(owner, steward, await self.ask(owner, "message", request))
        head = self.bench.seal_dataset(owner, to=prepared.sealing_key)
        dataset = self.bench.dataset(owner, head=head, permissions=(train, read))
        request = self.bench.request(owner, steward, self.bench.registration(dataset))
        answer = self.bench.answer(owner, steward, await self.ask(owner, "message", request))
        assert isinstance(answer, DatasetRegistered)
        return dataset

    async def accepted(self, *datasets: Dataset) -> Job:
        """A job of north's own scientist that both key brokers said yes to."""
        scientist = self.bench.person("north", "sam", ("scientist",))
        uses = (dataset.use() for dataset in datasets)
        job = self.bench.job(*uses, terms={"job_key_broker": "north"}, by=scientist)
        for name in job.terms.key_brokers:
            answer = decode(Signed, await self.ask(name, "precheck", encode(job.precheck))).peek(PrecheckAnswer)
            assert answer.decision == "yes", answer.reason
        return job

    async def nonce(self, name: str, worker: Worker) -> bytes:
        request = NonceRequest(job_id=worker.job.terms.job_id, terms=worker.job.digest, attempt=worker.attempt)
        return decode(NonceReply, await self.ask(name, "nonce", encode(request))).nonce

    async def evidence(self, worker: Worker, **nonces: bytes) -> Evidence:
        """Evidence with each key broker's nonce, or with other ``nonces``."""
        fresh = {name: await self.nonce(name, worker) for name in worker.job.terms.key_brokers if not nonces}
        return worker.evidence(worker.claims(self.bench.consortium, nonces or fresh))

    async def outcome(self, name: str, request: bytes) -> str:
        """``granted``, or the reason code."""
        try:
            answer = await self.ask(name, "grant", request)
        except CasemateError as refusal:
            return refusal.reason
        decode(Signed, answer).verify(Grant, self.bench.key_brokers[name].signing.public)
        return "granted"


@pytest.fixture
async def brokers(nats_stack: NatsStack, tmp_path: Path) -> AsyncIterator[Brokers]:
    bench = Bench(tmp_path)
    processes = [KeyBrokerProcess(bench, name, nats_stack.url, nats_stack.seeds[name]) for name in NAMES]
    settings = f"max_concurrency = {2 * RIVALS}\n"
    for process in processes:
        process.settings_file.write_text(process.settings_file.read_text() + settings)
    await asyncio.gather(*(process.start() for process in processes))
    try:
        yield Brokers(bench, await nats_stack.connect("gateway"), await nats_stack.connect("worker-1"))
    finally:
        await asyncio.gather(*(process.kill() for process in processes))


async def test_fresh_evidence_is_good_once_and_for_nothing_else(brokers: Brokers) -> None:
    """
    1. One nonce, fifty requests at once: one Grant.
    2. Evidence of another job, of another attempt, or with another key broker's nonce.
    3. Another sealing key, or another signing key, than the one that was attested.
    4. None of that used up anything: the honest worker's evidence is good, at both, and once.
    """
    datasets = [await brokers.register(name) for name in NAMES]
    job, other = await brokers.accepted(*datasets), await brokers.accepted(*datasets)
    racer = Worker(job)
    request = racer.request(await brokers.evidence(racer))
    outcomes = await asyncio.gather(*(brokers.outcome("north", request) for _ in range(RIVALS)))  # 1
    assert (outcomes.count("granted"), outcomes.count("nonce_refused")) == (1, RIVALS - 1)

    worker = Worker(job, 2)
    evidence = await brokers.evidence(worker)
    claims = evidence.claims
    of_north = claims.nonce_of("north") or b""
    for thief in (Worker(other, 2), Worker(job, 3)):  # 2
        stolen = {item.key_broker: item.nonce for item in claims.nonces}
        theirs = thief.evidence(thief.claims(brokers.bench.consortium, stolen))
        assert await brokers.outcome("north", thief.request(theirs)) == "nonce_refused"
    misled = await brokers.evidence(worker, north=of_north, south=of_north)
    assert await brokers.outcome("south", worker.request(misled)) == "nonce_refused"
    without = await brokers.evidence(worker, north=of_north)
    assert await brokers.outcome("south", worker.request(without)) == "nonce_refused"

    substitute = KeyRing.generate()
    signed_by_another = encode(sign(GrantRequest(evidence=evidence), substitute.signing))  # 3
    assert await brokers.outcome("north", signed_by_another) == "bad_signature"
    thief = Worker(job, 2)
    fresh = await brokers.evidence(thief)
    swapped = fresh.claims.model_copy(update={"sealing_key": substitute.sealing.public})
    told = await brokers.outcome("north", thief.request(fresh.model_copy(update={"claims": swapped})))
    assert told == "evidence_outside_policy"

    for name in NAMES:  # 4
        assert await brokers.outcome(name, worker.request(evidence)) == "granted"
        assert await brokers.outcome(name, worker.request(evidence)) == "nonce_refused"


async def test_unused_nonces_keep_nobody_waiting(brokers: Brokers) -> None:
    """Whoever asks for a thousand and uses none, by whatever attempt, takes nothing from the honest ones."""
    dataset = await brokers.register("north")
    job = await brokers.accepted(dataset)
    honest = Worker(job)
    evidence = await brokers.evidence(honest)
    for attempt in range(1, 21):
        greedy = Worker(job, attempt)
        given = await asyncio.gather(*(brokers.nonce("north", greedy) for _ in range(RIVALS)))
        assert len(set(given)) == RIVALS
    assert await brokers.outcome("north", honest.request(evidence)) == "granted"
