"""1,000 jobs of all kinds on one dataset: the ledger's verdicts and standings against composition from scratch."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from casemate_key_broker import ledger, standings
from casemate_key_broker.budgets import charge_for
from casemate_key_broker.database import Database
from casemate_key_broker.ledger import Charge
from casemate_key_broker.licences import Registered
from casemate_privacy import ORDERS, ZERO_CURVE, GaussianSumEvent, PrivacyEvent, RenyiFilter, TrainingEvent
from casemate_privacy.events import sampled
from casemate_privacy.renyi_filter import _log_weights
from casemate_schemas.errors import BudgetError
from casemate_schemas.requests import ChargeKind
from casemate_schemas.signatures import sign
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from support.key_brokers import Bench

EPSILON, DELTA = 5.0, 1e-5
JOBS = 1_000
KINDS: tuple[ChargeKind, ...] = ("train", "evaluate", "statistics", "metrics")


def _draw(draw: random.Random, kind: ChargeKind) -> PrivacyEvent:
    if kind == "train":
        return TrainingEvent(
            Fraction(draw.randint(1 << 22, 1 << 26), 1 << 32), draw.uniform(1.0, 6.0), draw.randint(1, 300)
        )
    return GaussianSumEvent(draw.uniform(0.5, 2.0), draw.uniform(40.0, 500.0), draw.randint(1, 4))


@pytest.fixture(scope="module")
def charges(tmp_path_factory: pytest.TempPathFactory) -> list[Charge]:
    """1,000 charges of 80 different releases, each run several times in a row."""
    bench = Bench(tmp_path_factory.mktemp("bench"))
    licence = bench.licence("cardio@north", epsilon=EPSILON, delta=DELTA, epsilon_per_job=EPSILON)
    signed = sign(licence, bench.stewards["north"].keys.signing)
    dataset = Registered(bench.card(), b"\x01" * 32, bytes(32), signed, licence)
    draw = random.Random(11)
    kinds = [draw.choice(KINDS) for _ in range(80)]
    found = [charge_for(_draw(draw, kind), kind, dataset) for kind in kinds]
    return [found[number * len(found) // JOBS] for number in range(JOBS)]


def _reserve(database: Database, number: int, charge: Charge) -> bool:
    try:
        with database.transaction() as tx:
            ledger.reserve(
                tx,
                job_id=f"{number:032x}",
                terms=number.to_bytes(32, "big"),
                submitter="clara@clara",
                purpose="research",
                deadline=1,
                epoch=1,
                charges=(charge,),
                now=0,
            )
    except BudgetError:
        return False
    return True


def _curve(event: TrainingEvent) -> np.ndarray:
    """The Rényi curve by dp-accounting, and by plain quadrature below order 3, where that one's bound is loose."""
    curve = np.array(RdpAccountant(ORDERS).compose(event.to_dp_event()).rdp)
    rate, sigma = float(event.sample_rate), event.noise_multiplier
    z = np.linspace(-14 * sigma, 4 + 14 * sigma, 20_001)
    density = np.exp(-((z / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
    ratio = 1 - rate + rate * np.exp((2 * z - 1) / (2 * sigma**2))
    for index, order in enumerate(ORDERS):
        if order < 3:
            curve[index] = math.log(np.trapezoid(density * ratio**order, z)) / (order - 1) * event.steps
    return curve


def _admits(total: np.ndarray) -> bool:
    return RenyiFilter(EPSILON, DELTA).admits(ZERO_CURVE, tuple(np.maximum(total, 0.0).tolist()))


def _holds(total: np.ndarray, delta: float) -> bool:
    """The filter's inequality (*) of decision 3, on a grid of losses and with nothing rounded outward."""
    orders, losses = np.array(ORDERS), EPSILON + np.geomspace(1e-4, 60, 1_000)
    exponent = _log_weights(EPSILON, DELTA) + (orders - 1) * (losses[:, None] - total)
    mixture = np.logaddexp.reduce(exponent, axis=1)
    return bool(np.all(np.log(-np.expm1(EPSILON - losses)) <= np.log(delta) + mixture))


def test_verdicts_and_estimate_are_those_of_composition_from_scratch(charges: list[Charge], tmp_path: Path) -> None:
    kinds = list(dict.fromkeys(charges))
    theirs = np.array([_curve(sampled(charge.event)) for charge in kinds])
    database, counts, refused = Database(tmp_path / "state"), np.zeros(len(kinds)), 0
    for number, charge in enumerate(charges):
        kind = kinds.index(charge)
        counts[kind] += 1
        is_admitted = _reserve(database, number, charge)
        total = counts @ theirs
        assert _admits(total * (1 + 1e-5)) <= is_admitted <= _admits(total * (1 - 1e-5)), number
        if number % 25 == 0 or not is_admitted:
            assert _holds(total, 0.99 * DELTA) <= is_admitted <= _holds(total, DELTA), number
        counts[kind] -= not is_admitted
        refused += not is_admitted
    assert refused > 20 and counts.sum() > 800, (refused, counts.sum())

    standings.catch_up(database, charges[0].lineage, 1)
    standings.catch_up(database, charges[0].lineage, JOBS)
    with database.transaction() as tx:
        found = standings.find_all(tx, charges[0].lineage)
        spent = ledger.spent_curve(tx, charges[0].lineage)
        ledger.verify(tx)
    database.close()
    assert len(found) == counts.sum()
    last = found[max(found)]
    assert last.epsilon == RenyiFilter(EPSILON, DELTA).spent_epsilon(spent) <= EPSILON
    accountant = PLDAccountant(value_discretization_interval=5e-4)
    for kind, count in zip(kinds, counts, strict=True):
        if count:
            accountant.compose(sampled(kind.event).to_dp_event(), int(count))
    assert last.estimate == pytest.approx(accountant.get_epsilon(DELTA), rel=0.01)
    values = [found[number].epsilon for number in sorted(found)]
    assert values == sorted(values)


@pytest.mark.parametrize("broken", ["UPDATE losses SET composed = x'c1'", "DELETE FROM losses"])
def test_standings_are_made_again_where_what_was_kept_is_lost(
    charges: list[Charge], tmp_path: Path, broken: str
) -> None:
    database, lineage = Database(tmp_path / "state"), charges[0].lineage
    for number in range(4):
        assert _reserve(database, number, charges[number * 30])
    standings.catch_up(database, lineage, 10)
    with database.transaction() as tx:
        before = standings.find_all(tx, lineage)
        tx.execute(broken)
        tx.execute("DELETE FROM standings WHERE number > 2")
    for size in (3, 4):
        standings.catch_up(database, lineage, 3)
        with database.transaction() as tx:
            found = standings.find_all(tx, lineage)
        assert len(found) == size and all(found[number] == before[number] for number in found)
    database.close()
