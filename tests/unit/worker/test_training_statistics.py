"""What the keystreams are made into has the right distribution: noise of both mechanisms, and samples.

Each test is a number of standard errors, over draws of a fixed key: no test is flaky. A right program whose key is chosen
anew fails one with the probability 6·10^-5 (beyond 4 standard errors). *Power*: each test is shown the deviation that its
name tells, planted into the very same draws, and must find it. All of these are worth 7.1 standard errors or more on
average, so with another key, too, one of that size would be found with a probability of at least 0.999.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from casemate_privacy.events import TrainingEvent
from casemate_schemas.errors import ParameterError
from casemate_worker.training.keystream import Keystream
from casemate_worker.training.noise import Noise, noise_mechanism
from casemate_worker.training.sampling import PoissonSampler
from scipy.special import ndtr
from scipy.stats import chi2, kstwobign, norm
from support import training_reference as reference

Array = np.ndarray
Surprise = Callable[[Array], float]
"""How many standard errors draws ``[steps, coordinates]`` are from what they should be, as of a normal."""

SEED, OTHER = bytes(range(32)), bytes(range(1, 33))
LIMIT = 4.0
STEPS, COORDINATES = 128, 4097
SIGMA, CLIPPING_NORM = 1.7, 0.6
MECHANISMS = ("hardened", "exact")


def _mechanism(name: str, seed: bytes = SEED) -> Noise:
    return noise_mechanism(name, seed, CLIPPING_NORM)(SIGMA)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=MECHANISMS)
def draws(request: pytest.FixtureRequest) -> Array:
    """Noise over its nominal deviation, ``[steps, coordinates]``: half a million draws."""
    noise, zeros = _mechanism(request.param), torch.zeros(COORDINATES, dtype=torch.float64)
    rows = [noise.add(zeros, step).numpy() / (SIGMA * CLIPPING_NORM) for step in range(STEPS)]
    return np.array(rows)


def _of_p_value(p_value: float) -> float:
    """The standard errors of a two-sided normal test with this p-value."""
    return float(norm.isf(max(p_value, 1e-300) / 2))


def _mean(z: Array) -> float:
    return abs(float(z.mean())) * math.sqrt(z.size)


def _variance(z: Array) -> float:
    return abs(float((z**2).mean()) - 1) / math.sqrt(2 / z.size)


def _kolmogorov(z: Array) -> float:
    """Kolmogorov and Smirnov's test against the normal distribution, whose grid moves it by a hundredth of the limit."""
    reached, ordered = np.arange(1, z.size + 1) / z.size, ndtr(np.sort(z, axis=None))
    distance = max(float((reached - ordered).max()), float((ordered - reached).max()) + 1 / z.size)
    return _of_p_value(float(kstwobign.sf(distance * math.sqrt(z.size))))


def _cells(z: Array) -> float:
    """Pearson's chi-square over 256 cells of equal probability."""
    counts = np.bincount(np.minimum((ndtr(z) * 256).astype(np.int64), 255).ravel(), minlength=256)
    expected = z.size / 256
    return _of_p_value(float(chi2.sf(((counts - expected) ** 2 / expected).sum(), 255)))


def _tails(z: Array) -> float:
    """The worst of the tails beyond 2, 3 and 4 deviations, each side by itself."""
    found = 0.0
    for threshold in (2.0, 3.0, 4.0):
        expected = z.size * float(norm.sf(threshold))
        found = max(found, *(abs(float((side > threshold).sum()) - expected) / math.sqrt(expected) for side in (z, -z)))
    return found


def _neighbours(z: Array) -> float:
    return _correlation(z[:, 1:], z[:, :-1])


def _steps(z: Array) -> float:
    return _correlation(z[1:], z[:-1])


def _sizes(z: Array) -> float:
    """Sizes of neighbours, which a radius shared by two coordinates would couple."""
    squares = (z**2 - 1) / math.sqrt(2)
    return max(_correlation(squares[:, 1:], squares[:, :-1]), _correlation(squares[1:], squares[:-1]))


def _correlation(first: Array, second: Array) -> float:
    return abs(float((first * second).mean())) * math.sqrt(first.size)


def _thin_tails(z: Array) -> Array:
    """As if made of twelve uniform numbers: one in two draws is cut where theirs are rare."""
    return np.where(np.abs(z) > 3, np.where(np.arange(z.size).reshape(z.shape) % 2 < 1, z * 0.9, z), z)


NOISE_CHECKS: dict[str, tuple[Surprise, Callable[[Array], Array]]] = {
    "mean, by 0.01 deviations": (_mean, lambda z: z + 0.01),
    "variance, by 1.5 %": (_variance, lambda z: z * math.sqrt(1.015)),
    "distribution, moved by 0.015": (_kolmogorov, lambda z: z + 0.015),
    "distribution, of variance 3 % more": (_cells, lambda z: z * math.sqrt(1.03)),
    "tails, half of the draws beyond 3 drawn in": (_tails, _thin_tails),
    "neighbours, correlated by 0.01": (_neighbours, lambda z: z + 0.01 * np.roll(z, 1, axis=1)),
    "steps, correlated by 0.01": (_steps, lambda z: z + 0.01 * np.roll(z, 1, axis=0)),
    "sizes, one pair in 60 sharing one": (
        _sizes,
        lambda z: np.where(np.arange(z.shape[1]) % 60 == 1, np.roll(np.abs(z), 1, axis=1) * np.sign(z), z),
    ),
}


@pytest.mark.parametrize("name", NOISE_CHECKS)
def test_noise_is_normal_and_independent(draws: Array, name: str) -> None:
    surprise, planted = NOISE_CHECKS[name]
    assert surprise(draws) < LIMIT
    assert surprise(planted(draws)) > LIMIT


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_last_bits_of_what_is_released_are_even(mechanism: str) -> None:
    """The 256 values of the last eight bits on the grid, chi-square; one draw in 50 with its last bit cleared is found."""
    deviation = SIGMA * CLIPPING_NORM
    grid = 2.0 ** (math.floor(math.log2(deviation)) - 12) if mechanism == "hardened" else None
    grid = grid or math.ldexp(math.nextafter(deviation, math.inf), -31)
    noise = _mechanism(mechanism)
    released = noise.add(torch.zeros(1_000_000, dtype=torch.float64), 5).numpy()
    integers = np.rint(released / grid).astype(np.int64)
    assert np.array_equal(integers * grid, released)

    def surprise(integers: Array) -> float:
        counts = np.bincount(integers & 255, minlength=256)
        expected = len(integers) / 256
        return _of_p_value(float(chi2.sf(((counts - expected) ** 2 / expected).sum(), 255)))

    assert surprise(integers) < LIMIT
    every_50th = np.arange(len(integers)) % 50 == 0
    assert surprise(np.where(every_50th, integers & ~1, integers)) > LIMIT


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_same_keystream_gives_the_same_noise_and_another_key_or_step_another_one_everywhere(mechanism: str) -> None:
    zeros = torch.zeros(1001, dtype=torch.float64)
    rows = [_mechanism(mechanism, seed).add(zeros, step) for seed in (SEED, OTHER) for step in (0, 1, 2**40)]
    again = [_mechanism(mechanism, seed).add(zeros, step) for seed in (SEED, OTHER) for step in (0, 1, 2**40)]
    assert all(torch.equal(first, second) for first, second in zip(rows, again, strict=True))
    for i, first in enumerate(rows):
        for second in rows[:i]:
            # On the coarser grid two draws meet with probability 10^-4: five times in 1,001 with 10^-7.
            assert int((first == second).sum()) <= 4
            assert float(first @ second) ** 2 < LIMIT**2 * 1001 * (SIGMA * CLIPPING_NORM) ** 4


# --- samples ---

RECORDS, RATE = 2000, Fraction(1, 5)


def _sampled(owner: str, seed: bytes = SEED) -> Array:
    """``[steps, records]``: 1 where the record is in the step's batch."""
    sampler, found = PoissonSampler(seed, owner, RATE), np.zeros((STEPS, RECORDS))
    for step in range(STEPS):
        found[step, sampler.indices(step, RECORDS)] = 1
    return found


@pytest.fixture(scope="module")
def samples() -> Array:
    """Two owners' samples, ``[2, steps, records]``: half a million decisions."""
    return np.array([_sampled("north"), _sampled("south")])


def _centred(x: Array) -> Array:
    q = float(RATE)
    return (x - q) / math.sqrt(q * (1 - q))


def _rate(x: Array) -> float:
    return _mean(_centred(x))


def _batch_sizes(x: Array) -> float:
    """Their variance; as that of binomials, which are nearly normal here."""
    sums = _centred(x).sum(axis=2) / math.sqrt(RECORDS)
    return abs(float((sums**2).mean()) - 1) / math.sqrt(2 / sums.size)


def _inclusions(x: Array) -> float:
    """The variance of how often a record is drawn: a pass over the data in epochs has next to none."""
    sums = _centred(x).sum(axis=1) / math.sqrt(STEPS)
    return abs(float((sums**2).mean()) - 1) / math.sqrt(2 / sums.size)


def _owners(x: Array) -> float:
    return _correlation(*_centred(x))


def _records(x: Array) -> float:
    centred = _centred(x)
    return _correlation(centred[:, :, 1:], centred[:, :, :-1])


def _adjacent_steps(x: Array) -> float:
    centred = _centred(x)
    return _correlation(centred[:, 1:], centred[:, :-1])


def _mixed(x: Array, other: Array, every: int) -> Array:
    """``x`` with one decision in ``every`` taken from ``other``."""
    return np.where(np.arange(x.size).reshape(x.shape) % every == 0, other, x)


def _of_one_size(x: Array) -> Array:
    """Three batches in four of the expected size, as shuffling makes them."""
    found = x.copy()
    for owner in found:
        for batch in (owner[step] for step in range(STEPS) if step % 4):
            extra = int(batch.sum()) - int(RATE * RECORDS)
            batch[np.flatnonzero(batch == (extra > 0))[: abs(extra)]] = extra < 0
    return found


SAMPLE_CHECKS: dict[str, tuple[Surprise, Callable[[Array], Array]]] = {
    "rate, one record in 40 of those drawn left out": (_rate, lambda x: _mixed(x, np.zeros_like(x), 40)),
    "batch sizes, three in four fixed": (_batch_sizes, _of_one_size),
    "records, drawn in turn in one step of four": (
        _inclusions,
        lambda x: np.where(
            np.arange(STEPS)[:, None] % 4 == 0, (np.arange(STEPS)[:, None] // 4 + np.arange(RECORDS)) % 5 < 1, x
        ),
    ),
    "owners, one decision in 50 shared": (_owners, lambda x: np.array([x[0], _mixed(x[1], x[0], 50)])),
    "neighbours, one decision in 49 shared": (_records, lambda x: _mixed(x, np.roll(x, 1, axis=2), 49)),
    "steps, one decision in 49 shared": (_adjacent_steps, lambda x: _mixed(x, np.roll(x, 1, axis=1), 49)),
}


@pytest.mark.parametrize("name", SAMPLE_CHECKS)
def test_samples_are_poisson_and_independent(samples: Array, name: str) -> None:
    surprise, planted = SAMPLE_CHECKS[name]
    assert surprise(samples) < LIMIT
    assert surprise(planted(samples)) > LIMIT


def test_samples_and_noise_are_independent() -> None:
    """One seed serves both: 0.02 of correlation between a record's place in a batch and a coordinate's noise is found."""
    noise, zeros = _mechanism("exact"), torch.zeros(RECORDS, dtype=torch.float64)
    z = np.array([noise.add(zeros, step).numpy() for step in range(STEPS)]) / (SIGMA * CLIPPING_NORM)
    x = _centred(_sampled("north"))
    assert _correlation(x, z) < LIMIT
    assert _correlation(x, z + 0.02 * x) > LIMIT


def test_the_same_keystream_gives_the_same_samples_and_another_owner_or_key_other_ones() -> None:
    first = _sampled("north")
    assert np.array_equal(first, _sampled("north"))
    for other in (_sampled("south"), _sampled("north", OTHER)):
        assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
        assert _correlation(_centred(first), _centred(other)) < LIMIT


@pytest.mark.parametrize(
    "rate", [Fraction(1, 3), Fraction(5, 7), Fraction(1, 1 << 20), Fraction((1 << 52) + 1, (1 << 53) - 1), Fraction(1)]
)
def test_what_is_accounted_is_never_less_than_what_is_sampled(rate: Fraction) -> None:
    realised = Fraction(PoissonSampler(SEED, "north", rate)._threshold, 1 << 64)
    accounted = TrainingEvent(rate, 1.0, 1)
    assert rate - Fraction(1, 1 << 64) < realised <= rate == accounted.sample_rate <= Fraction(accounted.rate_upper)
    planned = Fraction(math.floor(rate * (1 << 32)), 1 << 32)
    assert Fraction(PoissonSampler(SEED, "north", planned)._threshold, 1 << 64) == planned
    assert Fraction(TrainingEvent(planned, 1.0, 1).rate_upper) == planned


def test_keys_are_separate_for_every_use() -> None:
    labels = ("noise", "sampling/north", "sampling/south", "initialisation", "dropout")
    words = [Keystream(SEED, label).words(0, 64) for label in labels]
    assert words[0].tolist() == reference.words(SEED, "noise", 0, 64)
    assert len({word for row in words for word in row.tolist()}) == 64 * len(labels)
    with pytest.raises(ParameterError):
        Keystream(SEED + b"\x00", "noise")
