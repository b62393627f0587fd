"""Commits: one result for terms for ever, and the first key broker decides."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from casemate_key_broker import audit_log, ledger
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import (
    AuthenticationError,
    AuthorisationError,
    CasemateError,
    CommitConflictError,
    NotFoundError,
    ReleaseError,
    SignatureError,
)
from casemate_schemas.grant import CommitReceipt
from casemate_schemas.signatures import Signed, sign
from support.key_brokers import Bench, Job, Worker

RESULT = b"\x11" * 32
RIVAL = b"\x22" * 32


@pytest.fixture
def job(bench: Bench) -> Job:
    return bench.accepted_job(bench.register().use())


@pytest.fixture
def worker(bench: Bench, job: Job) -> Worker:
    """A worker that holds the Grants of clara, who decides, and of north."""
    granted = Worker(job)
    evidence = bench.evidence(granted)
    for broker in ("clara", "north"):
        bench.grant(broker, granted, evidence)
    return granted


def _refused(bench: Bench, error: type[CasemateError], payload: bytes, broker: str = "north") -> None:
    """Refused, and the ledger is as it was."""
    with bench.database(broker).transaction() as tx:
        before = ledger.head(tx)
    with pytest.raises(error):
        bench.broker(broker).commit(payload)
    with bench.database(broker).transaction() as tx:
        assert ledger.head(tx) == before


def test_the_same_commit_again_is_the_same_receipt(bench: Bench, worker: Worker) -> None:
    first = bench.broker("clara").commit(worker.commit(RESULT))
    bench.clock.advance(60)
    assert bench.restart("clara").commit(worker.commit(RESULT)) == first
    assert bench.receipt("clara", first).result == RESULT


def test_a_second_result_is_refused_for_ever(bench: Bench, job: Job, worker: Worker) -> None:
    bench.broker("clara").commit(worker.commit(RESULT))
    _refused(bench, CommitConflictError, worker.commit(RIVAL), "clara")
    bench.restart("clara")
    _refused(bench, CommitConflictError, worker.commit(RIVAL), "clara")
    with bench.database("clara").transaction() as tx:
        assert ledger.committed_result(tx, job.digest) == RESULT
        entry = audit_log.entries(tx)[-1]
    assert (entry.event, entry.reason, entry.result) == ("refused", "another_result_committed", RIVAL)


def test_a_successor_learns_the_committed_result_from_its_grant(bench: Bench, job: Job, worker: Worker) -> None:
    bench.broker("clara").commit(worker.commit(RESULT))
    successor = Worker(job, attempt=2)
    grant, _ = bench.grant("clara", successor)
    assert grant.header.committed == RESULT
    assert bench.broker("clara").commit(successor.commit(RESULT)) == bench.broker("clara").commit(worker.commit(RESULT))


def test_rivals_at_once(bench: Bench, job: Job) -> None:
    workers = [Worker(job, attempt) for attempt in range(1, 5)]
    for worker in workers:
        bench.grant("clara", worker)

    def outcome(worker: Worker) -> str:
        try:
            bench.broker("clara").commit(worker.commit(os.urandom(32)))
        except CommitConflictError as error:
            return error.reason
        return "committed"

    with ThreadPoolExecutor(4) as pool:
        outcomes = sorted(pool.map(outcome, workers))
    assert outcomes == ["another_result_committed"] * 3 + ["committed"]


def test_without_a_grant(bench: Bench, job: Job, worker: Worker) -> None:
    """Another key, or the same key for another attempt; and terms that nobody knows."""
    _refused(bench, AuthenticationError, Worker(job).commit(RESULT), "clara")
    _refused(bench, AuthenticationError, worker.commit(RESULT, attempt=2), "clara")
    _refused(bench, NotFoundError, worker.commit(RESULT, terms=b"\x07" * 32), "clara")
    _refused(bench, NotFoundError, worker.commit(RESULT, job_id="07" * 16), "clara")


def test_a_grant_elsewhere_is_none_here(bench: Bench, job: Job) -> None:
    elsewhere = Worker(job)
    bench.grant("clara", elsewhere)
    first = bench.broker("clara").commit(elsewhere.commit(RESULT))
    _refused(bench, AuthenticationError, elsewhere.commit(RESULT, first))


def test_a_changed_request(bench: Bench, worker: Worker) -> None:
    signed = decode(Signed, worker.commit(RESULT))
    payload = signed.payload.replace(RESULT, RIVAL)
    _refused(bench, SignatureError, encode(signed.model_copy(update={"payload": payload})), "clara")


def test_the_first_receipt_is_missing_or_forged(bench: Bench, worker: Worker) -> None:
    _refused(bench, AuthorisationError, worker.commit(RESULT))
    receipt = bench.receipt("clara", bench.broker("clara").commit(worker.commit(RESULT)))
    _refused(bench, SignatureError, worker.commit(RESULT, encode(sign(receipt, worker.keys.signing))))
    own = receipt.model_copy(update={"key_broker": "north"})
    _refused(bench, SignatureError, worker.commit(RESULT, encode(sign(own, bench.key_brokers["north"].signing))))


def test_the_first_receipt_is_about_something_else(bench: Bench, worker: Worker) -> None:
    receipt = bench.receipt("clara", bench.broker("clara").commit(worker.commit(RESULT)))

    def by_clara(changed: CommitReceipt) -> bytes:
        return encode(sign(changed, bench.key_brokers["clara"].signing))

    for field, value in {"terms": RIVAL, "job_id": "07" * 16, "consortium": RIVAL, "key_broker": "south"}.items():
        changed = by_clara(receipt.model_copy(update={field: value}))
        _refused(bench, AuthorisationError, worker.commit(RESULT, changed))
    _refused(bench, CommitConflictError, worker.commit(RIVAL, by_clara(receipt)))
    proof = receipt.proof.model_copy(update={"root": RIVAL})
    _refused(bench, ReleaseError, worker.commit(RESULT, by_clara(receipt.model_copy(update={"proof": proof}))))
    with bench.database("clara").transaction() as tx:
        other = audit_log.prove(tx, 1)
    moved = by_clara(receipt.model_copy(update={"proof": other}))
    _refused(bench, AuthorisationError, worker.commit(RESULT, moved))
    bench.broker("north").commit(worker.commit(RESULT, by_clara(receipt)))
