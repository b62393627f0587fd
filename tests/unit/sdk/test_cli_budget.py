"""How a budget is shown: the plot, every entry explained, the summary; and that a renewal wants the dataset's id typed."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from casemate.cli.budget import PLOT_ROWS, _ledger, _summary, plot
from casemate.cli.jobs import choices_table
from casemate_privacy import OwnerTarget, weigh_choices
from casemate_schemas.job import Rational
from casemate_schemas.requests import Budget, BudgetRenewal, LedgerLine
from rich.console import Console

DAY_MS = 24 * 3600 * 1000


def _line(number: int, after: float | None, **changed: Any) -> LedgerLine:
    fields: dict[str, Any] = {
        "job_id": f"{number:032x}",
        "terms": bytes(32),
        "submitter": "clara@clara",
        "purpose": "research",
        "at": number * DAY_MS,
        "kind": "train",
        "sample_rate": Rational.of(Fraction(1, 8)),
        "noise_multiplier": 2.5,
        "steps": 40,
        "limit_epsilon": 4.0,
        "delta": 1e-5,
        "epsilon": 0.5,
        "epsilon_after": after,
        "estimate_after": None,
        "state": "committed",
        "committed": bytes(32),
        "period": 1,
    }
    return LedgerLine(**(fields | changed))


def _budget(*lines: LedgerLine) -> Budget:
    return Budget(
        dataset="cardio@north",
        lineage=bytes(32),
        privacy_unit="record",
        epsilon=4.0,
        delta=1e-5,
        epsilon_spent=3.0,
        epsilon_remaining=0.8,
        epsilon_estimate=2.75,
        renewals=(BudgetRenewal(at=0, person="nora@north", epsilon_spent=3.5),),
        n_charges=len(lines) + 7,
        lines=lines,
    )


def _text(renderable: Any) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


def test_the_plot_rises_to_what_is_spent_and_leaves_the_rest_free() -> None:
    found = _budget(_line(1, 1.0), _line(2, 2.0), _line(3, 3.0), _line(4, None), _line(0, 3.5, period=0))
    rows = _text(plot(found)).splitlines()
    heights = [sum(row[9 + column : 10 + column] == "█" for row in rows[:PLOT_ROWS]) for column in range(64)]
    assert heights[0] == round(PLOT_ROWS / 4) and heights[-1] == round(PLOT_ROWS * 3 / 4)
    assert heights == sorted(heights) and rows[0].split()[0] == "4"
    assert rows[PLOT_ROWS].split() == ["1970-01-02T00:00:00+00:00", "1970-01-04T00:00:00+00:00"]


def test_every_entry_is_explained() -> None:
    found = _budget(
        _line(1, 1.25), _line(2, None, kind="statistics", sample_rate=Rational.of(Fraction(1)), state="failed")
    )
    shown = _text(_ledger(found))
    for words in (
        "train: σ 2.5, q 0.125, 40 releases",
        "statistics: σ 2.5, q 1, 40",
        "1.25",
        "…",
        "failed",
        "research",
    ):
        assert words in shown, shown
    summary = _text(_summary(found))
    for words in ("ε 3 of 4 spent", "0.8 left", "2.75 (an estimate", "by nora@north, after ε 3.5", "newest 2 of 9"):
        assert words in summary, summary


def test_what_each_budget_costs_in_signal() -> None:
    owners = {"cardio@north": OwnerTarget(400, 3.0, 1e-3), "cardio@south": OwnerTarget(400, 1.0, 1e-3)}
    each, strictest, without = weigh_choices(owners, steps=50, expected_batch=80)
    assert each.samples[0] > each.samples[1] and each.noise_to_signal < strictest.noise_to_signal
    assert (without.name, without.names) == ("without cardio@south", ("cardio@north",))
    for choice in (each, strictest, without):
        assert sum(choice.samples) == pytest.approx(80, rel=0.01)
        assert choice.noise_to_signal == pytest.approx(choice.plan.noise_multiplier / 80, rel=0.01)
    shown = _text(choices_table([each]))
    assert "a budget for each" in shown and f"cardio@south: ε 1, {each.samples[1]:.1f}" in shown
    assert len(weigh_choices({"cardio@north": owners["cardio@north"]}, 50, 80)) == 1


def test_nothing_spent() -> None:
    assert "nothing spent" in _text(plot(_budget()))


@pytest.mark.parametrize(("top", "expected"), [(3.0, 4.0), (5.0, 5.0)])
def test_the_scale_is_the_licence_or_more(top: float, expected: float) -> None:
    assert float(_text(plot(_budget(_line(1, top)))).split()[0]) == expected
