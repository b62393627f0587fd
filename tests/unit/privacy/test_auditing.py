"""The audit's arithmetic: against the papers' own figures, another library's, and exact probabilities of mechanisms."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from casemate_privacy import TrainingEvent, epsilon
from casemate_privacy.auditing import (
    PrivacyProfile,
    audit_report,
    guess,
    one_run_epsilon,
    one_run_noise,
    one_run_p_value,
    profile_of,
    refutes_profile,
    repeated_game_epsilon,
    scaled,
)
from casemate_schemas.audit import AuditCounts, Guesses
from casemate_schemas.codec import encode
from casemate_schemas.errors import ParameterError
from scipy import stats
from support.planted_bugs import audit_plan

PUBLISHED = [
    # canaries, guesses, right ones, delta, significance; epsilon
    ((1000, 100, 75, 1e-4, 0.05), 0.673),  # Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846v1), appendix D, page 46
    ((100_000, 1510, 1439, 1e-5, 0.05), 2.6758),  # ibid., section 7, page 28, which prints 2.675
    # google-deepmind/jax_privacy, auditing_test.py, test_epsilon_one_run_close: quantiles of two normals, 10,000 canaries each,
    # at the threshold that is best there, significance 0.05 over the number of thresholds
    ((20_000, 3376, 2807, 1e-6, 0.05 / 386), 1.13346),
    ((20_000, 4666, 4499, 1e-6, 0.05 / 374), 2.311945),
    ((20_000, 8233, 8223, 1e-6, 0.05 / 140), 4.395568),
]


@pytest.mark.parametrize(("counts", "expected"), PUBLISHED)
def test_published_figures(counts: tuple[int, int, int, float, float], expected: float) -> None:
    canaries, guesses, correct, delta, significance = counts
    found = one_run_epsilon(canaries, guesses, correct, delta=delta, significance=significance)
    assert found == pytest.approx(expected, rel=2e-5, abs=3e-5)


def exact_p_value(canaries: int, guesses: int, correct: int, epsilon_: float, delta: float) -> mpmath.mpf:
    """Corollary 5.4 with 50 digits, term by term."""
    with mpmath.workdps(50):
        right = 1 / (1 + mpmath.exp(-mpmath.mpf(epsilon_)))

        masses = [mpmath.binomial(guesses, k) * right**k * (1 - right) ** (guesses - k) for k in range(guesses + 1)]
        tail, below = mpmath.fsum(masses[correct:]), mpmath.mpf(0)
        parts = [mpmath.mpf(0)]
        for i in range(1, correct + 1):
            below += masses[correct - i]
            parts.append(below / i)
        return min(mpmath.mpf(1), tail + 2 * canaries * mpmath.mpf(delta) * max(parts))


@pytest.mark.parametrize("epsilon_", [0.0, 0.3, 8.0])
@pytest.mark.parametrize("counts", [(50, 50, 50), (200, 60, 41), (200, 60, 0), (64, 1, 1), (150, 150, 90)])
@pytest.mark.parametrize("delta", [0.0, 0.01])
def test_p_values_are_exact_and_never_below(counts: tuple[int, int, int], epsilon_: float, delta: float) -> None:
    exact = exact_p_value(*counts, epsilon_, delta)
    found = one_run_p_value(*counts, epsilon_, delta)
    assert exact <= found <= min(1, exact * (1 + mpmath.mpf(2e-9)))


def right_ones(canaries: int, epsilon_: float) -> np.ndarray:
    """The distribution of right guesses about answers to randomised response, which is exactly epsilon-private."""
    return np.asarray(stats.binom.pmf(np.arange(canaries + 1), canaries, 1 / (1 + math.exp(-epsilon_))))


@pytest.mark.parametrize("truth", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("delta", [0.0, 1e-4])
def test_a_private_mechanism_is_refuted_no_more_often_than_promised_and_almost_as_often(
    truth: float, delta: float
) -> None:
    """Exactly: randomised response, which with probability delta tells everything, is (epsilon, delta)-private."""
    canaries, significance = 60, 0.05
    masses = (1 - delta) * right_ones(canaries, truth)
    masses[canaries] += delta
    bounds = [
        one_run_epsilon(canaries, canaries, v, delta=delta, significance=significance) for v in range(canaries + 1)
    ]
    refuted = sum(mass for mass, bound in zip(masses, bounds, strict=True) if bound > truth)
    assert refuted <= significance
    if delta == 0:
        assert refuted > significance / 4
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("truth", [0.5, 2.0])
def test_a_profile_that_holds_is_refuted_no_more_often_than_promised(truth: float) -> None:
    """Exactly, for randomised response and its own profile."""
    canaries, significance = 60, 0.05
    right = 1 / (1 + math.exp(-truth))
    epsilons = np.linspace(0.0, truth, 50)
    profile = PrivacyProfile(epsilons, np.maximum(0.0, right - np.exp(epsilons) * (1 - right)))
    refuted = [v for v in range(canaries + 1) if refutes_profile(canaries, canaries, v, profile, significance)]
    assert refuted == list(range(min(refuted), canaries + 1))
    assert significance / 100 < sum(right_ones(canaries, truth)[refuted]) <= significance


def gaussian_profile(mu: float) -> PrivacyProfile:
    epsilons = np.linspace(0.0, 30.0, 3001)
    deltas = stats.norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons) * stats.norm.cdf(-mu / 2 - epsilons / mu)
    return PrivacyProfile(epsilons, np.maximum(deltas, 0.0))


def gaussian_refuted(canaries: int, guesses: int, correct: int, mu: float, significance: float) -> bool:
    """Algorithm 3 of Mahloujifar et al. with the Gaussian's trade-off curve in closed form."""
    right, wrong = significance * correct / canaries, significance * (guesses - correct) / canaries
    for i in reversed(range(correct)):
        least = max(wrong, float(stats.norm.cdf(stats.norm.ppf(min(right, 1.0)) - mu)))
        right, wrong = right + i / (guesses - i) * (least - wrong), least
    return right + wrong > guesses / canaries


@pytest.mark.parametrize("counts", [(1000, 500, 320), (1000, 125, 101), (200, 200, 150)])
def test_the_profile_of_a_gaussian_refutes_what_its_trade_off_curve_does(counts: tuple[int, int, int]) -> None:
    """Within a percent of mu: a profile on a grid claims a little less."""
    low, high = 0.01, 10.0
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gaussian_refuted(*counts, middle, 0.01) else (low, middle)
    assert refutes_profile(*counts, gaussian_profile(0.99 * low), 0.01)
    assert not refutes_profile(*counts, gaussian_profile(1.001 * high), 0.01)


def test_another_librarys_bound_for_a_gaussian_is_just_refuted() -> None:
    """jax_privacy's test_epsilon_one_run_close: epsilon 9.133752 at delta 1e-6 for 5,436 guesses, all right, of 20,000."""
    counts, significance = (20_000, 5436, 5436), 0.05 / 140
    low, high = 0.5, 5.0  # mu for epsilon 9.133752, by the Gaussian mechanism's delta
    for _ in range(60):
        mu = (low + high) / 2
        delta = stats.norm.cdf(mu / 2 - 9.133752 / mu) - math.exp(9.133752) * stats.norm.cdf(-mu / 2 - 9.133752 / mu)
        low, high = (mu, high) if delta < 1e-6 else (low, mu)
    assert refutes_profile(*counts, gaussian_profile(0.995 * low), significance)
    assert not refutes_profile(*counts, gaussian_profile(1.001 * low), significance)


EVENT = TrainingEvent(Fraction(1, 8), 2.0, 20)


def test_a_profile_says_more_than_its_point_at_delta() -> None:
    counts = Guesses(score="likelihood", top=500, bottom=0, correct=330)
    factor = one_run_noise(1000, [counts], EVENT, significance=0.05)
    assert factor is not None
    point = one_run_epsilon(1000, counts.made, counts.correct, delta=1e-5, significance=0.05)
    assert epsilon(scaled(EVENT, factor), 1e-5) > 1.3 * point > 0
    assert refutes_profile(1000, 500, 330, profile_of(scaled(EVENT, factor)), 0.05)
    assert not refutes_profile(1000, 500, 330, profile_of(scaled(EVENT, factor / 1.02)), 0.05)


def test_guesses_no_better_than_coins_prove_nothing() -> None:
    counts = [Guesses(score="spread", top=250, bottom=250, correct=250)]
    assert one_run_noise(1000, counts, EVENT, significance=0.05) is None


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ((0, 1000, 1000, 1000), 5.43),
        ((10, 1000, 300, 1000), 2.609),
        ((300, 1000, 10, 1000), 2.609),
        ((5, 9, 5, 9), 0.0),
    ],
)
def test_repeated_games_against_intervals_of_scipy(seen: tuple[int, int, int, int], expected: float) -> None:
    delta, significance = 1e-3, 0.05
    found = repeated_game_epsilon(*seen, delta=delta, significance=significance)
    tests = [stats.binomtest(seen[i], seen[i + 1]) for i in (0, 2)]
    without, having = (test.proportion_ci(1 - significance / 2, method="exact") for test in tests)
    ratios = [
        (having.low - delta) / without.high,
        (without.low - delta) / having.high,
        (1 - having.high - delta) / (1 - without.low),
        (1 - without.high - delta) / (1 - having.low),
    ]
    assert found == pytest.approx(math.log(max(1.0, *ratios)), abs=1e-9)
    assert found == pytest.approx(expected, abs=0.01)


def test_the_highest_scores_are_guessed_to_be_in_and_the_lowest_not() -> None:
    included = np.arange(64) % 4 == 3
    scores = {"likelihood": included * 100.0 + np.arange(64), "spread": np.full(64, np.nan)}
    counts = {(item.score, item.top, item.bottom): item.correct for item in guess(scores, included).guesses}
    assert counts["likelihood", 2, 0] == 2
    assert counts["likelihood", 4, 4] == 8
    assert counts["likelihood", 32, 0] == 16
    assert counts["likelihood", 16, 16] == 32
    assert counts["spread", 32, 0] == 8 and len(counts) == 12


def test_a_report_follows_from_plan_and_counts() -> None:
    plan = audit_plan(canaries=64)
    assert plan.audit is not None
    included = np.arange(64) % 2 == 0
    found = audit_report(plan, guess({"likelihood": 1.0 * included, "spread": np.zeros(64)}, included))
    assert found.epsilon == epsilon(TrainingEvent(Fraction(1, 8), 2.4913, 20), 1e-5)
    expected = one_run_epsilon(64, 32, 32, delta=1e-5, significance=0.05 / 24)
    assert found.one_run_epsilon == expected > 1.5
    assert found.profile_epsilon > found.one_run_epsilon and found.refutes


def test_reports_of_a_plan_are_equally_long_whatever_was_guessed_right() -> None:
    plan, noise = audit_plan(canaries=600), np.arange(600.0) % 7
    assert plan.audit is not None
    lengths = set()
    for coins in (np.arange(600) >= 300, np.arange(600) < 300, noise > 3):
        counts = guess({"likelihood": np.arange(600.0), "spread": noise}, coins)
        lengths.add((len(encode(counts)), len(encode(audit_report(plan, counts)))))
    assert len(lengths) > 1 and len({length for _, length in lengths}) == 1


def test_guesses_that_were_not_fixed_in_advance_are_refused() -> None:
    plan = audit_plan(canaries=64)
    fair = guess({"likelihood": np.zeros(64), "spread": np.zeros(64)}, np.zeros(64, dtype=bool)).guesses
    for bad in (fair[1:], fair[:1] * 12, (fair[0].model_copy(update={"top": 3}), *fair[1:])):
        with pytest.raises(ParameterError):
            audit_report(plan, AuditCounts(guesses=bad))


@pytest.mark.parametrize("counts", [(0, 0, 0), (10, 11, 3), (10, 5, 6), (10, 5, -1), (10, 0, 0), (200_000, 5, 1)])
def test_counts_that_cannot_be_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ParameterError):
        one_run_epsilon(*counts, delta=1e-5, significance=0.05)
    with pytest.raises(ParameterError):
        refutes_profile(*counts, gaussian_profile(1.0), 0.05)


@pytest.mark.parametrize("significance", [0.0, 1.0, math.nan, -1.0])
def test_significances_that_cannot_be_are_refused(significance: float) -> None:
    with pytest.raises(ParameterError):
        one_run_epsilon(10, 5, 5, delta=0.0, significance=significance)
    with pytest.raises(ParameterError):
        repeated_game_epsilon(0, 5, 5, 5, delta=0.0, significance=significance)
