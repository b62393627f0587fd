"""What a job costs a dataset: its PLD epsilon and Rényi curve, the cap that a licence puts on one job, and what is left."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from casemate_privacy.accounting import epsilon
from casemate_privacy.events import TrainingEvent
from casemate_privacy.renyi import Curve, rdp_curve
from casemate_privacy.renyi_filter import RenyiFilter
from casemate_schemas.errors import BudgetError
from casemate_schemas.job import DatasetUse, Training
from casemate_schemas.licence import Licence

from . import ledger
from .database import Transaction
from .ledger import Charge
from .licences import Registered


def charge_of(use: DatasetUse, training: Training, dataset: Registered) -> Charge:
    """What ``training`` costs ``dataset`` under the licence in force: up to a second of work the first time.

    Raises :class:`ParameterError` for what cannot be accounted.
    """
    event = TrainingEvent(use.sample_rate.fraction, training.noise_multiplier, training.steps)
    return Charge(
        dataset=use.dataset,
        lineage=dataset.lineage,
        licence=dataset.licence_digest,
        sample_rate=use.sample_rate,
        noise_multiplier=training.noise_multiplier,
        steps=training.steps,
        epsilon=epsilon(event, dataset.licence.delta),
        curve=rdp_curve(event),
        limit_epsilon=dataset.licence.epsilon,
        delta=dataset.licence.delta,
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


@lru_cache(maxsize=4096)
def _proven(lifetime: RenyiFilter, spent: Curve) -> Balance:
    """A fifth of a second of bisection, and the same until the next charge: a listing asks for every dataset's at once."""
    return Balance(lifetime.spent_epsilon(spent), lifetime.remaining_epsilon(spent))
