"""What the demonstration shows at its end: a table for people, the same as data."""

from __future__ import annotations

from typing import Any

from casemate_schemas.evidence import Evidence
from casemate_schemas.result import OwnerPrivacy
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from casemate.datasets import SIMULATED

from . import data
from .scenario import Outcome


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome as plain JSON values. Each owner's epsilon is what its own key broker charged."""
    result = outcome.result
    (noise,) = result.privacy.noise
    return {
        "simulation": result.simulation,
        "accuracy": outcome.accuracy,
        "majority_accuracy": outcome.majority_accuracy,
        "non_private_accuracy": outcome.non_private_accuracy,
        "job_id": result.job_id,
        "worker": outcome.worker,
        "owners": [
            {
                "owner": owner,
                "dataset": stated.dataset,
                "epsilon": _charged(outcome, owner),
                "epsilon_stated": stated.epsilon,
                "delta": outcome.budgets[owner].delta,
                "sample_rate": float(stated.sample_rate.fraction),
                "sample_rate_exact": str(stated.sample_rate.fraction),
                "noise_multiplier": noise.noise_multiplier,
                "steps": noise.steps,
                "epsilon_remaining": outcome.budgets[owner].epsilon_remaining,
            }
            for owner, stated in _owners(outcome)
        ],
        "person": {"epsilon": result.privacy.person_epsilon, "delta": result.privacy.person_delta},
        "evidence": _evidence(result.manifest.evidence, simulation=result.simulation),
        "verified": [
            {"step": step.number, "name": step.name, "by": step.by, "finding": step.finding}
            for step in result.verification.steps
        ],
        "software": result.manifest.software,
        "isolation": result.manifest.isolation,
        "timings_s": {name: round(seconds, 3) for name, seconds in outcome.timings.seconds.items()},
    }


def show(outcome: Outcome, console: Console) -> None:
    """The final table."""
    banner = Panel(Text(SIMULATED.upper(), justify="center"), style="bold yellow")
    console.print(Group(banner, _accuracy(outcome), _privacy(outcome), _verified(outcome), _time(outcome), banner))


def _owners(outcome: Outcome) -> list[tuple[str, OwnerPrivacy]]:
    by_owner = {stated.dataset.partition("@")[2]: stated for stated in outcome.result.privacy.owners}
    return [(owner, by_owner[owner]) for owner in data.HOSPITALS]


def _charged(outcome: Outcome, owner: str) -> float:
    return sum(line.epsilon for line in outcome.budgets[owner].lines if line.job_id == outcome.result.job_id)


def _evidence(evidence: Evidence, *, simulation: bool) -> dict[str, Any]:
    from casemate_attestation.report import AttestationReport

    component = evidence.components[0]
    report = AttestationReport.parse(component.report)
    return {
        "type": component.type,
        "simulation": simulation,
        "report_version": report.version,
        "measurement": report.measurement.hex(),
        "chip_id": report.chip_id.hex(),
        "report_data": report.report_data.hex(),
        "attempt": evidence.claims.attempt,
        "key_brokers": [item.key_broker for item in evidence.claims.nonces],
    }


def _accuracy(outcome: Outcome) -> Table:
    table = Table(title="Accuracy on held-out records", title_justify="left")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_row("trained by the consortium, differentially private", f"[bold]{outcome.accuracy:.1%}")
    table.add_row("the same without privacy (trained here, on the public data)", f"{outcome.non_private_accuracy:.1%}")
    table.add_row("always the majority class", f"{outcome.majority_accuracy:.1%}")
    return table


def _privacy(outcome: Outcome) -> Table:
    table = Table(title="Privacy charged, per hospital", title_justify="left")
    for column in ("dataset", "ε charged", "δ", "ε left", "sample rate", "noise multiplier", "steps"):
        table.add_column(column, justify="left" if column == "dataset" else "right")
    (noise,) = outcome.result.privacy.noise
    for owner, stated in _owners(outcome):
        budget = outcome.budgets[owner]
        table.add_row(
            stated.dataset,
            f"{_charged(outcome, owner):.4f}",
            f"{budget.delta:g}",
            f"{budget.epsilon_remaining:.3f}",
            f"{float(stated.sample_rate.fraction):.4f}",
            f"{noise.noise_multiplier:.4f}",
            str(noise.steps),
        )
    person = outcome.result.privacy
    if person.person_epsilon is not None:
        table.caption = f"A patient in all three: ε {person.person_epsilon:.3f} at δ {person.person_delta:g}"
    return table


def _verified(outcome: Outcome) -> Table:
    table = Table(title="Who verified what", title_justify="left")
    for column in ("step", "found", "by"):
        table.add_column(column, overflow="fold")
    for step in outcome.result.verification.steps:
        table.add_row(f"{step.number} {step.name}", step.finding, step.by)
    return table


def _time(outcome: Outcome) -> Table:
    table = Table(title=f"Where the time went ({outcome.worker} trained)", title_justify="left")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    for name, seconds in outcome.timings.seconds.items():
        table.add_row(name, f"{seconds:.2f}")
    table.add_row("all", f"{sum(outcome.timings.seconds.values()):.2f}", style="bold")
    return table
