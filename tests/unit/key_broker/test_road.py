"""The whole road of one job at the key brokers: precheck, nonce, grant, commit."""

from __future__ import annotations

import os

from casemate_key_broker import audit_log
from casemate_privacy.accounting import epsilon
from casemate_privacy.events import TrainingEvent
from casemate_schemas.codec import decode, digest_of
from casemate_schemas.grant import AuditEntry
from casemate_schemas.requests import Budget, ShowBudget
from support.key_brokers import Bench, Worker


def test_a_job_of_two_owners_is_granted_and_committed_once(bench: Bench) -> None:
    north, south = bench.register("north"), bench.register("south")
    job = bench.accepted_job(north.use(), south.use())
    worker = Worker(job)
    evidence = bench.evidence(worker)
    shares = {}
    for name, envelopes in {
        "clara": (job.routing.job_envelope,),
        "north": (north.envelope,),
        "south": (south.envelope,),
    }.items():
        grant, secrets = bench.grant(name, worker, evidence)
        header = grant.header
        assert (header.terms, header.attempt, header.worker_key) == (job.digest, 1, worker.keys.signing.public)
        assert (header.evidence, header.envelopes) == (digest_of(evidence), envelopes)
        assert header.reservation == header.ledger_head and header.committed is None
        assert header.issued < header.expires
        shares[name] = secrets.seed_share
    assert len(set(shares.values())) == 3

    result = os.urandom(32)
    first = bench.broker("clara").commit(worker.commit(result))
    receipts = {"clara": first}
    for name in ("north", "south"):
        receipts[name] = bench.broker(name).commit(worker.commit(result, first))
    for name, payload in receipts.items():
        receipt = bench.receipt(name, payload)
        receipt.proof.check()
        entry = decode(AuditEntry, receipt.proof.entry)
        assert (entry.key_broker, entry.event, entry.result) == (name, "committed", result)
        assert (receipt.result, receipt.terms) == (result, job.digest)
    again = bench.broker("north").commit(worker.commit(result, first))
    assert again == receipts["north"]

    budget = bench.ask("north", bench.stewards["north"], ShowBudget(dataset=north.card.id))
    assert isinstance(budget, Budget)
    expected = epsilon(TrainingEvent(north.use().sample_rate.fraction, 2.0, 10), 1e-4)
    (line,) = budget.lines
    assert (line.epsilon, line.committed, line.submitter) == (expected, result, "clara@clara")
    assert budget.epsilon_spent == expected and 0 < budget.epsilon_remaining < budget.epsilon
    with bench.database("north").transaction() as tx:
        events = [entry.event for entry in audit_log.entries(tx)]
    assert events == ["manifest", "registered", "prechecked", "granted", "committed"]
