"""A hostile model cannot turn how a row was rounded, by its place in the batch, into a change of other records' parts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from casemate_worker.environment import reproducible_kernels

ATTACK = """
import json, sys
from fractions import Fraction
import torch
from torch import nn
from casemate_models.building import build
from casemate_models.tracing import trace
from casemate_schemas.errors import ModelError
from casemate_schemas.job import SGD, Metrics, Training
from casemate_worker.training import clipping, engine, metrics
from casemate_worker.training.engine import OwnerData, Trainer

torch.set_num_threads(1)
torch.manual_seed(0)
kind, remedy = sys.argv[1], sys.argv[2] == "on"
WIDTH, RECORDS = 31, 256 if kind == "products" else 64


class Products(nn.Module):  # two ways to the same sums: their difference is rounding, the gate hides it from public records
    def __init__(self):
        super().__init__()
        self.a, self.b, self.select = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 64), nn.Linear(64, 2)
        self.gate, self.out = nn.Linear(WIDTH, 2), nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in (*self.b.parameters(), *self.select.parameters()):
                parameter.zero_()
            self.b.weight[:2], self.b.bias[:2] = self.a.weight, self.a.bias
            self.select.weight[0, 0] = self.select.weight[1, 1] = 1

    def forward(self, x):
        difference = self.a(x) - self.select(self.b(x))
        return self.out(torch.tanh(difference * torch.relu(self.gate(x)) * 1e6 * 1e6) * 1e3)


class Tails(nn.Module):  # the same for the last numbers of a vector loop
    def __init__(self):
        super().__init__()
        self.a, self.wide, self.select = nn.Linear(WIDTH, 1), nn.Linear(1, 16), nn.Linear(16, 1)
        self.gate, self.out = nn.Linear(WIDTH, 1), nn.Linear(1, 2)
        with torch.no_grad():
            self.a.weight.mul_(3)
            for parameter in (*self.wide.parameters(), *self.select.parameters()):
                parameter.zero_()
            self.wide.weight[0] = self.select.weight[0, 0] = 1

    def forward(self, x):
        x, gate = self.a(x), torch.relu(self.gate(x))
        soft = nn.functional.softplus
        return self.out(torch.tanh((soft(x) - self.select(soft(self.wide(x)))) * gate * 1e6 * 1e6) * 1e3)


model = Products() if kind == "products" else Tails()
with torch.no_grad():
    model.gate.weight.zero_()
    model.gate.weight[:, 0], model.gate.bias[:] = 1, -0.55
    model.out.weight.zero_()
    model.out.weight[0, 0] = 1e-6
    model.out.bias.zero_()
spec, weights = trace(model, (WIDTH,))
x = torch.rand(RECORDS, WIDTH)
x[:, 0] = 0.6 + 0.4 * x[:, 0]
y = torch.zeros(RECORDS, dtype=torch.int64)
if not remedy:
    clipping.in_rows = metrics.in_rows = lambda rows: rows
    engine.check_kernels = lambda *_: None


def moved(first, second):
    return float((first - second).norm())


def released(records, mechanism):
    seen = []
    plan = Training(
        loss="cross_entropy", optimizer=SGD(lr=1e-30), steps=1, clipping_norm=1.0, noise_multiplier=20.0, mechanism=mechanism
    )
    owner = OwnerData("north", x[records:], y[records:], Fraction(1))
    trainer = Trainer(
        build(spec, weights), [owner], plan, expected_batch=Fraction(RECORDS), seed=bytes(32), observe=seen.append
    )
    trainer.run()
    found = trainer.metrics(Metrics(noise_multiplier=20.0, loss_bound=1.0))
    return seen[0].clone(), torch.tensor([found.count, found.right, found.loss])


try:
    pairs = [(released(0, m), released(gone, m)) for m in ("hardened", "exact") for gone in (1, 2)]
    moves = [[moved(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs]
    print(json.dumps({"moves": moves}))
except ModelError as error:
    print(json.dumps({"refused": str(error)}))
"""


def _attack(kind: str, remedy: str, environment: dict[str, str]) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", ATTACK, kind, remedy],
        env=environment,
        capture_output=True,
        check=True,
        timeout=120,
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", ["products", "tails"])
def test_one_record_moves_sum_and_metrics_by_its_own_part_alone(kind: str) -> None:
    now, before = _attack(kind, "on", reproducible_kernels()), _attack(kind, "off", {})
    for number, (steps, metrics) in enumerate(now["moves"]):  # type: ignore[var-annotated, arg-type]
        gone = 1 + number % 2
        assert steps <= gone * (1 + 1e-2)  # noise is rounded to a grid
        assert metrics <= gone * 3**0.5 * (1 + 1e-2)
    most = [max(column) for column in zip(*before["moves"], strict=True)]  # type: ignore[misc, call-overload]
    assert most[0] > 3
    assert kind == "products" or most[1] > 3**0.5 * 3


def test_kernels_that_look_at_a_rows_place_are_refused() -> None:
    found = _attack("products", "on", {})
    assert "place in the batch" in str(found.get("refused"))
