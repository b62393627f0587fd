"""Copies of one state that run at once, over a real nats-server: the first that anchors a decision stops the others."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from casemate_key_broker.anchoring import Anchoring
from casemate_messaging.ledger_heads import LedgerHeadStore
from casemate_messaging.logs import ProgramLog
from casemate_schemas.errors import ConflictError, RolledBackError
from support.key_brokers import MEMBERS, Bench, Worker
from support.nats import NatsStack


def _copied(bench: Bench, folder: Path) -> Bench:
    """The same key brokers over copies of their states, on a machine of another's."""
    clone = object.__new__(Bench)
    clone.__dict__.update(bench.__dict__)
    clone.folder, clone._open = folder, {}
    shutil.copytree(bench.folder, folder, ignore=lambda _, names: {"lock"} & set(names))
    return clone


async def test_two_enclaves_of_one_state_do_not_double_the_budget(nats_stack: NatsStack, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "first", hosted=MEMBERS)
    dataset = bench.register(epsilon=1.0, epsilon_per_job=1.0)
    jobs = [bench.accepted_job(dataset.use()) for _ in range(2)]
    requests = [worker.request(bench.evidence(worker)) for worker in map(Worker, jobs)]
    bench.close()
    twins = [bench, _copied(bench, tmp_path / "second")]
    store = LedgerHeadStore(await nats_stack.connect("north"))
    anchors = [
        Anchoring(store, "north", lambda twin=twin: twin.broker("north"), ProgramLog("key-broker"))  # type: ignore[misc]
        for twin in twins
    ]
    for anchoring in anchors:
        await anchoring.meet()  # before either has decided anything: both are whole
    for twin, request in zip(twins, requests, strict=True):
        await asyncio.to_thread(twin.broker("north").grant, request)
    await anchors[0].leave()
    with pytest.raises(RolledBackError):
        await anchors[1].leave()
    again = Worker(jobs[1], 2)
    with pytest.raises(RolledBackError):
        await asyncio.to_thread(twins[1].broker("north").grant, again.request(twins[1].evidence(again)))
    await anchors[0].leave()
    assert await store.newest("north") is not None
    for twin in twins:
        twin.close()


async def test_a_head_takes_the_place_of_the_one_that_was_seen_and_of_no_other(nats_stack: NatsStack) -> None:
    store = LedgerHeadStore(await nats_stack.connect("north"))
    first = await store.put("north", b"first", after=0)
    for content in (b"rival", b"second"):
        with pytest.raises(ConflictError):
            await store.put("north", content, after=0)
    second = await store.put("north", b"second", after=first)
    assert await store.put("north", b"second", after=first) == second, "its own, whose answer was lost"
    stored = await store.stored("north")
    assert stored is not None and (stored.sequence, stored.data) == (second, b"second")
