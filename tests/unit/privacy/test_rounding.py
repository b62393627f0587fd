"""Why discrete Gaussian noise on a grid costs what continuous noise does: the lemma, and bounds against what can happen."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest
from casemate_privacy.rounding import (
    DEVIATION_BITS,
    exact_clipping_norm,
    largest_batch,
    rounding_reserve,
)
from casemate_schemas.errors import ParameterError
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.stats import binom


def _randomly_rounded(s: float, r: float, reach: int) -> np.ndarray:
    """Probabilities that a normal of variance s² - r², rounded at random as in step 1 of the proof, becomes -reach ... reach.

    By the trapezoid rule, whose error for such integrands is far below a float's.
    """
    y, h = np.linspace(-12 * s, 12 * s, 20_001, retstep=True)
    density = np.exp(-(y**2) / (2 * (s * s - r * r))) / math.sqrt(2 * math.pi * (s * s - r * r)) * h
    integers = np.arange(-math.ceil(12 * s) - 12, math.ceil(12 * s) + 13)
    shares = np.exp(-((integers[:, None] - y) ** 2) / (2 * r * r))
    probabilities = (shares / shares.sum(axis=0)) @ density
    found: np.ndarray = probabilities[np.abs(integers) <= reach]
    return found


@pytest.mark.parametrize(("s", "r", "least"), [(0.8, 0.5, 5e-4), (1.5, 0.5, 5e-7), (1.0, 0.7, 5e-7), (2.5, 1.3, 0.0)])
def test_a_randomly_rounded_normal_is_nearly_the_discrete_gaussian(s: float, r: float, least: float) -> None:
    """The lemma's factor exp(±3η), where η is large enough to see; in the last case it is below 10^-14."""
    eta = 2 * sum(math.exp(-2 * (math.pi * r * k) ** 2) for k in range(1, 6))
    weights = np.exp(-(np.arange(-60, 61) ** 2) / (2 * s * s))
    discrete = weights[np.abs(np.arange(-60, 61)) <= 4] / weights.sum()
    worst = np.abs(np.log(_randomly_rounded(s, r, 4) / discrete)).max()
    assert least <= worst <= 3 * eta + 1e-12


def test_the_factor_is_below_the_smallest_float_for_every_job() -> None:
    eta = 2 * mp.exp(-2 * mp.pi**2 * 16**2) * (1 + mp.mpf(10) ** -100)
    assert eta < mp.mpf(10) ** -2194
    assert 6 * 2**40 * 10**6 * eta < mp.mpf(5e-324)


@pytest.mark.parametrize("sensitivity", [1, 3, 8])
def test_discrete_noise_costs_no_more_than_the_continuous_noise_that_it_is_made_of(sensitivity: int) -> None:
    """One coordinate, by dp-accounting's own discrete Gaussian: s = 8, r = 2, η < 10^-33."""
    discrete = pld.from_discrete_gaussian_mechanism(8.0, sensitivity, truncation_bound=120)
    continuous = pld.from_gaussian_mechanism(math.sqrt(64 - 4), sensitivity=sensitivity)
    for delta in (1e-3, 1e-6, 1e-9):
        assert discrete.get_epsilon_for_delta(delta) <= continuous.get_epsilon_for_delta(delta)
        # and not by chance: with hardly less noise it does not hold
        assert discrete.get_epsilon_for_delta(delta) > 0.93 * continuous.get_epsilon_for_delta(delta)


@pytest.mark.parametrize(("rows", "rate"), [(40, 1.0), (400, 0.5), (100_000, 0.001), (10, 0.01)])
def test_no_batch_exceeds_the_largest(rows: int, rate: float) -> None:
    bound = largest_batch(rows * rate)
    assert bound >= rows * rate
    if bound < rows:
        assert binom.logsf(math.floor(bound), rows, rate) < -256 * math.log(2)


def test_sums_in_any_order_err_by_less_than_the_reserve() -> None:
    """Vectors that cancel, added up in float64 in orders of all kinds; the truth is in fractions."""
    generator = np.random.Generator(np.random.PCG64(1))
    count, d = int(largest_batch(240.0)) // 2 * 2, 3
    vectors = generator.normal(size=(count, d))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[count // 2 :] = -vectors[: count // 2] * (1 - 2.0**-30)
    truth = [sum(map(Fraction, column)) for column in vectors.T.tolist()]
    limit = rounding_reserve(0.0, 0, 240.0) / 2
    orders = (np.arange(count), np.argsort(vectors[:, 0]), np.argsort(-np.abs(vectors[:, 0])))
    for some in (vectors[order] for order in orders):
        for found in (some.sum(axis=0), np.add.accumulate(some)[-1], np.ones(count) @ some):
            error = math.sqrt(sum(float(Fraction(x) - y) ** 2 for x, y in zip(found.tolist(), truth, strict=True)))
            assert error <= limit


@pytest.mark.parametrize("coordinates", [1, 15_000, 10**9])
@pytest.mark.parametrize("sigma", [0.3, 4.0, 300.0])
def test_what_is_reserved_covers_sum_grid_and_the_normal(coordinates: int, sigma: float) -> None:
    """The inequality of the module, in exact numbers: |n - n'|·g <= C·sqrt(1 - r²/s²) for all that clipping lets through."""
    norm, expected = 0.7, 256.0
    clipped = mp.mpf(exact_clipping_norm(norm, sigma, coordinates, expected, 16))
    n, unit = mp.mpf(largest_batch(expected)), mp.mpf(2) ** -53
    grid = mp.mpf(math.nextafter(sigma * norm, math.inf)) / 2**DEVIATION_BITS
    gamma = (n * 16 + 4) * unit / (1 - (n * 16 + 4) * unit)
    moved = clipped * (1 + 2 * gamma * n * 2**16) + mp.sqrt(coordinates) * grid
    allowed = mp.mpf(norm) * mp.sqrt(1 - mp.mpf(16) ** 2 / mp.mpf(2) ** (2 * DEVIATION_BITS))
    assert moved <= allowed
    assert clipped > 0.98 * norm


def test_each_part_of_the_reserve_is_in_it() -> None:
    n, unit, s = largest_batch(0.0), 2.0**-53, 2.0**DEVIATION_BITS
    sums, mixing = 2 * (n + 4) * n * unit, 16.0**2 / s**2
    assert rounding_reserve(0.0, 0, 0.0) >= sums + mixing
    assert rounding_reserve(3.0, 10_000, 0.0) >= sums + mixing + 100 * 3.0 / s
    assert rounding_reserve(0.0, 0, 0.0, 7) >= sums + mixing + 2 * (7 * n + 4) * n * 2**16 * unit


def test_more_than_a_64th_is_refused() -> None:
    exact_clipping_norm(1.0, 1e4, 10**7, 256.0)
    for asked in ((1e4, 10**8, 256.0), (1.0, 10, 1e7), (1.0, 10, 4096.0, 1024), (math.nan, 10, 256.0)):
        with pytest.raises(ParameterError):
            exact_clipping_norm(1.0, *asked)
