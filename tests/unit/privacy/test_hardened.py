"""What computed noise adds to ε and δ: the formula once more, and the inequality that it rests on, in exact numbers."""

from __future__ import annotations

import math
import random

import mpmath as mp
import pytest
from casemate_privacy.hardened import check_hardened, hardened_excess
from casemate_schemas.errors import ParameterError

KAPPA = mp.mpf(2) ** mp.mpf("-27.9")


@pytest.mark.parametrize(
    ("coordinates", "steps", "epsilon", "delta"),
    [
        (31, 300, 3.0, 1e-5),
        (15_042, 1000, 3.0, 1e-5),
        (15_043, 1, 0.1, 1e-3),
        (3_300_000, 5000, 8.0, 1e-10),
        (1, 1, 100.0, 1e-5),
    ],
)
def test_the_formula_of_the_theorem(coordinates: int, steps: int, epsilon: float, delta: float) -> None:
    with mp.workprec(200):
        m = steps * ((coordinates + 1) // 2) + 2
        p = mp.mpf(2) ** -100 + m * mp.mpf(2) ** -83
        spread = KAPPA * mp.sqrt(2 * m * mp.log(mp.mpf(2) ** 100)) + m * ((mp.exp(KAPPA) - 1) ** 2 + mp.mpf(2) ** -83)
        alpha = min(m * KAPPA, spread)
        expected = 2 * alpha, (mp.exp(alpha) - 1) * delta + (1 + mp.exp(epsilon + alpha)) * p
        for found, exact in zip(hardened_excess(coordinates, steps, epsilon, delta), expected, strict=True):
            assert math.isclose(found, float(exact), rel_tol=1e-9)


def test_a_cell_moved_by_eta_keeps_its_probability_within_kappa() -> None:
    """Step 2 for squares at all distances up to R, also across it: their probability with a band outside, and inside."""
    generator = random.Random(1)
    with mp.workprec(300):
        eta, reach = mp.mpf(2) ** -43, mp.mpf("10.8")

        def within(low: mp.mpf, high: mp.mpf) -> mp.mpf:
            return (mp.erf(high / mp.sqrt(2)) - mp.erf(low / mp.sqrt(2))) / 2

        for distance in (0.0, 0.0, 1e-4, 0.3, 2.0, 6.0, 10.0, 10.79):
            for side in (mp.mpf(2) ** -12, mp.mpf(2) ** -13 * (1 + mp.mpf(2) ** -40)):
                turn = generator.uniform(0, 2 * math.pi) if distance < 10.7 else generator.choice([0, math.pi / 4])
                x, y = (mp.mpf(distance * f(turn)) - side * generator.random() for f in (math.cos, math.sin))
                assert mp.hypot(abs(x) + side, abs(y) + side) < reach + side * 2
                sizes = [within(x - e, x + side + e) * within(y - e, y + side + e) for e in (-eta, mp.mpf(0), eta)]
                assert mp.exp(-KAPPA) * sizes[1] <= sizes[0] < sizes[1] < sizes[2] <= mp.exp(KAPPA) * sizes[1]
                assert sizes[2] - sizes[1] > (KAPPA / 10) * sizes[1]  # the bound is of the right size


def test_rare_radii_are_as_rare_as_stated() -> None:
    with mp.workprec(200):
        assert mp.exp(-(mp.mpf("10.79") ** 2) / 2) < mp.mpf(2) ** mp.mpf("-83.9")
        assert mp.exp(-(mp.mpf("10.8") ** 2) / 2) > mp.mpf(2) ** -85
        assert mp.mpf("4.1") * mp.mpf(2) ** -30 < KAPPA * (1 - KAPPA)
        assert 4 * (1 + mp.mpf(2) ** -30) * mp.exp(mp.mpf("10.8") * mp.mpf(2) ** -11) < mp.mpf("4.1")


def test_ordinary_jobs_pass_and_others_are_told_what_to_use() -> None:
    check_hardened(15_042, 1000, 3.0, 1e-5)
    check_hardened(3_300_000, 5000, 3.0, 1e-5)
    check_hardened(31, 300, 0.01, 1e-10)
    for coordinates, steps, epsilon, delta in (
        (10**8, 10_000, 3.0, 1e-5),
        (15_042, 1000, 0.02, 1e-5),
        (9000, 9000, 50.0, 1e-10),
    ):
        with pytest.raises(ParameterError, match="mechanism='exact'"):
            check_hardened(coordinates, steps, epsilon, delta)


@pytest.mark.parametrize(
    "asked", [(0, 1, 1.0, 1e-5), (1, 0, 1.0, 1e-5), (1, 1, 0.0, 1e-5), (1, 1, 101.0, 1e-5), (1, 1, 1.0, 0.0)]
)
def test_what_makes_no_sense_is_refused(asked: tuple[int, int, float, float]) -> None:
    with pytest.raises(ParameterError):
        hardened_excess(*asked)
