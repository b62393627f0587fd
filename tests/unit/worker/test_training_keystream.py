"""Keys, keystreams, sampling and noise: reproducible, separate, and of the right distribution.

Seeds are fixed, so each statistical test passes always or never. Its comment says which error it would have found, with
the threshold at z standard errors, so that a correct program fails for a chance seed with the probability stated.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import subprocess
import sys
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from casemate_schemas.errors import ParameterError
from casemate_worker.key_schedule import attempt_seed, resume_key
from casemate_worker.training import noise
from casemate_worker.training.keystream import Keystream
from casemate_worker.training.noise import HardenedGaussian, standard_normals
from casemate_worker.training.sampling import PoissonSampler
from support import training_reference as reference

SEED = bytes(range(32))
OTHER = bytes(range(1, 33))
SHARES = [bytes([n]) * 32 for n in (1, 2, 3)]
TERMS = hashlib.sha256(b"terms").digest()
ENTROPY = hashlib.sha256(b"entropy").digest()


def _hkdf(secret: bytes, info: bytes) -> bytes:
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def test_seed_and_resume_key_are_hkdf_of_the_documented_bytes() -> None:
    secret = b"".join(SHARES) + TERMS
    assert attempt_seed(SHARES, TERMS, 7, ENTROPY) == _hkdf(
        secret + (7).to_bytes(8, "big") + ENTROPY, b"casemate/v1/attempt-seed"
    )
    assert resume_key(SHARES, TERMS) == _hkdf(secret, b"casemate/v1/resume")


def test_every_part_of_the_seed_matters() -> None:
    seeds = [
        attempt_seed(SHARES, TERMS, 1, ENTROPY),
        attempt_seed(SHARES, TERMS, 2, ENTROPY),
        attempt_seed(SHARES, TERMS, 1, TERMS),
        attempt_seed(SHARES, ENTROPY, 1, ENTROPY),
        attempt_seed(SHARES[:2], TERMS, 1, ENTROPY),
        attempt_seed(SHARES[::-1], TERMS, 1, ENTROPY),
        resume_key(SHARES, TERMS),
        resume_key(SHARES, ENTROPY),
        resume_key(SHARES[:2], TERMS),
    ]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("shares", "terms", "attempt", "entropy"),
    [
        ([], TERMS, 0, ENTROPY),
        ([b"x" * 31], TERMS, 0, ENTROPY),
        ([b"x" * 32] * 1025, TERMS, 0, ENTROPY),
        (SHARES, TERMS[:31], 0, ENTROPY),
        (SHARES, TERMS, -1, ENTROPY),
        (SHARES, TERMS, 1 << 63, ENTROPY),
        (SHARES, TERMS, 0, ENTROPY + b"x"),
    ],
)
def test_malformed_parts_of_the_seed_are_refused(
    shares: list[bytes], terms: bytes, attempt: int, entropy: bytes
) -> None:
    with pytest.raises(ParameterError):
        attempt_seed(shares, terms, attempt, entropy)


def test_key_schedule_needs_no_torch() -> None:
    program = "import sys, casemate_worker.key_schedule; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("step", [0, 1, 2**40])
def test_keystream_is_the_documented_one(step: int) -> None:
    assert Keystream(SEED, "noise").words(step, 37).tolist() == reference.words(SEED, "noise", step, 37)


def test_another_key_label_or_step_differs_everywhere() -> None:
    count = 10_000
    streams = [
        Keystream(SEED, "noise").words(3, count),
        Keystream(SEED, "noise").words(4, count),
        Keystream(OTHER, "noise").words(3, count),
        Keystream(SEED, "sampling/north").words(3, count),
        Keystream(SEED, "sampling/south").words(3, count),
    ]
    for i, first in enumerate(streams):
        for second in streams[:i]:
            # Two independent streams agree at one of 10^4 places with probability 5·10^-16; streams that were each
            # other's shift would share words.
            assert not np.intersect1d(first, second).size


def test_a_short_draw_begins_a_longer_one() -> None:
    stream = Keystream(SEED, "noise")
    assert np.array_equal(stream.words(9, 1001)[:17], stream.words(9, 17))


def test_a_seed_of_another_length_is_refused_and_none_is_shown() -> None:
    with pytest.raises(ParameterError):
        Keystream(SEED[:16], "noise")
    assert SEED.hex() not in repr(vars(Keystream(SEED, "noise")))


@pytest.mark.parametrize("rate", [Fraction(0), Fraction(-1, 2), Fraction(3, 2)])
def test_rates_outside_their_range_are_refused(rate: Fraction) -> None:
    with pytest.raises(ParameterError):
        PoissonSampler(SEED, "north", rate)


def test_sampling_at_extreme_rates() -> None:
    assert PoissonSampler(SEED, "north", Fraction(1)).indices(0, 5).tolist() == [0, 1, 2, 3, 4]
    assert PoissonSampler(SEED, "north", Fraction(1, 2**64)).indices(0, 1000).size == 0
    assert PoissonSampler(SEED, "north", Fraction(1, 2**90)).indices(0, 1000).size == 0
    assert PoissonSampler(SEED, "north", Fraction(1, 2)).indices(0, 0).size == 0


def test_threshold_is_exact_to_the_last_of_64_bits() -> None:
    word = reference.words(SEED, "sampling/north", 5, 8)[7]
    at, above = Fraction(word, 2**64), Fraction(2 * word + 1, 2**65)
    # floor: any rate from word / 2^64 to below (word + 1) / 2^64 leaves the record out, so none is oversampled.
    assert 7 not in PoissonSampler(SEED, "north", at).indices(5, 8)
    assert 7 not in PoissonSampler(SEED, "north", above).indices(5, 8)
    assert 7 in PoissonSampler(SEED, "north", at + Fraction(1, 2**64)).indices(5, 8)


@pytest.mark.parametrize("rate", [Fraction(1, 100), Fraction(1, 3), Fraction(9, 10)])
def test_sampler_rate_and_independence(rate: Fraction) -> None:
    steps, records = 400, 1000
    batches = np.zeros((steps, records))
    for step in range(steps):
        batches[step, PoissonSampler(SEED, "north", rate).indices(step, records)] = 1
    q, trials = float(rate), steps * records

    # Rate, at 4 standard errors (chance failure 6·10^-5): finds an error of 8 standard errors, 0.4 to 8 % of q,
    # with probability above 0.9999.
    error = math.sqrt(q * (1 - q) / trials)
    assert abs(batches.mean() - q) < 4 * error
    # Batch sizes vary as binomials do, at 4 standard errors: a fixed-size or shuffled sampler has variance 0.
    expected_variance = records * q * (1 - q)
    assert abs(batches.sum(axis=1).var() / expected_variance - 1) < 4 * math.sqrt(2 / steps)
    # A record's inclusions vary likewise: a sampler that goes through the data in epochs has less.
    assert abs(batches.sum(axis=0).var() / (steps * q * (1 - q)) - 1) < 4 * math.sqrt(2 / records)
    # Neighbouring records and steps are uncorrelated, at 4 standard errors.
    centred = (batches - q) / math.sqrt(q * (1 - q))
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 4 / math.sqrt(trials)
    assert abs((centred[1:] * centred[:-1]).mean()) < 4 / math.sqrt(trials)


def test_owners_are_sampled_independently() -> None:
    steps, records = 200, 1000
    north, south = (
        np.array(
            [
                np.isin(np.arange(records), PoissonSampler(SEED, o, Fraction(1, 2)).indices(s, records))
                for s in range(steps)
            ]
        )
        for o in ("north", "south")
    )
    # Agreement of fair coins, at 4 standard errors (chance failure 6·10^-5): finds a correlation of 0.02 surely.
    assert abs((north == south).mean() - 0.5) < 4 * 0.5 / math.sqrt(steps * records)


def test_normals_have_the_moments_and_tails_of_normals() -> None:
    count = 1_000_000
    z = standard_normals([Keystream(SEED, "noise").at(0)], count)[0]
    # Each at 4 standard errors (chance failure 6·10^-5); an error of 8 standard errors, 1.1 % of the variance or
    # 0.8 % in the mean, is found with probability above 0.9999.
    assert abs(z.mean()) < 4 / math.sqrt(count)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / count)
    for threshold in (0.5, 1.0, 2.0, 3.0, 4.0):
        tail = math.erfc(threshold / math.sqrt(2))
        assert abs((np.abs(z) > threshold).mean() - tail) < 4 * math.sqrt(tail / count)
    # The two of a pair, neighbours, and their squares (which a shared radius would couple) are uncorrelated.
    for first, second in ((z[0::2], z[1::2]), (z[1:], z[:-1])):
        assert abs((first * second).mean()) < 4 / math.sqrt(len(first))
        assert abs(((first**2 - 1) * (second**2 - 1)).mean()) < 4 * 2 / math.sqrt(len(first))


@pytest.mark.parametrize(("noise_multiplier", "clipping_norm"), [(1.3, 0.25), (0.8, 1.0), (64.0, 1e-4), (0.5, 2.0)])
def test_added_noise_has_deviation_sigma_times_c_on_the_public_grid(
    noise_multiplier: float, clipping_norm: float
) -> None:
    deviation, size = noise_multiplier * clipping_norm, 200_001
    total = torch.linspace(-50 * deviation, 50 * deviation, size, dtype=torch.float64)
    noisy = HardenedGaussian(SEED, noise_multiplier=noise_multiplier, clipping_norm=clipping_norm).add(total, step=11)
    # Deviation, at 4 standard errors of 0.16 % (chance failure 6·10^-5): finds an error of 1.3 % with 0.9999.
    assert abs(float((noisy - total).std()) / deviation - 1) < 4 / math.sqrt(2 * size)
    grid = 2.0 ** (math.floor(math.log2(deviation)) - 12)
    assert torch.equal(noisy / grid, torch.round(noisy / grid))
    assert not torch.equal(noisy / (2 * grid), torch.round(noisy / (2 * grid)))
    exact = total + deviation * torch.from_numpy(reference.normals(SEED, 11, size))
    assert float((noisy - exact).abs().max()) <= 0.5001 * grid


class _Scripted:
    """Words from a list."""

    def __init__(self, *words: int) -> None:
        self.left = list(words)

    def take(self, count: int) -> np.ndarray:
        taken, self.left = self.left[:count], self.left[count:]
        return np.array(taken, np.uint64)


def test_words_near_either_end_take_one_more_in_their_order() -> None:
    edge, top = 2**44, 2**64
    firsts = [edge, edge - 1, 2**63, top - edge, 0, top - edge - 1, top - 1, 12345]
    drawn = [word for i, first in enumerate(firsts) for word in (first, i << 60)]
    further = [7, 2**63 + 1, 3, 2**64 - 2, 99]
    streams = _Scripted(*drawn[:8], *further[:2]), _Scripted(*drawn[8:], *further[2:], 77)
    found = standard_normals(streams, 8)
    assert [stream.left for stream in streams] == [[], [77]]
    expected = reference.normals_of(drawn[:8], further[:2]) + reference.normals_of(drawn[8:], further[2:])
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-14, atol=1e-300)
    assert 11.2 < math.hypot(*found[1, :2]) < 13.4  # 128 bits reach where 64 end, at 9.42
    assert 0 < math.hypot(*found[1, 4:6]) < 2.0**-50  # and as near to 0


def test_normals_made_piece_by_piece_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts = [12345, 2**63, 0, 2**44 - 1, 2**63 + 5, 2**64 - 1, 7, 2**60, 2**61, 2**64 - 2]
    drawn = [word for i, first in enumerate(firsts) for word in (first, i << 59)]
    found = []
    for words in (1 << 17, 4):
        monkeypatch.setattr(noise, "_WORDS", words)
        streams = _Scripted(*drawn[:10], 7, 2**63 + 1, 9, 11), _Scripted(*drawn[10:], 3, 2**64 - 2, 99, 10)
        found.append(standard_normals(streams, 10))
        assert [stream.left for stream in streams] == [[11], [10]]
    np.testing.assert_allclose(*found, rtol=1e-15)
    assert len(np.unique(found[0])) == 20


_COMMON = [2**44, 2**45 + 1, 2**53 - 1, 2**53 + 1, 2**60 + 1, 2**63 - 1, 2**63, 2**64 - 2**50 - 1, 2**64 - 2**44 - 1]
_RARE = [0, 2**20 + 1, 2**44 - 1, 2**64 - 2**44, 2**64 - 2**30, 2**64 - 1]


@pytest.mark.parametrize("first", _COMMON + _RARE)
def test_computed_normals_are_as_near_to_ideal_ones_as_their_privacy_presumes(first: int) -> None:
    """The premise in ``casemate_privacy.hardened``: 2^-43 for all ideal numbers that the words may stand for."""
    rng = np.random.default_rng(first % 2**32)
    for second in [0, 2**64 - 1, 2**62 - 1, 2**62, *rng.integers(0, 2**64, 12, dtype=np.uint64).tolist()]:
        more = [2**43, 2**64 - 1] if first in _RARE else [0]
        for third in more if first == 0 else [0, *more]:
            found = standard_normals([_Scripted(first, second, third)], 2)[0]
            with mpmath.workprec(400):
                whole = mpmath.mpf((first << 64) + third) if first in _RARE else mpmath.mpf(first << 64)
                width = 1 if first in _RARE else 2**64
                for u, v in ((u, v) for u in (whole, whole + width) for v in (second >> 11, (second >> 11) + 1)):
                    radius = mpmath.sqrt(-2 * mpmath.log(u / 2**128))
                    if radius <= 10.8:
                        ideal = (
                            radius * mpmath.cospi(v / mpmath.mpf(2**52)),
                            radius * mpmath.sinpi(v / mpmath.mpf(2**52)),
                        )
                        assert all(
                            abs(x - y) < mpmath.mpf(2) ** -43.5 for x, y in zip(found.tolist(), ideal, strict=True)
                        )


@pytest.mark.parametrize("size", [0.0, 1e-9, 1.0, 1e6, 1e12, 2.0**50])
def test_a_sum_of_any_size_and_its_noise_are_rounded_once_and_together(size: float) -> None:
    sigma, norm, count = 1.3, 0.7, 400
    deviation = sigma * norm
    grid = Fraction(2) ** (math.floor(math.log2(deviation)) - 12)
    total = torch.linspace(-1, 1, count, dtype=torch.float64) * size
    released = HardenedGaussian(SEED, noise_multiplier=sigma, clipping_norm=norm).add(total, step=3)
    noise = standard_normals([Keystream(SEED, "noise").at(3)], count)[0] * (deviation / float(grid))
    for s, y, found in zip(total.tolist(), noise.tolist(), released.tolist(), strict=True):
        exact = Fraction(s) / grid + Fraction(y)
        # within half a step of the exact sum, but for the addition of numbers below 2^17, and of doubles beyond 2^53 steps
        slack = Fraction(1, 2**36) + abs(exact) * (Fraction(1, 2**52) if abs(exact) > 2**53 else 0)
        assert abs(Fraction(found) / grid - exact) <= Fraction(1, 2) + slack


def test_every_step_and_seed_has_noise_of_its_own() -> None:
    zeros = torch.zeros(1001, dtype=torch.float64)
    draws = [
        HardenedGaussian(seed, noise_multiplier=1.0, clipping_norm=1.0).add(zeros, step)
        for seed in (SEED, OTHER)
        for step in (0, 1)
    ]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            # Independent N(0, 1) coordinates meet on the grid with probability 7·10^-5 each; a difference of variance 2.
            assert int((first == second).sum()) <= 3
            assert abs(float((first - second).var()) - 2) < 4 * 2 * math.sqrt(2 / 1001)


@pytest.mark.parametrize(("noise_multiplier", "clipping_norm"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_there_is_no_mechanism_without_noise(noise_multiplier: float, clipping_norm: float) -> None:
    with pytest.raises(ParameterError):
        HardenedGaussian(SEED, noise_multiplier=noise_multiplier, clipping_norm=clipping_norm)
