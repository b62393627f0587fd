"""What must hold for each job on a running stack, whatever died, slept, lied or was full meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import nats.errors
import numpy as np
import pytest
from casemate.identity import load_keys
from casemate.jobs import Job
from casemate.local_stack.supervisor import LocalStack
from casemate.results import Result
from casemate_key_broker import audit_log, ledger
from casemate_key_broker.database import Database
from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.jobs import JobStore
from casemate_schemas.admission import Routing
from casemate_schemas.codec import decode
from casemate_schemas.envelope import open_head
from casemate_schemas.errors import (
    AuthorisationError,
    CasemateError,
    IntegrityError,
    NotFoundError,
    SealError,
    UnavailableError,
)
from casemate_schemas.grant import AuditEntry
from casemate_schemas.job_state import TERMINAL, JobEvent, JobRecord
from casemate_schemas.requests import Budget
from casemate_schemas.result import Release
from casemate_schemas.sealing import unseal_content_key, unseal_key
from casemate_schemas.signatures import Signed
from nats.aio.client import Client
from support.stack import EPSILON_PER_JOB, MEMBERS, OWNERS, SCIENTIST, connected
from support.waiting import PATIENCE_S, POLL_S, bounded


@dataclass
class Run:
    """One job under fault, on datasets of its own."""

    job: Job
    dataset: str
    routing: bytes | None
    """What was submitted, if the SDK remembers it."""
    events: list[JobEvent] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _collector: asyncio.Task[None] | None = None

    def collect(self) -> Self:
        """Begins to follow the job as the scientist does."""
        self._collector = asyncio.create_task(self._collect())
        return self

    @bounded
    async def reached(self, state: str) -> None:
        """Waits for an event with that state."""
        while not any(event.state == state for event in self.events):
            self._changed.clear()
            await self._changed.wait()

    @bounded
    async def ended(self) -> str:
        """Waits for the end; the state the job ended in."""
        assert self._collector is not None
        await asyncio.shield(self._collector)
        return self.events[-1].state

    async def close(self) -> None:
        if self._collector is not None:
            self._collector.cancel()
            await asyncio.gather(self._collector, return_exceptions=True)

    async def _collect(self) -> None:
        """From the start again, should the gateway have been away for longer than the SDK waits."""
        while True:
            with contextlib.suppress(UnavailableError):
                self.events.clear()
                async for event in self.job.events():
                    self.events.append(event)
                    self._changed.set()
                return


class Invariants:
    """A running stack, and a connection with the gateway's key: whoever runs NATS sees and may change as much."""

    def __init__(self, stack: LocalStack, host: Client) -> None:
        self.stack = stack
        self.host = host
        self.records = JobStore(host)

    async def record(self, run: Run) -> JobRecord:
        """The job's record as NATS holds it."""
        return (await self.records.get(run.job.id))[0]

    async def check_one_result(self, run: Run) -> Result:
        """The invariants of a job that was to succeed.

        1. It ended once, as sealed, and left the work queue.
        2. Its one result is verified and opened, and holds finite weights.
        3. Each owner was charged once, a single job's epsilon, and holds the commit of this very result.
        4. Each key broker's ledger and audit log verify, and tell of one reservation and one commit.
        5. Whoever is no recipient gets nothing of it from the gateway, an owner's steward included.
        """
        assert await run.ended() == "sealed"  # 1
        assert [event.state for event in run.events if event.state in TERMINAL] == ["sealed"]
        await self.queue_is_empty()
        record = await self.record(run)
        assert (record.state, record.reason) == ("sealed", None)
        result = await run.job.result()  # 2
        digest = self.released(record)
        assert result.job_id == run.job.id and all(np.isfinite(array).all() for array in result.arrays.values())
        terms = result.manifest.terms.digest
        for owner, privacy in zip(OWNERS, result.privacy.owners, strict=True):  # 3
            budget = await self.budget(run, owner)
            assert [(line.job_id, line.terms, line.committed) for line in budget.lines] == [(run.job.id, terms, digest)]
            assert budget.lines[0].epsilon == budget.epsilon_spent == privacy.epsilon <= EPSILON_PER_JOB
        for name in MEMBERS:  # 4
            booked, audited = self.books(name, terms)
            assert booked == ["reserve" if name in OWNERS else "release", "commit"], name
            told = [entry.event for entry in audited if entry.event in ("prechecked", "committed")]
            assert told == ["prechecked", "committed"], name
            assert [entry.result for entry in audited if entry.event == "committed"] == [digest], name
            assert any(entry.event == "granted" for entry in audited), name
        await self._check_withheld(run.job.id)  # 5
        return result

    async def _check_withheld(self, job_id: str) -> None:
        async with connected(self.stack.layout, f"sam@{OWNERS[0]}") as steward:
            job = await steward.job(job_id)
            assert (await job.status()).state == "sealed"
            with pytest.raises(AuthorisationError):
                await job.result()

    async def check_invariants(self, runs: Sequence[Run], *, hostile: bool = False) -> Counter[str]:
        """What must hold of jobs that have settled, whatever happened meanwhile; how many ended in which state.

        1. No submit that was acknowledged is lost: each job has its record, which says how it ended. Where NATS itself was
           ``hostile`` the record may be destroyed: then it is taken for nothing else, and counts as ``broken``.
        2. Nobody was told of any other end.
        3. The scientist opens the one result of each sealed job, verified, and none of any other.
        4. Each key broker's ledger and audit log verify, hold one charge of the job's terms at most, and one commit, of this
           result; of a sealed job all hold both.
        5. Nobody but the recipient opens a released result, and nobody at all a result that was uploaded and not released.
        """
        found = Counter[str]()
        for run in runs:
            record = await self._record_unless_broken(run) if hostile else await self.record(run)  # 1
            state = "broken" if record is None else record.state
            assert state in (*TERMINAL, "broken"), (run.job.id, state)
            if not hostile:  # 2
                assert {event.state for event in run.events if event.state in TERMINAL} <= {state}, run.job.id
            digest = self.released(record) if record is not None and state == "sealed" else None
            if not await self._check_readable(run, digest, hostile=hostile):  # 3
                digest, state = None, "broken"
            self._check_booked(run.job.id, self._terms(run, record), digest)  # 4
            found[state] += 1
        await self._check_sealed_from_others()  # 5
        return found

    async def settled(self, runs: Sequence[Run], patience_s: float = PATIENCE_S) -> None:
        """Waits until every one has ended, or has a record that nobody can read."""
        waiting = list(runs)
        async with asyncio.timeout(patience_s):
            while waiting:
                run = waiting[-1]
                with contextlib.suppress(UnavailableError):
                    record = await self._record_unless_broken(run)
                    if record is None or record.state in TERMINAL:
                        waiting.pop()
                        continue
                await asyncio.sleep(POLL_S)

    async def _record_unless_broken(self, run: Run) -> JobRecord | None:
        """The record, if it is the one of what was submitted."""
        try:
            record = await self.record(run)
        except (IntegrityError, NotFoundError):
            return None
        return record if run.routing in (None, record.routing) else None

    async def _check_readable(self, run: Run, digest: bytes | None, *, hostile: bool) -> bool:
        """That the scientist opens this very result, or none. False where none opens of what was garbled after its release."""
        if digest is None:
            with pytest.raises(CasemateError):
                await run.job.result()
            return True
        try:
            result = await run.job.result()
        except CasemateError:
            if not hostile:
                raise
            return False
        assert result.job_id == run.job.id and result.bundle.release.peek(Release).result == digest
        assert all(np.isfinite(array).all() for array in result.arrays.values())
        return True

    @staticmethod
    def _terms(run: Run, record: JobRecord | None) -> bytes:
        routing = run.routing if record is None else record.routing
        assert routing is not None
        return decode(Signed, routing).peek(Routing).terms

    def _check_booked(self, job_id: str, terms: bytes, digest: bytes | None) -> None:
        for name in MEMBERS:
            booked, audited = self.books(name, terms)
            charge = "reserve" if name in OWNERS else "release"
            committed = {entry.result for entry in audited if entry.event == "committed"}
            assert booked in ([], [charge], [charge, "commit"]), (job_id, name, booked)
            assert len(committed) <= 1, (job_id, name)
            if digest is not None:
                assert (booked, committed) == ([charge, "commit"], {digest}), (job_id, name)

    async def _check_sealed_from_others(self) -> None:
        """By the store as whoever runs NATS sees it."""
        layout = self.stack.layout
        people = {person: load_keys(layout.person_keys(person)).sealing for person in layout.read_facts().people}
        releases = {
            release.result: release
            async for record, _ in self.records.list(lambda *_: None)
            if record.release is not None and (release := decode(Signed, record.release).peek(Release))
        }
        async for digest, stored in EnvelopeStore(self.host, BlobStore(self.host)).heads():
            try:
                head = open_head(stored.data)
            except CasemateError:
                continue  # garbled on its way into the store: nobody opens that
            if head.header.preamble.kind != "result":
                continue
            for person, key in people.items():
                with pytest.raises(SealError):
                    unseal_content_key(head, key)
                for sealed in releases[digest].sealed_keys if digest in releases and person != SCIENTIST else ():
                    with pytest.raises(SealError):
                        unseal_key(sealed, head.header, key)

    async def budget(self, run: Run, owner: str) -> Budget:
        """What the owner's steward sees of this run's dataset."""
        async with connected(self.stack.layout, f"sam@{owner}") as consortium:
            return await consortium.budget(f"{run.dataset}@{owner}")

    @staticmethod
    def released(record: JobRecord) -> bytes:
        """Digest of the result that the record's release opens."""
        assert record.release is not None
        return decode(Signed, record.release).peek(Release).result

    @bounded
    async def queue_is_empty(self) -> None:
        """Waits until every delivery was acknowledged."""
        js = self.host.jetstream(timeout=1)
        while True:
            with contextlib.suppress(nats.errors.Error):  # after a crash of NATS this connection has to be made anew
                if (await js.stream_info("WORK_cpu")).state.messages == 0:
                    return
            await asyncio.sleep(POLL_S)

    def books(self, key_broker: str, terms: bytes) -> tuple[list[str], list[AuditEntry]]:
        """(ledger events, audit entries) about ``terms``, from a verified copy of the key broker's state at rest."""
        state = self.stack.layout.member(key_broker) / "key-broker"
        with tempfile.TemporaryDirectory() as folder:
            for file in state.glob("key-broker.sqlite*"):
                shutil.copy(file, folder)
            database = Database(Path(folder))
            try:
                with database.transaction() as tx:
                    ledger.verify(tx)
                    audit_log.verify(tx)
                    rows = tx.execute("SELECT event FROM ledger WHERE terms = ? ORDER BY number", (terms,)).fetchall()
                    return [event for (event,) in rows], [e for e in audit_log.entries(tx) if e.terms == terms]
            finally:
                database.close()
