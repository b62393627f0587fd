"""Where a lineage stood after each of its charges: epsilon as the filter proves it, and the PLD's estimate.

To be shown; nothing is decided by it, so none of it is part of the chain. It is kept because making it anew takes some
30 ms a charge, grown charge by charge, and made again from the ledger where it is missing, broken or of another format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from casemate_privacy.lifetime import LifetimeLoss
from casemate_privacy.renyi import ZERO_CURVE, Curve, add_curves, check_curve
from casemate_privacy.renyi_filter import RenyiFilter
from casemate_schemas.codec import pack, unpack
from casemate_schemas.errors import CasemateError

from . import ledger
from .database import State, Transaction
from .ledger import Charge


@dataclass(frozen=True)
class Standing:
    """What the charges up to one of them cost together, at its licence's delta. ``estimate`` is ``None`` if unbounded."""

    epsilon: float
    estimate: float | None


@dataclass(frozen=True)
class _Kept:
    """All charges of a lineage up to entry ``number``."""

    number: int
    curve: Curve
    composed: LifetimeLoss


def find_all(tx: Transaction, lineage: bytes) -> dict[int, Standing]:
    """What is known, by the ledger entry's number."""
    query = "SELECT number, epsilon, estimate FROM standings WHERE lineage = ?"
    return {number: Standing(epsilon, estimate) for number, epsilon, estimate in tx.execute(query, (lineage,))}


def catch_up(database: State, lineage: bytes, max_charges: int) -> None:
    """Computes what is missing for the oldest ``max_charges`` charges, outside of any transaction.

    Whoever else does the same at the same time comes to the same values, and the first to end keeps theirs.
    """
    with database.transaction() as tx:
        kept = _load(tx, lineage)
        charges = ledger.charges_after(tx, lineage, kept.number, max_charges)
    start, found = kept.number, dict[int, Standing]()
    for number, charge in charges:
        kept = _after(kept, number, charge)
        found[number] = _standing(kept, charge, is_first=start == 0 and len(found) == 0)
    if found:
        with database.transaction() as tx:
            if _load(tx, lineage).number == start:
                _store(tx, lineage, kept, found)


def _after(kept: _Kept, number: int, charge: Charge) -> _Kept:
    return _Kept(number, add_curves(kept.curve, charge.curve), kept.composed.after(charge.event, charge.delta))


def _standing(kept: _Kept, charge: Charge, *, is_first: bool) -> Standing:
    """The first job's own exact epsilon is a guarantee, and less than the filter, made for many, proves."""
    proven = RenyiFilter(charge.limit_epsilon, charge.delta).spent_epsilon(kept.curve)
    estimate = kept.composed.epsilon(charge.delta)
    epsilon = min(proven, charge.epsilon) if is_first else proven
    return Standing(epsilon, min(estimate, epsilon) if math.isfinite(estimate) else None)


def _load(tx: Transaction, lineage: bytes) -> _Kept:
    row = tx.execute("SELECT number, curve, composed FROM losses WHERE lineage = ?", (lineage,)).fetchone()
    if row is not None:
        try:
            curve = unpack(row[1])
            check_curve(curve)
            return _Kept(row[0], curve, LifetimeLoss.from_bytes(row[2]))
        except CasemateError:
            tx.execute("DELETE FROM losses WHERE lineage = ?", (lineage,))
    return _Kept(0, ZERO_CURVE, LifetimeLoss.empty())


def _store(tx: Transaction, lineage: bytes, kept: _Kept, found: dict[int, Standing]) -> None:
    row = (lineage, kept.number, pack(kept.curve), kept.composed.to_bytes())
    tx.execute("INSERT OR REPLACE INTO losses VALUES (?, ?, ?, ?)", row)
    rows = [(lineage, number, standing.epsilon, standing.estimate) for number, standing in found.items()]
    tx.executemany("INSERT OR REPLACE INTO standings VALUES (?, ?, ?, ?)", rows)
