"""Planning for subjects, with padded batches, and with metrics beside the weights."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import casemate as cm
import pytest
import torch
from casemate.planning import padded_size
from casemate_privacy.accounting import epsilon
from casemate_privacy.events import TrainingEvent
from casemate_privacy.statement import job_event, privacy_statement
from casemate_schemas.dataset import Column, DatasetCard
from casemate_schemas.errors import DatasetError, ParameterError
from casemate_schemas.job import Metrics, Plan, SubjectUse
from scipy.stats import binom
from support.fake_gateway import FakeGateway
from support.results import World
from torch import nn

from .conftest import KeyBrokers, card_of, licence_of
from .test_jobs import opened_job, request_of

OF_SUBJECTS = cm.Privacy(epsilon=3.0, delta=1e-3, unit="subject")


def card_of_subjects(owner: str, **changed: Any) -> DatasetCard:
    columns = (*card_of(owner).columns, Column(name="patient", dtype="int64", lower=0, upper=1e9))
    subjects = {"privacy_unit": "subject", "subject_column": "patient", "max_records_per_subject": 3}
    return card_of(owner, **{"columns": columns, "subject_bound": 80, **subjects, **changed})


async def planned(gateway: FakeGateway, options: dict[str, Any], w: World, **changes: Any) -> Plan:
    torch.set_num_threads(1)
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.train(**request_of(**changes))
    return opened_job(gateway, w)[0].plan


@pytest.fixture
def with_subjects(brokers: KeyBrokers) -> None:
    for owner in ("north", "south"):
        brokers.offers[owner] = brokers.offer(card_of_subjects(owner), licence_of(owner))


@pytest.mark.usefixtures("with_subjects")
async def test_subjects_are_planned_for_at_their_own_bounds(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    plan = await planned(gateway, options, w, privacy=OF_SUBJECTS, batch_size=40)
    assert plan.privacy.unit == "subject"
    assert {use.subjects for use in plan.datasets} == {SubjectUse(max_records=3, bound=80)}
    assert float(plan.expected_batch) == pytest.approx(40, rel=0.01)
    assert plan.pipeline.features == ("age", "pulse"), "never the column that names subjects"
    assert 2.99 < epsilon(job_event(plan, plan.datasets[0]), 1e-3) <= 3.0
    statement = privacy_statement(plan)
    assert statement.unit == "subject"
    assert statement.person_epsilon is not None
    assert statement.person_epsilon > 2 * statement.owners[0].epsilon


@pytest.mark.usefixtures("with_subjects")
async def test_what_is_asked_for_must_be_what_the_cards_protect(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers, w: World
) -> None:
    with pytest.raises(DatasetError, match=r"protects one subject.*unit='subject'"):
        await planned(gateway, options, w)
    with pytest.raises(DatasetError, match="names subjects"):
        await planned(gateway, options, w, privacy=OF_SUBJECTS, batch_size=40, features=["age", "patient"])
    with pytest.raises(ParameterError, match="160 declared subjects"):
        await planned(gateway, options, w, privacy=OF_SUBJECTS, batch_size=161)
    brokers.offers["south"] = brokers.offer(card_of("south"), licence_of("south"))
    with pytest.raises(DatasetError, match=r"cardio@south protects one record"):
        await planned(gateway, options, w, privacy=OF_SUBJECTS, batch_size=40)
    assert not gateway.submissions


async def test_training_gets_what_metrics_leave_of_epsilon(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    metrics = cm.Metrics(epsilon_share=0.2, loss_bound=2.0)
    without, plan = await planned(gateway, options, w), await planned(gateway, options, w, metrics=metrics)
    assert plan.release == ("weights", "metrics")
    assert plan.metrics == Metrics(noise_multiplier=plan.metrics.noise_multiplier, loss_bound=2.0)
    *_, last = job_event(plan, plan.datasets[0]).phases
    assert last == TrainingEvent(Fraction(1), plan.metrics.noise_multiplier, 1)
    alone = epsilon(last, 1e-3)
    assert 0.599 < alone <= 0.6
    for use in plan.datasets:
        assert 2.99 < epsilon(job_event(plan, use), 1e-3) <= 3.0
    assert plan.training.noise_multiplier > without.training.noise_multiplier
    assert privacy_statement(plan).metrics_noise_multiplier == plan.metrics.noise_multiplier


async def test_an_owner_with_a_stricter_cap_decides_the_noise_of_metrics(
    gateway: FakeGateway, options: dict[str, Any], brokers: KeyBrokers, w: World
) -> None:
    brokers.offers["north"] = brokers.offer(card_of("north"), licence_of("north", epsilon_per_job=1.0, delta=1e-4))
    plan = await planned(gateway, options, w, metrics=cm.Metrics(epsilon_share=0.3))
    north, south = plan.datasets
    assert 0.99 < epsilon(job_event(plan, north), 1e-4) <= 1.0
    assert 2.99 < epsilon(job_event(plan, south), 1e-3) <= 3.0


async def test_padding_changes_neither_rates_nor_noise(gateway: FakeGateway, options: dict[str, Any], w: World) -> None:
    without, auto = await planned(gateway, options, w), await planned(gateway, options, w, padded_batch="auto")
    given = await planned(gateway, options, w, padded_batch=333)
    assert (without.training.padded_batch, given.training.padded_batch) == (None, 333)
    assert auto.training.padded_batch == padded_size(float(auto.expected_batch), 400)
    assert auto.datasets == without.datasets
    assert auto.training.noise_multiplier == without.training.noise_multiplier


async def test_what_a_worker_could_not_hold_is_refused_before_anything_is_sent(
    gateway: FakeGateway, brokers: KeyBrokers, options: dict[str, Any], w: World
) -> None:
    wide = (*card_of("north").columns[2:], Column(name="scan", dtype="float32", shape=(1100, 1000), lower=0, upper=1))
    card = card_of("north", columns=wide, row_bound=2000)
    brokers.offers["north"] = brokers.offer(card, licence_of("north"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(1_100_000, 1))
    asked = {"datasets": ["cardio@north"], "model": model, "features": ["scan"], "mechanism": "exact"}
    with pytest.raises(ParameterError, match="subjects or padded batches take"):
        await planned(gateway, options, w, **asked, padded_batch=500)
    assert gateway.submissions == [] and gateway.envelopes == {}


@pytest.mark.parametrize(("units", "rate"), [(400, 0.25), (30_000, 0.01), (50, 0.5), (1_000_000, 0.0005), (10, 1.0)])
def test_a_padded_batch_holds_all_but_one_draw_in_a_billion(units: int, rate: float) -> None:
    size = padded_size(units * rate, units)
    assert binom.sf(size, units, rate) < 1e-9
    assert size <= min(units, units * rate + 8 * (units * rate) ** 0.5 + 15)


@pytest.mark.parametrize(
    "wrong",
    [
        {"padded_batch": 0},
        {"padded_batch": 1.5},
        {"padded_batch": "yes"},
        {"metrics": True},
        {"metrics": {"epsilon_share": 0.1}},
    ],
)
async def test_what_is_no_such_parameter_is_refused(
    gateway: FakeGateway, options: dict[str, Any], w: World, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ParameterError):
        await planned(gateway, options, w, **wrong)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (cm.Metrics, {"epsilon_share": 0.0}),
        (cm.Metrics, {"epsilon_share": 1.0}),
        (cm.Metrics, {"epsilon_share": float("nan")}),
        (cm.Metrics, {"loss_bound": 0.0}),
        (cm.Metrics, {"loss_bound": float("nan")}),
        (cm.Privacy, {"epsilon": 1.0, "delta": 1e-3, "unit": "person"}),
    ],
)
def test_parameters_out_of_range_are_refused_where_they_are_typed(kind: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        kind(**fields)


@pytest.mark.parametrize(
    "changed",
    [
        {"subject_column": "age"},
        {"subject_column": "nobody"},
        {"subject_bound": 201},
        {"privacy_unit": "record"},
        {"max_records_per_subject": None},
    ],
)
def test_a_card_declares_subjects_whole_or_not_at_all(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="subject"):
        card_of_subjects("north", **changed)
