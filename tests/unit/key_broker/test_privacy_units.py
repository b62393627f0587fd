"""What the terms say decides what is charged: the privacy unit, its bounds, and metrics beside the weights."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from casemate_privacy.accounting import epsilon
from casemate_privacy.events import TrainingEvent
from casemate_schemas.dataset import Column
from casemate_schemas.job import Metrics, Plan, Privacy, SubjectUse, Training
from casemate_schemas.pipeline import PipelineSpec
from casemate_schemas.requests import Budget, ShowBudget
from pydantic import ValidationError
from support.key_brokers import Bench, Dataset

EIGHTH = Fraction(1, 8)
SUBJECTS = {"privacy_unit": "subject", "subject_column": "patient", "max_records_per_subject": 4, "subject_bound": 90}
OF_SUBJECTS = Privacy(epsilon=3.0, delta=1e-4, unit="subject")


def registered(bench: Bench, **card: Any) -> Dataset:
    columns = (*bench.card().columns, Column(name="patient", dtype="int64", lower=0, upper=1e9))
    made = bench.dataset()
    dataset = Dataset(bench.card(columns=columns, **card), made.licence, made.head, made.envelope, "north")
    bench.ask("north", bench.stewards["north"], bench.registration(dataset))
    return dataset


def subjects_plan(bench: Bench, dataset: Dataset, use: SubjectUse | None = None, **changed: Any) -> Plan:
    subjects = use or SubjectUse(max_records=4, bound=90)
    return bench.plan(dataset.use(subjects=subjects), **{"privacy": OF_SUBJECTS, **changed})


def charged(bench: Bench, dataset: Dataset, plan: Plan) -> Budget:
    bench.grant_all(bench.accepted_job(plan=plan))
    found = bench.ask("north", bench.stewards["north"], ShowBudget(dataset=dataset.card.id))
    assert isinstance(found, Budget)
    return found


def test_a_subject_is_charged_what_a_record_is(bench: Bench) -> None:
    dataset = registered(bench, **SUBJECTS)
    found = charged(bench, dataset, subjects_plan(bench, dataset))
    (line,) = found.lines
    assert found.privacy_unit == "subject"
    assert line.epsilon == epsilon(TrainingEvent(EIGHTH, 2.0, 10), 1e-4)


@pytest.mark.parametrize(
    ("use", "changed", "said"),
    [
        (SubjectUse(max_records=5, bound=90), {}, "at most 4 records of a subject"),
        (SubjectUse(max_records=4, bound=91), {}, "at most 90 subjects"),
        (
            SubjectUse(max_records=4, bound=90),
            {"pipeline": PipelineSpec(features=("age", "patient"), target="outcome", target_kind="binary")},
            "names subjects",
        ),
    ],
)
def test_more_of_a_subject_than_the_card_lends_is_refused(
    bench: Bench, use: SubjectUse, changed: dict[str, Any], said: str
) -> None:
    dataset = registered(bench, **SUBJECTS)
    answer = bench.precheck("north", bench.job(plan=subjects_plan(bench, dataset, use, **changed)))
    assert answer.reason == "dataset_mismatch"
    assert said in bench.detail("north", answer).message


def test_a_plan_for_another_unit_than_the_cards_is_refused(bench: Bench) -> None:
    subjects, records = registered(bench, **SUBJECTS), bench.register("south")
    answer = bench.precheck("north", bench.job(subjects.use()))
    assert answer.reason == "dataset_mismatch"
    assert "protects one subject" in bench.detail("north", answer).message
    plan = bench.plan(records.use(subjects=SubjectUse(max_records=1, bound=200)), privacy=OF_SUBJECTS)
    answer = bench.precheck("south", bench.job(plan=plan))
    assert answer.reason == "dataset_mismatch"
    assert "protects one record" in bench.detail("south", answer).message


def test_a_plan_has_one_unit_and_lists_what_it_releases(bench: Bench) -> None:
    use = bench.register().use()
    subject = use.model_copy(update={"subjects": SubjectUse(max_records=1, bound=9)})
    metrics = Metrics(noise_multiplier=2.0, loss_bound=1.0)
    wrong: list[tuple[Any, dict[str, Any]]] = [
        (use, {"privacy": OF_SUBJECTS}),
        (subject, {}),
        (use, {"metrics": metrics}),
        (use, {"release": ("weights", "metrics")}),
        (use, {"release": ("metrics",), "metrics": metrics}),
        (use.model_copy(update={"row_bound": 1 << 25}), {"training": {"padded_batch": 4}}),
        (subject, {"privacy": OF_SUBJECTS, "training": {"augmentation": {"multiplicity": 2, "flip": True}}}),
        (use, {"training": {"padded_batch": 4, "augmentation": {"multiplicity": 2, "flip": True}}}),
    ]
    for item, changed in wrong:
        with pytest.raises(ValidationError):
            bench.plan(item, **changed)


def test_metrics_are_charged_with_the_weights(bench: Bench) -> None:
    dataset = registered(bench)
    plan = bench.plan(
        dataset.use(), release=("weights", "metrics"), metrics=Metrics(noise_multiplier=9.0, loss_bound=5.0)
    )
    (line,) = charged(bench, dataset, plan).lines
    training, metrics = TrainingEvent(EIGHTH, 2.0, 10), TrainingEvent(Fraction(1), 9.0, 1)
    assert line.epsilon == epsilon([training, metrics], 1e-4) > epsilon(training, 1e-4)
    (phase,) = line.further
    assert (phase.sample_rate.fraction, phase.noise_multiplier, phase.steps) == (1, 9.0, 1)


def test_metrics_count_towards_the_cap_on_a_job(bench: Bench) -> None:
    training = epsilon(TrainingEvent(EIGHTH, 2.0, 10), 1e-4)
    dataset = bench.register(epsilon_per_job=training)
    metrics = Metrics(noise_multiplier=9.0, loss_bound=5.0)
    assert bench.precheck("north", bench.job(dataset.use())).decision == "yes"
    plan = bench.plan(dataset.use(), release=("weights", "metrics"), metrics=metrics)
    assert bench.precheck("north", bench.job(plan=plan)).reason == "budget_exceeded"


def test_metrics_are_released_only_where_they_may_be_read(bench: Bench) -> None:
    dataset = bench.register(permissions=bench.permissions(read_metrics=None))
    metrics = Metrics(noise_multiplier=9.0, loss_bound=5.0)
    assert bench.precheck("north", bench.job(dataset.use())).decision == "yes"
    plan = bench.plan(dataset.use(), release=("weights", "metrics"), metrics=metrics)
    job = bench.job(plan=plan)
    refusal = bench.detail("north", bench.precheck("north", job))
    assert refusal.reason == "licence_forbids" and "read_metrics" in refusal.message


def test_padding_costs_nothing(bench: Bench) -> None:
    dataset = bench.register()
    padded = Training(**dict(bench.plan(dataset.use()).training) | {"padded_batch": 60})
    (line,) = charged(bench, dataset, bench.plan(dataset.use(), training=dict(padded))).lines
    assert line.epsilon == epsilon(TrainingEvent(EIGHTH, 2.0, 10), 1e-4)
