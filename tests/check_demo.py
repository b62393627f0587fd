"""Does the demo's JSON hold what it must, and are its epsilons true? ``python tests/check_demo.py FILE.json``.

Each owner's epsilon is computed again from the recorded sample rate, noise multiplier, steps and delta, with Google's
``dp-accounting`` directly and none of this project's code. Exit status 0, or 1 with what is wrong.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from dp_accounting.pld import privacy_loss_distribution

TOLERANCE = 0.01
INTERVAL = 1e-4
PHASES = ("found", "start", "seal", "submit", "train", "verify")
SHAPE: dict[str, type] = {
    "accuracy": float,
    "majority_accuracy": float,
    "non_private_accuracy": float,
    "owners": list,
    "simulation": bool,
    "evidence": dict,
    "timings_s": dict,
}
OWNER_SHAPE: dict[str, type] = {
    "dataset": str,
    "epsilon": float,
    "delta": float,
    "sample_rate": float,
    "sample_rate_exact": str,
    "noise_multiplier": float,
    "steps": int,
}


def problems(outcome: dict[str, Any]) -> Iterator[str]:
    """Everything that is wrong with a demo's outcome, in words."""
    if wrong := list(_misshapen(outcome, SHAPE)):
        yield from wrong
        return
    if outcome["simulation"] is not True or outcome["evidence"].get("simulation") is not True:
        yield "a demo's attestation is simulated, and this one does not say so"
    if not 0.5 <= outcome["majority_accuracy"] < outcome["accuracy"] <= 1:
        yield f"accuracy {outcome['accuracy']} is not above the majority's {outcome['majority_accuracy']}"
    if not outcome["majority_accuracy"] < outcome["non_private_accuracy"] <= 1:
        yield f"accuracy without privacy is {outcome['non_private_accuracy']}"
    if missing := [name for name in PHASES if not outcome["timings_s"].get(name, -1) >= 0]:
        yield f"no time is given for {', '.join(missing)}"
    if len({owner.get("dataset") for owner in outcome["owners"]}) != 3:
        yield "expected three owners' datasets"
    for owner in outcome["owners"]:
        yield from _owner_problems(owner)


def recomputed_epsilon(owner: dict[str, Any]) -> float:
    """Epsilon of Poisson-sampled Gaussian steps under add/remove of one record, by privacy loss distributions."""
    step = privacy_loss_distribution.from_gaussian_mechanism(
        owner["noise_multiplier"],
        sampling_prob=float(Fraction(owner["sample_rate_exact"])),
        value_discretization_interval=INTERVAL,
    )
    return float(step.self_compose(owner["steps"]).get_epsilon_for_delta(owner["delta"]))


def _owner_problems(owner: dict[str, Any]) -> Iterator[str]:
    if wrong := list(_misshapen(owner, OWNER_SHAPE)):
        yield from wrong
        return
    name = owner["dataset"]
    if not math.isclose(owner["sample_rate"], float(Fraction(owner["sample_rate_exact"]))):
        yield f"{name}: two sample rates, {owner['sample_rate']} and {owner['sample_rate_exact']}"
    again = recomputed_epsilon(owner)
    if not math.isclose(owner["epsilon"], again, rel_tol=TOLERANCE):
        yield f"{name}: epsilon {owner['epsilon']} was charged, the recorded figures give {again}"


def _misshapen(value: dict[str, Any], shape: dict[str, type]) -> Iterator[str]:
    for name, kind in shape.items():
        if type(value.get(name)) is not kind:
            yield f"{name}: expected a {kind.__name__}, got {value.get(name)!r:.60}"


def main() -> int:
    """The script."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python tests/check_demo.py FILE.json\n")
        return 1
    try:
        found = list(problems(json.loads(Path(sys.argv[1]).read_text())))
    except (OSError, ValueError, ArithmeticError, AttributeError) as error:
        found = [f"cannot be read: {error}"]
    for problem in found:
        sys.stderr.write(f"{sys.argv[1]}: {problem}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
