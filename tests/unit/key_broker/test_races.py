"""Whoever comes at once: one job has the last of a budget, one result holds the commit at every key broker."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from casemate_key_broker import ledger
from casemate_schemas.errors import BudgetError, CasemateError
from casemate_schemas.requests import ShowBudget
from support.key_brokers import Bench, Job, Worker

from .conftest import member_run_and_hosted

pytestmark = member_run_and_hosted

BROKERS = ("clara", "north")


def _at_once(*acts: Callable[[], object]) -> list[object]:
    """What each returned or was refused with."""
    barrier = Barrier(len(acts))

    def run(act: Callable[[], object]) -> object:
        barrier.wait()
        try:
            return act()
        except CasemateError as error:
            return error

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(run, acts))


def _grant(bench: Bench, worker: Worker) -> Callable[[], bytes]:
    request = worker.request(bench.evidence(worker))
    return lambda: bench.broker("north").grant(request)


def test_of_jobs_that_race_for_the_last_of_a_budget_exactly_one_wins(bench: Bench) -> None:
    dataset = bench.register(epsilon=1.5, epsilon_per_job=1.5)

    def accepted() -> Job:
        return bench.accepted_job(plan=bench.plan(dataset.use(), training={"steps": 20}))

    outcomes = _at_once(*(_grant(bench, Worker(accepted())) for _ in range(3)))
    assert sum(isinstance(outcome, bytes) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, BudgetError) for outcome in outcomes) == 2
    budget = bench.ask("north", bench.stewards["north"], ShowBudget(dataset=dataset.card.id))
    assert len(budget.lines) == budget.n_charges == 1 and budget.epsilon_spent <= 1.5


def test_attempts_of_one_job_at_once_are_charged_once(bench: Bench) -> None:
    dataset = bench.register()
    job = bench.accepted_job(dataset.use())
    outcomes = _at_once(*(_grant(bench, Worker(job, attempt)) for attempt in (1, 2, 3)))
    assert all(isinstance(outcome, bytes) for outcome in outcomes)
    budget = bench.ask("north", bench.stewards["north"], ShowBudget(dataset=dataset.card.id))
    assert [line.terms for line in budget.lines] == [job.digest]


def test_attempts_that_race_to_commit_leave_one_digest_at_every_key_broker(bench: Bench) -> None:
    job = bench.accepted_job(bench.register().use())
    workers = [Worker(job, attempt) for attempt in (1, 2, 3)]
    for worker in workers:
        evidence = bench.evidence(worker)
        for broker in BROKERS:
            bench.grant(broker, worker, evidence)

    def commit(worker: Worker) -> bytes:
        result = os.urandom(32)
        first = bench.broker("clara").commit(worker.commit(result))
        bench.broker("north").commit(worker.commit(result, first))
        return result

    outcomes = _at_once(*(lambda worker=worker: commit(worker) for worker in workers))  # type: ignore[misc]
    (won,) = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
    lost = [outcome.reason for outcome in outcomes if isinstance(outcome, CasemateError)]
    assert lost == ["another_result_committed"] * 2
    for broker in BROKERS:
        with bench.database(broker).transaction() as tx:
            assert ledger.committed_result(tx, job.digest) == won
