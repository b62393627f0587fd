"""Budgets as their owner sees them: every charge explained, a fresh one only by the owner's own act, heads told to all."""

from __future__ import annotations

import pytest
from casemate_key_broker import audit_log, ledger, licences
from casemate_schemas.codec import decode
from casemate_schemas.errors import IntegrityError
from casemate_schemas.requests import (
    Budget,
    BudgetRenewed,
    EndorseState,
    LedgerHead,
    PersonResponse,
    Refusal,
    RenewBudget,
    ShowBudget,
    ShowState,
)
from casemate_schemas.sealing import open_envelope
from support.key_brokers import DAY_MS, Bench, Dataset, Person, Worker


def _budget(bench: Bench, dataset: Dataset) -> Budget:
    found = bench.ask("north", bench.stewards["north"], ShowBudget(dataset=dataset.card.id))
    assert isinstance(found, Budget), found
    return found


def _renew(bench: Bench, dataset: Dataset, person: Person, lineage: bytes) -> BudgetRenewed | Refusal:
    answer = bench.ask("north", person, RenewBudget(dataset=dataset.card.id, lineage=lineage))
    assert isinstance(answer, BudgetRenewed | Refusal)
    return answer


def test_every_charge_is_explained(bench: Bench) -> None:
    dataset = bench.register(epsilon=5.0)
    jobs = [bench.accepted_job(plan=bench.plan(dataset.use(), training={"steps": steps})) for steps in (5, 9)]
    workers = [bench.grant_all(job) for job in jobs]
    first = bench.broker("clara").commit(workers[0].commit(b"\x11" * 32))
    bench.broker("north").commit(workers[0].commit(b"\x11" * 32, first))
    found = _budget(bench, dataset)
    assert [(line.state, line.steps, line.purpose, line.submitter) for line in found.lines] == [
        ("committed", 5, "research", "clara@clara"),
        ("reserved", 9, "research", "clara@clara"),
    ]
    one, two = found.lines
    assert one.kind == "train" and one.noise_multiplier == 2.0 and one.sample_rate.denominator == 8
    assert one.epsilon_after == one.epsilon == pytest.approx(one.estimate_after, rel=1e-3)
    assert two.epsilon_after == found.epsilon_spent > two.estimate_after > two.epsilon > one.epsilon
    assert found.epsilon_estimate == two.estimate_after
    bench.clock.advance(2 * DAY_MS / 1000)
    assert [line.state for line in _budget(bench, dataset).lines] == ["committed", "failed"]


def test_a_fresh_budget_starts_at_nothing_and_keeps_all_that_was(bench: Bench) -> None:
    dataset = bench.register(epsilon=1.5, epsilon_per_job=1.5)

    def job_of(steps: int):
        return bench.job(plan=bench.plan(dataset.use(), training={"steps": steps}))

    accepted = job_of(20)
    for broker in ("clara", "north"):
        assert bench.precheck(broker, accepted).decision == "yes"
    bench.grant_all(accepted)
    assert bench.precheck("north", job_of(20)).reason == "budget_exceeded"
    spent = _budget(bench, dataset)
    assert isinstance(_renew(bench, dataset, bench.stewards["north"], spent.lineage), BudgetRenewed)
    after = _budget(bench, dataset)
    assert (after.epsilon_spent, after.epsilon_remaining, after.epsilon_estimate) == (0.0, 1.5, 0.0)
    assert after.lineage != spent.lineage
    assert [(line.terms, line.period) for line in after.lines] == [(accepted.digest, 0)]
    assert [renewal.person for renewal in after.renewals] == ["nora@north"]
    assert after.renewals[0].epsilon_spent > 0
    bench.restart("north")
    bench.grant("north", Worker(accepted, attempt=2))
    assert _budget(bench, dataset).epsilon_spent == 0.0, "the job was charged to the budget that it began under"
    assert bench.precheck("north", job_of(20)).decision == "yes"
    with bench.database("north").transaction() as tx:
        assert "budget_renewed" in [entry.event for entry in audit_log.entries(tx)]


def test_only_the_owner_renews_and_only_what_was_looked_at(bench: Bench) -> None:
    dataset = bench.register()
    lineage = _budget(bench, dataset).lineage
    for person in (bench.clara, bench.stewards["south"], bench.person("north", "sam", ("scientist",))):
        answer = _renew(bench, dataset, person, lineage)
        assert isinstance(answer, Refusal) and answer.reason == "not_allowed"
    admin = bench.person("north", "ada", ("admin",))
    assert isinstance(_renew(bench, dataset, admin, lineage), BudgetRenewed)
    again = _renew(bench, dataset, admin, lineage)
    assert isinstance(again, Refusal) and again.reason == "conflict"
    assert len(_budget(bench, dataset).renewals) == 1


def test_no_more_renewals_than_can_be_shown(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more, and no steward would ever see the ledger again."""
    monkeypatch.setattr(licences, "MAX_RENEWALS", 2)
    dataset, steward = bench.register(), bench.stewards["north"]
    for _ in range(2):
        assert isinstance(_renew(bench, dataset, steward, _budget(bench, dataset).lineage), BudgetRenewed)
    before = _budget(bench, dataset)
    answer = _renew(bench, dataset, steward, before.lineage)
    assert isinstance(answer, Refusal) and answer.reason == "too_large"
    assert _budget(bench, dataset) == before and len(before.renewals) == 2


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE datasets SET lineage = zeroblob(32)",
        "DELETE FROM renewals",
        "UPDATE renewals SET dataset = 'other@north'",
    ],
)
def test_a_lineage_changed_behind_its_back_is_found(bench: Bench, change: str) -> None:
    dataset = bench.register()
    _renew(bench, dataset, bench.stewards["north"], _budget(bench, dataset).lineage)
    with bench.database("north").transaction() as tx:
        ledger.verify(tx)
        tx.execute(change)
        with pytest.raises(IntegrityError):
            ledger.verify(tx)


def _head(bench: Bench) -> LedgerHead:
    steward = bench.stewards["north"]
    response = bench.broker("north").message(bench.request("north", steward, ShowState()))
    _, plaintext = open_envelope(
        response, steward.keys.sealing, kind="response", consortium=bench.consortium.id, max_bytes=1 << 20
    )
    signed = decode(PersonResponse, plaintext).head
    assert signed is not None
    return signed.verify(LedgerHead, bench.key_brokers["north"].signing.public)


def test_every_answer_tells_where_the_state_stands(bench: Bench) -> None:
    empty = _head(bench)
    dataset = bench.register()
    registered = _head(bench)
    assert (registered.entries, registered.ledger) == (empty.entries, empty.ledger)
    assert registered.audit_size == empty.audit_size + 1 and registered.audit_root != empty.audit_root
    bench.grant_all(bench.accepted_job(dataset.use()))
    assert _head(bench).entries == 1
    refused = bench.ask("north", bench.stewards["north"], EndorseState(ahead=bytes(32)))
    assert isinstance(refused, Refusal) and refused.reason == "wrong_state"
    stranger = bench.ask("north", bench.clara, ShowState())
    assert isinstance(stranger, Refusal) and stranger.reason == "not_allowed"
