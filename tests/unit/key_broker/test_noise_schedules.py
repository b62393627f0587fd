"""Noise that changes on the way is in the terms, and charged phase by phase."""

from __future__ import annotations

from fractions import Fraction

from casemate_privacy.accounting import epsilon
from casemate_privacy.events import TrainingEvent
from casemate_schemas.job import NoisePhase
from casemate_schemas.requests import Budget, ShowBudget
from support.key_brokers import Bench

RATE = Fraction(1, 8)
"""The bench's."""


def test_each_phase_is_charged_at_its_own_noise(bench: Bench) -> None:
    dataset = bench.dataset()
    bench.ask("north", bench.stewards["north"], bench.registration(dataset))
    schedule = (NoisePhase(first_step=4, factor=2.0), NoisePhase(first_step=9, factor=0.75))
    plan = bench.plan(dataset.use(), training={"noise_schedule": schedule})
    bench.grant_all(bench.accepted_job(plan=plan))
    found = bench.ask("north", bench.stewards["north"], ShowBudget(dataset=dataset.card.id))
    assert isinstance(found, Budget)
    (line,) = found.lines
    phases = [(4, 2.0), (5, 4.0), (1, 1.5)]
    assert [(line.steps, line.noise_multiplier)] + [(p.steps, p.noise_multiplier) for p in line.further] == phases
    assert line.epsilon == epsilon([TrainingEvent(RATE, sigma, steps) for steps, sigma in phases], 1e-4)
    assert line.epsilon != epsilon(TrainingEvent(RATE, 2.0, 10), 1e-4)
