"""A whole consortium for many tests: the local stack's real programs, people with the real SDK, and small datasets.

``async with running_road(folder) as road`` starts one; each test pushes a dataset of its own, so tests do not meet.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import casemate as cm
import numpy as np
import torch
from casemate._session import Session
from casemate.cli import cli
from casemate.client import Consortium, connect
from casemate.datasets import find_datasets
from casemate.identity import now_ms
from casemate.jobs import Job, seal_job, sign_terms, submit
from casemate.local_stack.founding import found
from casemate.local_stack.layout import Layout
from casemate.local_stack.supervisor import LocalStack
from casemate.planning import plan_training
from casemate.training_request import TrainingRequest
from casemate_messaging.connection import connect as connect_nats
from casemate_schemas.api import JobStatus
from casemate_schemas.identity import Role
from casemate_schemas.job import JobSpec, Plan
from casemate_schemas.job_state import TERMINAL
from casemate_schemas.keyring import KeyRing
from casemate_schemas.model import ModelSpec
from casemate_schemas.requests import Budget
from click.testing import CliRunner
from nats.aio.client import Client
from torch import nn

from .http import SignedRequest, signed_request

HOSPITALS = ("north", "south", "east")
SCIENTIST, COLLEAGUE, STRANGER = "clara@university", "mallory@university", "erin@east"
"""Two scientists of one member, and one of a hospital that most jobs do not concern."""

PURPOSE = "research"
TARGET = "sick"
ROWS, ROW_BOUND = 48, 64
_WAIT_S = 120.0
"""Patience, not an expectation: other tests run at the same time."""


@dataclass(frozen=True)
class Road:
    """A running stack, and the folder with everybody's keys."""

    layout: Layout
    stack: LocalStack

    def connected(self, person: str, **options: Any) -> AbstractAsyncContextManager[Consortium]:
        """``person@member`` at the gateway's door; ``options`` replace those of :func:`casemate.connect`."""
        facts = self.layout.read_facts()
        defaults: dict[str, Any] = {
            "identity": self.layout.person_keys(person),
            "consortium": facts.consortium,
            "state_dir": self.layout.member(person.partition("@")[2]) / f"sdk-{person}",
        }
        return connect(facts.url, **{**defaults, **options})

    async def push(
        self, name: str, *owners: str, columns: Mapping[str, Any] | None = None, **changed: Any
    ) -> list[str]:
        """Pushes a dataset of that name for each owner; ``changed`` replaces parts of the licence. Their ids."""

        async def one(owner: str) -> str:
            own = card(name, owner)
            async with self.connected(f"sam@{owner}") as consortium:
                data = patients(owner) if columns is None else columns
                return (await consortium.push(data, own, licence=licence(own.id, **changed))).dataset

        return list(await asyncio.gather(*(one(owner) for owner in owners)))

    async def budget(self, dataset: str) -> Budget:
        """The dataset's ledger, as its steward sees it."""
        async with self.connected(f"sam@{dataset.partition('@')[2]}") as consortium:
            return await consortium.budget(dataset)

    async def charged(self, datasets: Sequence[str]) -> list[list[str]]:
        """The job ids that each dataset was charged for."""
        budgets = await asyncio.gather(*map(self.budget, datasets))
        return [[line.job_id for line in budget.lines] for budget in budgets]

    @asynccontextmanager
    async def nats(self, user: str) -> AsyncIterator[Client]:
        """A connection with a program's own key: what its host could do."""
        seed = self.layout.program(user) / "nats.seed"
        client = await connect_nats(self.stack.nats.url, seed, user=user)
        try:
            yield client
        finally:
            await client.close()


async def ask(
    road: Road, keys: KeyRing, method: str, path: str, body: bytes = b"", **signing: Any
) -> tuple[int, dict[str, Any], bytes]:
    """One signed request past the SDK, ``signing`` as for :func:`support.http.signed_request`.

    Returns status, JSON body ({} if it is none) and raw body.
    """
    if keys.delegation is None:
        raise ValueError("expected a person's keys")
    url = road.layout.read_facts().url + path
    return await send(signed_request(keys.signing, keys.delegation, method, url, body, **signing), body)


async def send(signed: SignedRequest, body: bytes = b"") -> tuple[int, dict[str, Any], bytes]:
    """A request as it was signed."""
    async with (
        aiohttp.ClientSession() as session,
        session.request(signed.method, signed.url, data=body or None, headers=signed.headers) as response,
    ):
        answer = await response.read()
        return response.status, json.loads(answer) if "json" in response.content_type else {}, answer


@asynccontextmanager
async def running_road(
    folder: Path,
    *,
    members: Sequence[str] = (*HOSPITALS, "university"),
    workers: int = 2,
    overrides: Mapping[str, Mapping[str, object]] | None = None,
    more_people: Mapping[str, tuple[Role, ...]] | None = None,
    hosted: Sequence[str] = (),
) -> AsyncIterator[Road]:
    """Founds a consortium in ``folder`` and runs its programs while the block lasts.

    Key brokers of ``hosted`` members run in enclaves of the simulated chip.
    """
    people: dict[str, tuple[Role, ...]] = {f"sam@{name}": ("steward", "admin") for name in members if name in HOSPITALS}
    people |= {name: ("scientist",) for name in (SCIENTIST, COLLEAGUE, STRANGER) if name.partition("@")[2] in members}
    people |= more_people or {}
    layout = await asyncio.to_thread(found, folder, members=members, people=people, workers=workers, hosted=hosted)
    async with LocalStack(layout, overrides=overrides) as stack:
        yield Road(layout, stack)


def patients(owner: str, rows: int = ROWS) -> dict[str, Any]:
    """Records that are the same for an owner each time: two measurements in [0, 1], and whether one is sick."""
    random = np.random.default_rng(sum(owner.encode()))
    age, dose = random.random(rows), random.random(rows)
    return {"age": age, "dose": dose, TARGET: (age + dose > 1).astype(np.float64)}


def card(name: str, owner: str) -> cm.DatasetCard:
    """What owners declare about :func:`patients`."""
    columns = tuple(cm.Column(name=column, dtype="float64", lower=0.0, upper=1.0) for column in ("age", "dose", TARGET))
    return cm.DatasetCard(name=name, owner=owner, columns=columns, row_bound=ROW_BOUND)


def licence(dataset: str, **changed: Any) -> cm.Licence:
    """Scientists may list; those of the university may train for research, and read what comes of it."""
    university = cm.MemberIs(principal="submitter", member="university")
    options: dict[str, Any] = {
        "number": 1,
        "dataset": dataset,
        "permissions": (
            cm.Permission(action="list", rule=cm.RoleIs(principal="submitter", role="scientist")),
            cm.Permission(action="train", rule=cm.AllOf(rules=(university, cm.ForPurpose(purpose=PURPOSE)))),
            cm.Permission(action="read_result", rule=cm.MemberIs(principal="recipient", member="university")),
            cm.Permission(action="read_metrics", rule=cm.MemberIs(principal="recipient", member="university")),
        ),
        "epsilon": 40.0,
        "epsilon_per_job": 4.0,
        "delta": 1e-3,
        "expires": now_ms() + 24 * 3600 * 1000,
    }
    return cm.Licence(**{**options, **changed})


def network(inputs: int = 2) -> nn.Module:
    """A logistic regression that starts at zero."""
    net = nn.Sequential(nn.Linear(inputs, 1))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    return net


def request(datasets: Sequence[str], **changed: Any) -> dict[str, Any]:
    """Arguments of :meth:`Consortium.train` for a job of a few steps."""
    options: dict[str, Any] = {
        "model": network(),
        "datasets": tuple(datasets),
        "target": TARGET,
        "privacy": cm.Privacy(epsilon=1.0, delta=1e-3),
        "optimizer": cm.SGD(lr=0.5),
        "batch_size": 16,
        "steps": 4,
        "purpose": PURPOSE,
    }
    return {**options, **changed}


@dataclass(frozen=True)
class Planned:
    """What the SDK would submit: to be changed by hand, past the SDK's own checks."""

    plan: Plan
    model: ModelSpec
    weights: bytes

    def spec(self, plan: Plan | None = None, model: ModelSpec | None = None) -> JobSpec:
        """A job of its own id and salt."""
        return JobSpec(
            job_id=secrets.token_hex(16),
            salt=secrets.token_bytes(32),
            model=model or self.model,
            plan=plan or self.plan,
        )


async def planned(session: Session, datasets: Sequence[str], **changed: Any) -> Planned:
    """The SDK's own plan for :func:`request`."""
    defaults: dict[str, Any] = {
        "epochs": None,
        "features": None,
        "input_shape": None,
        "loss": None,
        "scaling": "minus_one_one",
        "recipients": None,
        "deadline_s": 600.0,
        "max_physical_batch": 1024,
        "checkpoint_every_steps": 100,
        "job_id": None,
    }
    asked = TrainingRequest(**{**defaults, **request(datasets, **changed)})
    listed = await find_datasets(session, asked.datasets)
    recipients = asked.recipients or (session.identity.signed_delegation,)
    return Planned(*await asyncio.to_thread(plan_training, asked, listed, recipients))


async def submit_spec(session: Session, told: JobSpec, weights: bytes, *, meant: JobSpec | None = None) -> Job:
    """Signs terms about the job ``told``, and submits it; or ``meant`` under those terms."""
    terms = sign_terms(session, told, weights, deadline_s=600.0)
    submission = await seal_job(session, meant or told, terms, weights)
    return await submit(session, submission, told.job_id)


async def casemate(road: Road, person: str, *arguments: str, stdin: str | None = None) -> str:
    """What ``casemate ARGUMENTS`` prints for that person. Raises what it fails with."""
    facts = road.layout.read_facts()
    environment = {
        "CASEMATE_URL": facts.url,
        "CASEMATE_IDENTITY": str(road.layout.person_keys(person)),
        "CASEMATE_CONSORTIUM": facts.consortium,
        "CASEMATE_STATE_DIR": str(road.layout.folder / f"state-{person}"),
    }
    result = await asyncio.to_thread(CliRunner().invoke, cli, arguments, env=environment, input=stdin)
    if result.exception is not None:
        raise result.exception
    return result.stdout


async def ended(job: Job) -> JobStatus:
    """The job's status once it has ended."""
    async with asyncio.timeout(_WAIT_S):
        async for event in job.events():
            if event.state in TERMINAL:
                break
        return await job.status()


async def until(found: Callable[[], bool], what: str) -> None:
    """Returns as soon as ``found`` says yes."""
    deadline = time.monotonic() + _WAIT_S
    while not found():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for {what}")
        await asyncio.sleep(0.02)


torch.set_num_threads(1)
