"""``kill -9`` at every write point of the ledger: the state opens, verifies, and goes on. Real processes, real files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from casemate_key_broker import audit_log, ledger
from casemate_key_broker.database import Database, State
from casemate_schemas.requests import BudgetRenewed, RenewBudget, ShowBudget
from support.crashing_state import CrashingState
from support.key_brokers import Bench, Dataset, Job, Worker

RESULT = b"\x11" * 32


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def dataset(bench: Bench) -> Dataset:
    return bench.register("north", epsilon=50.0)


def _killed_at(bench: Bench, point: int, act: Callable[[], object]) -> bool:
    """A child process opens north's state, does ``act`` and dies at that write point; False if it ended before."""
    bench.close("north")
    if (child := os.fork()) == 0:
        status = 1
        try:
            bench.open_state = lambda folder: _mortal(folder, point)
            act()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def _mortal(folder: Path, point: int) -> State:
    state = CrashingState(Database(folder), die=lambda: os.kill(os.getpid(), signal.SIGKILL))
    state.points_left = point
    return state


def _job(bench: Bench, dataset: Dataset) -> Job:
    return bench.accepted_job(plan=bench.plan(dataset.use(), training={"steps": 1}))


def _booked(bench: Bench, terms: bytes) -> list[str]:
    """The ledger's events about these terms, in a state that was just opened and holds together."""
    with bench.database("north").transaction() as tx:
        ledger.verify(tx)
        audit_log.verify(tx)
        rows = tx.execute("SELECT event FROM ledger WHERE terms = ? ORDER BY number", (terms,)).fetchall()
    return [event for (event,) in rows]


def test_a_grant(bench: Bench, dataset: Dataset) -> None:
    """Charged or not, never half, and once whoever asks again has its Grant."""
    outcomes = set()
    for point in range(100):
        job = _job(bench, dataset)
        worker = Worker(job)
        request = worker.request(bench.evidence(worker))
        killed = _killed_at(bench, point, lambda request=request: bench.broker("north").grant(request))
        booked = _booked(bench, job.digest)
        outcomes.add(tuple(booked))
        again = Worker(job, attempt=2)
        bench.grant("north", again)
        assert _booked(bench, job.digest) == ["reserve"]
        if not killed:
            break
    assert not killed and point > 15
    assert outcomes == {(), ("reserve",)}
    budget = bench.ask("north", bench.stewards["north"], ShowBudget(dataset=dataset.card.id))
    assert budget.n_charges == point + 1
    assert all(line.epsilon_after is not None for line in budget.lines)


def test_a_commit(bench: Bench, dataset: Dataset) -> None:
    for point in range(100):
        job = _job(bench, dataset)
        worker = bench.grant_all(job)
        first = bench.broker("clara").commit(worker.commit(RESULT))
        request = worker.commit(RESULT, first)
        killed = _killed_at(bench, point, lambda request=request: bench.broker("north").commit(request))
        assert _booked(bench, job.digest) in (["reserve"], ["reserve", "commit"])
        receipt = bench.broker("north").commit(request)
        assert bench.broker("north").commit(request) == receipt
        bench.receipt("north", receipt).proof.check()
        assert _booked(bench, job.digest) == ["reserve", "commit"]
        if not killed:
            break
    assert not killed and point > 5


def test_a_renewal(bench: Bench, dataset: Dataset) -> None:
    steward = bench.stewards["north"]
    bench.grant_all(_job(bench, dataset))
    for point in range(100):
        before = bench.ask("north", steward, ShowBudget(dataset=dataset.card.id))
        renew = RenewBudget(dataset=dataset.card.id, lineage=before.lineage)
        request = bench.request("north", steward, renew)
        killed = _killed_at(bench, point, lambda request=request: bench.broker("north").message(request))
        after = bench.ask("north", steward, ShowBudget(dataset=dataset.card.id))
        assert len(after.renewals) - len(before.renewals) in ((0, 1) if killed else (1,))
        assert (after.lineage == before.lineage) == (after.renewals == before.renewals)
        if after.lineage == before.lineage:
            assert isinstance(bench.ask("north", steward, renew), BudgetRenewed)
        assert _booked(bench, bytes(32)) == []
        if not killed:
            break
    assert not killed and point > 5
