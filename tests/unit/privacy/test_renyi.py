"""The Rényi curves: against arithmetic of 30 digits, against dp-accounting, and their sums."""

import itertools
import math
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest
from casemate_privacy import CURVE_MAX, ORDERS, ZERO_CURVE, TrainingEvent, add_curves, check_curve, rdp_curve
from casemate_schemas.errors import ParameterError


def exact_divergence(rate, sigma, order):
    """Order-``order`` divergence of one step, by quadrature with 30 digits."""
    with mp.workdps(30):
        q, s, a = mp.mpf(rate), mp.mpf(sigma), mp.mpf(order)

        def excess(z):
            u = q * mp.expm1((2 * z - 1) / (2 * s * s))
            return mp.npdf(z, 0, s) * ((1 + u) ** a - 1 - a * u)

        knots = sorted(
            {-30 * s, *(i * s for i in range(-12, 13, 3)), *(a + i * s for i in range(-12, 13, 3)), a + 40 * s}
        )
        return float(mp.log1p(mp.quad(excess, knots)) / (a - 1))


@pytest.mark.parametrize(("rate", "sigma"), [(0.3, 3.0), (0.5, 0.5), (2.0**-20, 0.4), (2.0**-20, 1e4), (0.99, 20.0)])
def test_against_exact_arithmetic(rate, sigma):
    curve = rdp_curve(TrainingEvent(Fraction(rate), sigma, 1))
    for order in (1.1, 3.5, 12):
        exact = exact_divergence(rate, sigma, order)
        assert exact < curve[ORDERS.index(order)] < exact * (1 + 3e-9)


@pytest.mark.parametrize(("rate", "sigma"), [(0.3, 3.0), (0.01, 1.0), (0.00427, 1.1), (0.9, 0.5)])
def test_against_dp_accounting(rate, sigma):
    from dp_accounting.rdp import RdpAccountant

    whole = [i for i, order in enumerate(ORDERS) if order == int(order)]
    event = TrainingEvent(Fraction(rate), sigma, 1000)
    theirs = RdpAccountant([ORDERS[i] for i in whole]).compose(event.to_dp_event()).rdp
    assert np.array(rdp_curve(event))[whole] == pytest.approx(np.minimum(theirs, CURVE_MAX), rel=1e-7)


def test_full_batches_are_gaussian():
    curve = rdp_curve(TrainingEvent(Fraction(1), 10.0, 50))
    assert curve == pytest.approx([order * 50 / 200 for order in ORDERS])
    nearly = rdp_curve(TrainingEvent(Fraction(10**9 - 1, 10**9), 10.0, 50))
    assert nearly == pytest.approx(curve, rel=1e-6)


def test_curves_rise_with_the_order():
    for rate, sigma in [(0.1, 2.0), (0.001, 0.4), (0.5, 100.0)]:
        curve = rdp_curve(TrainingEvent(Fraction(rate), sigma, 10))
        assert all(low <= high for low, high in itertools.pairwise(curve))


def test_sums_are_rounded_up_and_saturate():
    curve = rdp_curve(TrainingEvent(Fraction(1, 10), 1.0, 100))
    total = ZERO_CURVE
    for _ in range(1000):
        total = add_curves(total, curve)
    for index, value in enumerate(curve):
        assert total[index] >= min(Fraction(value) * 1000, Fraction(CURVE_MAX))
        assert total[index] <= value * 1000 * (1 + 1e-12)
    full = (CURVE_MAX,) * len(ORDERS)
    assert add_curves(full, curve) == full


def test_adding_nothing_changes_nothing():
    curve = rdp_curve(TrainingEvent(Fraction(1, 10), 1.0, 100))
    assert add_curves(curve, ZERO_CURVE) == add_curves(ZERO_CURVE, curve) == curve


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-300, 2 * CURVE_MAX, 1, None, "0"])
def test_what_is_no_curve_is_refused(value):
    bad = (*ZERO_CURVE[:-1], value)
    for call in (lambda: check_curve(bad), lambda: add_curves(ZERO_CURVE, bad), lambda: add_curves(bad, ZERO_CURVE)):
        with pytest.raises(ParameterError):
            call()
    with pytest.raises(ParameterError):
        check_curve(ZERO_CURVE[1:])


def exact_group_divergence(rate, sigma, records, order):
    """The larger direction of one step for several records of one unit, by quadrature with 30 digits."""
    with mp.workdps(30):
        q, s, a = mp.mpf(rate), mp.mpf(sigma), mp.mpf(order)
        weights = [mp.binomial(records, k) * q**k * (1 - q) ** (records - k) for k in range(records + 1)]

        def moment(power):
            def density(z):
                ratio = sum(w * mp.exp((2 * k * z - k * k) / (2 * s * s)) for k, w in enumerate(weights))
                return mp.npdf(z, 0, s) * ratio**power

            reach = a * records
            knots = sorted({i * s for i in range(-12, 13, 3)} | {reach + i * s for i in range(-12, 13, 4)} | {-reach})
            return mp.log(mp.quad(density, [-reach - 30 * s, *knots, reach + 30 * s])) / (a - 1)

        return float(max(moment(a), moment(1 - a)))


@pytest.mark.parametrize(("rate", "sigma", "records"), [(0.1, 2.0, 4), (0.5, 6.0, 3), (0.01, 1.0, 2)])
def test_units_of_several_records_against_exact_arithmetic(rate, sigma, records):
    curve = rdp_curve(TrainingEvent(Fraction(rate), sigma, 1, records))
    for order in (1.5, 3, 8):
        exact = exact_group_divergence(rate, sigma, records, order)
        assert exact < curve[ORDERS.index(order)] < exact * (1 + 1e-6) + 1e-10


def test_a_unit_of_several_records_costs_more_and_never_more_than_moving_all_of_them():
    one, four = (rdp_curve(TrainingEvent(Fraction(1, 8), 3.0, 10, records)) for records in (1, 4))
    whole = rdp_curve(TrainingEvent(Fraction(1), 3.0 / 4, 10))
    assert all(a < b <= c * (1 + 1e-12) for a, b, c in zip(one, four, whole, strict=True))
    assert rdp_curve(TrainingEvent(Fraction(1), 3.0, 10, 4)) == pytest.approx(whole, rel=1e-9)
    assert all(map(math.isfinite, rdp_curve(TrainingEvent(Fraction(1, 100), 0.3, 1, 16))))
