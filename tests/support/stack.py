"""A whole local stack for tests: founded once a session, copied for whoever starts one.

In a ``conftest.py``: ``from support.stack import founded``; then ``LocalStack(copy_of(founded, folder))``.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import casemate as cm
import numpy as np
import pytest
from casemate.client import Consortium, connect
from casemate.identity import now_ms
from casemate.local_stack.founding import found
from casemate.local_stack.layout import Layout

OWNERS = ("north", "south")
MEMBERS = (*OWNERS, "university")
"""Also the key brokers' ids in their order: the first decides, the second follows, the third is the submitter's."""
SCIENTIST = "clara@university"
WORKERS = ("worker-1", "worker-2")
PURPOSE = "research"
DELTA = 1e-3
EPSILON_PER_JOB = 3.0
FEATURES = ("a", "b", "c")
TARGET = "y"
ROWS = 64
_DAY_MS = 24 * 3600 * 1000


@pytest.fixture(scope="session")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A founded consortium, never started: making the simulated chip's keys takes seconds, copying them nothing."""
    return found_in(tmp_path_factory.mktemp("founded") / "stack")


def found_in(folder: Path) -> Layout:
    """A new consortium of two owners and a university, with two workers."""
    people: dict[str, tuple[Any, ...]] = {f"sam@{owner}": ("steward",) for owner in OWNERS}
    people[SCIENTIST] = ("scientist",)
    return found(folder, members=MEMBERS, people=people, workers=len(WORKERS))


def copy_of(founded: Layout, folder: Path) -> Layout:
    """The same consortium in another folder, which must not exist."""
    shutil.copytree(founded.folder, folder)
    return Layout(folder)


def connected(layout: Layout, person: str) -> AbstractAsyncContextManager[Consortium]:
    """A connection of ``person@member`` to a stack that runs."""
    facts = layout.read_facts()
    return connect(
        facts.url,
        identity=layout.person_keys(person),
        consortium=facts.consortium,
        state_dir=layout.member(person.partition("@")[2]) / "sdk",
    )


async def push(layout: Layout, owner: str, dataset: str) -> None:
    """Seals and registers a small dataset of its own name, hence of its own lineage and budget."""
    random = np.random.default_rng(OWNERS.index(owner))
    columns = {name: random.uniform(-1, 1, ROWS) for name in FEATURES}
    columns[TARGET] = (columns["a"] - columns["b"] > 0).astype(np.float64)
    card = cm.DatasetCard(
        name=dataset,
        owner=owner,
        columns=(
            *(cm.Column(name=name, dtype="float64", lower=-1.0, upper=1.0) for name in FEATURES),
            cm.Column(name=TARGET, dtype="float64", lower=0.0, upper=1.0),
        ),
        row_bound=ROWS,
        description="points on either side of a line",
    )
    async with connected(layout, f"sam@{owner}") as consortium:
        await consortium.push(columns, card, licence=licence(owner, dataset))


def licence(owner: str, dataset: str) -> cm.Licence:
    """Scientists of the university may train, within a budget of four jobs."""
    scientist = cm.RoleIs(principal="submitter", role="scientist")
    to_university = cm.MemberIs(principal="recipient", member="university")
    return cm.Licence(
        number=1,
        dataset=f"{dataset}@{owner}",
        text="Scientists of the university may train models and read the weights.",
        permissions=(
            cm.Permission(action="list", rule=scientist),
            cm.Permission(action="train", rule=cm.AllOf(rules=(scientist, to_university))),
            cm.Permission(action="read_result", rule=to_university),
        ),
        epsilon=4 * EPSILON_PER_JOB,
        epsilon_per_job=EPSILON_PER_JOB,
        delta=DELTA,
        expires=now_ms() + 365 * _DAY_MS,
    )
