"""The ledger by itself: never over the budget, never twice, never lost, never silently changed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from casemate_key_broker import ledger
from casemate_key_broker.database import FILE_NAME, Database, Transaction
from casemate_key_broker.ledger import Charge
from casemate_privacy.events import TrainingEvent
from casemate_privacy.renyi import ZERO_CURVE, add_curves, rdp_curve
from casemate_privacy.renyi_filter import RenyiFilter
from casemate_schemas.errors import BudgetError, CommitConflictError, IntegrityError, StateError, StorageFullError
from casemate_schemas.job import Rational
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

LINEAGES = (b"\x01" * 32, b"\x02" * 32)
LIMITS = {LINEAGES[0]: (1.0, 1e-4), LINEAGES[1]: (2.0, 1e-5)}


def charge(lineage: bytes = LINEAGES[0], steps: int = 10, noise_multiplier: float = 2.0) -> Charge:
    event = TrainingEvent(Fraction(1, 8), noise_multiplier, steps)
    limit_epsilon, delta = LIMITS[lineage]
    return Charge(
        dataset="cardio@north",
        lineage=lineage,
        licence=bytes(32),
        sample_rate=Rational.of(Fraction(1, 8)),
        noise_multiplier=noise_multiplier,
        steps=steps,
        epsilon=0.5,
        curve=rdp_curve(event),
        limit_epsilon=limit_epsilon,
        delta=delta,
    )


def reserve(tx: Transaction, terms: bytes, *charges: Charge) -> ledger.Reservation:
    return ledger.reserve(
        tx,
        job_id=terms[:16].hex(),
        terms=terms,
        submitter="clara@clara",
        purpose="research",
        deadline=10,
        epoch=1,
        charges=charges,
        now=1,
    )


class LedgerMachine(RuleBasedStateMachine):
    """Reservations, commits, aborted transactions and reopened files in any order, beside a model in plain Python."""

    terms = Bundle("terms")

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.folder.chmod(0o700)
        self.database = Database(self.folder)
        self.reserved: dict[bytes, bytes] = {}
        self.charged: dict[bytes, list[tuple[float, ...]]] = {lineage: [] for lineage in LINEAGES}
        self.committed: dict[bytes, bytes] = {}

    def teardown(self) -> None:
        self.database.close()
        shutil.rmtree(self.folder)

    @rule(target=terms, terms=st.binary(min_size=32, max_size=32))
    def new_terms(self, terms: bytes) -> bytes:
        return terms

    @rule(
        terms=terms,
        lineages=st.sets(st.sampled_from(LINEAGES)),
        steps=st.sampled_from((1, 10, 50, 200)),
        aborts=st.booleans(),
    )
    def reserve(self, terms: bytes, lineages: set[bytes], steps: int, aborts: bool) -> None:
        charges = [charge(lineage, steps) for lineage in sorted(lineages)]
        try:
            with self.database.transaction() as tx:
                reservation = reserve(tx, terms, *charges)
                if aborts:
                    raise KeyboardInterrupt
        except BudgetError:
            assert terms not in self.reserved
            assert any(not self._admits(item) for item in charges)
        except KeyboardInterrupt:
            pass
        else:
            if terms not in self.reserved:
                assert all(self._admits(item) for item in charges)
                for item in charges:
                    self.charged[item.lineage].append(item.curve)
            assert self.reserved.setdefault(terms, reservation.hash) == reservation.hash

    @rule(terms=terms, result=st.sampled_from((b"\x11" * 32, b"\x22" * 32)))
    def commit(self, terms: bytes, result: bytes) -> None:
        try:
            with self.database.transaction() as tx:
                ledger.commit(tx, terms, result, now=2)
        except StateError:
            assert terms not in self.reserved
        except CommitConflictError:
            assert self.committed[terms] != result
        else:
            assert self.committed.setdefault(terms, result) == result

    @rule()
    def reopen(self) -> None:
        self.database.close()
        self.database = Database(self.folder)

    @invariant()
    def holds_what_was_answered(self) -> None:
        with self.database.transaction() as tx:
            ledger.verify(tx)
            for lineage, curves in self.charged.items():
                total = ZERO_CURVE
                for curve in curves:
                    total = add_curves(total, curve)
                assert ledger.spent_curve(tx, lineage) == total
                assert len(ledger.newest_charges(tx, lineage, 4096)) == len(curves)
                limit_epsilon, delta = LIMITS[lineage]
                if len(curves) > 1:
                    assert RenyiFilter(limit_epsilon, delta).spent_epsilon(total) <= limit_epsilon * (1 + 1e-6)
            for terms, reserved in self.reserved.items():
                found = ledger.find_reservation(tx, terms)
                assert found is not None and found.hash == reserved
            results = {terms: ledger.committed_result(tx, terms) for terms in self.reserved}
            assert {terms: result for terms, result in results.items() if result} == self.committed

    def _admits(self, item: Charge) -> bool:
        total = ZERO_CURVE
        for curve in self.charged[item.lineage]:
            total = add_curves(total, curve)
        return RenyiFilter(item.limit_epsilon, item.delta).admits_event(total, item.event)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """Two reservations and a commit."""
    made = Database(tmp_path / "state")
    with made.transaction() as tx:
        reserve(tx, b"\x0a" * 32, charge(steps=1))
        reserve(tx, b"\x0b" * 32, charge(LINEAGES[1], steps=5))
        ledger.commit(tx, b"\x0a" * 32, b"\x11" * 32, now=2)
    return made


def test_a_refused_charge_leaves_every_lineage_as_it_was(database: Database) -> None:
    with database.transaction() as tx:
        before = [ledger.spent_curve(tx, lineage) for lineage in LINEAGES], ledger.head(tx)
    with pytest.raises(BudgetError, match=r"cardio@north.* lifetime budget 2 "), database.transaction() as tx:
        reserve(tx, b"\x0c" * 32, charge(steps=1), charge(LINEAGES[1], steps=5000))
    with database.transaction() as tx:
        assert ([ledger.spent_curve(tx, lineage) for lineage in LINEAGES], ledger.head(tx)) == before


def _swap(tx: Transaction) -> None:
    first = tx.execute("SELECT hash, terms, event, entry FROM ledger WHERE number = 1").fetchone()
    second = tx.execute("SELECT hash, terms, event, entry FROM ledger WHERE number = 2").fetchone()
    tx.execute("DELETE FROM charges")
    tx.execute("DELETE FROM ledger WHERE number < 3")
    for number, row in ((1, second), (2, first)):
        tx.execute("INSERT INTO ledger VALUES (?, ?, ?, ?, ?)", (number, *row))


CHANGES: dict[str, Callable[[Transaction], object]] = {
    "an entry's bytes": lambda tx: tx.execute(
        "UPDATE ledger SET entry = CAST(replace(CAST(entry AS TEXT), 'clara', 'carla') AS BLOB) WHERE number = 2"
    ),
    "an entry's hash": lambda tx: tx.execute("UPDATE ledger SET hash = zeroblob(32) WHERE number = 2"),
    "the last entry gone": lambda tx: tx.execute("DELETE FROM ledger WHERE number = 3"),
    "an entry's index": lambda tx: tx.execute("UPDATE ledger SET terms = zeroblob(32) WHERE number = 3"),
    "entries in another order": _swap,
    "a charge taken back": lambda tx: tx.execute("DELETE FROM spent WHERE lineage = ?", (LINEAGES[0],)),
    "a sum replaced": lambda tx: tx.execute("UPDATE spent SET curve = (SELECT min(curve) FROM spent)"),
    "a charge hidden": lambda tx: tx.execute("DELETE FROM charges WHERE number = 2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_behind_its_back_is_found_on_opening(database: Database, change: str) -> None:
    with database.transaction() as tx:
        ledger.verify(tx)
        tx.execute("PRAGMA defer_foreign_keys=ON")
        CHANGES[change](tx)
        with pytest.raises(IntegrityError):
            ledger.verify(tx)
        tx.execute("DELETE FROM charges")
    database.close()


def _reserve_many(tx: Transaction) -> None:
    for number in range(100):
        reserve(tx, bytes((number,)) * 32)


def test_a_full_disk_changes_nothing_and_is_worth_another_try(database: Database) -> None:
    with database.transaction() as tx:
        (pages,) = tx.execute("PRAGMA page_count").fetchone()
        tx.execute(f"PRAGMA max_page_count={pages}")
        before = ledger.head(tx)
    with pytest.raises(StorageFullError), database.transaction() as tx:
        _reserve_many(tx)
    with database.transaction() as tx:
        tx.execute("PRAGMA max_page_count=100000")
        assert ledger.head(tx) == before
        reserve(tx, b"\x0c" * 32)
        ledger.verify(tx)
    database.close()


def test_a_file_that_is_not_a_database(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    (folder / FILE_NAME).write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(IntegrityError):
        Database(folder)
