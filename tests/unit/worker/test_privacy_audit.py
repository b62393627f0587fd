"""The engine audited: nothing refutes what it promises, and every planted bug is found out."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from casemate_privacy import TrainingEvent, epsilon
from casemate_privacy.auditing import audit_report, one_run_epsilon, profile_of, refutes_profile, repeated_game_epsilon
from casemate_schemas.audit import AuditCounts, Guesses
from casemate_schemas.errors import ParameterError, TrainingError
from casemate_schemas.job import Mechanism, Plan
from casemate_schemas.pipeline import Loss
from casemate_worker.privacy_audit import PARTS, AuditedModel, AuditedTraining, flip_coins, with_canaries
from casemate_worker.training.engine import OwnerData, Trainer
from casemate_worker.worker import _audit_report
from support.planted_bugs import (
    CLIPPING_NORM,
    ONE_RUN_BUGS,
    RATE,
    Bug,
    audit_plan,
    mean_over_the_batch,
    no_step_for_an_empty_batch,
    play,
    play_often,
    seed_of,
)
from torch import Tensor, nn

torch.set_num_threads(1)

DELTA = 1e-5
EPSILON = epsilon(TrainingEvent(RATE, 2.4913, 20), DELTA)
OFTEN = Fraction(1, 2)
NOISE = 3.0
GAMES = 120


def lower_bound(plan: Plan, counts: AuditCounts) -> float:
    """The report's ``one_run_epsilon``, without the time that the other bound takes."""
    assert plan.audit is not None
    significance = (1 - plan.audit.confidence) / (2 * len(counts.guesses))
    return max(
        one_run_epsilon(plan.audit.canaries, item.made, item.correct, delta=DELTA, significance=significance)
        for item in counts.guesses
    )


@pytest.mark.parametrize(("number", "mechanism"), [*((n, "hardened") for n in range(8)), (8, "exact"), (9, "exact")])
def test_ten_runs_of_the_engine_refute_nothing(number: int, mechanism: Mechanism) -> None:
    """Neither epsilon, nor any other point of the privacy profile that is charged."""
    plan = audit_plan(mechanism=mechanism)
    counts = play(plan, number)
    assert lower_bound(plan, counts) <= EPSILON
    profile = profile_of(TrainingEvent(RATE, 2.4913, 20))
    significance = 0.05 / (2 * len(counts.guesses))
    assert not any(refutes_profile(1000, item.made, item.correct, profile, significance) for item in counts.guesses)


@pytest.mark.parametrize("name", ONE_RUN_BUGS)
def test_every_planted_bug_is_above_epsilon(name: str) -> None:
    plan = audit_plan()
    assert lower_bound(plan, play(plan, 0, ONE_RUN_BUGS[name])) > EPSILON


def test_an_audit_of_little_noise_finds_much_of_what_there_is_to_find() -> None:
    """Or it could never refute anything."""
    plan = audit_plan(noise=0.9)
    found = audit_report(plan, play(plan, 0))
    assert 0.15 * found.epsilon < found.one_run_epsilon < found.profile_epsilon < found.epsilon
    assert found.epsilon > 5 and not found.refutes


def stands_out(games: np.ndarray) -> int:
    """In how many games the release was not exactly zero."""
    return int((np.abs(games).max(axis=1) > 0).sum())


def is_quiet(games: np.ndarray) -> int:
    """In how many games it varied by less than three quarters of what it should."""
    return int((games.std(axis=1) < 0.75 * NOISE * CLIPPING_NORM).sum())


@pytest.mark.parametrize(
    ("bug", "others", "event"), [(no_step_for_an_empty_batch, 0, stands_out), (mean_over_the_batch, 1, is_quiet)]
)
@pytest.mark.parametrize("is_planted", [True, False])
def test_bugs_that_only_a_single_canary_shows(bug: Bug, others: int, event: type[stands_out], is_planted: bool) -> None:
    counts = [
        event(
            play_often(GAMES, present=present, others=others, rate=OFTEN, noise=NOISE, bug=bug if is_planted else None)
        )
        for present in (False, True)
    ]
    found = repeated_game_epsilon(counts[0], GAMES, counts[1], GAMES, delta=DELTA, significance=0.05)
    assert (found > epsilon(TrainingEvent(OFTEN, NOISE, 1), DELTA)) == is_planted


def classes(count: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, count))


LOSSES: dict[Loss, tuple[nn.Module, torch.dtype]] = {
    "cross_entropy": (classes(3), torch.int64),
    "binary_cross_entropy": (classes(1), torch.float32),
    "mean_squared_error": (nn.Sequential(classes(1), nn.Flatten(0)), torch.float32),
}


def audited(loss: Loss, owner_rows: int = 20) -> tuple[Trainer, Trainer, list[OwnerData]]:
    """A trainer with 32 canaries, all of them in; one without, of the same model; and the former's owners."""
    model, kind = LOSSES[loss]
    plan = audit_plan(canaries=32).training.model_copy(update={"loss": loss})
    features = torch.linspace(-1, 1, owner_rows * 3).reshape(-1, 3)
    owner = OwnerData("points@north", features, (torch.arange(owner_rows) % 2).to(kind), RATE)
    owners = with_canaries([owner], np.ones(32, dtype=bool), RATE)
    shared = {"expected_batch": Fraction(5), "seed": bytes(32)}
    with_them = Trainer(AuditedModel(model, (3,), 32, CLIPPING_NORM), owners, plan, **shared)
    return with_them, Trainer(model, [owner], plan, **shared), owners


def clipped_sum(trainer: Trainer, data: OwnerData, rows: slice) -> Tensor:
    return trainer._clipping.clipped_sum(data.features[rows], data.targets[rows])


@pytest.mark.parametrize("loss", LOSSES)
def test_canaries_are_as_long_as_clipping_allows_and_at_right_angles_to_all_else(loss: Loss) -> None:
    trainer, _, (_, canaries) = audited(loss)
    found = torch.stack([clipped_sum(trainer, canaries, slice(i, i + 1)) for i in range(32)])
    products = found @ found.T / CLIPPING_NORM**2
    assert 0.99 < float(products.diagonal().min()) <= float(products.diagonal().max()) <= 1 + 1e-12
    assert not (products - products.diagonal().diag()).any()
    assert not found[:, : -PARTS * 33].any()
    torch.testing.assert_close(clipped_sum(trainer, canaries, slice(None)), found.sum(dim=0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_owners_records_are_clipped_as_if_there_were_no_canaries(loss: Loss) -> None:
    trainer, alone, (records, _) = audited(loss)
    expected = clipped_sum(
        alone, OwnerData("points@north", records.features[:, :-1].contiguous(), records.targets, RATE), slice(None)
    )
    found = clipped_sum(trainer, records, slice(None))
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-5, atol=1e-7)
    assert expected.norm() > 0.1 and not found[len(expected) :].any()


def test_coins_are_fair_differ_by_seed_and_are_drawn_for_nothing_else() -> None:
    coins = flip_coins(bytes(32), 10_000)
    assert abs(int(coins.sum()) - 5000) < 250
    others = [flip_coins(seed_of(n), 10_000) for n in range(3)]
    for first, second in itertools.combinations([coins, *others], 2):
        assert abs(int((first == second).sum()) - 5000) < 250


def test_counts_are_the_same_for_the_same_seed_and_differ_for_another() -> None:
    plan = audit_plan(canaries=200, steps=3)
    assert play(plan, 1) == play(plan, 1) != play(plan, 2)


def test_a_plan_of_no_audit_is_refused() -> None:
    plan = Plan.model_validate(audit_plan().model_dump() | {"kind": "train", "release": ("weights",), "audit": None})
    owner = OwnerData("points@north", torch.zeros(2, 3), torch.zeros(2), RATE)
    with pytest.raises(ParameterError):
        AuditedTraining(nn.Linear(3, 1), [owner], plan, bytes(32))


def test_what_is_reserved_for_rounding_counts_the_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact noise reserves for the largest batch that can be, which is larger by the canaries."""
    means = []
    real = Trainer.__init__

    def noted(self: Trainer, *args: Any, **options: Any) -> None:
        means.append(options["expected_batch"])
        real(self, *args, **options)

    monkeypatch.setattr(Trainer, "__init__", noted)
    play(audit_plan(canaries=400, steps=1, mechanism="exact"), 0)
    assert means == [200 * RATE + 400 * RATE]


def test_counts_that_no_audit_has_are_a_failure_of_the_training_and_tell_no_more() -> None:
    plan = audit_plan(canaries=64)
    bad = AuditCounts(guesses=(Guesses(score="spread", top=1, bottom=0, correct=1),))
    with pytest.raises(TrainingError, match=r"^training failed$"):
        _audit_report(plan, bad)
    assert _audit_report(plan, None) is None
