"""The engine against a second program that shares nothing with it but the documents."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from casemate_schemas.job import SGD, Training
from casemate_worker.training.engine import OwnerData, Trainer
from support import training_reference as reference
from torch import nn

SEED = bytes(range(32))
STEPS = 60
RATES = {"east": Fraction(1, 3), "north": Fraction(1, 7), "south": Fraction(123_456_789, 1_000_000_007)}


def _owners(kind: str) -> list[reference.Owner]:
    """Three owners of unequal size, in an order that is not the order of their ids."""
    generator = np.random.default_rng(5)
    owners = []
    for name, rows in (("south", 31), ("east", 40), ("north", 57)):
        features = generator.uniform(-1, 1, (rows, 6)).astype(np.float32)
        score = features @ generator.normal(size=6)
        targets = {"class": np.digitize(score, [-0.5, 0.5]), "binary": score > 0, "value": score}[kind]
        owners.append(reference.Owner(name, features, targets.astype(np.float64), RATES[name]))
    return owners


def _linear(outputs: int) -> nn.Module:
    return nn.Linear(6, outputs)


def _mlp(_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


CASES = {
    "cross_entropy": ("class", torch.int64, _linear, 3, reference.softmax_gradient),
    "binary_cross_entropy": ("binary", torch.float32, _linear, 1, reference.logistic_gradient),
    "mean_squared_error": ("value", torch.float32, _mlp, 1, reference.mlp_gradient),
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("loss", CASES)
def test_an_independent_implementation_obtains_the_same_weights(loss: str, momentum: float) -> None:
    torch.set_num_threads(1)
    kind, dtype, build, outputs, gradient = CASES[loss]
    torch.manual_seed(0)
    model, owners = build(outputs), _owners(kind)
    start = [p.detach().numpy().copy() for p in model.parameters()]
    expected_batch = sum(owner.rate * len(owner.features) for owner in owners)
    plan = Training(
        loss=loss,
        optimizer=SGD(lr=0.2, momentum=momentum),
        steps=STEPS,
        clipping_norm=0.7,
        noise_multiplier=1.1,
        max_physical_batch=16,
    )
    data = [
        OwnerData(o.name, torch.from_numpy(o.features), torch.from_numpy(o.targets).to(dtype), o.rate) for o in owners
    ]

    Trainer(model, data, plan, expected_batch=expected_batch, seed=SEED).run()
    weights = reference.train(
        start,
        gradient,
        owners,
        SEED,
        steps=STEPS,
        clipping_norm=0.7,
        noise_multiplier=1.1,
        expected_batch=float(expected_batch),
        lr=0.2,
        momentum=momentum,
    )

    for ours, theirs, first in zip(model.parameters(), weights, start, strict=True):
        # float32 against float64; of 2,000 roundings one or two may fall to the other side, each 10^-5 at most in the end
        assert np.abs(ours.detach().numpy() - theirs).max() < 3e-5
        assert np.abs(first - theirs).max() > 1e-2  # both moved
