"""What privacy costs a training step: DP-SGD by this engine, and by others, over plain SGD, in one interleaved run.

Every step starts from a batch in memory and ends with moved weights. Ours is :meth:`Trainer.step` as the worker runs it
(sampling at rate 1, certified clipping and sums, ``hardened`` or ``exact`` noise from the keystream), in mode ``auto``; others
sum in float32 and draw noise from PyTorch's ordinary generator. All take turns; a turn is many steps where a step is
short, as in training, where a step finds in the cache what the last one of its own kind left there. Ratios are of one
round's turn by that round's plain turn: medians over rounds, with quartiles. A turn begins when no other thread of this
process works, so that noise which ours draws ahead disturbs nobody else; of the noise that a turn of the MLP's uses, all
but an eighth is drawn while it lasts. Peak memory is that of a process of its own, which sets up and takes a few steps, over
one that takes plain ones: medians of three of each, in turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import dp_peers
import torch
from _bench import Metric, Samples, arguments, interleaved, machine, peak_resident_bytes, report
from casemate_schemas.job import MAX_STEPS, SGD, Mechanism, Training
from casemate_worker.environment import reproducible_kernels
from casemate_worker.training.engine import OwnerData, Trainer
from casemate_worker.training.memory import keep_freed
from dp_cases import CASES, CLIPPING_NORM, LEARNING_RATE, NOISE_MULTIPLIER, Case, plain_step
from rich.console import Console
from rich.table import Table

ROUNDS = {"mlp": 40, "lenet": 30, "wrn": 5, "transformer": 5}
QUICK_ROUNDS = {"mlp": 5, "lenet": 6}
TURN_STEPS = {"mlp": 280}
"""Of a step that takes less than three times the plain one; a tenth of it for others."""
QUIET_S = 0.002
MEMORY_STEPS = 5
MEMORY_ROUNDS = 3
MAX_MEMORY_RATIO = 1.3


def main() -> None:
    os.environ.update(reproducible_kernels())  # read when libraries first compute
    if sys.argv[1:2] == ["--peak"]:
        print(peak_bytes(CASES[sys.argv[2]], sys.argv[3]))
        return
    options = arguments("Step time and peak memory of DP-SGD over plain SGD")
    keep_freed()  # as worker jobs do; here for plain steps and others, too
    warnings.simplefilter("ignore")
    metrics: list[Metric] = []
    runs: dict[str, Any] = {}
    for name, rounds in (QUICK_ROUNDS if options.quick else ROUNDS).items():
        case = CASES[name]
        torch.set_num_threads(case.threads)
        samples = measured(case, rounds)
        ratios = {label: _ratios(sample, samples["plain"]) for label, sample in samples.items()}
        peaks = [{label: _peak(case, label) for label in ("plain", "ours")} for _ in range(MEMORY_ROUNDS)]
        memory = {label: statistics.median(peak[label] for peak in peaks) for label in ("plain", "ours")}
        metrics.append(Metric(f"{name}_ratio", ratios["ours"].median_s, "x", case.target))
        metrics.append(Metric(f"{name}_memory_ratio", memory["ours"] / memory["plain"], "x", MAX_MEMORY_RATIO))
        runs[name] = {
            label: {
                **samples[label].summary(),
                "ratio": ratios[label].median_s,
                "ratio_quartiles": ratios[label].quartiles_s,
                "rate_per_s": case.batch / samples[label].median_s,
            }
            for label in samples
        }
        runs[name]["peak_bytes"] = peaks
        _print(case, samples, ratios)
    report(metrics, runs, machine("torch", "opacus", "numpy"), options.json)


def measured(case: Case, rounds: int) -> dict[str, Samples]:
    """Seconds a step, of turns."""
    steps = steppers(case)
    quick = {"plain", "ours", "ours, exact noise", "fastDP-style"}
    counts = {label: max(1, TURN_STEPS.get(case.name, 1) // (1 if label in quick else 10)) for label in steps}
    turns = {label: partial(_repeat, step, counts[label]) for label, step in steps.items()}
    found = interleaved(turns, rounds=rounds, warm_up=2, settle=_settle)
    return {label: Samples(tuple(s / counts[label] for s in sample.seconds)) for label, sample in found.items()}


def _repeat(step: Callable[[], None], count: int) -> None:
    for _ in range(count):
        step()


def _settle() -> None:
    """Wait until no thread of this process works."""
    busy_s = QUIET_S
    while busy_s > QUIET_S / 10:
        began_s = time.process_time()
        time.sleep(QUIET_S)
        busy_s = time.process_time() - began_s


def steppers(case: Case) -> dict[str, Callable[[], None]]:
    """The plain step, ours, and the others that know every layer of the network."""
    return {
        "plain": plain_step(case),
        "ours": ours(case),
        "ours, exact noise": ours(case, "exact"),
        "Opacus hooks": dp_peers.opacus_per_sample(case, mode="hooks"),
        "Opacus functorch": dp_peers.opacus_per_sample(case, mode="functorch"),
        "Opacus ghost": dp_peers.opacus_ghost(case),
        "fastDP-style": dp_peers.fastdp_style(case),
        "vmap(grad)": dp_peers.vmap_of_grad(case),
    }


def ours(case: Case, mechanism: Mechanism = "hardened") -> Callable[[], None]:
    """The worker's own step, all records in every batch."""
    features, targets = case.records()
    plan = Training(
        loss="cross_entropy",
        optimizer=SGD(lr=LEARNING_RATE),
        steps=MAX_STEPS,
        clipping_norm=CLIPPING_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        mechanism=mechanism,
    )
    owner = OwnerData("north", features, targets, Fraction(1))
    return Trainer(case.model(), [owner], plan, expected_batch=Fraction(case.batch), seed=bytes(32)).step


def peak_bytes(case: Case, label: str) -> int:
    """The largest resident size of this process once it has taken a few steps."""
    torch.set_num_threads(case.threads)
    if label == "ours":
        keep_freed()
    step = {"plain": partial(plain_step, case), "ours": partial(ours, case)}[label]()
    for _ in range(MEMORY_STEPS):
        step()
    return peak_resident_bytes()


def _peak(case: Case, label: str) -> int:
    command = [sys.executable, "-W", "ignore", __file__, "--peak", case.name, label]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _ratios(sample: Samples, plain: Samples) -> Samples:
    return Samples(tuple(a / b for a, b in zip(sample.seconds, plain.seconds, strict=True)))


def _print(case: Case, samples: dict[str, Samples], ratios: dict[str, Samples]) -> None:
    threads = f"{case.threads} thread{'s' if case.threads > 1 else ''}"
    table = Table(
        "", "median ms", "× plain", "quartiles", "records/s", title=f"{case.name}, batch {case.batch}, {threads}"
    )
    for label, sample in samples.items():
        rate = case.batch / sample.median_s
        low, high = ratios[label].quartiles_s
        spread = f"{low:.2f} to {high:.2f}"
        table.add_row(label, f"{1e3 * sample.median_s:.2f}", f"{ratios[label].median_s:.2f}", spread, f"{rate:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
