"""The exact mechanism: its integers are the documented ones, its grid cannot be reached around, its reserve is enough.

What its draws are distributed like is in ``test_training_statistics.py``; why that is private, in ``privacy/test_rounding.py``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from casemate_privacy import rounding
from casemate_privacy.rounding import exact_clipping_norm, hardened_clipping_norm
from casemate_schemas.errors import ParameterError
from casemate_schemas.job import SGD, Training
from casemate_worker.training import discrete_gaussian as sampler
from casemate_worker.training.clipping import BookKeeping
from casemate_worker.training.discrete_gaussian import discrete_gaussian
from casemate_worker.training.engine import OwnerData, Trainer
from casemate_worker.training.exact_noise import ExactGaussian
from casemate_worker.training.keystream import Keystream
from casemate_worker.training.noise import noise_mechanism
from casemate_worker.training.rounding import clip_for_rounding
from casemate_worker.training.schedules import ScheduledNoise
from scipy.stats import chi2
from support import training_reference as reference
from torch import Tensor, nn

torch.set_num_threads(1)

SEED = bytes(range(32))
DEVIATION = 2**31


class _Scripted:
    """Words from a list."""

    def __init__(self, words: Sequence[int]) -> None:
        self.left = list(words)

    def take(self, count: int) -> np.ndarray:
        taken, self.left = self.left[:count], self.left[count:]
        return np.array(taken, np.uint64)


@pytest.mark.parametrize(("step", "count"), [(0, 1), (3, 700), (2**40, 33)])
def test_integers_are_the_documented_ones(step: int, count: int) -> None:
    drawn = discrete_gaussian(Keystream(SEED, "noise").at(step), count)
    assert drawn.tolist() == reference.discrete_normals(SEED, step, count)


def test_blocks_are_finished_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_BLOCK", 40)
    drawn = discrete_gaussian(Keystream(SEED, "noise").at(3), 100)
    assert drawn[:40].tolist() == reference.discrete_normals(SEED, 3, 40)
    words = Keystream(SEED, "noise").at(3)
    assert np.array_equal(drawn, np.concatenate([discrete_gaussian(words, count) for count in (40, 40, 20)]))


@pytest.mark.parametrize("strip_bits", [0, 2])
def test_small_deviations_have_exactly_the_discrete_gaussians_probabilities(
    monkeypatch: pytest.MonkeyPatch, strip_bits: int
) -> None:
    """With strips of one and of four integers every integer has a count of its own.

    Chi-square over the integers within 3.5 deviations (chance failure 10^-4). Over so many cells a program whose zero came
    twice as often, or whose signs came at 51 to 49, is found with a probability above 0.99: both are tried.
    """
    monkeypatch.setattr(sampler, "_STRIP_BITS", strip_bits)
    deviation, count = 2 ** (strip_bits + 5), 400_000
    few = discrete_gaussian(Keystream(SEED, "noise").at(1), 500)
    assert few.tolist() == reference.discrete_normals(SEED, 1, 500, strip_bits)
    drawn = discrete_gaussian(Keystream(SEED, "noise").at(0), count)

    reach = int(3.5 * deviation)
    support = np.arange(-reach, reach + 1)
    weights = np.exp(-(np.arange(-40 * deviation, 40 * deviation + 1) ** 2) / (2.0 * deviation**2))
    expected = count * np.exp(-(support**2) / (2.0 * deviation**2)) / weights.sum()

    def surprise(values: np.ndarray) -> float:
        seen = np.bincount(values[np.abs(values) <= reach] + reach, minlength=len(support))
        return float(chi2.sf(((seen - expected) ** 2 / expected).sum(), len(support)))

    assert surprise(drawn) > 1e-4
    twice = np.append(drawn, np.zeros(int((drawn == 0).sum()), np.int64))
    assert surprise(twice) < 1e-4
    flipped = drawn.copy()
    flipped[: count // 50] = -np.abs(flipped[: count // 50])
    assert surprise(flipped) < 1e-4


def test_a_word_on_a_threshold_is_decided_by_all_512_bits() -> None:
    thresholds, leading, *_ = sampler._table()
    for index in (0, 5, 200, 500):
        rest = [(thresholds[index] >> 64 * place) % 2**64 for place in reversed(range(7))]
        first = int(leading[index])
        at, below = _Scripted([first, *rest]), _Scripted([first, *_minus_one(rest)])
        assert sampler._strips(at, 1).tolist() == [index + 1]
        assert sampler._strips(below, 1).tolist() == [index]
        assert not at.left and not below.left


def _minus_one(words: list[int]) -> list[int]:
    number = sum(word << 64 * (6 - place) for place, word in enumerate(words)) - 1
    return [(number >> 64 * place) % 2**64 for place in reversed(range(7))]


def test_only_words_on_a_threshold_take_more() -> None:
    leading = sampler._table().leading
    words = _Scripted([int(leading[9]) - 1, int(leading[9]), int(leading[9]) + 1, *[0] * 7, 77])
    assert sampler._strips(words, 3).tolist() == [9, 9, 10]
    assert words.left == [77]


def test_strips_are_found_in_every_bucket() -> None:
    leading = [int(word) for word in sampler._table().leading]
    starts = [start << 52 for start in range(1 << 12)]
    near = {number + offset for number in (*leading, *starts) for offset in (-1, 1)} - {*leading}
    words = sorted(number for number in near if 0 <= number < 2**64)
    found = sampler._strips(_Scripted(words), len(words))
    assert found.tolist() == [bisect_right(leading, word) for word in words]


def test_decisions_are_those_of_exact_fractions() -> None:
    third = 2**64 // 3  # odd
    cases = [
        # exponent·2^64, words, whether it stays, words that are left
        (third, [third], True, 0),  # at the bound: not below
        (third, [third - 1, third], False, 0),  # below; then not below a half of it
        (third, [third - 1, third // 2, 2**63], False, 0),  # on the first 64 bits of third / 2, whose next bit is 1
        (third, [third - 1, third // 2, 2**63 - 1, third // 3 + 1], True, 0),
        (0, [0], True, 0),
        (third, [third + 5, 9], True, 1),
    ]
    for exponent, words, stays, left in cases:
        scripted = _Scripted(words)
        assert sampler._exp_minus(scripted, np.array([exponent], np.uint64)).tolist() == [stays]
        assert len(scripted.left) == left


def test_a_fraction_is_compared_to_the_last_bit() -> None:
    digits = [2**64 // 3] * 3  # a third has the same 64 bits for ever
    assert sampler._below(_Scripted([*digits, 2**64 // 3 - 1]), 1, 3)
    assert not sampler._below(_Scripted([*digits, 2**64 // 3 + 1]), 1, 3)
    assert not sampler._below(_Scripted([2**63]), 1, 2)
    assert sampler._below(_Scripted([2**63 - 1]), 1, 2)


def test_a_negative_zero_does_not_stay() -> None:
    # strip 0, place 0, sign set; decided at once; then, for the same coordinate, place 3 of strip 0, sign clear
    words = _Scripted([0, 2**63, 2**64 - 1, 0, 3, 2**64 - 1])
    assert discrete_gaussian(words, 1).tolist() == [3]


@pytest.mark.parametrize(("sigma", "norm"), [(1.3, 0.25), (0.3, 1e-6), (1e4, 1e6), (1.0, 1.0)])
def test_what_is_released_is_on_a_grid_that_sigma_and_c_alone_decide(sigma: float, norm: float) -> None:
    noise = ExactGaussian(SEED, noise_multiplier=sigma, clipping_norm=norm)
    deviation = Fraction(sigma) * Fraction(norm)
    grid = Fraction(noise._grid)
    assert deviation <= grid * DEVIATION < deviation * (1 + Fraction(1, 2**50))
    total = torch.linspace(-40, 40, 2001, dtype=torch.float64) * float(deviation)
    integers = reference.discrete_normals(SEED, 11, len(total))
    for x, z, released in zip(total.tolist(), integers, noise.add(total, 11).tolist(), strict=True):
        n = round(x / noise._grid)
        assert released == float(n + z) * noise._grid


def test_sums_that_are_too_large_are_kept_where_integers_cannot_overflow() -> None:
    noise = ExactGaussian(SEED, noise_multiplier=1.0, clipping_norm=1.0)
    total = torch.tensor([1e300, -1e300, 2.0**40, 0.0], dtype=torch.float64)
    released = noise.add(total, 0)
    assert released[0] == pytest.approx(2.0**30) and released[1] == pytest.approx(-(2.0**30))
    assert abs(float(released[3])) < 32


def test_noise_drawn_ahead_is_the_noise_of_its_step() -> None:
    total = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    ahead, plain = (ExactGaussian(SEED, noise_multiplier=1.5, clipping_norm=0.7) for _ in range(2))
    for step in (0, 1, 2, 31, 32, 33, 7, 7, 1000, 64):
        ahead.draw_ahead(step, len(total))
        assert torch.equal(ahead.add(total, step), plain.add(total, step))


def test_a_schedule_adds_each_phases_noise_to_its_own_steps() -> None:
    """Each step's integers are that step's of the one keystream, on the grid that its phase's σ decides."""
    norm, total = 0.7, torch.linspace(-3, 3, 16, dtype=torch.float64)
    noise = ScheduledNoise(((4, 2.0), (61, 1.0), (3, 4.0)), noise_mechanism("exact", SEED, norm))
    for step in range(68):
        noise.draw_ahead(step, len(total))  # many steps at once, also of a phase that ends between them
        released = noise.add(total, step)
        grid = ExactGaussian(
            SEED, noise_multiplier=2.0 if step < 4 else 1.0 if step < 65 else 4.0, clipping_norm=norm
        )._grid
        integers = reference.discrete_normals(SEED, step, len(total))
        assert released.tolist() == [
            float(round(x / grid) + z) * grid for x, z in zip(total.tolist(), integers, strict=True)
        ]


@pytest.mark.parametrize(("sigma", "norm"), [(0.0, 1.0), (1.0, 0.0), (-1.0, -1.0), (math.nan, 1.0), (1e200, 1e200)])
def test_there_is_no_mechanism_without_noise(sigma: float, norm: float) -> None:
    with pytest.raises(ParameterError):
        ExactGaussian(SEED, noise_multiplier=sigma, clipping_norm=norm)


def test_rounding_at_its_worst_moves_the_grid_by_c_only_because_some_of_c_was_reserved() -> None:
    """Every coordinate's sum lies where the record makes it round the other way."""
    sigma, side = 3000.0, 1000
    grid = ExactGaussian(SEED, noise_multiplier=sigma, clipping_norm=1.0)._grid
    base = torch.full((side**2,), 0.499, dtype=torch.float64) * grid

    def moved(norm: float) -> float:
        steps = math.floor(norm / side / grid) + 0.002  # the record's part in each coordinate, in steps of the grid
        record = torch.full_like(base, steps * grid)
        assert float(record.norm()) <= norm
        difference = torch.round((base + record) / grid) - torch.round(base / grid)
        return float(difference.norm()) * grid

    assert moved(1.0) > 1.0
    assert 0.998 < moved(exact_clipping_norm(1.0, sigma, side**2, 100.0)) <= 1.0


def _trained(mechanism: str, model: nn.Module, features: Tensor, **changes: object) -> Trainer:
    fields = {"loss": "cross_entropy", "optimizer": SGD(lr=0.5), "steps": 3, "clipping_norm": 1.0}
    plan = Training.model_validate(fields | {"noise_multiplier": 1.0, "mechanism": mechanism} | changes)
    owner = OwnerData("north", features, torch.arange(len(features)) % 2, Fraction(1, 2))
    trainer = Trainer(model, [owner], plan, expected_batch=Fraction(len(features), 2), seed=SEED)
    trainer.run()
    return trainer


def _linear() -> nn.Module:
    model = nn.Linear(6, 2)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def test_a_trainer_clips_to_what_rounding_leaves() -> None:
    features = torch.linspace(-1, 1, 240).view(40, 6)
    exact, hardened = (_trained(mechanism, _linear(), features) for mechanism in ("exact", "hardened"))
    assert 1 - 1e-11 < hardened._clipping.clipping_norm == hardened_clipping_norm(1.0, 20.0) < 1.0
    assert exact._clipping.clipping_norm == exact_clipping_norm(1.0, 1.0, 14, 20.0) < 1.0
    assert not torch.equal(exact.weights()["weight"], hardened.weights()["weight"])


@pytest.mark.parametrize("mechanism", ["exact", "hardened"])
def test_products_that_may_cancel_are_reserved_for_or_formed(mechanism: str) -> None:
    """A layer at many positions: a little is reserved for its ghost norms; where that were much, there are none."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.second(torch.tanh(self.first(x)).sum(dim=1))
            return found

    for positions, products in ((3, 3), (4000, 0)):
        features = torch.sin(torch.arange(30.0 * positions * 4)).view(30, positions, 4)
        trainer = _trained(mechanism, Positions(), features, steps=1)
        assert trainer._clipping.cancelling == {"first.weight": positions}
        exact, hardened = exact_clipping_norm(1.0, 1.0, 58, 15.0, products), hardened_clipping_norm(1.0, 15.0, products)
        assert trainer._clipping.clipping_norm == (exact if mechanism == "exact" else hardened)
        if not products:
            assert trainer.clipping_strategies["first.weight"] != "ghost"


def test_only_the_layers_that_need_much_are_formed() -> None:
    clipping = BookKeeping(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), _no_loss, clipping_norm=1, max_physical_batch=4
    )
    clipping.strategies = {"0.weight": "ghost", "1.weight": "ghost", "1.bias": "per_sample"}
    clipping.cancelling = {"0.weight": 4000, "1.weight": 7}
    plan = Training(loss="cross_entropy", optimizer=SGD(lr=0.5), steps=3, clipping_norm=1.0, noise_multiplier=1.0)
    clip_for_rounding(clipping, plan, 12, 100.0)
    assert clipping.strategies == {"0.weight": "per_sample", "1.weight": "ghost", "1.bias": "per_sample"}
    assert clipping.clipping_norm == hardened_clipping_norm(1.0, 100.0, 7)


def _no_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sum(1)


def test_batches_so_large_that_float64_sums_lose_much_are_refused() -> None:
    assert hardened_clipping_norm(1.0, 5e6) > 0.98
    with pytest.raises(ParameterError, match="smaller batches"):
        hardened_clipping_norm(1.0, 1e7)


def test_a_job_that_would_lose_much_of_c_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "MAX_RESERVE", 1e-9)
    _trained("hardened", _linear(), torch.zeros(4, 6), steps=1)
    with pytest.raises(ParameterError, match="use hardened noise"):
        _trained("exact", _linear(), torch.zeros(4, 6), steps=1)
