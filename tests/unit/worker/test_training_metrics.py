"""Metrics of the final model: bounded for every record, noisy as stated, and the only thing about records that is told."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from casemate_privacy.rounding import exact_clipping_norm
from casemate_schemas.job import SGD, Mechanism, Metrics, Training
from casemate_schemas.metrics import MARGIN, MetricSums, noise_std, sensitivity
from casemate_worker.training.batches import OwnerData, batches_of
from casemate_worker.training.engine import Trainer
from casemate_worker.training.metrics import contributions, noisy_metrics
from torch import Tensor, nn

torch.set_num_threads(1)

SEED = bytes(range(32))
ONE = 1 << 20
METRICS = Metrics(noise_multiplier=2.0, loss_bound=4.0)


def training(loss: str = "cross_entropy", **changed: Any) -> Training:
    fields: dict[str, Any] = {
        "loss": loss,
        "optimizer": SGD(lr=0.1),
        "steps": 2,
        "clipping_norm": 1.0,
        "noise_multiplier": 1.0,
    }
    return Training(**(fields | changed))


def same(features: Tensor) -> Tensor:
    """The model whose outputs are its inputs."""
    return features


def owner(count: int, **changed: Any) -> OwnerData:
    features = torch.linspace(-3, 3, 2 * count).reshape(count, 2)
    return OwnerData("north", features, torch.arange(count) % 2, Fraction(1, 2), **changed)


def seeds(count: int) -> list[bytes]:
    return [index.to_bytes(32, "big") for index in range(count)]


def test_what_a_record_adds_is_its_answer_and_its_clamped_loss() -> None:
    outputs, targets = torch.tensor([[2.0, 0.0], [2.0, 0.0], [90.0, 0.0]]), torch.tensor([0, 1, 1])
    found = contributions(same, "cross_entropy", 4.0, outputs, targets)
    losses = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(2.0)), 4.0]
    assert found[:, 0].tolist() == [ONE] * 3
    assert found[:, 1].tolist() == [ONE, -ONE, -ONE]
    assert found[:, 2].tolist() == pytest.approx([(loss / 2 - 1) * ONE for loss in losses], abs=1)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mean_squared_error"])
def test_no_record_adds_more_than_the_sensitivity(loss: Any) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, 1.0])
    outputs = torch.cartesian_prod(values, values) if loss == "cross_entropy" else values[:, None]
    targets = torch.ones(len(outputs), dtype=torch.int64 if loss == "cross_entropy" else torch.float32)
    found = contributions(same, loss, 4.0, outputs, targets).double() / ONE
    assert found.shape[1] == round(sensitivity(loss) ** 2)
    assert bool((found.norm(dim=1) <= sensitivity(loss)).all())
    assert found[:, 0].tolist() == [1.0] * len(outputs)
    worst = contributions(same, loss, 4.0, outputs[:1], targets[:1])[0].tolist()
    assert worst == [ONE, *([-ONE] if loss != "mean_squared_error" else []), ONE]


def test_a_subject_adds_the_mean_of_its_records_and_nobody_nothing() -> None:
    outputs = torch.tensor([[[9.0, -9.0], [9.0, -9.0], [9.0, -9.0]], [[0.0, 0.0]] * 3])
    targets = torch.tensor([[0, 1, -100], [-100, -100, -100]])
    found = contributions(same, "cross_entropy", 18.0, outputs, targets)
    assert found[0, :2].tolist() == [ONE, 0] and abs(int(found[0, 2])) <= 1
    assert found[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("mechanism", ["hardened", "exact"])
def test_the_noise_is_as_large_as_stated_and_independent(mechanism: Mechanism) -> None:
    data, plan = owner(30), training(mechanism=mechanism)
    exact = contributions(same, "cross_entropy", 4.0, data.features, data.targets).sum(dim=0) / ONE
    rows = [noisy_metrics(same, batches_of([data], SEED, None), plan, METRICS, seed) for seed in seeds(600)]
    found = np.array([[row.count, row.right, row.loss] for row in rows]) - exact.numpy()
    stated = noise_std("cross_entropy", 2.0)
    assert {row.noise_std for row in rows} == {stated}
    assert stated == pytest.approx(2.0 * math.sqrt(3), rel=1e-4)
    # Five standard deviations of each statistic: a right program fails less than once in 100,000 runs.
    assert np.abs(found.mean(axis=0)).max() < 5 * stated / math.sqrt(600)
    assert np.abs(found.std(axis=0) / stated - 1).max() < 5 / math.sqrt(1200)
    assert np.abs(np.corrcoef(found.T) - np.eye(3)).max() < 5 / math.sqrt(600)


def test_the_margin_covers_rounding_to_the_grid_of_exact_noise() -> None:
    for loss in ("cross_entropy", "mean_squared_error"):
        delta = sensitivity(loss)  # type: ignore[arg-type]
        for sigma in (0.3, 10_000.0):
            assert exact_clipping_norm(delta * MARGIN, sigma, round(delta**2), 1.0) >= delta


def test_an_owner_without_records_adds_noise_alone_as_any_other() -> None:
    torch.manual_seed(0)
    nobody = OwnerData("south", torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), Fraction(1, 2))
    found = []
    for owners in ([owner(9)], [owner(9), nobody], [nobody]):
        model = nn.Sequential(nn.Linear(2, 2))
        trainer = Trainer(model, owners, training(), expected_batch=Fraction(5), seed=SEED)
        found.append(trainer.metrics(METRICS).count)
    assert abs(found[0] - found[1]) < 1e-9 and abs(found[0] - found[2] - 9) < 1e-3


def test_they_are_of_the_released_weights_and_draw_noise_of_their_own() -> None:
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.Linear(2, 2)), [owner(400)], training(), expected_batch=Fraction(200), seed=SEED)
    trainer.run()
    quiet = Metrics(noise_multiplier=0.3, loss_bound=4.0)
    weights = trainer.weights()
    outputs = owner(400).features @ weights["0.weight"].T + weights["0.bias"]
    right = float((outputs.argmax(dim=1) == owner(400).targets).float().mean())
    found = trainer.metrics(quiet)
    assert found.accuracy is not None
    assert abs(found.accuracy.value - right) < 3 * found.accuracy.error
    assert found == trainer.metrics(quiet) and found.count != round(found.count)


def test_metrics_are_the_same_whatever_the_shape_of_batches() -> None:
    plan = training(max_physical_batch=7)
    found = {
        noisy_metrics(same, batches_of([owner(40, bound=64)], SEED, padded), plan, METRICS, SEED)
        for padded in (None, 8, 64)
    }
    assert len(found) == 1


def test_error_bars_hold_the_truth_as_often_as_they_say() -> None:
    random, std = np.random.default_rng(1), 4.0
    held = 0
    for _ in range(1000):
        count, right, loss = (np.array([200.0, 120.0, -100.0]) + random.normal(0, std, 3)).tolist()
        found = MetricSums(count=count, right=right, loss=loss, noise_std=std, loss_bound=4.0)
        assert found.accuracy is not None
        assert found.mean_loss is not None
        held += abs(found.accuracy.value - 0.8) <= found.accuracy.error
        held += abs(found.mean_loss.value - 1.0) <= found.mean_loss.error
    assert 0.93 < held / 2000 < 0.97


def test_nothing_is_read_off_a_count_that_the_noise_drowns() -> None:
    found = MetricSums(count=7.0, right=6.0, loss=-6.0, noise_std=2.0, loss_bound=1.0)
    assert found.accuracy is None and found.mean_loss is None
    assert found.summary() == {
        "training accuracy": "drowned by the noise",
        "mean training loss": "drowned by the noise",
    }
