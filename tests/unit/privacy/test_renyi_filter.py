"""The lifetime filter: never more than the budget, also against a scientist who adapts."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from casemate_privacy import (
    CURVE_MAX,
    ORDERS,
    ZERO_CURVE,
    RenyiFilter,
    TrainingEvent,
    add_curves,
    epsilon,
    rdp_curve,
    rdp_epsilon,
)
from casemate_schemas.errors import ParameterError
from hypothesis import given, settings
from hypothesis import strategies as st

ORDER = np.array(ORDERS)


def random_event(rng):
    return TrainingEvent(
        Fraction(rng.randint(1, 1 << 16), 1 << 17), round(rng.choice([0.7, 1.0, 3.0, 10.0]) * rng.uniform(1, 3), 3),
        rng.randint(1, 200),
    )  # fmt: skip


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.sampled_from([(0.5, 1e-6), (3.0, 1e-3), (3.0, 1e-5), (10.0, 1e-5)]))
def test_what_is_admitted_stays_within_the_budget(seed, budget):
    rng, lifetime = random.Random(seed), RenyiFilter(*budget)
    admitted, spent = [], ZERO_CURVE
    for event in (random_event(rng) for _ in range(30)):
        if lifetime.admits_event(spent, event):
            spent = add_curves(spent, rdp_curve(event))
            admitted.append(event)
    if not admitted:
        return
    exact = epsilon(admitted, lifetime.delta)
    assert exact <= lifetime.epsilon
    assert exact <= lifetime.spent_epsilon(spent)
    if len(admitted) > 1:
        assert lifetime.spent_epsilon(spent) <= lifetime.epsilon
    from_scratch = ZERO_CURVE
    for event in admitted:
        from_scratch = add_curves(from_scratch, rdp_curve(event))
    assert from_scratch == spent


def fill(lifetime, event):
    spent, jobs = ZERO_CURVE, 0
    while lifetime.admits(spent, rdp_curve(event)):
        spent, jobs = add_curves(spent, rdp_curve(event)), jobs + 1
    return spent, jobs


def test_most_of_the_budget_can_be_spent():
    """A filter that refuses everything would pass the other tests."""
    for budget, least in [((3.0, 1e-3), 2.5), ((3.0, 1e-5), 2.6), ((8.0, 1e-5), 7.2)]:
        lifetime, event = RenyiFilter(*budget), TrainingEvent(Fraction(1, 4), 10.0, 10)
        _, jobs = fill(lifetime, event)
        assert epsilon([event] * jobs, lifetime.delta) > least


def test_one_more_is_refused_and_the_figures_say_so():
    lifetime, event = RenyiFilter(3.0, 1e-5), TrainingEvent(Fraction(1, 100), 1.0, 300)
    spent, jobs = fill(lifetime, event)
    assert jobs == 6
    assert not lifetime.admits_event(spent, event)
    assert lifetime.spent_epsilon(spent) <= 3.0 < lifetime.spent_epsilon(add_curves(spent, rdp_curve(event)))


def test_spent_and_remaining_at_the_ends():
    lifetime = RenyiFilter(3.0, 1e-5)
    assert (lifetime.spent_epsilon(ZERO_CURVE), lifetime.remaining_epsilon(ZERO_CURVE)) == (0.0, 3.0)
    full = (CURVE_MAX,) * len(ORDERS)
    assert lifetime.remaining_epsilon(full) == 0.0
    assert lifetime.spent_epsilon(full) > 1e5
    assert not lifetime.admits(full, ZERO_CURVE)


def test_remaining_is_what_one_gaussian_release_may_still_cost():
    lifetime = RenyiFilter(3.0, 1e-5)
    spent = rdp_curve(TrainingEvent(Fraction(1, 100), 1.0, 600))
    left = lifetime.remaining_epsilon(spent)
    fits = [
        s
        for s in np.geomspace(1, 100, 400)
        if lifetime.admits(spent, rdp_curve(TrainingEvent(Fraction(1), float(s), 1)))
    ]
    assert 0.95 * left < epsilon(TrainingEvent(Fraction(1), float(fits[0]), 1), 1e-5) <= left * 1.001
    assert left < 3.0


def test_a_first_job_may_use_the_exact_accountant_and_then_stands_alone():
    lifetime, job = RenyiFilter(3.0, 1e-3), TrainingEvent(Fraction(1, 4), 4.5785, 300)
    assert epsilon(job, 1e-3) == pytest.approx(3.0, rel=1e-3)
    assert not lifetime.admits(ZERO_CURVE, rdp_curve(job))
    assert lifetime.admits_event(ZERO_CURVE, job)
    tiny = TrainingEvent(Fraction(1, 1 << 20), 1e4, 1)
    assert not lifetime.admits_event(rdp_curve(job), tiny)
    assert not lifetime.admits_event(rdp_curve(tiny), job), "no longer the first"
    assert not lifetime.admits_event(ZERO_CURVE, TrainingEvent(Fraction(1, 4), 4.5785, 310))


def test_a_larger_budget_admits_what_a_smaller_one_does():
    spent, event = rdp_curve(TrainingEvent(Fraction(1, 10), 3.0, 100)), TrainingEvent(Fraction(1, 10), 3.0, 40)
    admitted = [RenyiFilter(e, 1e-5).admits(spent, rdp_curve(event)) for e in (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)]
    assert admitted == sorted(admitted)
    assert True in admitted and False in admitted


def spike(order, log_p, loss):
    """Curve of a mechanism that shows, with probability p, an output of privacy loss ``loss``; and its rest's loss."""
    p, q = math.exp(log_p), math.exp(log_p - loss)
    rest = math.log1p(-p) - math.log1p(-q)
    there = np.logaddexp(order * log_p + (1 - order) * (log_p - loss), math.log1p(-q) + order * rest)
    back = np.logaddexp((log_p - loss) * order + (1 - order) * log_p, math.log1p(-p) - order * rest)
    return np.maximum(np.maximum(there, back) / (order - 1), 0.0), rest


def adaptive_delta(epsilon_, rho, admits, targets):
    """What delta a scientist reaches who sees a Gaussian release of zCDP ``rho`` and then picks the best admitted spike."""
    losses = np.linspace(rho - 6 * math.sqrt(2 * rho), rho + 16 * math.sqrt(2 * rho), 61)
    density = np.exp(-((losses - rho) ** 2) / (4 * rho)) / math.sqrt(4 * math.pi * rho)
    best = np.zeros_like(losses)
    for i, seen in enumerate(losses):
        for order in targets:
            loss = max(epsilon_ + math.log(order / (order - 1)) - seen, 1e-3)
            low, high = -60.0, -1e-9
            for _ in range(18):
                middle = (low + high) / 2
                low, high = (middle, high) if admits(rho * ORDER + spike(ORDER, middle, loss)[0]) else (low, middle)
            p, rest = math.exp(low), spike(ORDER, low, loss)[1]
            harm = p * max(0.0, -math.expm1(epsilon_ - seen - loss)) + (1 - p) * max(
                0.0, -math.expm1(epsilon_ - seen - rest)
            )
            best[i] = max(best[i], harm)
    return float((best * density).sum() * (losses[1] - losses[0]))


def test_an_adaptive_scientist_breaks_the_rule_of_some_order_but_not_this_filter():
    """The reason for the mixture (docs/decisions/0003-renyi-filter.md)."""
    epsilon_, delta, rho, targets = 8.0, 1e-5, 0.1, (3, 4, 6, 9, 14)
    convert = np.log1p(-1 / ORDER) - np.log(delta * ORDER) / (ORDER - 1)
    naive = adaptive_delta(epsilon_, rho, lambda total: bool((total + convert).min() <= epsilon_), targets)
    assert naive > 1.5 * delta
    lifetime = RenyiFilter(epsilon_, delta)
    ours = adaptive_delta(
        epsilon_,
        rho,
        lambda total: lifetime.admits(tuple(map(float, np.minimum(total, CURVE_MAX))), ZERO_CURVE),
        targets,
    )
    assert 0.1 * delta < ours <= delta


def test_stricter_than_the_curve_fixed_in_advance_would_need():
    lifetime = RenyiFilter(3.0, 1e-5)
    for event in (TrainingEvent(Fraction(1, 50), 1.0, 300), TrainingEvent(Fraction(1, 4), 20.0, 300)):
        assert rdp_epsilon(rdp_curve(event), 1e-5) < lifetime.spent_epsilon(rdp_curve(event))


@pytest.mark.parametrize(
    "budget", [(math.nan, 1e-5), (0.0, 1e-5), (-1.0, 1e-5), (101.0, 1e-5), (3.0, 0.0), (3.0, math.nan)]
)
def test_absurd_budgets_are_refused(budget):
    with pytest.raises(ParameterError):
        RenyiFilter(*budget)


@pytest.mark.parametrize("bad", [(), ZERO_CURVE[1:], (*ZERO_CURVE[1:], math.nan), (*ZERO_CURVE[1:], -1.0)])
def test_malformed_curves_are_refused(bad):
    lifetime = RenyiFilter(3.0, 1e-5)
    for call in (lambda: lifetime.admits(bad, ZERO_CURVE), lambda: lifetime.admits(ZERO_CURVE, bad),
                 lambda: lifetime.spent_epsilon(bad), lambda: lifetime.remaining_epsilon(bad)):  # fmt: skip
        with pytest.raises(ParameterError):
            call()
