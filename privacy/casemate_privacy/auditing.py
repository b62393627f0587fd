"""What guesses about canaries prove: lower bounds on epsilon, each false with probability at most one minus its confidence.

The game: each of ``m`` canaries is in the data with probability 1/2, by coins of their own. Having seen what was released,
an auditor guesses for some of them whether they were in, and abstains about the rest. The more guesses are right, the less
private was the release, whatever data, model and order of computation were. Neighbours differ by adding or removing one record,
which is what a coin decides. Nothing here says that a release *is* private: a clumsy auditor proves nothing.

Three bounds:

- :func:`one_run_epsilon`: from one game with many canaries, at a given delta (Steinke, Nasr, Jagielski 2023);
- :func:`one_run_noise`: from the same game, against the whole privacy profile of DP-SGD and not its one point at delta, which
  proves far more (Mahloujifar, Melis, Chaudhuri 2024);
- :func:`repeated_game_epsilon`: from many games with one canary (Nasr et al. 2021).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final, get_args

import numpy as np
from casemate_schemas.audit import AuditCounts, AuditReport, Guesses, Score, padding_of
from casemate_schemas.errors import ParameterError
from casemate_schemas.job import Audit, DatasetUse, Plan
from numpy.typing import NDArray

from .accounting import composed_pld, epsilon
from .events import (
    MAX_NOISE_MULTIPLIER,
    MIN_NOISE_MULTIPLIER,
    PrivacyEvent,
    ScheduledEvent,
    check_range,
    phases_of,
)
from .statement import job_event

_MAX_CANARIES: Final = 100_000
MAX_BOUND: Final = 50.0
"""Largest bound that is ever reported: no number of canaries allowed here proves more."""

_ROUNDING: Final = 1e-9
_BISECTIONS: Final = 30
_GUESSED_PARTS: Final = (32, 8, 2)
"""An auditor may guess about the 1/32, 1/8 or 1/2 of the canaries with the highest scores, or half from either end."""
_MAX_FACTOR: Final = 256.0
_FACTOR_PRECISION: Final = 1.01
_PROFILE: Final = np.concatenate([[0.0], np.geomspace(0.01, 25.0, 96)])
"""Epsilons at which a privacy profile is looked at."""
_PROFILE_DELTA: Final = 1e-6
"""The delta whose epsilon sets the resolution of a profile's privacy loss distribution."""

Array = NDArray[np.float64]


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """A bound on the probability of ``correct`` or more right guesses, if the release was (``epsilon``, ``delta``)-private.

    Args:
        canaries: how many were in or out by a fair coin each, 1 to 100,000.
        guesses: how many were guessed about; chosen without a look at the coins.
        correct: how many guesses were right.
        epsilon: at least 0.
        delta: in [0, 1].

    Raises :class:`~casemate_schemas.errors.ParameterError` for counts that do not fit together.

    Source: Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run" (2023), corollary 5.4 and appendix D.

    >>> round(one_run_p_value(1000, 100, 75, 0.673, 1e-4), 4)
    0.05
    """
    _check_counts(canaries, guesses, correct)
    check_range("epsilon", epsilon, 0.0, math.inf)
    check_range("delta", delta, 0.0, 1.0)
    masses = _binomial(guesses, epsilon)
    tail = math.fsum(masses[correct:])
    below = np.cumsum(masses[:correct][::-1])  # [i - 1]: from correct - i to correct - 1
    alpha = float(np.max(below / np.arange(1, correct + 1), initial=0.0))
    return min(1.0, (tail + 2 * canaries * delta * alpha) * (1 + _ROUNDING))


def one_run_epsilon(canaries: int, guesses: int, correct: int, *, delta: float, significance: float) -> float:
    """The largest epsilon that so many right guesses refute at ``delta``; 0 if they refute none.

    A private release is refuted with probability at most ``significance``, in (0, 1). Other arguments, errors and source as
    for :func:`one_run_p_value`.

    >>> round(one_run_epsilon(1000, 100, 75, delta=1e-4, significance=0.05), 3)
    0.673
    >>> round(one_run_epsilon(100_000, 1510, 1439, delta=1e-5, significance=0.05), 3)
    2.676
    """
    _check_significance(significance)
    return _largest(lambda value: one_run_p_value(canaries, guesses, correct, value, delta) < significance)


class PrivacyProfile:
    """All that is claimed of a release: that it is (ε, δ(ε))-private, for many ε at once.

    An event that has probability ``x`` with a record then has, without it (or the other way round), at least
    ``exp(-ε)(x - δ(ε))`` and at least ``1 - exp(ε)(1 - x) - δ(ε)``, whichever ε: the maximum of lines in ``x``.
    """

    def __init__(self, epsilons: Array, deltas: Array) -> None:
        """For epsilons of at least 0 and a delta for each. Leaving some out claims less, and nothing wrong."""
        slopes = np.concatenate([np.exp(-epsilons), np.exp(epsilons)])
        offsets = np.concatenate([-np.exp(-epsilons) * deltas, 1.0 - np.exp(epsilons) - deltas])
        self._slopes, self._offsets, self._from = _upper_envelope(slopes, offsets)

    def least(self, probability: float) -> float:
        """The smallest probability that such an event can have at the neighbour, in [0, 1]."""
        line = bisect_right(self._from, probability) - 1
        return max(0.0, self._slopes[line] * probability + self._offsets[line])


def refutes_profile(canaries: int, guesses: int, correct: int, profile: PrivacyProfile, significance: float) -> bool:
    """Whether so many right guesses refute what is claimed. Arguments and errors as for :func:`one_run_epsilon`.

    Source: Mahloujifar, Melis, Chaudhuri, "Auditing f-Differential Privacy in One Run" (2024), algorithm 3 with two choices.
    From ``correct`` right guesses downwards it follows bounds on the parts of right and wrong guesses, of all canaries, that
    games with at least so many right ones can have; they must add to what was guessed.
    """
    _check_counts(canaries, guesses, correct)
    _check_significance(significance)
    right, wrong = significance * correct / canaries, significance * (guesses - correct) / canaries
    for count in range(correct - 1, -1, -1):
        least = profile.least(right)
        if least <= wrong:
            break
        right, wrong = min(1.0, right + count / (guesses - count) * (least - wrong)), least
    return right + wrong > (1 + _ROUNDING) * guesses / canaries


def one_run_noise(
    canaries: int, guesses: Sequence[Guesses], event: PrivacyEvent, *, significance: float
) -> float | None:
    """The smallest factor on the noise of ``event`` with which the guesses refute the profile; ``None`` if 256 is too small.

    A release that keeps what is claimed is refuted at 1 with probability at most ``significance`` times the number of guesses.
    Profiles are the pessimistic ones of :func:`~casemate_privacy.accounting.epsilon`; the noise multiplier stays within the
    bounds of what is accounted for. Takes seconds. Errors and source as for :func:`refutes_profile`.
    """

    def refuted(factor: float) -> bool:
        profile = profile_of(scaled(event, factor))
        return any(refutes_profile(canaries, item.made, item.correct, profile, significance) for item in guesses)

    factors = _factors(event)
    if (found := bisect_left(factors, True, key=refuted)) == len(factors):
        return None
    return factors[found]


def _factors(event: PrivacyEvent) -> list[float]:
    """The factors on the noise of ``event`` that are looked at, ascending: a grid of some 1 %, the same for everyone."""
    low = MIN_NOISE_MULTIPLIER / min(phase.noise_multiplier for phase in phases_of(event))
    high = max(low, _MAX_FACTOR)
    count = math.ceil(math.log(high / low) / math.log(_FACTOR_PRECISION))
    return [low * (high / low) ** (i / count) for i in range(count)] + [high]


def scaled(event: PrivacyEvent, factor: float) -> ScheduledEvent:
    """``event`` with ``factor`` times its noise, within the bounds of what is accounted for."""

    def noise(multiplier: float) -> float:
        return min(max(multiplier * factor, MIN_NOISE_MULTIPLIER), MAX_NOISE_MULTIPLIER)

    return ScheduledEvent(
        tuple(replace(phase, noise_multiplier=noise(phase.noise_multiplier)) for phase in phases_of(event))
    )


def audit_report(plan: Plan, counts: AuditCounts) -> AuditReport:
    """What the counts of an audited run of ``plan`` prove, beside what is guaranteed where records are sampled most often.

    1. The guesses are the ones that :func:`guess` makes for so many canaries.
    2. Each is held to its share of one minus the confidence: there are two bounds, and each is the best of all guesses.
    3. :func:`one_run_epsilon` bounds epsilon whatever the mechanism is.
    4. :func:`one_run_noise` does in terms of the plan's mechanism: the epsilon of the noise that is just refuted. It is above the
       plan's own only if the plan's own guarantee is refuted.

    Takes seconds. Raises :class:`~casemate_schemas.errors.ParameterError` for a plan of no audit, or other guesses.
    """
    canaries, use = _audited(plan).canaries, _most_sampled(plan)
    if [(item.score, item.top, item.bottom) for item in counts.guesses] != list(_guesses(canaries)):  # 1
        raise ParameterError("expected the counts of every guess that an audit makes, each once")
    event, delta = job_event(plan, use), plan.privacy.delta
    significance = _significance(plan, counts)  # 2
    point = max(  # 3
        one_run_epsilon(canaries, item.made, item.correct, delta=delta, significance=significance)
        for item in counts.guesses
    )
    factor = one_run_noise(canaries, counts.guesses, event, significance=significance)  # 4
    return AuditReport(
        canaries=canaries,
        sample_rate=use.sample_rate,
        confidence=_audited(plan).confidence,
        delta=delta,
        epsilon=epsilon(event, delta),
        one_run_epsilon=point,
        profile_epsilon=0.0 if factor is None else epsilon(scaled(event, factor), delta),
        guesses=counts.guesses,
        padding=padding_of(counts.guesses),
    )


def profile_epsilons_beside(plan: Plan, counts: AuditCounts) -> tuple[float, float]:
    """What :func:`audit_report` would say of ``profile_epsilon`` had it found the noise one step of its grid below, or above.

    Whether the noise at one step is refuted can hang on the last digit of a floating-point number, which machines do not
    agree about; and then they find neighbouring steps. Arguments and errors as for :func:`audit_report`.
    """
    event = job_event(plan, _most_sampled(plan))
    significance = _significance(plan, counts)
    factor = one_run_noise(_audited(plan).canaries, counts.guesses, event, significance=significance)
    factors = _factors(event)
    found = len(factors) if factor is None else factors.index(factor)

    def at(step: int) -> float:
        if step == len(factors):
            return 0.0
        return epsilon(scaled(event, factors[step]), plan.privacy.delta)

    return at(max(found - 1, 0)), at(min(found + 1, len(factors)))


def repeated_game_epsilon(
    false_positives: int, negatives: int, true_positives: int, positives: int, *, delta: float, significance: float
) -> float:
    """The largest epsilon that an event's frequencies refute, over independent games without and with one record.

    Args:
        false_positives: in how many of ``negatives`` games without the record the event was seen.
        true_positives: in how many of ``positives`` games with the record it was seen.
        delta: in [0, 1].
        significance: in (0, 1): a private release is refuted with at most this probability.

    Both neighbours' order and the event's complement are looked at; the two rates are bounded by Clopper and Pearson (1934) at
    half the significance each, from above and from below at once.

    Raises :class:`~casemate_schemas.errors.ParameterError` for counts that do not fit together.

    Source: Nasr, Song, Thakurta, Papernot, Carlini, "Adversary Instantiation: Lower Bounds for Differentially Private Machine
    Learning" (2021), section III.

    >>> round(repeated_game_epsilon(0, 1000, 1000, 1000, delta=0.0, significance=0.05), 2)
    5.43
    """
    _check_significance(significance)
    check_range("delta", delta, 0.0, 1.0)
    without = _clopper_pearson(false_positives, negatives, significance / 4)
    having = _clopper_pearson(true_positives, positives, significance / 4)
    pairs = (
        (having[0], without[1]),
        (without[0], having[1]),
        (1 - having[1], 1 - without[0]),
        (1 - without[1], 1 - having[0]),
    )
    ratios = [(low - delta) / high for low, high in pairs if low > delta]
    return min(MAX_BOUND, math.log(max([1.0, *ratios])))


def guess(scores: Mapping[Score, Array], included: NDArray[np.bool_]) -> AuditCounts:
    """What an auditor with these scores guesses, in ways that were fixed before a score was seen, and how much was right.

    Args:
        scores: ``likelihood`` and ``spread``, float64 ``[m]``; higher where a canary looks more as if it were in.
        included: bool ``[m]``, the coins.
    """
    ranked = {
        name: included[np.argsort(np.nan_to_num(score), kind="stable")].astype(np.int64)
        for name, score in scores.items()
    }
    found = []
    for name, top, bottom in _guesses(len(included)):
        coins = ranked[name]
        correct = int(coins[len(coins) - top :].sum()) + bottom - int(coins[:bottom].sum())
        found.append(Guesses(score=name, top=top, bottom=bottom, correct=correct))
    return AuditCounts(guesses=tuple(found))


def _guesses(canaries: int) -> Iterator[tuple[Score, int, int]]:
    """Score, and numbers of canaries taken to be in and out."""
    for name in get_args(Score):
        for part in _GUESSED_PARTS:
            count = max(1, canaries // part)
            yield name, count, 0
            yield name, count - count // 2, count // 2


def _audited(plan: Plan) -> Audit:
    if plan.audit is None:
        raise ParameterError("expected a plan of kind privacy_audit")
    return plan.audit


def _most_sampled(plan: Plan) -> DatasetUse:
    """Whom the canaries stand for."""
    return max(plan.datasets, key=lambda use: use.sample_rate.fraction)


def _significance(plan: Plan, counts: AuditCounts) -> float:
    """Each guess's share, for each of the two bounds."""
    return (1 - _audited(plan).confidence) / (2 * len(counts.guesses))


@lru_cache(maxsize=256)
def profile_of(event: PrivacyEvent) -> PrivacyProfile:
    """All that is claimed of a release that is ``event``, from the accountant's pessimistic loss distribution."""
    deltas = composed_pld(event, _PROFILE_DELTA).get_delta_for_epsilon(_PROFILE.tolist())
    return PrivacyProfile(_PROFILE, np.asarray(deltas, dtype=np.float64))


def _upper_envelope(slopes: Array, offsets: Array) -> tuple[list[float], list[float], list[float]]:
    """The lines that are the highest somewhere, by slope, and from where on each of them is."""
    lines: list[tuple[float, float, float]] = []
    for slope, offset in sorted(zip(slopes.tolist(), offsets.tolist(), strict=True)):
        start = -math.inf
        while lines:
            steepest, its_offset, its_start = lines[-1]
            if slope > steepest:
                start = (its_offset - offset) / (slope - steepest)
                if start > its_start:
                    break
            lines.pop()
            start = -math.inf
        lines.append((slope, offset, start))
    return [line[0] for line in lines], [line[1] for line in lines], [line[2] for line in lines]


def _binomial(trials: int, epsilon: float) -> Array:
    """Probabilities of 0 to ``trials`` successes, each as likely as randomised response at ``epsilon`` is right."""
    from scipy.special import gammaln

    k = np.arange(trials + 1, dtype=np.float64)
    log_right, log_wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    choices = gammaln(trials + 1) - gammaln(k + 1) - gammaln(trials - k + 1)
    return np.asarray(np.exp(choices + k * log_right + (trials - k) * log_wrong), dtype=np.float64)


def _clopper_pearson(seen: int, trials: int, significance: float) -> tuple[float, float]:
    """Below and above what a rate is but for ``significance`` on each side."""
    from scipy.special import betaincinv

    if not 0 <= seen <= trials or trials < 1:
        raise ParameterError(f"expected a count of at most {trials} games, got {seen}")
    low = float(betaincinv(seen, trials - seen + 1, significance)) if seen else 0.0
    high = float(betaincinv(seen + 1, trials - seen, 1 - significance)) if seen < trials else 1.0
    return low, high


def _largest(refuted: Callable[[float], bool]) -> float:
    """The largest epsilon that is refuted, from below; what refutes one refutes every smaller one."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high) and high < MAX_BOUND:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return min(low, MAX_BOUND)


def _check_counts(canaries: int, guesses: int, correct: int) -> None:
    if not (1 <= canaries <= _MAX_CANARIES and 1 <= guesses <= canaries and 0 <= correct <= guesses):
        raise ParameterError(
            f"expected right guesses among those made about canaries, got {correct}, {guesses}, {canaries}"
        )


def _check_significance(significance: float) -> None:
    if not 0 < significance < 1:
        raise ParameterError(f"significance: expected a number between 0 and 1, got {significance}")
