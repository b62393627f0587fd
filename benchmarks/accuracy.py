"""What privacy costs accuracy: models trained by the engine at a given epsilon, beside the same ones without privacy.

Each private figure is :class:`Trainer`'s, as a worker runs it, on one owner's records: sampling, certified clipping and
noise from the keystream, the noise multiplier solved for by privacy loss distributions at the case's delta. Seeds choose the
initial weights and the attempt's randomness; clipping is done in the way that is fastest here, which changes rounding
alone. The non-private figure is the same model, from the same weights, trained as many steps by plain SGD. The majority
figure is that of always answering with the training records' most frequent class.

Preprocessing knows public bounds and categories only (``_datasets.py``). Parameters were chosen by hand on a part of the
training records (as :meth:`Split.validation`), which is not charged here, as it is not in the papers compared with; test
records were looked at with the parameters given here, and no others.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any, Final

import torch
from _bench import Metric, arguments, machine, report
from _datasets import Split, adult, digits, mnist
from _scattering import CHANNELS, scattering
from casemate_privacy import noise_multiplier
from casemate_schemas.job import SGD, Averaging, LrSchedule, Optimizer, Training
from casemate_worker.training.engine import OwnerData, Trainer
from rich.console import Console
from torch import nn

SEEDS: Final = (0, 1, 2)
AVERAGED: Final = Averaging(decay=0.95)
FALLING: Final = LrSchedule(decay="linear")
_TABLE: Final = re.compile(r"(?<=<!-- accuracy -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One data set and model at one epsilon; ``batch`` is the expected one, ``least`` the accuracy asked for."""

    metric: str
    title: str
    data: Callable[[], Split]
    model: Callable[[], nn.Module]
    epsilon: float
    least: float
    batch: int
    steps: int
    optimizer: Optimizer
    clipping_norm: float
    delta: float = 1e-5
    averaging: Averaging = AVERAGED
    plain_lr: float = 0.1
    lr_schedule: LrSchedule = FALLING
    physical_batch: int = 1024


@dataclass(frozen=True)
class Outcome:
    """Accuracies on the test records, in per cent, and what they were reached with."""

    private: tuple[float, ...]
    plain: tuple[float, ...]
    majority: float
    noise_multiplier: float
    seconds: float


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """One hidden layer, with tanh: bounded activations suit clipping (Papernot et al. 2021)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def convolutional() -> nn.Sequential:
    """Two convolutions and a linear layer, 10,810 weights: few noised coordinates.

    What each layer takes in is normalised, in groups of channels in each image (De et al. 2022), after activation and
    pooling; the groups have no weights of their own.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.GroupNorm(4, 16, affine=False),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.GroupNorm(4, 32, affine=False),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def normalized_mnist() -> Split:
    """Images, each to mean zero and variance one by its own pixels."""
    whole = mnist()
    features, test = (nn.functional.layer_norm(x, x.shape[1:]) for x in (whole.features, whole.test_features))
    return Split(features, whole.targets, test, whole.test_targets)


def pooled_mnist() -> Split:
    """Images as 196 means over two by two pixels, each image to mean zero and variance one by its own pixels."""
    whole = mnist()
    small = [nn.functional.avg_pool2d(x, 2).flatten(1) for x in (whole.features, whole.test_features)]
    features, test = (nn.functional.layer_norm(x, x.shape[1:]) for x in small)
    return Split(features, whole.targets, test, whole.test_targets)


def scattered_mnist() -> Split:
    """The scattering transform of images, averaged over two by two places; channels normalised in groups, in each image."""
    whole = mnist()
    pooled = [nn.functional.avg_pool2d(scattering(x), 2) for x in (whole.features, whole.test_features)]
    features, test = (nn.functional.group_norm(x, CHANNELS // 3).flatten(1) for x in pooled)
    return Split(features, whole.targets, test, whole.test_targets)


CASES: Final = (
    Case(
        "digits_eps3",
        "digits, MLP 64-64-10",
        digits,
        lambda: perceptron(64, 64, 10),
        epsilon=3.0,
        delta=1e-3,
        least=93.0,
        batch=512,
        steps=280,
        optimizer=SGD(lr=20.0),
        clipping_norm=0.1,
        plain_lr=0.5,
        lr_schedule=LrSchedule(),
    ),
    Case(
        "adult_eps1",
        "Adult, MLP 47-64-2",
        adult,
        lambda: perceptron(47, 64, 2),
        epsilon=1.0,
        least=83.0,
        batch=2048,
        steps=350,
        optimizer=SGD(lr=0.5, momentum=0.9),
        clipping_norm=2.0,
        lr_schedule=LrSchedule(),
    ),
    Case(
        "mnist_mlp_eps1",
        "MNIST, MLP 196-256-10 on pooled images",
        pooled_mnist,
        lambda: perceptron(196, 256, 10),
        epsilon=1.0,
        least=93.0,
        batch=2048,
        steps=1170,
        optimizer=SGD(lr=0.33, momentum=0.9),
        clipping_norm=1.0,
    ),
    Case(
        "mnist_cnn_eps293",
        "MNIST, convolutional network, all of it trained",
        normalized_mnist,
        convolutional,
        epsilon=2.93,
        least=98.0,
        batch=2048,
        steps=1172,
        optimizer=SGD(lr=9.0, momentum=0.9),
        clipping_norm=0.1,
        averaging=Averaging(decay=0.98),
        physical_batch=256,
    ),
    Case(
        "mnist_scattering_eps293",
        "MNIST, scattering network (fixed) and linear layer (trained)",
        scattered_mnist,
        lambda: nn.Linear(CHANNELS * 16, 10),
        epsilon=2.93,
        least=98.0,
        batch=4096,
        steps=586,
        optimizer=SGD(lr=20.0, momentum=0.9),
        clipping_norm=0.1,
    ),
)


def main() -> None:
    options = arguments("Accuracy under differential privacy", document=True)
    torch.set_num_threads(1)
    chosen = CASES[:2] if options.quick else CASES
    outcomes: dict[str, Outcome] = {}
    for case in chosen:
        seeds = SEEDS[:1] if options.quick and case.metric != "digits_eps3" else SEEDS
        outcomes[case.metric] = outcome(case, case.data(), seeds)
        Console().print(_line(case, outcomes[case.metric]), markup=False)
    metrics = [
        Metric(case.metric, statistics.mean(outcomes[case.metric].private), "%", case.least, "higher")
        for case in chosen
    ]
    runs: dict[str, Any] = {name: vars(found) for name, found in outcomes.items()}
    report(metrics, runs, machine("torch", "dp-accounting"), options.json)
    if options.document is not None:
        _document(options.document, [_line(case, outcomes[case.metric]) for case in chosen])
    if not all(metric.met for metric in metrics):
        sys.exit(1)


def outcome(case: Case, split: Split, seeds: Sequence[int] = SEEDS) -> Outcome:
    """The case, once for each seed, with privacy and without."""
    began, sigma = time.perf_counter(), noise(case, len(split.features))
    private = tuple(accuracy(trained(case, split, sigma, seed), split) for seed in seeds)
    plain = tuple(accuracy(plainly_trained(case, split, seed), split) for seed in seeds)
    counts = torch.bincount(split.targets)
    majority = 100 * float((split.test_targets == counts.argmax()).double().mean())
    return Outcome(private, plain, majority, sigma, time.perf_counter() - began)


def noise(case: Case, records: int) -> float:
    """The noise multiplier with which the case meets its epsilon."""
    return noise_multiplier(case.epsilon, case.delta, _rate(case, records), case.steps)


def trained(case: Case, split: Split, sigma: float, seed: int) -> nn.Module:
    """The case's model after private training; it holds the averaged weights."""
    model, rate = _initial(case, seed), _rate(case, len(split.features))
    plan = Training(
        loss="cross_entropy",
        optimizer=case.optimizer,
        steps=case.steps,
        clipping_norm=case.clipping_norm,
        noise_multiplier=sigma,
        max_physical_batch=case.physical_batch,
        lr_schedule=case.lr_schedule,
        averaging=case.averaging,
    )
    owner = OwnerData("owner", split.features, split.targets, rate)
    trainer = Trainer(model, [owner], plan, expected_batch=rate * len(split.features), seed=seed.to_bytes(32, "big"))
    trainer.run()
    model.load_state_dict(trainer.weights())
    return model


def plainly_trained(case: Case, split: Split, seed: int) -> nn.Module:
    """As many steps of SGD with momentum, on batches of that size in a shuffled order."""
    model = _initial(case, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.plain_lr, momentum=0.9)
    order, draw = torch.empty(0, dtype=torch.int64), torch.Generator().manual_seed(seed)
    for _ in range(case.steps):
        if len(order) < case.batch:
            order = torch.cat([order, torch.randperm(len(split.features), generator=draw)])
        batch, order = order[: case.batch], order[case.batch :]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(split.features[batch]), split.targets[batch]).backward()
        optimizer.step()
    return model


def accuracy(model: nn.Module, split: Split) -> float:
    """On the test records, in per cent."""
    with torch.no_grad():
        answers = torch.cat([model(batch).argmax(dim=1) for batch in split.test_features.split(1024)])
    return 100 * float((answers == split.test_targets).double().mean())


def _rate(case: Case, records: int) -> Fraction:
    return Fraction(floor(min(1.0, case.batch / records) * 2**32), 2**32)


def _initial(case: Case, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return case.model()


def _line(case: Case, found: Outcome) -> str:
    private, plain = statistics.mean(found.private), statistics.mean(found.plain)
    each = ", ".join(f"{value:.2f}" for value in found.private)
    return (
        f"| {case.title} | {case.epsilon:g} | {case.delta:g} | {found.majority:.1f} | {plain:.2f} | **{private:.2f}** "
        f"| {each} | {case.least:g} | {found.noise_multiplier:g} | {case.steps} × {case.batch} |"
    )


def _document(path: Path, lines: Sequence[str]) -> None:
    """Put the table between its two marks in ``path``."""
    head = (
        "| records and model | ε | δ | majority | non-private | **private** | by seed | asked for | σ | steps × batch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    path.write_text(_TABLE.sub("\n" + "\n".join([*head, *lines]) + "\n\n", path.read_text()))


if __name__ == "__main__":
    main()
