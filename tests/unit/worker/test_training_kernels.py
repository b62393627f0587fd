"""A hostile model cannot turn how a row was rounded, by its place in the batch, into a change of other records' parts."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from casemate_models.losses import ExampleLoss
from casemate_worker.environment import reproducible_kernels
from casemate_worker.training import kernels
from casemate_worker.training.choosing import Mode
from casemate_worker.training.clipping import BookKeeping
from casemate_worker.training.probe import probe_model

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
remedy = sys.argv[1] == "on"
WIDTH = 31


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


if not remedy:
    clipping.in_rows = metrics.in_rows = lambda rows: rows
    engine.check_kernels = lambda *_: None


def moved(first, second):
    return float((first - second).norm())


def released(spec, weights, x, batch, mechanism):
    seen = []
    plan = Training(
        loss="cross_entropy", optimizer=SGD(lr=1e-30), steps=1, clipping_norm=1.0, noise_multiplier=20.0, mechanism=mechanism
    )
    owner = OwnerData("north", x, torch.zeros(len(x), dtype=torch.int64), Fraction(1))
    trainer = Trainer(build(spec, weights), [owner], plan, expected_batch=batch, seed=bytes(32), observe=seen.append)
    trainer.run()
    found = trainer.metrics(Metrics(noise_multiplier=20.0, loss_bound=1.0))
    return seen[0].clone(), torch.tensor([found.count, found.right, found.loss])


def attack(network, records):  # how far steps and metrics move without the first record, and without the first two
    torch.manual_seed(0)
    model = network()
    with torch.no_grad():
        model.gate.weight.zero_()
        model.gate.weight[:, 0], model.gate.bias[:] = 1, -0.55
        model.out.weight.zero_()
        model.out.weight[0, 0] = 1e-6
        model.out.bias.zero_()
    spec, weights = trace(model, (WIDTH,))
    x = torch.rand(records, WIDTH)
    x[:, 0] = 0.6 + 0.4 * x[:, 0]
    found = []
    for mechanism in ("hardened", "exact"):
        whole, *fewer = (released(spec, weights, x[gone:], Fraction(records), mechanism) for gone in (0, 1, 2))
        found += [[moved(a, b) for a, b in zip(whole, rest, strict=True)] for rest in fewer]
    return found


try:
    print(json.dumps({"products": attack(Products, 256), "tails": attack(Tails, 64)}))
except ModelError as error:
    print(json.dumps({"refused": str(error)}))
"""


def _attack(remedy: str, environment: dict[str, str]) -> dict[str, list[list[float]]]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", ATTACK, remedy],
        env=environment,
        capture_output=True,
        check=True,
        timeout=120,
    )
    found: dict[str, list[list[float]]] = json.loads(done.stdout)
    return found


def test_one_record_moves_sum_and_metrics_by_its_own_part_alone() -> None:
    now, before = _attack("on", reproducible_kernels()), _attack("off", {})
    for kind in ("products", "tails"):
        for number, (steps, metrics) in enumerate(now[kind]):
            gone = 1 + number % 2
            assert steps <= gone * (1 + 1e-2)  # noise is rounded to a grid
            assert metrics <= gone * 3**0.5 * (1 + 1e-2)
        most = [max(column) for column in zip(*before[kind], strict=True)]
        assert most[0] > 3
        assert kind == "products" or most[1] > 3**0.5 * 3


def test_kernels_that_look_at_a_rows_place_are_refused() -> None:
    assert "place in the batch" in str(_attack("on", {})["refused"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_rows_that_differ_in_one_bit_have_other_fingerprints(dtype: torch.dtype) -> None:
    values = (100 * torch.randn(40, 3, 700).relu()).to(dtype)
    rows = values.movedim(1, 2)  # not as it lies in memory
    before = kernels._fingerprints(rows)
    assert len(set(before.tolist())) == 40
    for row, at in ((0, 0), (17, 699), (39, 350)):
        flat = values.view(torch.uint8)
        flat[row, 2, at * values.element_size()] ^= 1
        changed = kernels._fingerprints(rows) != before
        flat[row, 2, at * values.element_size()] ^= 1
        assert changed.tolist() == [number == row for number in range(40)]
    assert (kernels._fingerprints(rows) == before).all()


@pytest.mark.parametrize("mode", ["per_sample", "ghost"])
def test_what_forms_gradients_is_no_part_of_the_model(mode: Mode) -> None:
    layer = torch.nn.Conv1d(2, 2, 3, padding=1)  # used twice, and formed in a call for each record
    model = torch.nn.Sequential(layer, torch.nn.Tanh(), layer, torch.nn.Flatten(), torch.nn.Linear(8, 2))
    clipping = BookKeeping(model, ExampleLoss("cross_entropy"), clipping_norm=1.0, max_physical_batch=64)
    features, targets = torch.zeros(0, 2, 4), torch.zeros(0, dtype=torch.int64)
    probe_model(model, clipping, features, targets, mode)
    taken: list[torch.Size] = []
    clipping.examine(
        torch.randn(32, 2, 4), torch.zeros(32).long(), nullcontext(), lambda rows: taken.append(rows.shape)
    )
    assert all(shape[0] == 32 for shape in taken)
    assert ((32, 12) in taken) == (mode == "per_sample")
    kernels.check_kernels(model, clipping.examine, features, targets, 64, mode)
