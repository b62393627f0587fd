"""One rank of a data-parallel training job, as ``torchrun`` would start it: ``python -m support.data_parallel FOLDER``.

The same scenarios run in one process, without a group, give what the ranks' results are compared with.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import safetensors.torch
import torch
from casemate_schemas.errors import ParameterError, TrainingError
from casemate_schemas.job import SGD, Augmentation, Training
from casemate_worker.training.choosing import Mode
from casemate_worker.training.distributed import Group, process_group
from casemate_worker.training.engine import OwnerData, Trainer
from torch import Tensor, nn

SEED = bytes(range(32))
STEPS, HALF, WIDTH = 6, 3, 12_000
SIGMA, CLIPPING_NORM = 0.8, 0.5


def plan(**changes: object) -> Training:
    fields: dict[str, object] = {
        "loss": "cross_entropy",
        "optimizer": SGD(lr=0.5, momentum=0.9),
        "steps": STEPS,
        "clipping_norm": CLIPPING_NORM,
        "noise_multiplier": SIGMA,
        "mechanism": "exact",  # whose sums are float64 throughout: they differ between one process and two by that alone
    }
    return Training.model_validate(fields | changes)


def owners(rate: Fraction, shape: tuple[int, ...] = (5,), rows: int = 23) -> list[OwnerData]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for name in ("north", "south"):
        features = torch.rand(rows, *shape, generator=generator) - 0.5
        targets = (features.flatten(1)[:, 0] > 0).long()
        found.append(OwnerData(name, features, targets, rate, bound=rows + 2))
    return found


def network(*layers: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.4, 0.4, generator=generator)
    return model


def trainer(
    group: Group | None, rate: Fraction, seen: list[Tensor], mode: Mode = "book_keeping", seed: bytes = SEED
) -> Trainer:
    model = network(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    expected = Fraction(8)
    return Trainer(
        model, owners(rate), plan(), expected_batch=expected, seed=seed, clipping=mode, observe=seen.append, group=group
    )


def scenarios(group: Group | None) -> dict[str, Tensor]:
    """Everything that is compared, by name."""
    found: dict[str, Tensor] = {}
    for name, rate in (("often", Fraction(1, 3)), ("hardly", Fraction(1, 40))):
        seen: list[Tensor] = []
        first = trainer(group, rate, seen)
        first.run(until=HALF)
        state = first.state()
        first.run()
        again = trainer(group, rate, [])
        again.restore(state)
        again.run()
        found |= {f"{name}/{key}": value for key, value in first.weights().items()}
        found |= {f"{name} restored/{key}": value for key, value in again.weights().items()}
        found |= {f"{name} noised/{step}": value for step, value in enumerate(seen)}
        fresh = trainer(group, rate, [])
        for step in range(STEPS):
            found[f"{name} sum/{step}"] = fresh._clipped_sum(*fresh._batches.drawn(step))
    return found | {"images": images(group), "padded": padded(group), "noise": noise(group)}


def images(group: Group | None) -> Tensor:
    """The weights of a model whose records have several views."""
    model = network(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    views = plan(augmentation=Augmentation(multiplicity=3, shift=1))
    records = owners(Fraction(1, 3), (1, 4, 4))
    job = Trainer(model, records, views, expected_batch=Fraction(8), seed=SEED, clipping="per_sample", group=group)
    job.run(until=2)
    return torch.cat([tensor.flatten() for tensor in job.weights().values()])


def padded(group: Group | None) -> Tensor:
    """The weights of a model whose batches are padded."""
    model, padded = network(nn.Linear(5, 2)), plan(padded_batch=25)
    records = owners(Fraction(1, 3))
    job = Trainer(model, records, padded, expected_batch=Fraction(8), seed=SEED, clipping="per_sample", group=group)
    job.run(until=2)
    return torch.cat([tensor.flatten() for tensor in job.weights().values()])


def noise(group: Group | None) -> Tensor:
    """The noised sum of a step whose records have no class, and so no gradient."""
    seen: list[Tensor] = []
    nobody = [OwnerData("north", torch.zeros(4, 2), torch.full((4,), 7), Fraction(1))]
    model = network(nn.Linear(2, WIDTH // 4), nn.Linear(WIDTH // 4, 2))
    Trainer(model, nobody, plan(), expected_batch=Fraction(1), seed=SEED, observe=seen.append, group=group).step()
    return seen[0]


def disagreement(group: Group, rank: int) -> Tensor:
    """1 where ranks with seeds of their own are refused."""
    try:
        trainer(group, Fraction(1, 3), [], seed=bytes([rank]) * 32)
    except ParameterError:
        return torch.ones(1)
    return torch.zeros(1)


def wait_for_the_others_in_vain(group: Group) -> None:
    """The others have left: whoever goes on is told so."""
    try:
        group.summed(torch.zeros(3, dtype=torch.float64))
    except TrainingError:
        return
    raise SystemExit("a sum without the others")


def main() -> None:
    torch.set_num_threads(1)
    with process_group(timeout_s=60.0) as group:
        measured = trainer(group, Fraction(1, 3), [], "auto")
        measured.run()
        found = scenarios(group) | {"refused": disagreement(group, group.rank)}
        found |= {f"auto/{key}": value for key, value in measured.weights().items()}
        safetensors.torch.save_file(found, Path(sys.argv[1], f"{group.rank}.safetensors"))
        if group.rank == 0:
            wait_for_the_others_in_vain(group)
            Path(sys.argv[1], "gave-up").touch()


if __name__ == "__main__":
    main()
