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
from casemate_privacy import TrainingEvent
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
        (Fraction(1, 2), 0.29, 1),
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
