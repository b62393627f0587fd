"""What a plan may ask of those who judge it: so much accounting, and no more."""

from __future__ import annotations

from fractions import Fraction

import pytest
from casemate_key_broker import prechecks
from casemate_privacy import statement
from casemate_privacy.statement import MAX_ACCOUNTED, check_accountable, privacy_statement
from casemate_schemas.errors import ParameterError
from casemate_schemas.job import NoisePhase, Plan, Rational
from support.results import world


def plan_of(owners: int, rates: int, phases: int) -> Plan:
    """So many datasets, sampled at so many different rates, under noise of so many phases."""
    plan = world().plan()
    (use, *_), training = plan.datasets, plan.training
    uses = tuple(
        use.model_copy(
            update={
                "dataset": f"cardio{i:02}@{use.owner}",
                "sample_rate": Rational.of(Fraction(1, 4 + i % rates)),
            }
        )
        for i in range(owners)
    )
    schedule = tuple(NoisePhase(first_step=i, factor=1 + i / 10) for i in range(1, phases))
    changes = {"datasets": uses, "training": training.model_copy(update={"noise_schedule": schedule})}
    return Plan.model_validate({**dict(plan), **changes})


@pytest.mark.parametrize("shape", [(64, 64, 1), (8, 8, 8), (64, 8, 8), (64, 1, 8)])
def test_as_many_pairs_as_may_be(shape: tuple[int, int, int]) -> None:
    check_accountable(plan_of(*shape))


@pytest.mark.parametrize("shape", [(9, 9, 8), (64, 33, 2)])
def test_more_are_refused_before_anything_is_computed(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statement, "epsilon", lambda *_: pytest.fail("it was computed"))
    plan = plan_of(*shape)
    for judge in (privacy_statement, lambda plan: prechecks.price((), plan)):
        with pytest.raises(ParameterError, match=f"at most {MAX_ACCOUNTED} are: fewer phases"):
            judge(plan)
