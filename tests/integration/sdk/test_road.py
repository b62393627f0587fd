"""A steward pushes, a scientist trains and opens a verified result; who may not, cannot."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import casemate as cm
import numpy as np
import pytest
import torch
from casemate.cli.epsilon import recompute
from casemate.results import load
from casemate_privacy.recorded import events_of_ledger
from casemate_schemas.errors import AuthorisationError, LicenceError, NotFoundError
from rich.console import Console
from torch import nn

from .conftest import Road

WAIT_S = 120


def patients(seed: int) -> dict[str, Any]:
    """The older half has the outcome."""
    age = np.random.default_rng(seed).uniform(0, 120, 150).astype(np.float32)
    return {"age": age, "outcome": (age > 60).astype(np.int64)}


async def push_both(road: Road, folder: Path) -> None:
    for number, (owner, steward) in enumerate(road.bench.stewards.items()):
        card = road.bench.card(owner)
        licence = road.bench.licence(card.id, delta=1e-3, epsilon=8.0, epsilon_per_job=3.0)
        identity = road.identity(steward)
        async with connect(road, identity, folder / owner) as consortium:
            registered = await consortium.push(patients(number), card, licence=licence)
            assert registered.dataset == card.id
            assert (await consortium.budget(card.id)).epsilon_spent == 0.0


def connect(road: Road, identity: Any, state_dir: Path) -> Any:
    return cm.connect(road.url, identity=identity, state_dir=state_dir, consortium=road.bench.consortium.id.hex())


def request_of(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "model": nn.Sequential(nn.Linear(1, 1)),
        "datasets": ["cardio@north", "cardio@south"],
        "target": "outcome",
        "privacy": cm.Privacy(epsilon=3.0, delta=1e-3),
        "optimizer": cm.SGD(lr=0.5),
        "batch_size": 100,
        "steps": 40,
    }
    return {**fields, **changes}


async def test_push_train_watch_open_and_open_again_elsewhere(road: Road, tmp_path: Path) -> None:
    await push_both(road, tmp_path)
    clara = road.identity(road.bench.clara)
    console = Console(file=io.StringIO(), width=140)
    async with connect(road, clara, tmp_path / "here") as consortium:
        job = await consortium.train(**request_of())
        status = await asyncio.wait_for(job.watch(console=console), WAIT_S)
        assert status.state == "sealed"
        result = await job.result()
    assert len(result.verification.steps) == 12 and result.simulation
    assert [2.99 < owner.epsilon <= 3.0 for owner in result.privacy.owners] == [True, True]
    assert float(result.weights["0.weight"]) > 0.5, "older patients have the outcome"
    stated = recompute(result.privacy_events().model_dump_json().encode(), None, check=True)
    assert [(item.charged, item.holds) for item in stated] == [
        *((owner.epsilon, True) for owner in result.privacy.owners),
        (result.privacy.person_epsilon, True),
    ]
    result.save(tmp_path / "out")
    assert load(tmp_path / "out", clara).provenance() == result.provenance()
    async with connect(road, clara, tmp_path / "elsewhere") as consortium:
        again = await (await consortium.job(job.id)).result()
        assert torch.equal(again.weights["0.weight"], result.weights["0.weight"])
    steward = road.identity(road.bench.stewards["north"])
    async with connect(road, steward, tmp_path / "north") as consortium:
        budget = await consortium.budget("cardio@north")
        (line,) = budget.lines
        alone, whole = recompute(events_of_ledger(budget).model_dump_json().encode(), None, check=True)
        assert alone.holds and whole.holds and whole.epsilon == alone.epsilon == line.epsilon
        assert line.job_id == job.id and line.epsilon == pytest.approx(3.0, rel=0.01) and line.committed is not None
        with pytest.raises((AuthorisationError, NotFoundError)):
            await (await consortium.job(job.id, submitter="clara@clara")).result()


async def test_a_forbidden_purpose_ends_refused_in_the_owners_words(road: Road, tmp_path: Path) -> None:
    """Both owners forbid it; the first refusal ends the job, and it is that owner's own words that arrive."""
    await push_both(road, tmp_path)
    async with connect(road, road.identity(road.bench.clara), tmp_path / "here") as consortium:
        job = await consortium.train(**request_of(purpose="marketing"))
        states = [event.state async for event in job.events()]
        assert states[-1] == "refused"
        with pytest.raises(
            LicenceError, match=r"^(north|south): the licence of cardio@\1 does not let this party train"
        ):
            await job.result()
