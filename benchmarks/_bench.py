"""What every benchmark here does alike: its arguments, timing alternatives by turns, a table, and one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.backends.openssl import backend
from rich.console import Console
from rich.table import Table

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Metric:
    """One figure. ``target`` is the worst that is good enough; None where there is none to meet."""

    name: str
    value: float
    unit: str
    target: float | None = None
    better: Better = "lower"

    @property
    def met(self) -> bool | None:
        """Whether the target is met, if there is one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target


@dataclass(frozen=True)
class Samples:
    """Seconds that each of several runs of one thing took, in order."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """The spread: a quarter of the runs took less than the first, a quarter more than the second."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high

    def summary(self) -> dict[str, float | int]:
        """For the JSON file."""
        low_s, high_s = self.quartiles_s
        return {"count": len(self.seconds), "median_s": self.median_s, "q1_s": low_s, "q3_s": high_s}


def arguments(description: str, *, document: bool = False) -> argparse.Namespace:
    """``quick`` (under a minute) and ``json`` (a path or None) from the command line; ``document`` if there may be one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer runs: under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write metrics, machine and runs to FILE")
    if document:
        parser.add_argument("--document", type=Path, metavar="FILE", help="put the table between its marks in FILE")
    return parser.parse_args()


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    batch: int = 1,
    warm_up: int = 10,
    clock: Callable[[], float] = time.perf_counter,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, Samples]:
    """Time ``batch`` calls of every case a round, each round beginning with the next one: all meet the same disturbances.

    A sample is the mean of one batch. More than one call a batch keeps the cases from emptying each other's caches.
    ``settle`` is called, untimed, before each turn. ``time.thread_time`` as the clock counts this thread's work alone, which
    is all there is where nothing waits.
    """
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for count in range(-warm_up, rounds):
        turn = count % len(names)
        for name in names[turn:] + names[:turn]:
            call = cases[name]
            settle()
            began = clock()
            for _ in range(batch):
                call()
            elapsed = (clock() - began) / batch
            if count >= 0:
                seconds[name].append(elapsed)
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def machine(*distributions: str) -> dict[str, Any]:
    """What the figures were measured on, with the versions of the distributions that matter to them."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "openssl": backend.openssl_version_text(),
        "versions": {name: version(name) for name in distributions},
    }


def report(
    metrics: Sequence[Metric], runs: Mapping[str, Any], where: Mapping[str, Any], json_file: Path | None
) -> None:
    """Print the metrics and, if asked to, write ``{"metrics": …, "machine": …, "runs": …}``."""
    table = Table(
        "metric", "value", "target", "", title=f"{where['cpu']}, {where['cores']} cores, Python {where['python']}"
    )
    for metric in metrics:
        sign = "≤" if metric.better == "lower" else "≥"
        target = "" if metric.target is None else f"{sign} {metric.target:g} {metric.unit}"
        verdict = {True: "[green]✓", False: "[red]✗", None: ""}[metric.met]
        table.add_row(metric.name, f"{metric.value:.3g} {metric.unit}", target, verdict)
    Console().print(table)
    if json_file is not None:
        figures = {m.name: {"value": m.value, "target": m.target, "unit": m.unit} for m in metrics}
        json_file.write_text(json.dumps({"metrics": figures, "machine": where, "runs": runs}, indent=2) + "\n")


def print_samples(samples: Mapping[str, Samples], title: str) -> None:
    """Medians and quartiles in microseconds."""
    table = Table("", "median µs", "quartiles µs", "runs", title=title)
    for name, sample in samples.items():
        low_s, high_s = sample.quartiles_s
        spread = f"{low_s * 1e6:.0f} to {high_s * 1e6:.0f}"
        table.add_row(name, f"{sample.median_s * 1e6:.0f}", spread, str(len(sample.seconds)))
    Console().print(table)


def peak_resident_bytes() -> int:
    """The most memory that this process has held since its program began (Linux).

    ``ru_maxrss`` says more than that: of a program it counts what the process that started it held.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("this system does not tell a process's peak memory")
    return 1024 * int(found[1])


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
