"""The privacy ledger: what each lineage was charged, and which one result each job committed. Nothing is ever taken back.

Entries are numbered and hash-chained; each is a canonical :class:`LedgerEntry` or :class:`RenewalEntry` whose digest is
the head after it. For one terms digest there is at most one reservation and at most one commit (unique indexes hold this
even against a bug here). What a lineage has spent is one Rényi curve, the sum of its charges; it is recomputed and compared
when the state is opened. A fresh budget is a fresh lineage, which only an owner's renewal begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

from casemate_privacy.events import ScheduledEvent, TrainingEvent
from casemate_privacy.renyi import ORDERS, ZERO_CURVE, Curve, add_curves
from casemate_privacy.renyi_filter import RenyiFilter
from casemate_schemas.codec import (
    Digest,
    M,
    Name,
    UnixMs,
    WireModel,
    decode,
    digest_of,
    domain_digest,
    encode,
    pack,
    unpack,
)
from casemate_schemas.dataset import DatasetId
from casemate_schemas.errors import BudgetError, CasemateError, CommitConflictError, IntegrityError, StateError
from casemate_schemas.job import MAX_DATASETS, MAX_STEPS, JobId, Rational
from casemate_schemas.requests import MAX_RELEASE_PHASES, ChargeKind, ReleasePhase
from pydantic import Field

from .database import Transaction, get_meta, set_meta

_HEAD: Final = "ledger-head"
_START: Final = bytes(32)

CurveValues = Annotated[
    tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=len(ORDERS), max_length=len(ORDERS))
]


class Charge(WireModel):
    """What one job costs one lineage, from what it follows, and the licence's limits it was held against."""

    dataset: DatasetId
    lineage: Digest
    licence: Digest
    kind: ChargeKind = "train"
    sample_rate: Rational
    """One for evaluations, statistics and metrics, which are sums over all records."""
    noise_multiplier: float
    """Standard deviation of the noise over the sensitivity."""
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    further: Annotated[tuple[ReleasePhase, ...], Field(max_length=MAX_RELEASE_PHASES)] = ()
    """What the same job releases besides: under other noise, as its schedule says, or metrics."""
    epsilon: Annotated[float, Field(ge=0)]
    """The job's own epsilon (PLD) at ``delta``."""
    curve: CurveValues
    """The job's Rényi curve on the orders of ``casemate_privacy.renyi``."""
    limit_epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]

    @property
    def event(self) -> ScheduledEvent:
        """What the lineage's records went through. Raises :class:`ParameterError` for what cannot be accounted."""
        first = TrainingEvent(self.sample_rate.fraction, self.noise_multiplier, self.steps)
        further = (
            TrainingEvent(phase.sample_rate.fraction, phase.noise_multiplier, phase.steps) for phase in self.further
        )
        return ScheduledEvent((first, *further))


class LedgerEntry(WireModel):
    """One entry. A ``release`` is a reservation that charges nothing: of a job's own key, without any dataset's."""

    KIND: ClassVar[str] = "ledger-entry"

    version: Literal[1] = 1
    number: Annotated[int, Field(ge=1)]
    previous: Digest
    event: Literal["reserve", "release", "commit"]
    at: UnixMs
    job_id: JobId
    terms: Digest
    submitter: Annotated[str, Field(max_length=140)]
    purpose: Name
    deadline: UnixMs
    epoch: Annotated[int, Field(ge=1)]
    """Whose secret the seed share is derived from."""
    charges: Annotated[tuple[Charge, ...], Field(max_length=MAX_DATASETS)] = ()
    result: Digest | None = None


class RenewalEntry(WireModel):
    """An owner gave a dataset a fresh budget: what its lineage had spent is no longer counted against its licence."""

    KIND: ClassVar[str] = "ledger-renewal"

    version: Literal[1] = 1
    number: Annotated[int, Field(ge=1)]
    previous: Digest
    event: Literal["renew"] = "renew"
    at: UnixMs
    dataset: DatasetId
    ended: Digest
    begun: Digest
    person: Annotated[str, Field(max_length=140)]


@dataclass(frozen=True)
class Reservation:
    """A job that may be granted keys: it was charged, once and for all."""

    hash: bytes
    entry: LedgerEntry


def find_reservation(tx: Transaction, terms: bytes) -> Reservation | None:
    """The reservation of these terms, if there is one."""
    row = tx.execute("SELECT hash, entry FROM ledger WHERE terms = ? AND event <> 'commit'", (terms,)).fetchone()
    return None if row is None else Reservation(row[0], _job_entry(row[1]))


def reserve(
    tx: Transaction,
    *,
    job_id: str,
    terms: bytes,
    submitter: str,
    purpose: str,
    deadline: int,
    epoch: int,
    charges: tuple[Charge, ...],
    now: int,
) -> Reservation:
    """The reservation of these terms: the one there is, or a new one that every lineage's filter admits.

    Raises :class:`BudgetError`, with nothing charged to anyone, if one lineage's budget does not cover its charge.
    """
    if (existing := find_reservation(tx, terms)) is not None:
        return existing
    for charge in charges:
        check_budget(tx, charge)
    size, head = get_meta(tx, _HEAD) or (0, _START)
    entry = LedgerEntry(
        number=size + 1,
        previous=head,
        event="reserve" if charges else "release",
        at=now,
        job_id=job_id,
        terms=terms,
        submitter=submitter,
        purpose=purpose,
        deadline=deadline,
        epoch=epoch,
        charges=charges,
    )
    for charge in charges:
        _set_spent(tx, charge.lineage, add_curves(spent_curve(tx, charge.lineage), charge.curve))
    reservation = Reservation(_append(tx, entry), entry)
    rows = [(charge.lineage, entry.number) for charge in charges]
    tx.executemany("INSERT INTO charges VALUES (?, ?)", rows)
    return reservation


def committed_result(tx: Transaction, terms: bytes) -> bytes | None:
    """The result digest that holds the commit of these terms, if one does."""
    row = tx.execute("SELECT entry FROM ledger WHERE terms = ? AND event = 'commit'", (terms,)).fetchone()
    return None if row is None else _job_entry(row[0]).result


def commit(tx: Transaction, terms: bytes, result: bytes, *, now: int) -> bool:
    """Holds ``result`` for these terms, for ever; whether that is new.

    Raises :class:`CommitConflictError` if another result holds it, and :class:`StateError` without a reservation.
    """
    if (existing := committed_result(tx, terms)) is not None:
        if existing != result:
            raise CommitConflictError("another result is committed for these terms")
        return False
    if (reservation := find_reservation(tx, terms)) is None:
        raise StateError("no keys were granted for these terms")
    size, head = get_meta(tx, _HEAD)
    changes = {"number": size + 1, "previous": head, "event": "commit", "at": now, "charges": (), "result": result}
    _append(tx, reservation.entry.model_copy(update=changes))
    return True


def renew(tx: Transaction, dataset: str, ended: bytes, begun: bytes, *, person: str, now: int) -> None:
    """Writes down that ``dataset`` goes on under the lineage ``begun``, of which nothing is spent. Earlier entries stay."""
    size, newest = get_meta(tx, _HEAD) or (0, _START)
    entry = RenewalEntry(
        number=size + 1, previous=newest, at=now, dataset=dataset, ended=ended, begun=begun, person=person
    )
    _append(tx, entry)
    tx.execute("INSERT INTO renewals VALUES (?, ?, ?)", (ended, dataset, entry.number))


def renewals(tx: Transaction, dataset: str) -> list[RenewalEntry]:
    """The renewals of a dataset's budget, oldest first."""
    query = "SELECT entry FROM renewals JOIN ledger USING (number) WHERE dataset = ? ORDER BY number"
    return [_renewal_entry(payload) for (payload,) in tx.execute(query, (dataset,)).fetchall()]


def head(tx: Transaction) -> bytes:
    """Hash of the newest entry; 32 zero bytes before the first."""
    return newest_entry(tx)[1]


def newest_entry(tx: Transaction) -> tuple[int, bytes]:
    """Number and hash of the newest entry; (0, 32 zero bytes) before the first."""
    size, newest = get_meta(tx, _HEAD) or (0, _START)
    return int(size), bytes(newest)


def hash_at(tx: Transaction, number: int) -> bytes | None:
    """Hash of the entry of that number, if there is one."""
    if number == 0:
        return _START
    row = tx.execute("SELECT hash FROM ledger WHERE number = ?", (number,)).fetchone()
    return None if row is None else bytes(row[0])


def spent_curve(tx: Transaction, lineage: bytes) -> Curve:
    """The sum of all charges of a lineage."""
    row = tx.execute("SELECT curve FROM spent WHERE lineage = ?", (lineage,)).fetchone()
    return ZERO_CURVE if row is None else unpack(row[0])


def check_budget(tx: Transaction, charge: Charge) -> None:
    """Raises :class:`BudgetError`, with the figures, unless the lineage's Rényi filter admits ``charge`` now."""
    lifetime = RenyiFilter(charge.limit_epsilon, charge.delta)
    spent = spent_curve(tx, charge.lineage)
    if not lifetime.admits_event(spent, charge.event):
        raise BudgetError(
            f"{charge.dataset}: this job alone costs epsilon {charge.epsilon:.4g} at delta {charge.delta:g}; of the "
            f"lifetime budget {charge.limit_epsilon:g} there is {lifetime.remaining_epsilon(spent):.4g} left"
        )


def newest_charges(tx: Transaction, lineage: bytes, limit: int) -> list[tuple[LedgerEntry, Charge]]:
    """The newest ``limit`` charges of a lineage with their entries, oldest of them first."""
    rows = tx.execute(
        "SELECT entry FROM charges JOIN ledger USING (number) WHERE lineage = ? ORDER BY number DESC LIMIT ?",
        (lineage, limit),
    ).fetchall()
    found = [_job_entry(payload) for (payload,) in reversed(rows)]
    return [(entry, charge) for entry in found for charge in entry.charges if charge.lineage == lineage]


def n_charges(tx: Transaction, lineage: bytes) -> int:
    """How often a lineage was charged."""
    (count,) = tx.execute("SELECT count(*) FROM charges WHERE lineage = ?", (lineage,)).fetchone()
    return int(count)


def charges_after(tx: Transaction, lineage: bytes, number: int, limit: int) -> list[tuple[int, Charge]]:
    """The oldest ``limit`` charges of a lineage in entries after ``number``, with their entries' numbers."""
    rows = tx.execute(
        "SELECT number, entry FROM charges JOIN ledger USING (number) WHERE lineage = ? AND number > ?"
        " ORDER BY number LIMIT ?",
        (lineage, number, limit),
    ).fetchall()
    found = [(number, _job_entry(payload)) for number, payload in rows]
    return [(number, charge) for number, entry in found for charge in entry.charges if charge.lineage == lineage]


def epochs(tx: Transaction) -> set[int]:
    """All epochs that reservations name."""
    rows = tx.execute("SELECT entry FROM ledger WHERE event IN ('reserve', 'release')")
    return {unpack(payload)["epoch"] for (payload,) in rows}


def verify(tx: Transaction) -> None:
    """That the ledger is what was written, and that what it says was spent follows from it.

    1. Numbers count up from one, every hash is its entry's digest, and every entry names the hash before it.
    2. The indexed columns repeat what the entries say, and the ledger ends where it was last seen to end.
    3. Each commit follows a reservation of the same terms, and each of them stands once.
    4. Per lineage, index and running sum are those recomputed from the charges.
    5. Each dataset is under the lineage that its last renewal began, and nothing else ended one.

    Raises :class:`IntegrityError`.
    """
    size, head, seen = 0, _START, set[tuple[bytes, bool]]()
    sums: dict[bytes, Curve] = {}
    index: set[tuple[bytes, int]] = set()
    ended: dict[bytes, tuple[str, int, bytes]] = {}
    for number, stored, terms, event, payload in tx.execute(_ALL).fetchall():
        entry, size = _renewal_entry(payload) if event == "renew" else _job_entry(payload), size + 1
        if (number, entry.number, entry.previous, domain_digest(entry.KIND, payload)) != (
            size,
            size,
            head,
            stored,
        ):  # 1
            raise IntegrityError(f"ledger entry {size} was changed or is missing")
        head = stored
        if isinstance(entry, RenewalEntry):
            ended[entry.ended] = (entry.dataset, size, entry.begun)
            continue
        if (entry.terms, entry.event) != (terms, event):  # 2
            raise IntegrityError(f"the index of ledger entry {size} was changed")
        _check_order(entry, seen)  # 3
        for charge in entry.charges:
            sums[charge.lineage] = add_curves(sums.get(charge.lineage, ZERO_CURVE), charge.curve)
            index.add((charge.lineage, size))
    if (get_meta(tx, _HEAD) or (0, _START)) != (size, head):  # 2
        raise IntegrityError("the ledger does not end where it was last seen to end")
    kept = {lineage: unpack(curve) for lineage, curve in tx.execute("SELECT lineage, curve FROM spent")}
    if kept != sums or set(tx.execute("SELECT lineage, number FROM charges")) != index:  # 4
        raise IntegrityError("what was spent is not the sum of the ledger's charges")
    _check_lineages(tx, ended)  # 5


_ALL: Final = "SELECT number, hash, terms, event, entry FROM ledger ORDER BY number"


def _check_lineages(tx: Transaction, ended: dict[bytes, tuple[str, int, bytes]]) -> None:
    """``ended`` holds, by the lineage that a renewal ended, (dataset, entry number, lineage begun)."""
    kept = {lineage: (dataset, number) for lineage, dataset, number in tx.execute("SELECT * FROM renewals")}
    if kept != {lineage: (dataset, number) for lineage, (dataset, number, _) in ended.items()}:
        raise IntegrityError("the index of renewed budgets was changed")
    last = {dataset: begun for dataset, _, begun in sorted(ended.values(), key=lambda renewal: renewal[1])}
    for dataset, lineage in tx.execute("SELECT dataset, lineage FROM datasets"):
        if lineage in ended or last.get(dataset, lineage) != lineage:
            raise IntegrityError(f"{dataset} is not under the lineage of its budget")


def _check_order(entry: LedgerEntry, seen: set[tuple[bytes, bool]]) -> None:
    """``seen`` holds (terms, whether it was a commit) of the entries before."""
    commits = entry.event == "commit"
    if (entry.terms, commits) in seen or (commits and (entry.terms, False) not in seen):
        raise IntegrityError(f"ledger entry {entry.number} cannot follow those before it")
    if (entry.result is not None) != commits or bool(entry.charges) != (entry.event == "reserve"):
        raise IntegrityError(f"ledger entry {entry.number} is not a whole {entry.event}")
    seen.add((entry.terms, commits))


def _append(tx: Transaction, entry: LedgerEntry | RenewalEntry) -> bytes:
    following = digest_of(entry)
    terms = entry.terms if isinstance(entry, LedgerEntry) else None
    row = (entry.number, following, terms, entry.event, encode(entry))
    tx.execute("INSERT INTO ledger VALUES (?, ?, ?, ?, ?)", row)
    set_meta(tx, _HEAD, (entry.number, following))
    return following


def _set_spent(tx: Transaction, lineage: bytes, curve: Curve) -> None:
    tx.execute("INSERT OR REPLACE INTO spent VALUES (?, ?)", (lineage, pack(curve)))


def _job_entry(payload: bytes) -> LedgerEntry:
    return _decoded(LedgerEntry, payload)


def _renewal_entry(payload: bytes) -> RenewalEntry:
    return _decoded(RenewalEntry, payload)


def _decoded(model: type[M], payload: bytes) -> M:
    try:
        return decode(model, payload)
    except CasemateError as error:
        raise IntegrityError("a ledger entry does not decode") from error
