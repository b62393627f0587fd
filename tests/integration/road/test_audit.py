"""An audit over the whole road: licences, budgets, a worker, a sealed report, verified offline; and what owners are charged."""

from __future__ import annotations

from pathlib import Path

import pytest
from casemate.results import load
from casemate_privacy.accounting import epsilon
from casemate_privacy.statement import job_event
from support.road import SCIENTIST, Road, ended, request

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_an_audit_is_charged_like_the_training_and_releases_a_report_alone(road: Road, tmp_path: Path) -> None:
    datasets = await road.push("audited", "north", "south")
    async with road.connected(SCIENTIST) as consortium:
        job = await consortium.audit(canaries=100, **request(datasets))
        assert (await ended(job)).state == "sealed"
        result = await job.result()
    assert result.audit is not None and not result.audit.refutes
    assert result.arrays == {} and "does not refute the guarantee" in str(result)
    assert set(result.manifest.clipping.values()) <= {"ghost", "per_sample", "grouped", "patches"}
    result.save(tmp_path / "audit")
    assert load(tmp_path / "audit", road.layout.person_keys(SCIENTIST)).audit == result.audit
    plan = result.terms.plan
    for use in plan.datasets:
        budget = await road.budget(use.dataset)
        assert budget.n_charges == 1
        assert budget.epsilon_spent >= epsilon(job_event(plan, use), budget.delta)
