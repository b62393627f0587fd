"""A job on datasets that protect subjects, with padded batches and metrics, from an owner's card to a scientist's result."""

from __future__ import annotations

import casemate as cm
import numpy as np
import pytest
from casemate_privacy.accounting import epsilon
from casemate_privacy.statement import job_event
from support.road import ROW_BOUND, SCIENTIST, Road, card, ended, licence, patients, request

pytestmark = pytest.mark.asyncio(loop_scope="session")

UNIT = cm.Privacy(epsilon=2.0, delta=1e-3, unit="subject")


async def test_a_job_on_subjects_is_charged_as_stated_and_tells_noisy_metrics(road: Road) -> None:
    columns = (*card("visits", "north").columns, cm.Column(name="patient", dtype="int64", lower=0, upper=1e6))
    own = cm.DatasetCard(
        name="visits",
        owner="north",
        columns=columns,
        row_bound=ROW_BOUND,
        privacy_unit="subject",
        subject_column="patient",
        max_records_per_subject=4,
        subject_bound=ROW_BOUND // 2,
    )
    data = patients("north")
    data["patient"] = np.arange(len(data["age"])) % 20
    async with road.connected("sam@north") as consortium:
        dataset = (await consortium.push(data, own, licence=licence(own.id))).dataset
    async with road.connected(SCIENTIST) as consortium:
        metrics = cm.Metrics(epsilon_share=0.5, loss_bound=2.0)
        wanted = request([dataset], privacy=UNIT, metrics=metrics, padded_batch="auto")
        job = await consortium.train(**wanted)
        assert (await ended(job)).state == "sealed"
        result = await job.result()
    plan = result.terms.plan
    assert plan.training.padded_batch is not None
    assert result.privacy.unit == "subject"
    (owner,), (line,) = result.privacy.owners, (await road.budget(dataset)).lines
    assert 1.99 < owner.epsilon == line.epsilon == epsilon(job_event(plan, plan.datasets[0]), 1e-3) <= 2.0
    assert [phase.noise_multiplier for phase in line.further] == [result.privacy.metrics_noise_multiplier]
    assert result.metrics is not None
    assert result.metrics.count != round(result.metrics.count)
    assert abs(result.metrics.count - 20) < 6 * result.metrics.noise_std
