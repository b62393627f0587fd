"""Prechecks: each reason for a no, the words for the submitter, and the same answer ever after."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from casemate_key_broker import audit_log
from casemate_key_broker.service import Limits
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import MAX_CLOCK_SKEW_MS
from casemate_schemas.errors import (
    AuthenticationError,
    MalformedError,
    ManifestError,
    NotFoundError,
    SignatureError,
    UnavailableError,
)
from casemate_schemas.job import Rational
from casemate_schemas.licence import AllOf, Approvals, Before, MemberIs, RoleIs, WithModel
from casemate_schemas.pipeline import PipelineSpec
from casemate_schemas.signatures import Signed, sign
from support.key_brokers import DAY_MS, PURPOSE, Bench, Dataset, Job

Make = Callable[[Bench, Dataset], Job]

BY_CLARA = MemberIs(principal="submitter", member="clara")


def _with_training(**training: Any) -> Make:
    return lambda bench, dataset: bench.job(plan=bench.plan(dataset.use(), training=training))


def _with_use(**changed: Any) -> Make:
    return lambda bench, dataset: bench.job(dataset.use(**changed))


def _with_pipeline(**changed: Any) -> Make:
    fields = {"features": ("age",), "target": "outcome", "target_kind": "binary"} | changed
    loss = {"class": "cross_entropy", "value": "mean_squared_error"}.get(fields["target_kind"], "binary_cross_entropy")
    return lambda bench, dataset: bench.job(
        plan=bench.plan(dataset.use(), pipeline=PipelineSpec(**fields), training={"loss": loss})
    )


def _with_terms(**changed: Any) -> Make:
    return lambda bench, dataset: bench.job(dataset.use(), terms=changed)


def _past_deadline(bench: Bench, dataset: Dataset) -> Job:
    job = bench.job(dataset.use())
    bench.clock.advance(DAY_MS / 1000)
    return job


def _from_the_future(bench: Bench, dataset: Dataset) -> Job:
    now = bench.clock()
    return bench.job(dataset.use(), terms={"created": now + MAX_CLOCK_SKEW_MS + 1, "deadline": now + DAY_MS})


def _other_recipients(bench: Bench, dataset: Dataset) -> Job:
    return bench.job(dataset.use(), routing={"recipients": (os.urandom(32),)})


def _submitted_twice(bench: Bench, dataset: Dataset) -> Job:
    job = bench.accepted_job(dataset.use())
    routing = job.routing.model_copy(update={"job_envelope": os.urandom(32)})
    submission = job.precheck.submission.model_copy(update={"routing": sign(routing, bench.clara.keys.signing)})
    return replace(job, routing=routing, precheck=job.precheck.model_copy(update={"submission": submission}))


def _other_terms_inside(bench: Bench, dataset: Dataset) -> Job:
    job, other = bench.job(dataset.use()), bench.job(dataset.use())
    submission = job.precheck.submission.model_copy(update={"terms_envelope": other.precheck.submission.terms_envelope})
    return replace(job, precheck=job.precheck.model_copy(update={"submission": submission}))


REFUSED: dict[str, tuple[Make, str, str]] = {
    "unknown dataset": (_with_use(dataset="unheard-of@north"), "not_found", "no dataset"),
    "another version": (_with_use(envelope=b"\x07" * 32), "dataset_mismatch", "another version"),
    "another card": (_with_use(card=b"\x07" * 32), "dataset_mismatch", "another version"),
    "another licence": (_with_use(licence=b"\x07" * 32), "licence_forbids", "another licence"),
    "another row bound": (_with_use(row_bound=199), "dataset_mismatch", "at most 200 rows"),
    "missing feature": (_with_pipeline(features=("age", "weight")), "dataset_mismatch", "no column 'weight'"),
    "missing target": (_with_pipeline(target="death"), "dataset_mismatch", "no column 'death'"),
    "target is not binary": (
        _with_pipeline(features=("outcome",), target="age"),
        "dataset_mismatch",
        "0 to 120",
    ),
    "too many classes": (_with_pipeline(target_kind="class", n_classes=3), "dataset_mismatch", "0 to 1"),
    "loss does not fit": (_with_training(loss="mean_squared_error"), "invalid_parameter", "kind value"),
    "purpose": (
        lambda bench, dataset: bench.job(plan=bench.plan(dataset.use(), purpose="marketing")),
        "licence_forbids",
        "train",
    ),
    "over the cap of one job": (_with_training(steps=2000), "budget_exceeded", "the licence allows 2 for one job"),
    "past its deadline": (_past_deadline, "deadline_passed", "deadline"),
    "from the future": (_from_the_future, "invalid_parameter", "future"),
    "another manifest": (_with_terms(manifest=b"\x07" * 32), "manifest_refused", "another manifest"),
    "routing differs": (_other_recipients, "invalid_parameter", "recipients"),
    "other terms inside": (_other_terms_inside, "invalid_parameter", "other terms"),
    "same terms, other routing": (_submitted_twice, "conflict", "another routing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason_in_words_for_the_submitter(bench: Bench, case: str) -> None:
    make, reason, words = REFUSED[case]
    job = make(bench, bench.register())
    answer = bench.precheck("north", job)
    assert (answer.decision, answer.reason) == ("refused", reason)
    refusal = bench.detail("north", answer)
    assert refusal.reason == reason and words in refusal.message
    with bench.database("north").transaction() as tx:
        entry = audit_log.entries(tx)[-1]
    assert (entry.event, entry.reason, entry.subject) == ("refused", reason, job.terms.job_id)
    assert entry.person == "clara@clara"


@pytest.mark.parametrize(
    ("rules", "expires_in_ms"),
    [
        ({"train": None}, DAY_MS),
        ({"train": None, "read_result": None}, DAY_MS),
        ({"train": MemberIs(principal="submitter", member="south")}, DAY_MS),
        ({"train": RoleIs(principal="submitter", role="admin")}, DAY_MS),
        ({"read_result": MemberIs(principal="recipient", member="south")}, DAY_MS),
        ({}, 1),
    ],
)
def test_a_licence_forbids(bench: Bench, rules: dict[str, Any], expires_in_ms: int) -> None:
    expires = bench.clock() + expires_in_ms
    dataset = bench.register(permissions=bench.permissions(**rules), expires=expires)
    bench.clock.advance(1)
    assert bench.precheck("north", bench.job(dataset.use())).reason == "licence_forbids"


def test_a_rule_whose_time_has_passed(bench: Bench) -> None:
    early = AllOf(rules=(BY_CLARA, Before(time=bench.clock() + 1000)))
    dataset = bench.register(permissions=bench.permissions(train=early))
    assert bench.precheck("north", bench.job(dataset.use())).decision == "yes"
    bench.clock.advance(1)
    assert bench.precheck("north", bench.job(dataset.use())).reason == "licence_forbids"


def test_a_licence_for_certain_purposes(bench: Bench) -> None:
    permissions = bench.permissions(train=BY_CLARA)
    other = bench.register(name="other", purposes=("marketing",), permissions=permissions)
    own = bench.register(name="own", purposes=(PURPOSE,), permissions=permissions)
    answer = bench.precheck("north", bench.job(other.use()))
    assert answer.reason == "licence_forbids" and "for marketing only" in bench.detail("north", answer).message
    assert bench.precheck("north", bench.job(own.use())).decision == "yes"


def test_a_licence_for_one_model(bench: Bench) -> None:
    only = AllOf(rules=(BY_CLARA, WithModel(model=b"m" * 32)))
    use = bench.register(permissions=bench.permissions(train=only)).use()
    for model, decision in ((b"m" * 32, "yes"), (b"x" * 32, "refused"), (None, "refused")):
        assert bench.precheck("north", bench.job(plan=bench.plan(use, model=model))).decision == decision


def test_missing_approvals_are_no_answer_yet(bench: Bench) -> None:
    """Nothing is kept or given out: the same submission is judged anew, and may be refused once it is asked again."""
    by = RoleIs(principal="approver", role="steward")
    plain = bench.permissions()
    asking = tuple(
        item.model_copy(update={"approvals": Approvals(count=2, by=by, valid_s=3600)})
        if item.action == "train"
        else item
        for item in plain
    )
    dataset = bench.register(permissions=asking)
    job = bench.job(dataset.use())
    for _ in range(2):
        answer = bench.precheck("north", job)
        assert (answer.decision, answer.reason, answer.terms) == ("awaiting", None, job.digest)
        assert bench.detail("north", answer).message == "approvals are missing: cardio@north has 0 of 2 to train"
    with pytest.raises(NotFoundError):
        bench.nonce("north", job)
    with bench.database("north").transaction() as tx:
        assert tx.execute("SELECT count(*) FROM answers").fetchone() == (0,)
    assert bench.precheck("north", bench.job(plan=bench.plan(dataset.use(), training={"steps": 2000}))).reason == (
        "budget_exceeded"
    )
    amended = replace(dataset, licence=bench.licence("cardio@north", number=2, permissions=plain))
    bench.ask("north", bench.stewards["north"], bench.registration(amended))
    assert bench.precheck("north", job).reason == "licence_forbids"
    assert bench.precheck("north", bench.job(amended.use())).decision == "yes"


def test_the_accepted_variants_of_what_is_refused_above(bench: Bench) -> None:
    dataset = bench.register()
    for make in (_with_use(), _with_pipeline(target_kind="class", n_classes=2), _with_training(steps=20)):
        answer = bench.precheck("north", make(bench, dataset))
        assert answer.decision == "yes", bench.detail("north", answer)


def test_a_spent_budget_is_refused_with_the_figures(bench: Bench) -> None:
    dataset = bench.register(epsilon=1.0, epsilon_per_job=1.0)
    bench.grant_all(bench.accepted_job(dataset.use()))
    answer = bench.precheck("north", bench.job(dataset.use()))
    assert answer.reason == "budget_exceeded"
    message = bench.detail("north", answer).message
    assert "epsilon 0.7978 at delta 0.0001" in message and "lifetime budget 1 " in message


def test_an_opinion_holds_nothing(bench: Bench) -> None:
    dataset = bench.register(epsilon=1.0, epsilon_per_job=1.0)
    for _ in range(3):
        assert bench.precheck("north", bench.job(dataset.use())).decision == "yes"


def test_the_jobs_own_key_broker_checks_the_job_envelope(bench: Bench) -> None:
    dataset = bench.register()
    job, other = bench.job(dataset.use()), bench.job(dataset.use())
    swapped = replace(job, precheck=job.precheck.model_copy(update={"job_head": other.precheck.job_head}))
    assert bench.precheck("clara", swapped).reason == "seal_does_not_open"
    stranger = bench.person("clara", "carl", ("scientist",))
    theirs = bench.job(dataset.use(), by=stranger)
    foreign = replace(job, precheck=job.precheck.model_copy(update={"job_head": theirs.precheck.job_head}))
    assert bench.precheck("north", foreign).decision == "yes", "an owner's key broker does not look at it"


def test_a_repeated_precheck_gets_the_stored_answer_whatever_happened_since(bench: Bench) -> None:
    dataset = bench.register()
    job, late = bench.job(dataset.use()), bench.job(dataset.use())
    payload = encode(job.precheck)
    first = bench.broker("north").precheck(payload)
    bench.clock.advance(2 * DAY_MS / 1000)
    assert bench.restart("north").precheck(payload) == first
    assert bench.precheck("north", late).reason == "deadline_passed", "a new one is judged as of now"
    with bench.database("north").transaction() as tx:
        assert [entry.event for entry in audit_log.entries(tx)].count("prechecked") == 1


def test_who_cannot_be_authenticated_gets_an_error_and_leaves_no_trace(bench: Bench) -> None:
    dataset = bench.register()
    job = bench.job(dataset.use())
    submission = job.precheck.submission
    expired = bench.person("clara", "carl", ("scientist",), days=1)
    forged = submission.routing.model_copy(update={"signature": bytes(64)})
    elsewhere = sign(job.routing.model_copy(update={"key_brokers": ("clara",)}), bench.clara.keys.signing)
    cases: list[tuple[type[Exception], dict[str, Signed]]] = [
        (SignatureError, {"routing": forged}),
        (SignatureError, {"delegation": bench.stewards["south"].delegation}),
        (AuthenticationError, {"delegation": expired.delegation}),
        (ManifestError, {"routing": elsewhere}),
    ]
    for error, changed in cases:
        request = job.precheck.model_copy(update={"submission": submission.model_copy(update=changed)})
        with pytest.raises(error):
            bench.broker("north").precheck(encode(request))
    with pytest.raises(MalformedError):
        bench.broker("north").precheck(encode(job.precheck) + b"\x00")
    with bench.database("north").transaction() as tx:
        assert [entry.event for entry in audit_log.entries(tx)] == ["manifest", "registered"]
        assert tx.execute("SELECT count(*) FROM answers").fetchone() == (0,)


def test_one_person_cannot_fill_the_disk(tmp_path: Any) -> None:
    bench = Bench(tmp_path, Limits(max_submissions_per_day=2))
    dataset = bench.register()
    for _ in range(2):
        assert bench.precheck("north", bench.job(dataset.use())).decision == "yes"
    with pytest.raises(UnavailableError):
        bench.precheck("north", bench.job(dataset.use()))
    bench.clock.advance(DAY_MS / 1000)
    assert bench.precheck("north", bench.job(dataset.use())).decision == "yes"
    bench.close()


def test_each_owner_is_priced_at_its_own_rate(bench: Bench) -> None:
    north, south = bench.register("north", epsilon_per_job=0.1), bench.register("south", epsilon_per_job=0.1)
    job = bench.job(north.use(sample_rate=Rational.of(Fraction(1, 64))), south.use())
    assert bench.precheck("north", job).decision == "yes"
    assert bench.precheck("south", job).reason == "budget_exceeded"


def test_answers_are_signed_about_these_terms(bench: Bench) -> None:
    job = bench.job(bench.register().use())
    answer = bench.precheck("north", job)
    told = (answer.consortium, answer.key_broker, answer.job_id, answer.terms, answer.reason, answer.detail)
    assert told == (bench.consortium.id, "north", job.terms.job_id, job.digest, None, None)
    assert decode(Signed, bench.broker("north").precheck(encode(job.precheck))).signer == (
        bench.key_brokers["north"].signing.public
    )
