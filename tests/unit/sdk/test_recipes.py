"""What a scientist may choose besides model and optimiser: told to the owners, planned for, refused where it cannot be."""

from __future__ import annotations

from typing import Any

import casemate as cm
import pytest
import torch
from casemate_privacy.accounting import epsilon
from casemate_privacy.statement import job_event
from casemate_schemas import job as wire
from casemate_schemas.errors import ModelError, ParameterError
from support.fake_gateway import FakeGateway
from support.results import World

from .test_jobs import opened_job, request_of

torch.set_num_threads(1)

RECIPE: dict[str, Any] = {
    "optimizer": cm.Adam(lr=0.1, weight_decay=0.01, bias_correction="dp"),
    "lr_schedule": cm.LrSchedule(warmup_steps=10, decay="cosine"),
    "noise_schedule": [cm.NoisePhase(first_step=50, factor=0.5)],
    "averaging": cm.Averaging(decay=0.9),
}


async def test_a_recipe_is_in_the_terms_and_all_its_noise_is_planned_for(
    gateway: FakeGateway, options: dict[str, Any], w: World
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.train(**request_of(**RECIPE))
    plan = opened_job(gateway, w)[0].plan
    training = plan.training
    assert training.optimizer == wire.Adam(lr=0.1, weight_decay=0.01, bias_correction="dp")
    assert training.lr_schedule == wire.LrSchedule(warmup_steps=10, decay="cosine")
    assert training.averaging == wire.Averaging(decay=0.9)
    assert training.noise_phases == ((50, training.noise_multiplier), (50, training.noise_multiplier * 0.5))
    for use in plan.datasets:
        assert 2.99 < epsilon(job_event(plan, use), 1e-3) <= 3.0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"lr_schedule": {"warmup_steps": 3}}, ParameterError),
        ({"lr_schedule": cm.LrSchedule(warmup_steps=101)}, ParameterError),
        ({"noise_schedule": [wire.NoisePhase(first_step=5, factor=2.0)]}, ParameterError),
        ({"noise_schedule": [cm.NoisePhase(first_step=100, factor=2.0)]}, ParameterError),
        ({"noise_schedule": [cm.NoisePhase(first_step=i + 1, factor=1.1) for i in range(8)]}, ParameterError),
        ({"averaging": 0.9}, ParameterError),
        ({"augmentation": cm.Augmentation(multiplicity=4, shift=1)}, ModelError),
    ],
)
async def test_what_no_worker_would_train_is_refused_before_anything_is_sent(
    gateway: FakeGateway, options: dict[str, Any], changes: dict[str, Any], error: type[Exception]
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        with pytest.raises(error):
            await consortium.train(**request_of(**changes))
    assert not gateway.submissions


@pytest.mark.parametrize(
    "make",
    [
        lambda: cm.Adam(lr=0.1, bias_correction="none"),  # type: ignore[arg-type]
        lambda: cm.SGD(lr=0.1, weight_decay=-1.0),
        lambda: cm.LrSchedule(final=2.0),
        lambda: cm.NoisePhase(first_step=0, factor=1.0),
        lambda: cm.Averaging(decay=1.0),
        lambda: cm.Augmentation(multiplicity=1, flip=True),
        lambda: cm.Augmentation(multiplicity=2),
    ],
)
def test_values_out_of_range_are_refused_where_they_are_typed(make: Any) -> None:
    with pytest.raises(ParameterError):
        make()
