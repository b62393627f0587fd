"""Padded batches: the same work whatever the data hold and whatever is drawn, at no cost in privacy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from casemate_schemas.codec import encode
from casemate_schemas.errors import DatasetError
from casemate_schemas.job import SGD, Metrics, Training
from casemate_worker.training.batches import OwnerData, PlaceBatches, RecordBatches, batches_of, present
from casemate_worker.training.choosing import Mode
from casemate_worker.training.engine import Trainer
from casemate_worker.training.subjects import subject_table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)

SEED = bytes(range(32))
BOUND = 60


class Recorder(TorchDispatchMode):
    """Which kernels were called, and the shapes of what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.calls.append((str(func), [tuple(part.shape) for part in made if isinstance(part, Tensor)]))
        return result


@contextmanager
def recorded() -> Iterator[list[tuple[str, list[tuple[int, ...]]]]]:
    recorder = Recorder()
    with recorder:
        yield recorder.calls


def training(**changed: Any) -> Training:
    fields: dict[str, Any] = {
        "loss": "cross_entropy",
        "optimizer": SGD(lr=0.1),
        "steps": 6,
        "clipping_norm": 1.0,
        "noise_multiplier": 1.0,
        "max_physical_batch": 16,
        "padded_batch": 40,
    }
    return Training(**(fields | changed))


def records(
    count: int, *, hostile: bool = False, subjects: int | None = None, rate: Fraction = Fraction(1, 3)
) -> OwnerData:
    """Records of an owner; hostile ones are not finite, enormous or of no class."""
    random = np.random.default_rng(count)
    features = torch.from_numpy(random.uniform(-1, 1, (count, 1, 6, 6)).astype(np.float32))
    targets = torch.from_numpy(random.integers(0, 3, count))
    if hostile:
        features[0::4], features[1::4], features[2::4] = math.nan, math.inf, 1e30
        targets[3::4] = 17
    table = None if subjects is None else torch.from_numpy(subject_table(np.arange(count) % subjects, 3, BOUND))
    return OwnerData("north", features, targets, rate, subjects=table, bound=BOUND)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)
    )


def trainer(data: OwnerData, mode: Mode = "book_keeping", **changed: Any) -> Trainer:
    return Trainer(network(), [data], training(**changed), expected_batch=Fraction(20), seed=SEED, clipping=mode)


def work(data: OwnerData, mode: Mode, **changed: Any) -> list[list[tuple[str, list[tuple[int, ...]]]]]:
    """What each step calls, and then the metrics."""
    found = trainer(data, mode, **changed)
    steps = []
    for _ in range(3):
        with recorded() as calls:
            found.step()
        steps.append(calls)
    with recorded() as calls:
        found.metrics(Metrics(noise_multiplier=1.0, loss_bound=3.0))
    return [*steps, calls]


@pytest.mark.parametrize(("mode", "subjects"), [("book_keeping", None), ("ghost", 9), ("per_sample", None)])
def test_every_step_calls_the_same_kernels_on_the_same_shapes_whatever_the_data(
    mode: Mode, subjects: int | None
) -> None:
    reference = work(records(40, subjects=subjects), mode)
    assert all(step == reference[0] for step in reference[:3]) and len(reference[0]) > 50
    for other in (
        records(3, subjects=subjects and 2),
        records(0, subjects=subjects),
        records(44, hostile=True, subjects=subjects),
    ):
        assert work(other, mode) == reference


def test_without_padding_they_differ_by_draw_and_by_data() -> None:
    steps = work(records(40), "book_keeping", padded_batch=None)
    assert steps[0] != steps[1]
    clean, hostile = records(40, rate=Fraction(1)), records(40, hostile=True, rate=Fraction(1))
    assert work(clean, "book_keeping", padded_batch=None)[0] != work(hostile, "book_keeping", padded_batch=None)[0]


def test_a_padded_step_uses_exactly_the_records_drawn() -> None:
    data = records(40)
    plain, padded = RecordBatches([data], SEED), PlaceBatches([data], SEED, 40)
    for step in range(20):
        features, targets = padded.drawn(step)
        there = present(targets)[:, 0]
        assert features.shape[:2] == (40, 1)
        assert torch.equal(features[there, 0], plain.drawn(step)[0])
        assert torch.equal(targets[there, 0], plain.drawn(step)[1])


def test_a_step_that_draws_too_many_places_uses_none_even_if_few_of_them_are_records() -> None:
    few = records(5)
    drawn = [len(RecordBatches([records(BOUND)], SEED).drawn(step)[0]) for step in range(40)]
    limit = sorted(drawn)[20]
    batches = PlaceBatches([few], SEED, limit)
    for step, places in enumerate(drawn):
        there = int(present(batches.drawn(step)[1]).sum())
        assert there == (0 if places > limit else len(RecordBatches([few], SEED).drawn(step)[0]))


def test_padding_changes_no_more_than_rounding() -> None:
    plain, padded = trainer(records(40), padded_batch=None), trainer(records(40))
    plain.run()
    padded.run()
    for name, tensor in plain.weights().items():
        assert torch.allclose(tensor, padded.weights()[name], atol=2e-3)
    assert not torch.equal(plain.weights()["0.weight"], network().state_dict()["0.weight"])


def test_a_state_has_one_size_whatever_the_data() -> None:
    sizes = set()
    for data in (records(40), records(3), records(44, hostile=True)):
        found = trainer(data)
        found.run(until=3)
        metrics = found.metrics(Metrics(noise_multiplier=1.0, loss_bound=3.0))
        sizes.add((len(found.state()), len(encode(metrics))))
    assert len(sizes) == 1


def test_a_resumed_padded_run_equals_an_uninterrupted_one() -> None:
    whole, first, second = (trainer(records(40, subjects=9)) for _ in range(3))
    whole.run()
    first.run(until=2)
    second.restore(first.state())
    second.run()
    assert second.state() == whole.state()


def test_padding_needs_a_public_bound() -> None:
    with pytest.raises(DatasetError, match="bound"):
        batches_of([OwnerData("north", torch.zeros(2, 3), torch.zeros(2), Fraction(1))], SEED, 4)


# --- the proof, in numbers ------------------------------------------------------------------------------------------------

Z = np.arange(-14.0, 18.0, 2e-3)


def _density(mean: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.exp(-((Z - mean) ** 2) / 2) / math.sqrt(2 * math.pi)


def none_of_too_many(drawn: tuple[int, ...], size: int, _units: set[int]) -> tuple[int, ...]:
    return drawn if len(drawn) <= size else ()


def the_first_of_too_many(drawn: tuple[int, ...], size: int, _units: set[int]) -> tuple[int, ...]:
    return drawn[:size]


def none_if_too_many_units(drawn: tuple[int, ...], size: int, units: set[int]) -> tuple[int, ...]:
    return drawn if len(units.intersection(drawn)) <= size else ()


Rule = Callable[[tuple[int, ...], int, set[int]], tuple[int, ...]]


def _worst_excess(rule: Rule, places: int, size: int, rate: float) -> float:
    """How far delta(epsilon) of a step with padding exceeds that of plain Poisson sampling, both directions, at worst.

    Place 0 is the unit's, which moves a sum by 1. The others hold a unit each that moves it by -1.
    """
    with_unit, without = np.zeros_like(Z), np.zeros_like(Z)
    for count in range(places + 1):
        for drawn in itertools.combinations(range(places), count):
            weight = rate**count * (1 - rate) ** (places - count)
            for density, units in ((with_unit, set(range(places))), (without, set(range(1, places)))):
                used = units.intersection(rule(drawn, size, units))
                density += weight * _density(sum(1.0 if place == 0 else -1.0 for place in used))
    plain = (1 - rate) * _density(0.0) + rate * _density(1.0)
    worst = -math.inf
    for epsilon in (0.0, 0.05, 0.1, 0.2, 0.5, 1.0):
        for (p, q), (a, b) in (
            ((with_unit, without), (plain, _density(0.0))),
            ((without, with_unit), (_density(0.0), plain)),
        ):
            ours = np.maximum(p - math.exp(epsilon) * q, 0).sum() * 2e-3
            bound = np.maximum(a - math.exp(epsilon) * b, 0).sum() * 2e-3
            worst = max(worst, float(ours - bound))
    return worst


@pytest.mark.parametrize(("places", "size", "rate"), [(3, 1, 0.5), (4, 2, 0.5), (5, 1, 0.2), (5, 3, 0.7), (5, 2, 0.5)])
def test_padding_reveals_no_more_than_poisson_sampling(places: int, size: int, rate: float) -> None:
    assert _worst_excess(none_of_too_many, places, size, rate) < 1e-12


@pytest.mark.parametrize("rule", [the_first_of_too_many, none_if_too_many_units])
def test_other_rules_would(rule: Rule) -> None:
    assert _worst_excess(rule, 5, 2, 0.5) > 0.01
