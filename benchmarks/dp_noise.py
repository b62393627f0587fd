"""What noise costs by itself: one step's for a model of 15,000 parameters, by mechanism, beside its bare keystream."""

from __future__ import annotations

import torch
from _bench import Metric, arguments, interleaved, machine, report
from casemate_worker.training.keystream import NOISE, Keystream
from casemate_worker.training.noise import noise_mechanism

COORDINATES = 15_000
MOST_MS = 3.0
SEED = bytes(32)


def main() -> None:
    options = arguments("Milliseconds to draw and add one step's noise, on one thread")
    torch.set_num_threads(1)
    total = torch.linspace(-1, 1, COORDINATES, dtype=torch.float64)
    hardened, exact = (noise_mechanism(name, SEED, 1.0)(1.0) for name in ("hardened", "exact"))
    keystream = Keystream(SEED, NOISE)
    cases = {
        "keystream": lambda: keystream.words(0, COORDINATES),
        "hardened": lambda: hardened.add(total, 0),
        "exact": lambda: exact.add(total, 0),
    }
    samples = interleaved(cases, rounds=100 if options.quick else 1000)
    targets = {"keystream": None, "hardened": None, "exact": MOST_MS}
    metrics = [Metric(f"{name}_ms", 1e3 * samples[name].median_s, "ms", targets[name]) for name in cases]
    report(
        metrics, {name: sample.summary() for name, sample in samples.items()}, machine("torch", "numpy"), options.json
    )


if __name__ == "__main__":
    main()
