"""Two workers with the same job: one result is committed for ever, the other one is nobody's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
from casemate.identity import load_keys
from casemate_attestation.guest import SimulatedGuest
from casemate_messaging.blobs import BlobStore
from casemate_messaging.connection import connect
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.logs import ProgramLog
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import ManifestChain, verify_chain
from casemate_schemas.errors import CommitConflictError, ConflictError, SealError
from casemate_schemas.grant import CommitReceipt, CommitRequest
from casemate_schemas.job_state import JobRecord, advance
from casemate_schemas.sealing import unseal_content_key
from casemate_schemas.signatures import Signed, sign
from casemate_schemas.subjects import WorkerOp
from casemate_worker.__main__ import now_ms
from casemate_worker.attempt import Attempt
from casemate_worker.settings import Settings
from casemate_worker.worker import Worker
from support.faults import Bench
from support.stack import MEMBERS, SCIENTIST, WORKERS

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Duplicate(Worker):
    """A real worker under a host that gave the same job to another one too, and tells neither of them.

    Its record is its own for ever, and it does not commit before the other one has uploaded as well.
    """

    record: JobRecord
    barrier: asyncio.Barrier
    attempt: Attempt
    result: bytes
    receipts: dict[str, bytes]

    async def _move(self, attempt: Attempt, state: Any, **changes: object) -> None: ...

    async def _revise(self, attempt: Attempt, **changes: object) -> JobRecord:
        return self.record

    async def _tell(self, *_: object) -> None: ...

    async def _upload(self, record_attempt: Attempt, *args: Any) -> bytes:
        self.attempt, self.result = record_attempt, await super()._upload(record_attempt, *args)
        await self.barrier.wait()
        return self.result

    async def _ask(self, name: str, op: WorkerOp, request: bytes) -> bytes:
        answer = await super()._ask(name, op, request)
        if op == "commit":
            self.receipts[name] = answer
        return answer


@asynccontextmanager
async def duplicates(bench: Bench, record: JobRecord) -> AsyncIterator[list[Duplicate]]:
    """Two workers, each with a record that gives it the job, as attempts 1 and 2."""
    layout, barrier = bench.stack.layout, asyncio.Barrier(len(WORKERS))
    found: list[Duplicate] = []
    async with AsyncExitStack() as stack:
        for name in WORKERS:
            settings = Settings.load(layout.program(name) / "settings.toml")
            client = await connect(settings.nats_url, settings.nats_seed_file, user=name)
            stack.push_async_callback(client.close)
            guest = SimulatedGuest(layout.folder / layout.chip_socket)
            stack.callback(guest.close)
            chain = decode(ManifestChain, layout.manifest.read_bytes())
            consortium = partial(verify_chain, chain, consortium=bytes.fromhex(settings.consortium))
            worker = Duplicate(settings, client, consortium, guest, clock=now_ms, log=ProgramLog("worker"))
            record = advance(record, "claimed", now_ms=now_ms(), worker=name)
            worker.record, worker.barrier, worker.receipts = record, barrier, {}
            found.append(worker)
        yield found


async def test_one_result_commits_and_every_key_broker_refuses_the_other(bench: Bench) -> None:
    with bench.orders.hold("pull"):
        for name in WORKERS:
            await bench.orders.held("pull", name)
        run = await bench.submit()
        await run.reached("queued")
        async with duplicates(bench, await bench.record(run)) as workers:
            outcomes = await asyncio.gather(*(w._work(w.record) for w in workers), return_exceptions=True)
            assert sorted(type(outcome) for outcome in outcomes if outcome is not None) == [CommitConflictError]
            loser, winner = sorted(workers, key=lambda worker: outcomes[workers.index(worker)] is None)
            assert loser.result != winner.result
            await _check_answers(winner, loser)
    result = await bench.check_one_result(run)
    assert bench.released(await bench.record(run)) == winner.result
    for name in MEMBERS:
        _, audited = bench.books(name, result.manifest.terms.digest)
        refused = {(entry.result, entry.reason) for entry in audited if entry.event == "refused"}
        assert refused == {(loser.result, CommitConflictError.reason)}, name
    await _check_unreadable(bench, loser.result)


async def _check_answers(winner: Duplicate, loser: Duplicate) -> None:
    """Each key broker holds the winner's digest, refuses the loser's, and tells the loser which one it is, if asked."""
    assert tuple(winner.receipts) == MEMBERS and not loser.receipts
    first = decode(Signed, winner.receipts[MEMBERS[0]])
    for name in MEMBERS:
        receipt = decode(Signed, winner.receipts[name]).peek(CommitReceipt)
        assert (receipt.key_broker, receipt.result) == (name, winner.result)
        request = CommitRequest(
            job_id=loser.record.job_id,
            terms=receipt.terms,
            attempt=loser.record.attempt,
            result=loser.result,
            first_receipt=None if name == MEMBERS[0] else first,
        )
        with pytest.raises(CommitConflictError):
            await loser._ask(name, "commit", encode(sign(request, loser.attempt.signing)))
        rightful = request.model_copy(update={"result": winner.result})
        answer = await loser._ask(name, "commit", encode(sign(rightful, loser.attempt.signing)))
        assert answer == winner.receipts[name]


async def _check_unreadable(bench: Bench, result: bytes) -> None:
    """The loser's upload lies in the store, complete, and the recipient's key does not open it."""
    stored = await EnvelopeStore(bench.host, BlobStore(bench.host)).head(result)
    with pytest.raises(SealError):
        unseal_content_key(stored.head, load_keys(bench.stack.layout.person_keys(SCIENTIST)).sealing)


@pytest.mark.parametrize("point", ["uploaded", "committing", "receipts"])
async def test_a_paused_worker_cannot_publish_over_its_successor(bench: Bench, point: str) -> None:
    """SIGSTOP for longer than the ack wait; the successor ends the job; SIGCONT changes nothing any more."""
    bench.orders.stop(point)
    run = await bench.submit()
    paused = await bench.orders.stopped()
    assert await run.ended() == "sealed"
    before = await bench.record(run)
    assert before.attempt == 2 and before.worker != paused
    bench.go_on(paused)
    gave_up = await bench.logged(paused, "gave_up", run.job.id)
    assert gave_up["reason"] in (ConflictError.reason, CommitConflictError.reason)
    assert await bench.record(run) == before
    await bench.check_one_result(run)
    assert await bench.record(run) == before
