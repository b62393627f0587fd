"""Epsilon against published figures, an independent accountant, exact formulas and its own monotonicity."""

import math
import warnings
from fractions import Fraction

import pytest
from casemate_privacy import (
    GaussianSumEvent,
    TrainingEvent,
    epsilon,
    epsilon_estimate,
    person_epsilon,
    rdp_curve,
    rdp_epsilon,
)
from casemate_schemas.errors import ParameterError
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

TABLE = [
    # rate, noise multiplier, steps, delta, PLD at interval 1e-4, RDP
    ("0.00427", 1.1, 14000, 1e-5, 2.376, 2.590),
    ("0.0819", 3.0, 2000, 1e-5, 5.774, 6.239),
    ("0.00853", 1.0, 1200, 1e-5, 1.681, 1.941),
    ("0.0001", 0.6, 50000, 1e-7, 1.257, 2.631),
    ("0.02", 0.6, 3000, 1e-5, 25.03, 27.5),
]


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta", "pld", "rdp"), TABLE)
def test_known_figures(rate, sigma, steps, delta, pld, rdp):
    event = TrainingEvent(Fraction(rate), sigma, steps)
    assert epsilon(event, delta) == pytest.approx(pld, rel=1.2e-3)
    assert rdp_epsilon(rdp_curve(event), delta) == pytest.approx(rdp, rel=0.04)


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "delta"),
    [("0.0819", 3.0, 2000, 1e-5), ("0.25", 4.5785, 300, 1e-3), ("0.01", 1.0, 500, 1e-5)],
)
def test_an_independent_accountant_agrees(rate, sigma, steps, delta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(sigma, float(Fraction(rate)), steps)]
        prv = accountant.get_epsilon(delta=delta, eps_error=0.005)
    ours = epsilon(TrainingEvent(Fraction(rate), sigma, steps), delta)
    assert prv - 0.011 <= ours <= prv + 0.001, "PRV's figure includes its error bound, ours only the discretisation"


@pytest.mark.parametrize(("sigma", "steps"), [(30.0, 400), (5.0, 7)])
@pytest.mark.parametrize("delta", [1e-3, 1e-10])
def test_full_batches_cost_what_the_gaussian_formula_says(sigma, steps, delta):
    mu = math.sqrt(steps) / sigma
    value = epsilon(TrainingEvent(Fraction(1), sigma, steps), delta)
    true_delta = norm.cdf(mu / 2 - value / mu) - math.exp(value) * norm.cdf(-mu / 2 - value / mu)
    assert 0.99 * delta < true_delta <= delta


def test_never_below_the_truth_and_close_to_it():
    event = TrainingEvent(Fraction(1, 4), 4.0, 200)
    from dp_accounting.pld import privacy_loss_distribution as pld

    def reference(pessimistic):
        step = pld.from_gaussian_mechanism(
            4.0, sampling_prob=0.25, value_discretization_interval=2e-5, pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        )  # fmt: skip
        return step.self_compose(200).get_epsilon_for_delta(1e-5)

    assert reference(False) < epsilon(event, 1e-5) < reference(True) * 1.0005


def test_equal_events_merge_and_order_does_not_matter():
    a, b = TrainingEvent(Fraction(1, 8), 3.0, 100), TrainingEvent(Fraction(1, 3), 5.0, 50)
    doubled = TrainingEvent(Fraction(1, 8), 3.0, 200)
    assert epsilon([a, a], 1e-5) == epsilon(doubled, 1e-5)
    assert epsilon_estimate([a, b, a], 1e-5) == epsilon_estimate([doubled, b], 1e-5) == epsilon([b, doubled], 1e-5)
    assert max(epsilon(doubled, 1e-5), epsilon(b, 1e-5)) < epsilon([a, b, a], 1e-5)
    assert epsilon([a, b, a], 1e-5) < epsilon(doubled, 1e-5) + epsilon(b, 1e-5)


def test_nothing_costs_nothing():
    assert epsilon([], 1e-5) == 0.0


def test_hopeless_parameters_get_the_renyi_bound_at_once():
    event = TrainingEvent(Fraction(1), 0.3, 1_000_000)
    assert epsilon(event, 1e-5) == rdp_epsilon(rdp_curve(event), 1e-5) > 1e6


@settings(max_examples=8, deadline=None)
@given(
    rate=st.fractions(Fraction(1, 1000), Fraction(1, 2), max_denominator=10**6),
    sigma=st.floats(0.7, 20),
    steps=st.integers(1, 2000),
)
def test_monotone_in_everything(rate, sigma, steps):
    base = epsilon(TrainingEvent(rate, sigma, steps), 1e-5)
    slack = base * 3e-3 + 1e-9  # the discretisation differs between the two
    assert epsilon(TrainingEvent(rate * 2, sigma, steps), 1e-5) >= base - slack
    assert epsilon(TrainingEvent(rate, sigma, steps * 2), 1e-5) >= base - slack
    assert epsilon(TrainingEvent(rate, sigma * 2, steps), 1e-5) <= base + slack
    assert epsilon(TrainingEvent(rate, sigma, steps), 1e-6) >= base
    assert base <= rdp_epsilon(rdp_curve(TrainingEvent(rate, sigma, steps)), 1e-5)


EVENT = TrainingEvent(Fraction(1, 4), 8.0, 200)


def test_one_record_is_the_ordinary_case():
    assert person_epsilon([EVENT], 1e-3) == pytest.approx(epsilon(EVENT, 1e-3), rel=1e-6)


def test_a_person_at_several_owners_of_one_job_pays_more_than_the_sum():
    """The noise is shared, so adding epsilons and deltas would claim too much: the group bound is what holds."""
    alone, together = epsilon(EVENT, 1e-3), person_epsilon([EVENT] * 3, 3e-3)
    assert together > 3 * alone * 1.1
    group_delta = 1e-3 * (1 + math.exp(alone) + math.exp(2 * alone))
    assert person_epsilon([EVENT] * 3, group_delta) < 3 * alone


def test_a_rarely_sampled_second_record_costs_little():
    rare = TrainingEvent(Fraction(1, 1000), 8.0, 200)
    assert epsilon(EVENT, 1e-3) < person_epsilon([EVENT, rare], 1e-3) < epsilon(EVENT, 1e-3) * 1.02


def test_full_batches_of_two_records_are_twice_the_sensitivity():
    full = TrainingEvent(Fraction(1), 40.0, 100)
    half_the_noise = TrainingEvent(Fraction(1), 20.0, 100)
    assert person_epsilon([full, full], 1e-5) == pytest.approx(epsilon(half_the_noise, 1e-5), rel=2e-3)


@pytest.mark.parametrize(
    "events",
    [[], [EVENT] * 17, [EVENT, TrainingEvent(Fraction(1, 4), 7.0, 200)], [TrainingEvent(Fraction(1), 0.3, 10**6)]],
)
def test_no_person_epsilon_outside_one_job(events):
    with pytest.raises(ParameterError):
        person_epsilon(events, 1e-3)


@pytest.mark.parametrize("delta", [math.nan, 0.0, -1e-5, 1e-11, 0.6, 1, math.inf, "1e-5", None, True])
def test_absurd_deltas_are_refused(delta):
    with pytest.raises(ParameterError):
        epsilon(EVENT, delta)
    with pytest.raises(ParameterError):
        person_epsilon([EVENT], delta)


def test_too_many_distinct_events_are_refused():
    with pytest.raises(ParameterError):
        epsilon([TrainingEvent(Fraction(1, 4), 1.0 + i / 1024, 1) for i in range(1025)], 1e-5)


def test_a_subject_with_several_records_is_a_person_in_as_many_datasets():
    one = TrainingEvent(Fraction(1, 8), 4.0, 100)
    assert epsilon(TrainingEvent(Fraction(1, 8), 4.0, 100, 3), 1e-5) == pytest.approx(
        person_epsilon([one] * 3, 1e-5), rel=2e-3
    )
    full = TrainingEvent(Fraction(1), 8.0, 10, 2)
    assert epsilon(full, 1e-5) == pytest.approx(epsilon(TrainingEvent(Fraction(1), 4.0, 10), 1e-5), rel=1e-6)


def test_evaluations_and_statistics_are_gaussian_releases():
    event = GaussianSumEvent(sensitivity=3.0, noise_std=30.0, releases=4)
    assert epsilon([event], 1e-5) == epsilon(event, 1e-5) == pytest.approx(get_epsilon_gaussian(5.0, 1e-5), rel=1e-3)
