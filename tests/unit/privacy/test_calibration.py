"""Noise and rates for targets: met, tight, and refused where absurd."""

import math
from fractions import Fraction

import pytest
from casemate_privacy import OwnerTarget, TrainingEvent, epsilon, noise_multiplier, plan_job, plan_rates, sample_rate
from casemate_schemas.errors import ParameterError


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [
        (3.0, 1e-3, Fraction(1, 10), 100),
        (3.0, 1e-3, Fraction(1, 2), 400),
        (1.0, 1e-5, Fraction(3, 10), 3000),
        (8.0, 1e-6, Fraction(1, 3), 500),
        (0.05, 1e-5, Fraction(1), 10),
    ],
)
def test_the_smallest_noise_that_meets_the_target(target, delta, rate, steps):
    sigma = noise_multiplier(target, delta, rate, steps)
    assert target * 0.999 < epsilon(TrainingEvent(rate, sigma, steps), delta) <= target
    assert sigma == float(f"{sigma:.5g}")
    less = float(f"{sigma * (1 - 1.5e-4):.5g}")
    assert epsilon(TrainingEvent(rate, less, steps), delta) > target * (1 - 1e-6)


def test_a_generous_target_gets_the_least_noise_allowed():
    assert noise_multiplier(100.0, 0.5, Fraction(1, 1000), 1) == 0.3


@pytest.mark.parametrize("target", [0.5, 3.0, 20.0])
def test_the_largest_rate_that_meets_the_target(target):
    rate = sample_rate(target, 1e-5, 6.0, 1000)
    assert target * 0.999 < epsilon(TrainingEvent(rate, 6.0, 1000), 1e-5) <= target
    assert (rate * 2**32).denominator == 1


def test_a_rate_needs_no_more_than_one():
    assert sample_rate(50.0, 1e-5, 30.0, 10) == 1


GOOD = {"target_epsilon": 3.0, "delta": 1e-5, "sample_rate": Fraction(1, 4), "steps": 100}


@pytest.mark.parametrize(
    "bad",
    [
        {"target_epsilon": math.nan},
        {"target_epsilon": -1.0},
        {"target_epsilon": 0.0},
        {"target_epsilon": 1e6},
        {"delta": 0.0},
        {"delta": 1.0},
        {"sample_rate": Fraction(0)},
        {"sample_rate": 0.25},
        {"steps": 0},
        {"steps": 10**7},
        {"target_epsilon": 0.001, "delta": 1e-10, "sample_rate": Fraction(1), "steps": 10**6},
    ],
)
def test_absurd_or_unreachable_targets_are_refused(bad):
    with pytest.raises(ParameterError):
        noise_multiplier(**(GOOD | bad))


def test_no_rate_meets_a_strict_target_under_little_noise():
    with pytest.raises(ParameterError):
        sample_rate(0.01, 1e-10, 0.3, 100_000)


HOSPITAL = OwnerTarget(152, 3.0, 1e-3)


def test_equal_owners_get_equal_rates():
    plan = plan_job([HOSPITAL] * 3, steps=300, expected_batch=114)
    assert len(set(plan.rates)) == 1
    assert sum(float(rate) * 152 for rate in plan.rates) == pytest.approx(114, rel=0.01)
    assert plan.noise_multiplier == noise_multiplier(3.0, 1e-3, Fraction(1, 4), 300)
    assert plan.epsilons == tuple(epsilon(plan.event(i), 1e-3) for i in range(3))


def test_each_owner_reaches_its_own_epsilon():
    owners = [HOSPITAL, OwnerTarget(152, 1.0, 1e-4), OwnerTarget(300, 8.0, 1e-3)]
    plan = plan_job(owners, steps=200, expected_batch=100)
    for index, owner in enumerate(owners):
        assert owner.epsilon * 0.99 < epsilon(plan.event(index), owner.delta) <= owner.epsilon
    assert plan.rates[1] < plan.rates[0] < plan.rates[2]
    assert sum(float(rate) * owner.rows for rate, owner in zip(plan.rates, owners, strict=True)) == pytest.approx(
        100, rel=0.01
    )


def test_the_strictest_owner_does_not_set_the_noise_for_all():
    owners = [HOSPITAL, HOSPITAL, OwnerTarget(152, 0.5, 1e-3)]
    plan = plan_job(owners, steps=200, expected_batch=100)
    common = Fraction(100, 3 * 152)
    assert noise_multiplier(3.0, 1e-3, common, 200) < plan.noise_multiplier
    assert plan.noise_multiplier < 0.5 * noise_multiplier(0.5, 1e-3, common, 200)


def test_rates_for_a_given_noise():
    plan = plan_rates([HOSPITAL, HOSPITAL, OwnerTarget(10, 90.0, 0.1)], 300, 5.0)
    assert plan.rates[0] == plan.rates[1] < plan.rates[2] == 1


@pytest.mark.parametrize("rows", [0, -1, 1.5, math.nan, 1 << 41])
def test_absurd_rows_are_refused(rows):
    with pytest.raises(ParameterError):
        OwnerTarget(rows, 3.0, 1e-3)


@pytest.mark.parametrize(
    ("owners", "steps", "batch"),
    [
        ([], 100, 10),
        ([HOSPITAL] * 65, 100, 10),
        ([HOSPITAL], 0, 10),
        ([HOSPITAL], 100, 153),
        ([HOSPITAL], 100, math.nan),
    ],
)
def test_absurd_plans_are_refused(owners, steps, batch):
    with pytest.raises(ParameterError):
        plan_job(owners, steps, batch)
