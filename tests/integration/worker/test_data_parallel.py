"""Two real processes train as one does: the same sums, noise once, the same weights in both, also after a restore."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from casemate_schemas.errors import TrainingError
from casemate_worker.training.distributed import process_group
from support.data_parallel import CLIPPING_NORM, SIGMA, STEPS, scenarios
from torch import Tensor

TESTS = Path(__file__).parents[2]
WORLD = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each rank found, started as ``torchrun`` starts them: the store is its agent's, here this process's."""
    folder = tmp_path_factory.mktemp("ranks")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = os.environ | {
        "PYTHONPATH": str(TESTS),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "support.data_parallel", str(folder)]
    processes = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE) for rank in range(WORLD)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert (folder / "gave-up").exists()
    return [safetensors.torch.load_file(folder / f"{rank}.safetensors") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return scenarios(None)


def test_ranks_have_the_same_bits(ranks: list[dict[str, Tensor]]) -> None:
    first, second = ranks
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rate", ["often", "hardly"])
def test_sums_are_those_of_one_process_and_noised_on_the_grid_the_same(
    rate: str, ranks: list[dict[str, Tensor]], alone: dict[str, Tensor]
) -> None:
    sums = [(ranks[0][f"{rate} sum/{step}"], alone[f"{rate} sum/{step}"]) for step in range(STEPS)]
    assert all(torch.allclose(found, expected, rtol=0, atol=1e-12) for found, expected in sums)
    empty = sum(not expected.any() for _, expected in sums)
    assert (empty > 0) == (rate == "hardly")  # so there are steps in which no rank has a record, and one rank has none
    for name in alone:
        if name.startswith((f"{rate} noised/", f"{rate}/")):
            assert torch.equal(ranks[0][name], alone[name]), name


@pytest.mark.parametrize("name", ["images", "padded"])
def test_views_and_padded_batches_are_shared_as_well(
    name: str, ranks: list[dict[str, Tensor]], alone: dict[str, Tensor]
) -> None:
    assert torch.allclose(ranks[0][name], alone[name], rtol=0, atol=1e-6)


def test_a_restored_run_ends_where_the_other_does(ranks: list[dict[str, Tensor]]) -> None:
    for found in ranks:
        for name in found:
            if name.startswith("often/"):
                assert torch.equal(found[name.replace("often/", "often restored/")], found[name])


def test_noise_is_added_once(ranks: list[dict[str, Tensor]], alone: dict[str, Tensor]) -> None:
    noise = ranks[1]["noise"]
    assert torch.equal(noise, alone["noise"])
    variance = float(noise.square().mean())
    spread = 6 * (2 / len(noise)) ** 0.5  # six standard deviations of the mean of squares: 7 %
    assert abs(variance / (SIGMA * CLIPPING_NORM) ** 2 - 1) < spread < 0.1


def test_ranks_that_were_given_other_seeds_are_refused(ranks: list[dict[str, Tensor]]) -> None:
    assert all(found["refused"].tolist() == [1.0] for found in ranks)


def test_a_process_that_is_told_of_no_group_joins_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrainingError), process_group(timeout_s=1.0):
        pass
