"""Training draws from its keystreams alone: generators of Python, NumPy, PyTorch and the system are neither used nor moved."""

from __future__ import annotations

import copy
import os
import random
import secrets
from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from casemate_schemas.job import SGD, Training
from casemate_worker.training.engine import OwnerData, Trainer
from torch import Tensor, nn

torch.set_num_threads(1)

STATELESS = {"get_rng_state", "initial_seed", "getstate", "get_state", "get_bit_generator"}
"""They only look, as the check that a model draws nothing does."""

# fmt: off
DRAWING = (
    "alpha_dropout", "bernoulli", "binomial", "dropout", "dropout_", "feature_dropout", "manual_seed", "multinomial",
    "native_dropout", "normal", "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm",
    "rrelu", "rrelu_", "seed", "set_rng_state",
)
DRAWING_METHODS = (
    "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal_", "random_",
    "uniform_",
)
# fmt: on

PLANS = {
    "hardened": {"mechanism": "hardened"},
    "exact": {"mechanism": "exact"},
    "augmented": {"augmentation": {"multiplicity": 3, "shift": 1, "flip": True}, "noise_multiplier": 2.0},
}


MODEL = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2))


def _trained(plan: str) -> dict[str, Tensor]:
    values = torch.sin(1.3 * torch.arange(60 * 25.0)).view(60, 1, 5, 5)
    targets = (values.mean(dim=(1, 2, 3)) > 0).long()
    owners = [
        OwnerData("north", values[:25], targets[:25], Fraction(1, 3)),
        OwnerData("south", values[25:], targets[25:], Fraction(1, 4)),
    ]
    model = copy.deepcopy(MODEL)
    for number, parameter in enumerate(model.parameters()):
        parameter.data = torch.cos(torch.arange(float(parameter.numel())) + number).view_as(parameter) / 4
    fields: dict[str, Any] = {"loss": "cross_entropy", "optimizer": SGD(lr=0.5, momentum=0.9), "steps": 6}
    fields |= {"clipping_norm": 1.0, "noise_multiplier": 1.0, "max_physical_batch": 8}
    trainer = Trainer(
        model,
        owners,
        Training.model_validate(fields | PLANS[plan]),
        expected_batch=Fraction(17),
        seed=bytes(range(32)),
        clipping="book_keeping",
    )
    trainer.run()
    return trainer.weights()


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a plan; gives the generators back as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield request.param
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_generators_seeded_otherwise_change_nothing_and_are_not_moved(plan: str) -> None:
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = _states()
        found.append(_trained(plan))
        assert _states() == before
    assert _same(*found)


def test_generators_that_raise_change_nothing(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _trained(plan)
    poisoned = _poison(monkeypatch)
    assert len(poisoned) > 100
    for draw in (lambda: torch.rand(1), lambda: torch.zeros(1).normal_(), lambda: np.random.default_rng()):
        with pytest.raises(RuntimeError, match="drawn from"):
            draw()
    assert _same(_trained(plan), expected)


def _poison(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes everything raise that draws from a generator not the engine's own; what that was."""
    poisoned = []

    def poison(holder: Any, name: str) -> None:
        def raising(*_args: object, **_kwargs: object) -> None:
            raise RuntimeError(f"drawn from {name}")

        monkeypatch.setattr(holder, name, raising)
        poisoned.append(name)

    for module in (random, np.random, secrets):
        for name in _drawing(module):
            poison(module, name)
    for name in DRAWING:
        poison(torch, name)
    for name in DRAWING_METHODS:
        poison(torch.Tensor, name)
    for name in ("urandom", "getrandom"):
        poison(os, name)
    return poisoned


def _drawing(module: ModuleType) -> list[str]:
    names = module.__all__ if hasattr(module, "__all__") else dir(module)
    return [name for name in names if name not in STATELESS and callable(getattr(module, name))]
