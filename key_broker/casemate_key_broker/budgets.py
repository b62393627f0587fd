"""What a job costs a dataset: its PLD epsilon and Rényi curve, the cap that a licence puts on one job, and what is left."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from casemate_privacy.accounting import epsilon
from casemate_privacy.events import PrivacyEvent, ScheduledEvent, TrainingEvent, sampled
from casemate_privacy.renyi import Curve, rdp_curve
from casemate_privacy.renyi_filter import RenyiFilter
from casemate_privacy.statement import job_event
from casemate_schemas.errors import BudgetError
from casemate_schemas.job import DatasetUse, Plan, Rational
from casemate_schemas.licence import Licence
from casemate_schemas.requests import Budget, BudgetRenewal, ChargeKind, LedgerLine, ReleasePhase

from . import ledger, standings
from .database import Transaction
from .ledger import Charge, LedgerEntry
from .licences import Registered
from .standings import Standing

MAX_LINES: Final = 1024


def charge_of(use: DatasetUse, plan: Plan, dataset: Registered) -> Charge:
    """What ``plan`` costs ``dataset`` under the licence in force: up to a second of work the first time.

    Raises :class:`ParameterError` for what cannot be accounted.
    """
    return charge_for(job_event(plan, use), "train", dataset)


def charge_for(released: PrivacyEvent, kind: ChargeKind, dataset: Registered) -> Charge:
    """What a release costs ``dataset`` under the licence in force. Raises :class:`ParameterError`."""
    event, *further = released.phases if isinstance(released, ScheduledEvent) else (sampled(released),)
    return Charge(
        dataset=dataset.id,
        lineage=dataset.lineage,
        licence=dataset.licence_digest,
        kind=kind,
        sample_rate=Rational.of(event.sample_rate),
        noise_multiplier=event.noise_multiplier,
        steps=event.steps,
        further=tuple(_phase(other) for other in further),
        epsilon=epsilon(released, dataset.licence.delta),
        curve=rdp_curve(released),
        limit_epsilon=dataset.licence.epsilon,
        delta=dataset.licence.delta,
    )


def _phase(event: TrainingEvent) -> ReleasePhase:
    return ReleasePhase(
        sample_rate=Rational.of(event.sample_rate), noise_multiplier=event.noise_multiplier, steps=event.steps
    )


def check_cap(charge: Charge, licence: Licence) -> None:
    """Raises :class:`BudgetError`, with the figures, if one job may not cost that much."""
    if charge.epsilon > licence.epsilon_per_job:
        raise BudgetError(
            f"{charge.dataset}: this job costs epsilon {charge.epsilon:.4g} at delta {charge.delta:g}; the licence "
            f"allows {licence.epsilon_per_job:g} for one job: more noise, fewer steps or a lower sample rate cost less"
        )


@dataclass(frozen=True)
class Balance:
    """What a dataset's jobs are guaranteed to have cost together, and a guide to what one more may cost."""

    spent: float
    remaining: float


def balance(tx: Transaction, dataset: Registered) -> Balance:
    """Where the lineage stands under the licence in force.

    A single job is stated at its own exact epsilon, which the filter's bound, made for many, lies above.
    """
    lifetime = RenyiFilter(dataset.licence.epsilon, dataset.licence.delta)
    proven = _proven(lifetime, ledger.spent_curve(tx, dataset.lineage))
    charges = ledger.newest_charges(tx, dataset.lineage, 2)
    if len(charges) != 1:
        return proven
    return Balance(min(proven.spent, epsilon(charges[0][1].event, dataset.licence.delta)), proven.remaining)


def show(tx: Transaction, dataset: Registered, now: int) -> Budget:
    """Where the lineage stands, and what brought it there: the newest charges of all its periods, oldest first."""
    renewals = ledger.renewals(tx, dataset.id)
    lineages = (*(renewal.ended for renewal in renewals), dataset.lineage)
    lines = [line for period, lineage in enumerate(lineages) for line in _lines(tx, lineage, period, now)]
    state = balance(tx, dataset)
    current = [line for line in lines if line.period == len(renewals)]
    return Budget(
        dataset=dataset.id,
        lineage=dataset.lineage,
        privacy_unit=dataset.card.privacy_unit,
        epsilon=dataset.licence.epsilon,
        delta=dataset.licence.delta,
        epsilon_spent=state.spent,
        epsilon_remaining=state.remaining,
        epsilon_estimate=current[-1].estimate_after if current else 0.0,
        renewals=tuple(
            BudgetRenewal(at=renewal.at, person=renewal.person, epsilon_spent=_spent_by(tx, renewal.ended))
            for renewal in renewals
        ),
        n_charges=sum(ledger.n_charges(tx, lineage) for lineage in lineages),
        lines=tuple(lines[-MAX_LINES:]),
    )


def _lines(tx: Transaction, lineage: bytes, period: int, now: int) -> list[LedgerLine]:
    known = standings.find_all(tx, lineage)
    charges = ledger.newest_charges(tx, lineage, MAX_LINES)
    return [_line(tx, entry, charge, known.get(entry.number), period, now) for entry, charge in charges]


def _line(
    tx: Transaction, entry: LedgerEntry, charge: Charge, standing: Standing | None, period: int, now: int
) -> LedgerLine:
    committed = ledger.committed_result(tx, entry.terms)
    return LedgerLine(
        job_id=entry.job_id,
        terms=entry.terms,
        submitter=entry.submitter,
        purpose=entry.purpose,
        at=entry.at,
        kind=charge.kind,
        sample_rate=charge.sample_rate,
        noise_multiplier=charge.noise_multiplier,
        steps=charge.steps,
        further=charge.further,
        limit_epsilon=charge.limit_epsilon,
        delta=charge.delta,
        epsilon=charge.epsilon,
        epsilon_after=None if standing is None else standing.epsilon,
        estimate_after=None if standing is None else standing.estimate,
        state="committed" if committed is not None else "reserved" if now < entry.deadline else "failed",
        committed=committed,
        period=period,
    )


def _spent_by(tx: Transaction, lineage: bytes) -> float:
    """What a lineage had spent when it was ended, under the licence of its last charge."""
    last = ledger.newest_charges(tx, lineage, 1)
    if not last:
        return 0.0
    charge = last[0][1]
    return _proven(RenyiFilter(charge.limit_epsilon, charge.delta), ledger.spent_curve(tx, lineage)).spent


@lru_cache(maxsize=4096)
def _proven(lifetime: RenyiFilter, spent: Curve) -> Balance:
    """A fifth of a second of bisection, and the same until the next charge: a listing asks for every dataset's at once."""
    return Balance(lifetime.spent_epsilon(spent), lifetime.remaining_epsilon(spent))
