"""Noise that changes on the way: solved for as one job, and charged as what it is."""

from fractions import Fraction

import pytest
from casemate_privacy import OwnerTarget, TrainingEvent, epsilon, noise_multiplier, plan_job, sample_rate
from casemate_privacy.shapes import JobShape
from casemate_schemas.errors import ParameterError
from casemate_schemas.job import NoisePhase

RATE = Fraction(1, 10)
SHAPE = JobShape.of(100, [NoisePhase(first_step=40, factor=0.7), NoisePhase(first_step=80, factor=2.0)])


def test_noise_at_the_start_is_the_least_with_which_all_phases_together_meet_the_target():
    sigma = noise_multiplier(3.0, 1e-3, RATE, SHAPE)
    phases = [TrainingEvent(RATE, sigma * factor, steps) for steps, factor in ((40, 1.0), (40, 0.7), (20, 2.0))]
    assert 3.0 * 0.999 < epsilon(phases, 1e-3) <= 3.0
    assert SHAPE.event(RATE, sigma).phases == tuple(phases)
    constant = noise_multiplier(3.0, 1e-3, RATE, 100)
    assert constant < sigma < constant / 0.7  # the second phase is the dearest, and neither the only one


def test_a_release_to_which_all_records_add_is_planned_for():
    more = JobShape.of(100, once=(8.0,))
    sigma = noise_multiplier(3.0, 1e-3, RATE, more)
    assert sigma > noise_multiplier(3.0, 1e-3, RATE, 100)
    events = [TrainingEvent(RATE, sigma, 100), TrainingEvent(Fraction(1), 8.0, 1)]
    assert 3.0 * 0.999 < epsilon(events, 1e-3) <= 3.0


def test_rates_and_plans_know_the_schedule():
    rate = sample_rate(1.0, 1e-5, 4.0, SHAPE)
    assert 0.999 < epsilon(SHAPE.event(rate, 4.0), 1e-5) <= 1.0
    plan = plan_job([OwnerTarget(152, 3.0, 1e-3), OwnerTarget(152, 1.0, 1e-3)], SHAPE, 60)
    assert plan.steps == 100
    for index, target in enumerate((3.0, 1.0)):
        assert target * 0.999 < epsilon(plan.event(index), 1e-3) <= target
    assert sum(152 * float(rate) for rate in plan.rates) == pytest.approx(60, rel=0.01)


def test_a_generous_target_gets_the_least_noise_that_every_phase_allows():
    sigma = noise_multiplier(100.0, 0.5, Fraction(1, 1000), SHAPE)
    assert sigma == pytest.approx(0.3 / 0.7)
    assert min(phase.noise_multiplier for phase in SHAPE.event(RATE, sigma).phases) >= 0.3


@pytest.mark.parametrize("firsts", [(100,), (40, 40), (60, 30)])
def test_phases_ascend_and_lie_within_the_job(firsts):
    with pytest.raises(ParameterError):
        JobShape.of(100, [NoisePhase(first_step=first, factor=2.0) for first in firsts])
