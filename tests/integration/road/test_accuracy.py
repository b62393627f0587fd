"""The demonstration's model is good: at epsilon 3 and delta 1e-3, over three ways to hold out a fifth of the records.

The first is trained by a worker; the other two by its engine, under the very plan of that job.
"""

from __future__ import annotations

import asyncio

import pytest
import torch
from casemate.demo import data, scenario
from casemate.results import Result
from casemate_schemas.job import Plan
from casemate_worker.training.engine import OwnerData, Trainer
from support.road import SCIENTIST, Road, ended

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_mean_accuracy_over_three_seeds(road: Road) -> None:
    hospitals, held_out = data.load(0)
    result = await _result(road, hospitals)
    for owner in result.privacy.owners:
        assert (owner.epsilon <= scenario.EPSILON, owner.delta) == (True, scenario.DELTA)
    accuracies = [_accuracy(result.weights, held_out)]
    for seed in (1, 2):
        hospitals, held_out = data.load(seed)
        accuracies.append(_accuracy(_trained(result.terms.plan, hospitals, seed), held_out))
    assert sum(accuracies) / len(accuracies) >= 0.92, accuracies


async def _result(road: Road, hospitals: dict[str, data.Records]) -> Result:
    """Of the demonstration's job."""
    datasets = await asyncio.gather(*(_push(road, owner, records) for owner, records in hospitals.items()))
    async with road.connected(SCIENTIST) as consortium:
        job = await scenario.train(consortium, datasets)
        assert (await ended(job)).state == "sealed"
        return await job.result()


def _trained(plan: Plan, hospitals: dict[str, data.Records], seed: int) -> dict[str, torch.Tensor]:
    """What the worker's engine makes of these records under ``plan``."""
    rates = {use.dataset.split("@")[1]: use.sample_rate.fraction for use in plan.datasets}
    owners = [
        OwnerData(owner, torch.from_numpy(records.scaled()), torch.from_numpy(records.benign).float(), rates[owner])
        for owner, records in hospitals.items()
    ]
    trainer = Trainer(
        scenario.network(), owners, plan.training, expected_batch=plan.expected_batch, seed=seed.to_bytes(32, "big")
    )
    trainer.run()
    return trainer.weights()


def _accuracy(weights: dict[str, torch.Tensor], held_out: data.Records) -> float:
    """On the records that nobody sealed."""
    net = scenario.network()
    net.load_state_dict(weights)
    with torch.no_grad():
        predicted = net(torch.from_numpy(held_out.scaled())).squeeze(1) > 0
    return float((predicted.numpy() == (held_out.benign == 1)).mean())


async def _push(road: Road, owner: str, records: data.Records) -> str:
    card = data.card(owner)
    async with road.connected(f"sam@{owner}") as consortium:
        return (await consortium.push(records.columns(), card, licence=scenario.licence(owner))).dataset
