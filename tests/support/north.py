"""North's key broker as a process over a real nats-server, and everyone who asks it."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from casemate_messaging.ledger_heads import LedgerHeadStore
from casemate_messaging.rpc import call
from casemate_schemas import subjects
from casemate_schemas.admission import PrecheckAnswer
from casemate_schemas.codec import decode, encode
from casemate_schemas.custody import DatasetPrepared, PrepareDataset
from casemate_schemas.grant import Grant, GrantSecrets, NonceReply, NonceRequest, grant_info
from casemate_schemas.licence import MemberIs
from casemate_schemas.requests import DatasetRegistered, LedgerHead
from casemate_schemas.signatures import Signed
from support.key_broker_process import KeyBrokerProcess
from support.key_brokers import Bench, Dataset, Job, Worker
from support.nats import NatsStack


class North:
    """North's key broker as a process, with the jobs of its own scientist, so that one key broker is all there is to ask."""

    def __init__(self, bench: Bench, process: KeyBrokerProcess, nats: NatsStack) -> None:
        self.bench = bench
        self.process = process
        self._nats = nats
        self._scientist = bench.person("north", "sam", ("scientist",))

    async def ask(self, op: str, payload: bytes) -> bytes:
        client = await self._nats.connect("gateway" if op in subjects.GATEWAY_OPS else "worker-1")
        return await call(client, subjects.key_broker("north") + f".{op}", payload, timeout_s=30.0)

    async def steward(self, body: object) -> object:
        person = self.bench.stewards["north"]
        return self.bench.answer("north", person, await self.ask("message", self.bench.request("north", person, body)))

    async def register(self, name: str = "cardio") -> Dataset:
        prepared = await self.steward(PrepareDataset(owner="north"))
        assert isinstance(prepared, DatasetPrepared)
        return await self.registered(self.bench.seal_dataset(to=prepared.sealing_key), name)

    async def registered(self, head: bytes, name: str = "cardio") -> Dataset:
        permissions = self.bench.permissions(train=MemberIs(principal="submitter", member="north"))
        dataset = self.bench.dataset("north", name, head=head, permissions=permissions)
        assert isinstance(await self.steward(self.bench.registration(dataset)), DatasetRegistered)
        return dataset

    async def accepted(self, dataset: Dataset) -> Job:
        job = self.bench.job(dataset.use(), terms={"job_key_broker": "north"}, by=self._scientist)
        answer = decode(Signed, await self.ask("precheck", encode(job.precheck))).peek(PrecheckAnswer)
        assert answer.decision == "yes", answer
        return job

    async def granted(self, job: Job, attempt: int = 1) -> tuple[Worker, Grant, GrantSecrets]:
        """A worker with its Grant, and what it opens in it."""
        worker = Worker(job, attempt)
        request = NonceRequest(job_id=job.terms.job_id, terms=job.digest, attempt=attempt)
        nonce = decode(NonceReply, await self.ask("nonce", encode(request))).nonce
        evidence = worker.evidence(worker.claims(self.bench.consortium, {"north": nonce}))
        grant = decode(Signed, await self.ask("grant", worker.request(evidence))).peek(Grant)
        opened = worker.keys.sealing.open_secret(grant.sealed_secrets, info=grant_info(grant.header))
        return worker, grant, decode(GrantSecrets, opened)

    async def grant(self, job: Job, attempt: int = 1) -> Grant:
        return (await self.granted(job, attempt))[1]

    async def anchored(self) -> LedgerHead:
        newest = await LedgerHeadStore(await self._nats.connect("north")).newest("north")
        assert newest is not None
        return decode(Signed, newest).verify(LedgerHead, self.bench.key_brokers["north"].signing.public)

    async def restarted_from(self, copy: Path) -> None:
        await self.process.stop()
        shutil.rmtree(self.process.state_dir)
        shutil.copytree(copy, self.process.state_dir)
        await self.process.start()


@pytest.fixture
async def north(nats_stack: NatsStack, tmp_path: Path) -> AsyncIterator[North]:
    """Started, with a folder for backups."""
    bench = Bench(tmp_path)
    process = KeyBrokerProcess(bench, "north", nats_stack.url, nats_stack.seeds["north"])
    with process.settings_file.open("a") as file:
        file.write(f"backup_dir = {json.dumps(str(tmp_path / 'backups'))}\n")
    await process.start()
    try:
        yield North(bench, process, nats_stack)
    finally:
        await process.kill()
