"""The lifetime estimate, grown job by job: against closed forms, against dp-accounting from scratch, and its kept form."""

import random
from fractions import Fraction

import numpy as np
import pytest
from casemate_privacy import GaussianSumEvent, LifetimeLoss, TrainingEvent
from casemate_privacy.lifetime import MAX_POINTS, _Losses
from casemate_schemas.codec import pack, unpack
from casemate_schemas.errors import IntegrityError, ParameterError
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant


def _after(events, delta=1e-5):
    kept = LifetimeLoss.empty()
    for event in events:
        kept = kept.after(event, delta)
    return kept


@pytest.mark.parametrize(("jobs", "noise", "delta"), [(1, 5.0, 1e-5), (40, 60.0, 1e-10), (400, 80.0, 1e-3)])
def test_gaussian_sums_are_one_gaussian_release(jobs, noise, delta):
    exact = get_epsilon_gaussian(noise / np.sqrt(jobs), delta)
    estimate = _after([GaussianSumEvent(1.0, noise)] * jobs, delta).epsilon(delta)
    assert exact * (1 - 1e-7) <= estimate <= exact * 1.005


def test_heterogeneous_jobs_cost_what_dp_accounting_says_from_scratch():
    draw = random.Random(4)
    events = [
        TrainingEvent(Fraction(draw.randint(1 << 22, 1 << 28), 1 << 32), draw.uniform(0.8, 9.0), draw.randint(1, 200))
        if number % 3
        else GaussianSumEvent(2.0, draw.uniform(60, 400), draw.randint(1, 9))
        for number in range(40)
    ]
    accountant = PLDAccountant(value_discretization_interval=2e-4)
    for event in events:
        accountant.compose(getattr(event, "sampled", event).to_dp_event())
    for delta in (1e-3, 1e-5, 1e-8):
        assert _after(events).epsilon(delta) == pytest.approx(accountant.get_epsilon(delta), rel=0.01)


def test_what_nobody_released_costs_nothing_and_too_much_is_infinite():
    assert LifetimeLoss.empty().epsilon(1e-5) == 0.0
    assert _after([TrainingEvent(Fraction(1), 0.3, 1000)]).epsilon(1e-5) == float("inf")
    with pytest.raises(ParameterError):
        LifetimeLoss.empty().epsilon(0.0)


def test_a_coarser_grid_dominates_and_keeps_both_masses():
    rng = np.random.default_rng(1)
    masses = rng.dirichlet(np.ones(5000))
    fine = _Losses(2.0**-12, -2300, masses, 0.0)
    coarse = fine.coarser(2.0**-7)

    def reverse(item):
        losses = (item.first + np.arange(len(item.masses))) * item.interval
        return float((item.masses * np.exp(-losses)).sum())

    assert coarse.masses.sum() == pytest.approx(1.0, abs=1e-12)
    assert reverse(coarse) == pytest.approx(reverse(fine), rel=1e-12)
    for delta in (0.3, 1e-2, 1e-4):
        assert fine.epsilon(delta) - 1e-12 <= coarse.epsilon(delta) <= fine.epsilon(delta) + 2.0**-7


def test_what_is_kept_stays_small_and_comes_back_as_it_was():
    kept = _after([TrainingEvent(Fraction(1, 8), 0.7, 400)] * 12)
    data = kept.to_bytes()
    assert max(len(kept.remove.masses), len(kept.add.masses)) <= MAX_POINTS and len(data) < 600_000
    assert LifetimeLoss.from_bytes(data).epsilon(1e-5) == kept.epsilon(1e-5)


def _changed(index, value):
    version, remove, add = unpack(_after([GaussianSumEvent(1.0, 9.0)]).to_bytes())
    fields = list(remove)
    fields[index] = value
    return pack((version, tuple(fields), add))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        pack((2, (), ())),
        pack((1, (1.0, 0, b"", 1.0), (1.0, 0, b"", 1.0))),
        _changed(0, 0.3),
        _changed(0, 0.0),
        _changed(2, bytes(8 * (MAX_POINTS + 1))),
        _changed(2, b"\x00" * 9),
        _changed(3, 0.5),
    ],
)
def test_what_is_not_kept_losses_is_refused(data):
    with pytest.raises(IntegrityError):
        LifetimeLoss.from_bytes(data)
