"""Events: what is refused, exact rates, and the way to dp-accounting and back. And every module's doctests."""

import doctest
import importlib
import math
import pkgutil
import subprocess
import sys
from fractions import Fraction

import casemate_privacy
import pytest
from casemate_privacy import LifetimeLoss, ScheduledEvent, TrainingEvent
from casemate_privacy.events import merge, phases_of, sampled
from casemate_schemas.errors import ParameterError


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"),
    [
        (Fraction(0), 1.0, 1),
        (Fraction(-1, 2), 1.0, 1),
        (Fraction(3, 2), 1.0, 1),
        (Fraction(1, 1 << 21), 1.0, 1),
        (Fraction((1 << 64), (1 << 65) + 1), 1.0, 1),
        (0.5, 1.0, 1),
        (1, 1.0, 1),
        (Fraction(1, 2), math.nan, 1),
        (Fraction(1, 2), math.inf, 1),
        (Fraction(1, 2), 0.0, 1),
        (Fraction(1, 2), -1.0, 1),
        (Fraction(1, 2), 0.0099, 1),
        (Fraction(1, 2), 10_001.0, 1),
        (Fraction(1, 2), "1", 1),
        (Fraction(1, 2), 1.0, 0),
        (Fraction(1, 2), 1.0, -1),
        (Fraction(1, 2), 1.0, 1_000_001),
        (Fraction(1, 2), 1.0, 1.0),
        (Fraction(1, 2), 1.0, True),
    ],
)
def test_absurd_events_are_refused(rate, sigma, steps):
    with pytest.raises(ParameterError):
        TrainingEvent(rate, sigma, steps)


def test_a_rate_without_a_float_is_rounded_up():
    third = TrainingEvent(Fraction(1, 3), 1.0, 1)
    assert Fraction(third.rate_upper) > Fraction(1, 3) > Fraction(math.nextafter(third.rate_upper, 0))
    assert TrainingEvent(Fraction(3, 1 << 20), 1.0, 1).rate_upper == 3 / (1 << 20)


def test_many_equal_steps_of_several_jobs_are_no_more_than_one_event_may_have():
    long = TrainingEvent(Fraction(1, 1 << 20), 10.0, 600_000)
    assert [event.steps for event in merge([long, long])] == [1_000_000, 200_000]
    alone = casemate_privacy.epsilon(long, 1e-5)
    assert alone < casemate_privacy.epsilon([long, long], 1e-5) < 2 * alone


def test_phases_in_any_order_cost_the_same_and_one_phase_is_itself():
    one, two = TrainingEvent(Fraction(1, 8), 3.0, 20), TrainingEvent(Fraction(1, 8), 2.0, 10)
    assert phases_of(ScheduledEvent((one, two, one))) == (two, TrainingEvent(Fraction(1, 8), 3.0, 40))
    assert casemate_privacy.epsilon(ScheduledEvent((one,)), 1e-5) == casemate_privacy.epsilon(one, 1e-5)
    schedule, both = ScheduledEvent((one, two)), [two, one]
    assert casemate_privacy.epsilon(schedule, 1e-5) == casemate_privacy.epsilon(both, 1e-5)
    curves = (casemate_privacy.rdp_curve(event) for event in both)
    assert casemate_privacy.rdp_curve(schedule) == casemate_privacy.add_curves(*curves)
    kept = LifetimeLoss.empty().after(schedule, 1e-5).epsilon(1e-5)
    assert kept == pytest.approx(casemate_privacy.epsilon(schedule, 1e-5), rel=1e-3)
    with pytest.raises(ParameterError, match="one phase"):
        sampled(schedule)


@pytest.mark.parametrize(
    "phases",
    [
        (),
        [TrainingEvent(Fraction(1, 2), 1.0, 1)],
        (TrainingEvent(Fraction(1, 2), 1.0, 1), None),
        (TrainingEvent(Fraction(1, 2), 1.0, 1), TrainingEvent(Fraction(1, 2), 1.0, 1, 2)),
        (TrainingEvent(Fraction(1, 2), 1.0, 1_000_000), TrainingEvent(Fraction(1, 2), 2.0, 1)),
        (TrainingEvent(Fraction(1, 2), 1.0, 1),) * 257,
    ],
)
def test_absurd_schedules_are_refused(phases):
    with pytest.raises(ParameterError):
        ScheduledEvent(phases)


def test_a_rarely_drawn_unit_of_many_records_under_little_noise_overflows_nothing():
    assert casemate_privacy.epsilon(TrainingEvent(Fraction(1, 1 << 20), 0.3, 1, 16), 1e-3) == 0.0


def test_to_dp_accounting_and_back():
    event = TrainingEvent(Fraction(12345, 1 << 20), 1.25, 321)
    assert TrainingEvent.from_dp_event(event.to_dp_event()) == event


def test_the_same_epsilon_by_dp_accountings_own_accountant():
    from dp_accounting.pld import PLDAccountant

    event = TrainingEvent(Fraction(1, 4), 4.5785, 300)
    accountant = PLDAccountant(value_discretization_interval=1e-4).compose(event.to_dp_event())
    assert casemate_privacy.epsilon(event, 1e-3) == pytest.approx(accountant.get_epsilon(1e-3), rel=2e-4)


def test_foreign_dp_events_are_refused():
    import dp_accounting as dp

    for event in (dp.GaussianDpEvent(1.0), dp.SelfComposedDpEvent(dp.LaplaceDpEvent(1.0), 3), dp.NonPrivateDpEvent()):
        with pytest.raises(ParameterError):
            TrainingEvent.from_dp_event(event)
    bad = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(math.nan, dp.GaussianDpEvent(1.0)), 3)
    with pytest.raises(ParameterError):
        TrainingEvent.from_dp_event(bad)


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(casemate_privacy.__path__)])
def test_the_numbers_in_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(f"casemate_privacy.{name}")).failed == 0


def test_importing_it_does_not_import_scipy():
    code = "import sys, casemate_privacy; print({'scipy', 'dp_accounting', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
