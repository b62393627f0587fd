"""The demonstration from founding to verified result: nothing in it that a consortium could not do itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from casemate_schemas.errors import StateError
from casemate_schemas.identity import Role
from casemate_schemas.requests import Budget

import casemate as cm
from casemate.client import Consortium, connect
from casemate.identity import now_ms
from casemate.local_stack.founding import found
from casemate.local_stack.layout import Layout
from casemate.local_stack.supervisor import LocalStack
from casemate.results import Result

from . import data

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

SCIENTIST: Final = "clara@university"
PURPOSE: Final = "breast-cancer-diagnosis"
EPSILON: Final = 3.0
DELTA: Final = 1e-3
STEPS: Final = 300
BATCH_SIZE: Final = 96
LIFETIME_EPSILON: Final = 12.0
OPTIMIZER: Final = cm.SGD(lr=0.1, momentum=0.9)
_LICENCE_DAYS: Final = 365


@dataclass
class Timings:
    """Seconds by phase, in the order in which phases began."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


@dataclass(frozen=True)
class Outcome:
    """Everything the table and the JSON are made of."""

    result: Result
    budgets: dict[str, Budget]
    accuracy: float
    majority_accuracy: float
    non_private_accuracy: float
    worker: str
    timings: Timings


async def run(folder: Path, *, seed: int, workers: int, console: Console) -> Outcome:
    """The whole scenario in ``folder``, which must be empty or new.

    1. Three hospitals and a university found a consortium; its programs start.
    2. Each hospital's steward seals its records and registers them under its licence.
    3. The scientist lists what they may use, and submits an ordinary module.
    4. Two attested workers are up; one trains it; the scientist watches.
    5. The scientist verifies and opens the result; each steward looks at what was charged.
    6. How good is it, beside the majority class and the same model without privacy?
    """
    timings = Timings()
    hospitals, held_out = data.load(seed)
    members = (*data.HOSPITALS, "university")
    people: dict[str, tuple[Role, ...]] = {f"sam@{name}": ("steward", "admin") for name in members}
    people[SCIENTIST] = ("scientist",)
    console.print("Three hospitals and a university found a consortium: keys, a SIMULATED chip, a manifest all sign.")
    with timings.phase("found"):  # 1
        layout = await asyncio.to_thread(found, folder, members=members, people=people, workers=workers)
    console.print(f"NATS, gateway, four key brokers and {workers} workers start, each a process of its own.")
    with timings.phase("start"):
        stack = await LocalStack(layout).__aenter__()
    try:
        console.print(
            "Each hospital's steward seals its records to its own key broker, under its own licence and budget."
        )
        with timings.phase("seal"):  # 2
            await asyncio.gather(*(_push(layout, name, hospitals[name]) for name in data.HOSPITALS))
        async with _connected(layout, SCIENTIST) as consortium:
            console.print(f"{SCIENTIST} lists what they may use, and submits an ordinary torch module:")
            with timings.phase("submit"):  # 3
                job = await _submit(consortium, console)
            with timings.phase("train"):  # 4
                status = await job.watch(console=console)
            if status.state != "sealed":
                raise StateError(f"the job ended as {status.state} ({status.reason}); see {layout.logs}")
            console.print(f"{SCIENTIST} verifies the result offline, and opens it. Each steward looks at its ledger.")
            with timings.phase("verify"):  # 5
                result = await job.result()
        with timings.phase("budgets"):
            budgets = dict(zip(data.HOSPITALS, await _budgets(layout), strict=True))
        worker = _worker_of(layout, job.id)
    finally:
        with timings.phase("stop"):
            await stack.stop()
    with timings.phase("compare"):  # 6
        accuracy, majority, non_private = await asyncio.to_thread(_accuracies, result, hospitals, held_out)
    return Outcome(result, budgets, accuracy, majority, non_private, worker, timings)


def network() -> nn.Module:
    """The scientist's model: an ordinary module, here a logistic regression from zero."""
    from torch import nn

    net = nn.Sequential(nn.Linear(len(data.BOUNDS), 1))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    return net


async def train(consortium: Consortium, datasets: Sequence[str]) -> cm.Job:
    """The scientist's job on these datasets, with this page's privacy parameters."""
    return await consortium.train(
        model=network(),
        datasets=datasets,
        target=data.TARGET,
        steps=STEPS,
        batch_size=BATCH_SIZE,
        optimizer=OPTIMIZER,
        privacy=cm.Privacy(epsilon=EPSILON, delta=DELTA, clipping_norm=1.0),
        purpose=PURPOSE,
        checkpoint_every_steps=100,
    )


def licence(owner: str) -> cm.Licence:
    """Each hospital's terms: scientists of the university, for one purpose, within a lifetime's budget."""
    scientist = cm.AllOf(
        rules=(
            cm.MemberIs(principal="submitter", member="university"),
            cm.RoleIs(principal="submitter", role="scientist"),
        )
    )
    to_university = cm.MemberIs(principal="recipient", member="university")
    train = cm.AllOf(rules=(scientist, cm.ForPurpose(purpose=PURPOSE), to_university))
    return cm.Licence(
        number=1,
        dataset=f"{data.DATASET}@{owner}",
        text="Scientists of the university may train models for breast cancer diagnosis and read the weights.",
        permissions=(
            cm.Permission(action="list", rule=scientist),
            cm.Permission(action="train", rule=train),
            cm.Permission(action="read_result", rule=to_university),
        ),
        epsilon=LIFETIME_EPSILON,
        epsilon_per_job=EPSILON,
        delta=DELTA,
        expires=now_ms() + _LICENCE_DAYS * 24 * 3600 * 1000,
    )


def _connected(layout: Layout, person: str) -> Any:
    facts = layout.read_facts()
    return connect(
        facts.url,
        identity=layout.person_keys(person),
        consortium=facts.consortium,
        state_dir=layout.member(person.partition("@")[2]) / "sdk",
    )


async def _push(layout: Layout, owner: str, records: data.Records) -> None:
    async with _connected(layout, f"sam@{owner}") as consortium:
        await consortium.push(records.columns(), data.card(owner), licence=licence(owner))


async def _submit(consortium: Consortium, console: Console) -> cm.Job:
    listed = await consortium.datasets()
    for dataset in listed:
        console.print(
            f"  {dataset.id}: at most {dataset.card.row_bound} rows, {len(dataset.card.columns)} columns, "
            f"ε {dataset.epsilon_remaining:.3g} left at δ {dataset.licence.delta:g}"
        )
    return await train(consortium, [dataset.id for dataset in listed])


async def _budgets(layout: Layout) -> list[Budget]:
    async def budget(owner: str) -> Budget:
        async with _connected(layout, f"sam@{owner}") as consortium:
            spent: Budget = await consortium.budget(f"{data.DATASET}@{owner}")
            return spent

    return await asyncio.gather(*(budget(owner) for owner in data.HOSPITALS))


def _worker_of(layout: Layout, job_id: str) -> str:
    """Which worker trained, by its own log."""
    for name in layout.read_facts().workers:
        if f'"event":"claimed","job_id":"{job_id}"' in (layout.logs / f"{name}.log").read_text():
            return name
    return "unknown"


def _accuracies(
    result: Result, hospitals: dict[str, data.Records], held_out: data.Records
) -> tuple[float, float, float]:
    import torch

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            predicted = net(torch.from_numpy(held_out.scaled())).squeeze(1) > 0
        return float((predicted.numpy() == (held_out.benign == 1)).mean())

    private = network()
    private.load_state_dict(result.weights)
    majority = max(float(held_out.benign.mean()), 1 - float(held_out.benign.mean()))
    return accuracy(private), majority, accuracy(_without_privacy(list(hospitals.values())))


def _without_privacy(hospitals: list[data.Records]) -> nn.Module:
    """The same model, optimiser and steps on the pooled public records, without clipping or noise.

    Anyone could train it so, outside: no worker has a path without noise.
    """
    import numpy as np
    import torch
    from torch import nn

    features = torch.from_numpy(np.concatenate([records.scaled() for records in hospitals]))
    targets = torch.from_numpy(np.concatenate([records.benign for records in hospitals]).astype(np.float32))
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=OPTIMIZER.lr, momentum=OPTIMIZER.momentum)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(features).squeeze(1), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return net
