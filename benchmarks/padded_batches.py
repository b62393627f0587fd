"""What a step's duration tells about the records it drew, with and without padded batches, and what padding costs.

Three trainers take steps by turns, on one thread: as drawn, padded, and padded on other records of which a third are not
finite. Durations are the training thread's own, as if nothing else ran on the machine. An observer who sees them alone
guesses which steps drew many records, by the best threshold: ``advantage`` is how often that is right, less one half, doubled
(0: guessing, 1: always), and ``correlation`` is Spearman's rank correlation. A third figure is the advantage in telling the
two padded trainers apart. Every figure comes with what chance alone gives for as many steps: the 99th percentile over shuffles.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from _bench import Metric, arguments, machine, report
from casemate.planning import padded_size
from casemate_schemas.job import MAX_STEPS, SGD, Training
from casemate_worker.environment import reproducible_kernels
from casemate_worker.training.engine import OwnerData, Trainer
from casemate_worker.training.sampling import PoissonSampler
from dp_cases import CASES, CLIPPING_NORM, LEARNING_RATE, NOISE_MULTIPLIER, Case
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

RATE = Fraction(1, 4)
STEPS, QUICK_STEPS = {"mlp": 4000, "lenet": 800}, {"mlp": 600, "lenet": 80}
SHUFFLES = 500
WARM_UP = 20
SEED = bytes(range(32))
Figures = NDArray[np.float64]


def main() -> None:
    os.environ.update(reproducible_kernels())  # read when libraries first compute
    options = arguments("What step times tell, with and without padded batches")
    torch.set_num_threads(1)
    metrics: list[Metric] = []
    runs: dict[str, Any] = {}
    for name, steps in (QUICK_STEPS if options.quick else STEPS).items():
        found = measure(CASES[name], steps)
        runs[name] = found
        _print(name, found)
        metrics.append(Metric(f"{name}_padding_cost", found["padded"]["mean_us"] / found["as drawn"]["mean_us"], "x"))
        for kind in ("as drawn", "padded"):
            metrics.append(Metric(f"{name}_advantage_{kind.replace(' ', '_')}", found[kind]["advantage"], ""))
    report(metrics, runs, machine("torch", "numpy"), options.json)


def measure(case: Case, steps: int) -> dict[str, dict[str, float]]:
    """Each trainer's figures over so many steps, the first ones left out."""
    trainers = {
        "as drawn": stepper(case, padded=False, hostile=False),
        "padded": stepper(case, padded=True, hostile=False),
        "padded, other records": stepper(case, padded=True, hostile=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for count in range(-WARM_UP, steps):
        names = list(trainers)
        turn = count % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.thread_time()
            trainers[name]()
            if count >= 0:
                seconds[name].append(time.thread_time() - began)
    sampler = PoissonSampler(SEED, "north", RATE)
    drawn = np.array([len(sampler.indices(WARM_UP + step, 4 * case.batch)) for step in range(steps)], dtype=np.float64)
    found = {name: figures(np.array(values), drawn) for name, values in seconds.items()}
    one, other = np.array(seconds["padded"]), np.array(seconds["padded, other records"])
    label = np.repeat([0.0, 1.0], steps)
    found["padded, other records"]["told_apart"] = advantage(np.concatenate([one, other]), label)
    found["padded, other records"]["told_apart_by_chance"] = by_chance(np.concatenate([one, other]), label, advantage)
    return found


def stepper(case: Case, *, padded: bool, hostile: bool) -> Callable[[], None]:
    """A trainer's step: of four batches of records each is drawn with probability one quarter."""
    parts = [case.records() for _ in range(4)]
    features, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    if hostile:
        features = features.flip(0) * 3
        features[::3] = torch.nan
    units = len(features)
    plan = Training(
        loss="cross_entropy",
        optimizer=SGD(lr=LEARNING_RATE),
        steps=MAX_STEPS,
        clipping_norm=CLIPPING_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        padded_batch=padded_size(float(RATE * units), units) if padded else None,
    )
    owner = OwnerData("north", features, targets, RATE, bound=units)
    return Trainer(case.model(), [owner], plan, expected_batch=RATE * units, seed=SEED, clipping="book_keeping").step


def figures(seconds: Figures, drawn: Figures) -> dict[str, float]:
    """Mean and spread of durations, and what they tell of the records drawn."""
    many = (drawn > np.median(drawn)).astype(np.float64)
    low, high = np.percentile(seconds, [5, 95])
    return {
        "mean_us": float(seconds.mean() * 1e6),
        "p5_us": float(low * 1e6),
        "p95_us": float(high * 1e6),
        "correlation": float(abs(spearmanr(seconds, drawn).statistic)),
        "correlation_by_chance": by_chance(seconds, drawn, lambda a, b: float(abs(spearmanr(a, b).statistic))),
        "advantage": advantage(seconds, many),
        "advantage_by_chance": by_chance(seconds, many, advantage),
    }


def advantage(seconds: Figures, label: Figures) -> float:
    """Of the best threshold on durations, either way round: true positive rate less false positive rate."""
    ordered = label[np.argsort(seconds, kind="stable")]
    gap = np.cumsum(ordered) / ordered.sum() - np.cumsum(1 - ordered) / (1 - ordered).sum()
    return float(np.abs(gap).max())


def by_chance(seconds: Figures, label: Figures, figure: Callable[[Figures, Figures], float]) -> float:
    """The 99th percentile of ``figure`` where durations have nothing to do with labels."""
    random = np.random.default_rng(0)
    return float(np.percentile([figure(seconds, random.permutation(label)) for _ in range(SHUFFLES)], 99))


def _print(name: str, found: dict[str, dict[str, float]]) -> None:
    table = Table("", "mean µs", "5–95 % µs", "correlation (chance)", "advantage (chance)", title=name)
    for kind, row in found.items():
        table.add_row(
            kind,
            f"{row['mean_us']:.0f}",
            f"{row['p5_us']:.0f}–{row['p95_us']:.0f}",
            f"{row['correlation']:.3f} ({row['correlation_by_chance']:.3f})",
            f"{row['advantage']:.3f} ({row['advantage_by_chance']:.3f})",
        )
    other = found["padded, other records"]
    Console().print(table)
    Console().print(
        f"telling the two padded ones apart: {other['told_apart']:.3f} ({other['told_apart_by_chance']:.3f})"
    )


if __name__ == "__main__":
    main()
