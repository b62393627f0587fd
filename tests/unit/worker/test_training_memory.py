"""What training holds at a time: few formed gradients, in pieces that fit, and nothing that nobody needs any more."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from casemate_worker.training import choosing, kernels, uses
from casemate_worker.training import noise as noise_module
from casemate_worker.training.blocks import Blocks
from casemate_worker.training.choosing import Mode, chosen
from casemate_worker.training.clipping import BookKeeping
from casemate_worker.training.memory import give_back
from casemate_worker.training.noise import HardenedGaussian
from casemate_worker.training.terms import Term
from casemate_worker.training.uses import Strategy, Use
from torch import Tensor, nn

torch.set_num_threads(1)


def _chosen(mode: Mode, layer: nn.Module, positions: int, features: int) -> BookKeeping:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.flatten(1) - targets[:, None]).square().sum(1)

    clipping = BookKeeping(layer, loss, clipping_norm=1.0, max_physical_batch=64)
    clipping.choose(mode, lambda count: (torch.ones(count, positions, features), torch.zeros(count)))
    return clipping


@pytest.mark.parametrize(
    ("positions", "width", "expected"),
    [
        (32, 128, "per_sample"),  # 1.3 times the operations, 64 KiB a record
        (48, 2048, "ghost"),  # 1.2 times, 16 MiB
        (400, 2048, "per_sample"),  # 2.8 times, 16 MiB
    ],
)
def test_where_formed_gradients_take_much_memory_fewer_are_formed(
    positions: int, width: int, expected: Strategy
) -> None:
    clipping = _chosen("book_keeping", nn.Linear(width, width, bias=False), positions, width)
    assert clipping.strategies == {"weight": expected}
    assert clipping.physical_batch == (32 if expected == "per_sample" and width == 2048 else 64)


def test_those_go_first_that_lose_least_for_a_byte() -> None:
    costs: dict[str, dict[Strategy, float]] = {
        "small": {"per_sample": 1.0, "ghost": 1.5},  # 0.5 for 1 byte
        "large": {"patches": 4.0, "grouped": 5.0, "ghost": 8.0},  # 0.4
        "cheap": {"per_sample": 2.0, "ghost": 3.0},  # 0.25
        "dear": {"per_sample": 1.0, "ghost": 2.6},
        "never": {"per_sample": 1.0},
        "always": {"per_sample": 3.0, "ghost": 1.0},
    }
    sizes = {"small": 1, "large": 10, "cheap": 4, "dear": 100, "never": 7, "always": 50}
    formed: list[set[str]] = []
    for most in (122, 121, 118, 117, 108, 107, 0):
        found = chosen(costs, sizes, most)
        assert all(found[name] in ("ghost", min(each, key=each.__getitem__)) for name, each in costs.items())
        formed.append({name for name, strategy in found.items() if strategy != "ghost"})
    left = {"small", "large", "cheap", "dear", "never"}
    without = left - {"cheap"}
    assert formed == [
        left,
        without,
        without,
        without - {"large"},
        without - {"large"},
        {"dear", "never"},
        {"dear", "never"},
    ]


def test_what_is_measured_is_weighed_against_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(_uses: Sequence[Use], strategy: Strategy, _blocks: Blocks | None) -> float:
        return 2.0 if strategy == "ghost" else 1.0

    monkeypatch.setattr(choosing, "_seconds", seconds)
    monkeypatch.setattr(choosing, "_measured", {})
    for width, expected in ((128, "per_sample"), (2048, "ghost")):
        clipping = _chosen("auto", nn.Linear(width, width, bias=False), 2, width)
        assert clipping.strategies == {"weight": expected}


def test_nothing_of_one_physical_batch_is_held_while_the_next_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    clipping = _chosen("per_sample", nn.Linear(3, 2), 2, 3)
    clipping.physical_batch = 32
    held: list[weakref.ref[Term]] = []
    alive: list[int] = []
    terms_of = BookKeeping._terms

    def noted(self: BookKeeping, features: Tensor, targets: Tensor) -> tuple[dict[int, Term], Tensor]:
        alive.append(sum(term() is not None for term in held))
        terms, losses = terms_of(self, features, targets)
        held.extend(map(weakref.ref, terms.values()))
        return terms, losses

    monkeypatch.setattr(BookKeeping, "_terms", noted)
    clipping.clipped_sum(torch.ones(96, 2, 3), torch.zeros(96))
    assert alive == [0, 0, 0]
    assert len(held) == 6


@pytest.mark.parametrize(("count", "elements"), [(1, 5), (32, 1 << 16), (64, 1 << 18), (64, 349_000), (63, 1 << 22)])
def test_pieces_have_every_record_once_and_none_by_itself(count: int, elements: int) -> None:
    pieces = uses._pieces(count, elements)
    starts = [piece.start for piece in pieces]
    assert starts[0] == 0
    assert pieces[-1].stop == count
    assert all(first.stop == second.start for first, second in pairwise(pieces))
    sizes = [piece.stop - piece.start for piece in pieces]
    assert count == 1 or min(sizes) >= 2
    most = max(sizes[:-1], default=2)  # below 4 MiB, unless two have more; the last may have one more
    assert most == 2 or 4 * elements * most < 1 << 22
    assert sizes[-1] <= most + 1 or len(sizes) == 1


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


FREED = """
import os, sys
from pathlib import Path
from casemate_worker.training.memory import keep_freed

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if sys.argv[1] == "keep":
    keep_freed()
before = resident_bytes()
blocks = [bytearray(b"1" * (1 << 20)) for _ in range(64)]
del blocks
print(resident_bytes() - before)
"""
"""What of 64 MiB that were in use and are free is still the process's."""


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="asks Linux what is resident")
def test_freed_memory_is_kept_from_then_on() -> None:
    def left(keep: str) -> int:
        command = [sys.executable, "-c", FREED, keep]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert left("no") < 8_000_000
    assert left("keep") > 60_000_000


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="asks Linux what is resident")
def test_memory_between_blocks_in_use_goes_back() -> None:
    blocks = [bytearray(b"\x01" * 60_000) for _ in range(2_000)]  # 120 MB, in the heap
    kept = blocks[::50]
    del blocks
    before = _resident_bytes()
    give_back()
    assert before - _resident_bytes() > 60_000_000
    assert len(kept) == 40


def test_the_question_about_kernels_leaves_nothing_behind() -> None:
    layer = nn.Linear(3, 2)

    def run(x: Tensor, _: Tensor, inside: object, take: object) -> None:
        with torch.no_grad(), inside:  # type: ignore[attr-defined]
            outputs = layer(x)
        take(outputs)  # type: ignore[operator]

    kernels.check_kernels(layer, run, torch.empty(0, 3), torch.empty(0), 64, None)
    assert kernels._pool.cache_info().currsize == kernels._keys.cache_info().currsize == 0


def test_a_large_models_noise_is_the_same_and_is_not_held_while_gradients_are(monkeypatch: pytest.MonkeyPatch) -> None:
    total = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    small, large = (HardenedGaussian(bytes(32), noise_multiplier=1.5, clipping_norm=0.7) for _ in range(2))
    small.draw_ahead(3, len(total))
    monkeypatch.setattr(noise_module, "_MOST_AHEAD", 4000)
    large.draw_ahead(3, len(total))
    assert len(small._ahead._blocks) > len(large._ahead._blocks) == 0
    assert torch.equal(small.add(total, 3), large.add(total, 3))
