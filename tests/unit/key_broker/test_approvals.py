"""Jobs that wait for people: who sees them, whose word counts, for how long, and what a revoked person's word is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from casemate_key_broker import approvals as kept
from casemate_key_broker import audit_log, ledger
from casemate_schemas.admission import PrecheckAnswer
from casemate_schemas.approval import Approval
from casemate_schemas.codec import decode, digest_of, encode
from casemate_schemas.errors import AuthenticationError, CasemateError, LicenceError, UnavailableError
from casemate_schemas.identity import Delegation
from casemate_schemas.licence import Approvals, Licence, MemberIs, Permission, RoleIs
from casemate_schemas.requests import (
    ApprovalListing,
    ApprovalShown,
    GiveApproval,
    ListApprovals,
    Refusal,
    ShowApproval,
)
from casemate_schemas.signatures import sign
from support.key_brokers import DAY_MS, Bench, Dataset, Job, Person, Worker

from .conftest import member_run_and_hosted

STEWARD = RoleIs(principal="approver", role="steward")


def asks(bench: Bench, **approvals: Any) -> Dataset:
    """A dataset of north's whose training two stewards must approve."""
    asked = Approvals(**({"count": 2, "by": STEWARD, "valid_s": 3600} | approvals))
    return bench.register(permissions=with_approvals(bench, asked))


def with_approvals(bench: Bench, asked: Approvals) -> tuple[Permission, ...]:
    usual = bench.permissions()
    return tuple(item.model_copy(update={"approvals": asked}) if item.action == "train" else item for item in usual)


def said(bench: Bench, person: Person, job: Job, dataset: Dataset, **changed: Any) -> Any:
    """What the person's signed word looks like."""
    fields: dict[str, Any] = {
        "consortium": bench.consortium.id,
        "key_broker": "north",
        "job_id": job.terms.job_id,
        "terms": job.digest,
        "licence": digest_of(dataset.licence),
        "decision": "approve",
        "at": bench.clock(),
        "expires": bench.clock() + DAY_MS,
    }
    return sign(Approval(**(fields | changed)), person.keys.signing)


def give(bench: Bench, person: Person, job: Job, dataset: Dataset, **changed: Any) -> Any:
    """The key broker's answer to a person's word."""
    word = said(bench, person, job, dataset, **changed)
    return bench.ask("north", person, GiveApproval(terms=job.digest, approvals=(word,)))


def waiting(bench: Bench, dataset: Dataset, **changed: Any) -> Job:
    """A job that north keeps waiting."""
    job = bench.job(dataset.use(), **changed)
    assert bench.precheck("north", job).decision == "awaiting"
    return job


def events(bench: Bench, *wanted: str) -> list[tuple[str, str | None]]:
    with bench.database("north").transaction() as tx:
        return [(entry.event, entry.person) for entry in audit_log.entries(tx) if entry.event in wanted]


@pytest.fixture
def nora(bench: Bench) -> Person:
    return bench.stewards["north"]


@pytest.fixture
def nils(bench: Bench) -> Person:
    return bench.person("north", "nils", ("steward",))


@member_run_and_hosted
def test_two_people_approve_and_the_job_is_taken(bench: Bench, nora: Person, nils: Person) -> None:
    dataset = asks(bench)
    job = waiting(bench, dataset)
    first = bench.precheck("north", job)
    assert first == bench.precheck("north", job), "asking again gets the same answer"
    shown = give(bench, nora, job, dataset)
    assert isinstance(shown, ApprovalShown) and shown.state == "awaiting"
    assert [(item.action, item.count, item.missing) for item in shown.uses[0].awaited] == [("train", 2, 1)]
    answer = bench.precheck("north", job)
    assert (answer.decision, answer.reason) == ("awaiting", None)
    assert bench.detail("north", answer).message == "approvals are missing: cardio@north has 1 of 2 to train"
    assert give(bench, nora, job, dataset).state == "awaiting", "one person counts once"
    bench.restart("north")
    shown = give(bench, nils, job, dataset)
    assert shown.state == "approved" and [item.person for item in shown.given] == ["nils@north", "nora@north"]
    assert [bench.precheck(name, job).decision for name in ("north", "clara")] == ["yes", "yes"]
    assert bench.ask("north", nora, ListApprovals()) == ApprovalListing(pending=(), n_pending=0)
    bench.grant_all(job)
    told = [("approved", "nora@north")] * 2 + [("approved", "nils@north")]
    assert events(bench, "approved", "denied") == told


def test_an_approver_sees_what_is_asked(bench: Bench, nora: Person) -> None:
    dataset = asks(bench)
    job = waiting(bench, dataset)
    listing = bench.ask("north", nora, ListApprovals())
    (item,) = listing.pending
    assert (item.job_id, item.terms, item.submitter) == (job.terms.job_id, job.digest, "clara@clara")
    assert (item.datasets, item.deadline, listing.n_pending) == (("cardio@north",), job.terms.deadline, 1)
    shown = bench.ask("north", nora, ShowApproval(terms=job.digest))
    (use,) = shown.uses
    assert shown.terms == job.signed_terms and use.licence.verify(Licence, nora.keys.signing.public) == dataset.licence
    assert 0 < use.epsilon < dataset.licence.epsilon and use.epsilon_spent == 0.0
    assert (shown.given, shown.state) == ((), "awaiting")


def test_nobody_else_learns_of_it(bench: Bench) -> None:
    dataset = asks(bench, by=MemberIs(principal="approver", member="north"))
    job = waiting(bench, dataset)
    admin = bench.person("north", "ada", ("admin",))
    outsiders = [bench.clara, bench.stewards["south"], bench.person("south", "sue", ("admin",))]
    for person in outsiders:
        assert bench.ask("north", person, ListApprovals()).n_pending == 0
        for body in (ShowApproval(terms=job.digest), ShowApproval(terms=bytes(32))):
            assert bench.ask("north", person, body).reason == "not_found"
        assert give(bench, person, job, dataset).reason == "not_found"
    assert bench.ask("north", admin, ListApprovals()).n_pending == 1
    assert events(bench, "approved") == []


def test_who_looks_after_the_data_sees_and_has_no_say(bench: Bench, nora: Person) -> None:
    dataset = asks(bench, by=MemberIs(principal="approver", member="south"))
    job = waiting(bench, dataset)
    assert bench.ask("north", nora, ListApprovals()).n_pending == 1
    assert give(bench, nora, job, dataset).reason == "not_allowed"
    assert give(bench, bench.stewards["south"], job, dataset).uses[0].awaited[0].missing == 1


def test_the_submitter_has_no_say(bench: Bench) -> None:
    dataset = asks(bench, by=RoleIs(principal="approver", role="scientist"))
    job = waiting(bench, dataset)
    other = bench.person("clara", "clara", ("scientist",))
    for person in (bench.clara, other):
        assert give(bench, person, job, dataset).reason == "not_found"
    assert isinstance(give(bench, bench.person("clara", "carl", ("scientist",)), job, dataset), ApprovalShown)


def test_one_person_with_two_keys_is_one(bench: Bench, nora: Person) -> None:
    dataset = asks(bench, four_eyes=True)
    job = waiting(bench, dataset)
    give(bench, nora, job, dataset)
    bench.clock.advance(1)
    shown = give(bench, bench.person("north", "nora", ("steward",)), job, dataset)
    assert shown.state == "awaiting" and shown.uses[0].awaited[0].missing == 1 and len(shown.given) == 1


def test_one_key_with_two_names_is_one(bench: Bench, nora: Person) -> None:
    dataset = asks(bench)
    job = waiting(bench, dataset)
    give(bench, nora, job, dataset)
    renamed = nora.delegation.peek(Delegation).model_copy(update={"person": "nina"})
    twice = replace(nora, delegation=sign(renamed, bench.members["north"].signing))
    assert give(bench, twice, job, dataset).reason == "conflict"


def test_four_eyes_are_of_one_member(bench: Bench, nora: Person, nils: Person) -> None:
    dataset = asks(bench, four_eyes=True)
    job = waiting(bench, dataset)
    give(bench, nora, job, dataset)
    assert give(bench, bench.stewards["south"], job, dataset).state == "awaiting"
    assert give(bench, nils, job, dataset).state == "approved"


def test_a_denial_ends_the_job_for_ever(bench: Bench, nora: Person, nils: Person) -> None:
    dataset = asks(bench, count=1)
    job = waiting(bench, dataset)
    assert give(bench, nora, job, dataset, decision="deny").state == "denied"
    assert give(bench, nora, job, dataset).reason == "conflict", "a no is not taken back"
    assert give(bench, nils, job, dataset).state == "denied"
    bench.clock.advance(2 * 3600)
    answer = bench.precheck("north", job)
    assert (answer.decision, answer.reason) == ("refused", "licence_forbids"), "longer than approvals are valid"
    assert bench.detail("north", answer).message == "nora@north denied this job"
    assert bench.ask("north", nora, ListApprovals()).n_pending == 0
    assert events(bench, "denied", "refused") == [("denied", "nora@north"), ("refused", "clara@clara")]


def test_a_denial_comes_before_the_keys_or_not_at_all(bench: Bench, nora: Person, nils: Person) -> None:
    dataset = asks(bench, count=1)
    first, second = waiting(bench, dataset), waiting(bench, dataset)
    for job in (first, second):
        give(bench, nora, job, dataset)
        assert [bench.precheck(name, job).decision for name in ("north", "clara")] == ["yes", "yes"]
    bench.grant_all(first)
    assert give(bench, nils, first, dataset, decision="deny").reason == "conflict"
    assert give(bench, nils, second, dataset, decision="deny").state == "denied"
    with pytest.raises(LicenceError, match="nils@north denied"):
        bench.grant("north", Worker(second))


def test_a_denial_while_a_grant_is_judged_still_counts(
    bench: Bench, nora: Person, nils: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = asks(bench, count=1)
    job = waiting(bench, dataset)
    give(bench, nora, job, dataset)
    assert [bench.precheck(name, job).decision for name in ("north", "clara")] == ["yes", "yes"]
    north = bench.broker("north")
    judge = north._judge_release

    def judged(*asked: Any) -> Any:
        found = judge(*asked)
        assert give(bench, nils, job, dataset, decision="deny").state == "denied"
        return found

    monkeypatch.setattr(north, "_judge_release", judged)
    with pytest.raises(LicenceError, match="nils@north denied"):
        bench.grant("north", Worker(job))
    with bench.database("north").transaction() as tx:
        assert ledger.find_reservation(tx, job.digest) is None


WRONG_WORDS: dict[str, tuple[Callable[[Bench, Job, Dataset], dict[str, Any]], str]] = {
    "other terms": (lambda b, j, d: {"terms": bytes(32)}, "invalid_parameter"),
    "another job": (lambda b, j, d: {"job_id": "0" * 32}, "invalid_parameter"),
    "another key broker": (lambda b, j, d: {"key_broker": "south"}, "not_authenticated"),
    "another consortium": (lambda b, j, d: {"consortium": bytes(32)}, "not_authenticated"),
    "another licence": (lambda b, j, d: {"licence": bytes(32)}, "not_allowed"),
    "of yesterday": (lambda b, j, d: {"at": b.clock() - DAY_MS}, "invalid_parameter"),
    "of tomorrow": (lambda b, j, d: {"at": b.clock() + DAY_MS, "expires": b.clock() + 2 * DAY_MS}, "invalid_parameter"),
    "lapsed": (lambda b, j, d: {"at": b.clock() - 2, "expires": b.clock()}, "invalid_parameter"),
}


@pytest.mark.parametrize("wrong", WRONG_WORDS)
def test_a_word_is_about_these_very_terms(bench: Bench, nora: Person, wrong: str) -> None:
    dataset = asks(bench)
    job = waiting(bench, dataset)
    changed, reason = WRONG_WORDS[wrong]
    refusal = give(bench, nora, job, dataset, **changed(bench, job, dataset))
    assert isinstance(refusal, Refusal) and refusal.reason == reason
    assert events(bench, "approved") == [] and bench.ask("north", nora, ShowApproval(terms=job.digest)).given == ()


def test_nobody_hands_in_anothers_word(bench: Bench, nora: Person, nils: Person) -> None:
    dataset = asks(bench)
    job = waiting(bench, dataset)
    stolen = said(bench, nora, job, dataset)
    answer = bench.ask("north", nils, GiveApproval(terms=job.digest, approvals=(stolen,)))
    assert answer.reason == "bad_signature"


def test_a_word_held_back_does_not_replace_a_later_one(bench: Bench, nora: Person) -> None:
    dataset = asks(bench)
    job = waiting(bench, dataset)
    held_back = said(bench, nora, job, dataset)
    bench.clock.advance(10)
    give(bench, nora, job, dataset)
    assert bench.ask("north", nora, GiveApproval(terms=job.digest, approvals=(held_back,))).reason == "conflict"


def test_an_approval_has_to_hold_at_the_grant(bench: Bench, nora: Person) -> None:
    """It lapses; a worker that comes too late gets nothing, until it is given anew."""
    dataset = asks(bench, count=1)
    job = waiting(bench, dataset)
    give(bench, nora, job, dataset)
    assert [bench.precheck(name, job).decision for name in ("north", "clara")] == ["yes", "yes"]
    bench.clock.advance(3600)
    with pytest.raises(CasemateError) as refused:
        bench.grant("north", Worker(job))
    assert refused.value.reason == "approval_missing"
    assert bench.ask("north", nora, ShowApproval(terms=job.digest)).given[0].counts is False
    assert give(bench, nora, job, dataset).state == "approved"
    worker = bench.grant_all(job)
    bench.broker("clara").commit(worker.commit(bytes(32)))
    bench.broker("north").commit(worker.commit(bytes(32), bench.broker("clara").commit(worker.commit(bytes(32)))))
    bench.clock.advance(3600)
    assert bench.grant("north", Worker(job, attempt=2))[0].header.committed == bytes(32), "what is committed stays so"


def test_an_approval_is_under_the_licence_of_its_day(bench: Bench, nora: Person) -> None:
    dataset = asks(bench, count=1)
    job = waiting(bench, dataset)
    give(bench, nora, job, dataset)
    stricter = Approvals(count=1, by=STEWARD, valid_s=1800)
    bench.ask(
        "north",
        nora,
        bench.registration(
            replace(
                dataset, licence=bench.licence(dataset.card.id, number=2, permissions=with_approvals(bench, stricter))
            )
        ),
    )
    for answer in (give(bench, nora, job, dataset), bench.ask("north", nora, ShowApproval(terms=job.digest))):
        assert answer.reason == "not_found"
    assert bench.ask("north", nora, ListApprovals()).n_pending == 0
    assert bench.precheck("north", job).decision == "refused"


def test_revoked_people_have_no_say_and_submit_nothing(bench: Bench, nora: Person, nils: Person) -> None:
    dataset = asks(bench, count=1)
    jobs = [waiting(bench, dataset) for _ in range(2)]
    for job in jobs:
        give(bench, nora, job, dataset)
        assert [bench.precheck(name, job).decision for name in ("north", "clara")] == ["yes", "yes"]
    late = waiting(bench, dataset)
    bench.revoke("north", "nora")
    with pytest.raises(AuthenticationError, match="north has revoked"):
        give(bench, nora, late, dataset)
    with pytest.raises(CasemateError) as refused:
        bench.grant("north", Worker(jobs[0]))
    assert refused.value.reason == "approval_missing"
    shown = bench.ask("north", nils, ShowApproval(terms=jobs[0].digest))
    assert (shown.given[0].counts, shown.state) == (False, "awaiting")
    give(bench, nils, jobs[0], dataset)
    done = bench.grant_all(jobs[0])
    receipt = bench.broker("clara").commit(done.commit(bytes(32)))
    bench.broker("north").commit(done.commit(bytes(32), receipt))
    again = bench.person("north", "nora", ("steward",), begins=bench.clock() + 1)
    bench.clock.advance(1)
    assert give(bench, again, jobs[1], dataset).state == "approved", "under a new delegation she is back"
    bench.revoke("clara", "clara")
    with pytest.raises(AuthenticationError, match="clara has revoked"):
        bench.precheck("north", late)
    with pytest.raises(AuthenticationError, match="clara has revoked"):
        bench.grant("north", Worker(jobs[1]))
    assert bench.grant("north", Worker(jobs[0], attempt=2))[0].header.committed == bytes(32)


def test_nobody_fills_the_disk(bench: Bench, nora: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MAX_PENDING_BY_PERSON", 2)
    monkeypatch.setattr(kept, "MAX_PENDING_BY_MEMBER", 3)
    dataset = asks(bench)
    mine = [waiting(bench, dataset, terms={"deadline": bench.clock() + 60_000 * n}) for n in (1, 2)]
    with pytest.raises(UnavailableError, match="2 jobs of yours"):
        waiting(bench, dataset)
    assert bench.precheck("north", mine[0]).decision == "awaiting", "those that wait already go on"
    carl = bench.person("clara", "carl", ("scientist",))
    waiting(bench, dataset, by=carl)
    with pytest.raises(UnavailableError):
        waiting(bench, dataset, by=carl)
    give(bench, nora, mine[0], dataset)
    bench.clock.advance(61)
    waiting(bench, dataset)
    with bench.database("north").transaction() as tx:
        assert tx.execute("SELECT count(*) FROM pending").fetchone() == (3,)
        assert tx.execute("SELECT count(*) FROM approvals").fetchone() == (0,)


def test_another_cannot_end_the_wait(bench: Bench, nora: Person) -> None:
    """Whoever names somebody else's terms in a routing of their own is refused, and nothing else happens."""
    dataset = asks(bench)
    job = waiting(bench, dataset)
    mallory = bench.person("clara", "mallory", ("scientist",))
    forged = bench.job(dataset.use(), by=mallory, routing={"terms": job.digest})
    assert decode(type(job.signed_terms), bench.broker("north").precheck(encode(forged.precheck))).peek(
        PrecheckAnswer
    ).decision == ("refused")
    assert bench.ask("north", nora, ListApprovals()).n_pending == 1
