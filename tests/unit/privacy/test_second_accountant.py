"""The second accountant's interval holds what Opacus, closed formulas and the first accountant say, over a grid and at random."""

import math
import warnings
from fractions import Fraction

import pytest
from casemate_privacy import ScheduledEvent, TrainingEvent, epsilon, noise_multiplier, person_epsilon, plan_job
from casemate_privacy.owners import OwnerTarget
from casemate_privacy.prv import prv_epsilon, prv_person_epsilon
from casemate_privacy.shapes import JobShape
from casemate_schemas.errors import ParameterError
from casemate_schemas.job import NoisePhase
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

GRID = [
    # rate, noise multiplier, steps, delta
    ("1/2", 8.0, 100, 1e-3),
    ("1/4", 4.5785, 300, 1e-3),
    ("0.0819", 3.0, 2000, 1e-5),
    ("0.01", 1.0, 500, 1e-5),
    ("0.00427", 1.1, 4000, 1e-5),
    ("0.02", 0.7, 300, 1e-6),
    ("0.001", 0.6, 2000, 1e-7),
]


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), GRID)
def test_opacus_and_both_of_ours_agree(rate, sigma, steps, delta):
    """Opacus' figure is an upper bound, above the truth by less than twice its error."""
    event = TrainingEvent(Fraction(rate), sigma, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(sigma, float(Fraction(rate)), steps)]
        opacus = accountant.get_epsilon(delta=delta, eps_error=0.01)
    ours = epsilon(event, delta)
    found = prv_epsilon([event], delta, 0.01)
    assert opacus - 0.021 <= ours <= opacus
    assert max(ours - 0.01, found.lower) <= found.estimate <= ours <= found.estimate * (1 + 2e-4)
    assert ours <= found.upper < found.lower + 0.022


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    rate=st.fractions(Fraction(1, 2000), Fraction(1), max_denominator=10**6),
    sigma=st.floats(0.6, 30),
    steps=st.integers(1, 3000),
    unit_records=st.sampled_from([1, 1, 2, 5]),
    delta=st.sampled_from([1e-3, 1e-5, 1e-7]),
)
def test_the_first_accountant_is_never_below_the_truth_and_close_to_it(rate, sigma, steps, unit_records, delta):
    event = TrainingEvent(rate, sigma, steps, unit_records)
    ours = epsilon(event, delta)
    if ours > 50:  # beyond what anyone may plan with so little noise; the coarser bound answers from 100 on
        return
    found = prv_epsilon([event], delta, max(1e-3 * ours, 1e-4))
    assert found.lower <= ours <= found.upper * 1.001 + 1e-6


def test_full_batches_are_the_closed_formula():
    for sigma, steps, delta in ((30.0, 400, 1e-9), (5.0, 7, 1e-3)):
        exact = get_epsilon_gaussian(sigma / math.sqrt(steps), delta)
        found = prv_epsilon([TrainingEvent(Fraction(1), sigma, steps)], delta, 1e-3)
        assert found.lower < exact < found.upper and found.estimate == pytest.approx(exact, rel=1e-4)


SCHEDULE = (NoisePhase(first_step=100, factor=0.8), NoisePhase(first_step=250, factor=0.5))
TINY_STEPS_AND_ONE_RELEASE = [TrainingEvent(Fraction(1, 1000), 2.0, 4000), TrainingEvent(Fraction(1), 5.0, 1)]


@pytest.mark.parametrize(
    "events",
    [
        [TrainingEvent(Fraction(1, 8), 3.0, 100), TrainingEvent(Fraction(1, 3), 5.0, 50)],
        [JobShape.of(300, SCHEDULE).event(Fraction(1, 16), 3.0)],
        TINY_STEPS_AND_ONE_RELEASE,
    ],
    ids=["two jobs", "a schedule", "tiny steps and one release"],
)
def test_compositions_of_unlike_releases_stay_tight(events):
    """One interval for all must be fine for the many small losses, not for the one large: that cost 3 % once."""
    ours = epsilon(events, 1e-5)
    found = prv_epsilon(events, 1e-5, 1e-3)
    assert found.lower <= found.estimate <= ours <= found.estimate * (1 + 5e-4)


def test_a_person_at_several_owners_under_a_schedule():
    shape = JobShape.of(200, (NoisePhase(first_step=120, factor=0.75),), once=(20.0,))
    events = [shape.event(rate, 8.0) for rate in (Fraction(1, 4), Fraction(1, 10), Fraction(1, 3))]
    ours = person_epsilon(events, 1e-3)
    found = prv_person_epsilon(events, 1e-3, 2e-3)
    assert found.lower <= ours <= found.upper and ours == pytest.approx(found.estimate, rel=1e-3)
    assert max(epsilon(event, 1e-3) for event in events) * 1.5 < ours
    with pytest.raises(ParameterError):
        person_epsilon([events[0], ScheduledEvent(events[1].phases[:1])], 1e-3)


def test_noise_is_calibrated_to_a_tenth_of_a_percent_of_epsilon():
    """For a schedule with DP metrics, and for several owners: met, and not missed, as the second accountant sees it."""
    shape = JobShape.of(60, (NoisePhase(first_step=40, factor=0.75),), once=(40.0,))
    scheduled = shape.event(Fraction(1, 10), noise_multiplier(2.0, 1e-5, Fraction(1, 10), shape))
    plan = plan_job([OwnerTarget(800, 3.0, 1e-5), OwnerTarget(500, 1.0, 1e-6)], 60, 200)
    for event, target, delta in ((scheduled, 2.0, 1e-5), (plan.event(0), 3.0, 1e-5), (plan.event(1), 1.0, 1e-6)):
        assert 0.999 * target < epsilon(event, delta) <= target
        found = prv_epsilon([event], delta, 2e-3)
        assert 0.9985 * target < found.estimate <= target and found.lower <= target


@pytest.mark.parametrize(
    ("events", "delta", "error"),
    [
        ([TrainingEvent(Fraction(1, 2), 2.0, 3)], math.nan, 0.01),
        ([TrainingEvent(Fraction(1, 2), 2.0, 3)], 1e-5, 0.0),
        ([TrainingEvent(Fraction(1, 2), 2.0 + i, 3) for i in range(257)], 1e-5, 0.01),
        ([TrainingEvent(Fraction(1), 0.3, 1000)], 1e-5, 0.01),
    ],
)
def test_what_it_cannot_check_is_refused(events, delta, error):
    with pytest.raises(ParameterError):
        prv_epsilon(events, delta, error)


def test_nothing_costs_nothing():
    assert prv_epsilon([], 1e-5, 0.01).upper == 0.0
