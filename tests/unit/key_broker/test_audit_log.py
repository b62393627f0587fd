"""The audit log: proofs that check, and changes that show."""

from __future__ import annotations

from pathlib import Path

import pytest
from casemate_key_broker import audit_log
from casemate_key_broker.database import Database
from casemate_schemas.codec import encode
from casemate_schemas.errors import IntegrityError, ReleaseError
from casemate_schemas.grant import AuditEntry


def _entry(number: int) -> AuditEntry:
    return AuditEntry(key_broker="north", event="granted", at=number, subject=f"job {number}")


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(tmp_path / "state")
    with made.transaction() as tx:
        assert [audit_log.append(tx, _entry(number)) for number in range(7)] == list(range(7))
    return made


def test_every_entry_is_proven_and_no_other(database: Database) -> None:
    with database.transaction() as tx:
        audit_log.verify(tx)
        proofs = [audit_log.prove(tx, index) for index in range(7)]
    for index, proof in enumerate(proofs):
        proof.check()
        assert proof.entry == encode(_entry(index)) and proof.size == 7
        with pytest.raises(ReleaseError):
            proof.model_copy(update={"entry": encode(_entry(index + 1))}).check()
    database.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit SET entry = (SELECT entry FROM audit WHERE number = 0) WHERE number = 3",
        "UPDATE audit SET head = (SELECT head FROM audit WHERE number = 0) WHERE number = 3",
        "UPDATE audit_tree SET hash = (SELECT hash FROM audit_tree WHERE position = 0) WHERE level = 1 AND position = 1",
        "DELETE FROM audit_tree WHERE level = 2",
        "DELETE FROM audit WHERE number = 6",
        "DELETE FROM audit WHERE number = 2",
        "DELETE FROM audit",
    ],
)
def test_changes_show(database: Database, change: str) -> None:
    with database.transaction() as tx:
        tx.execute(change)
        with pytest.raises(IntegrityError):
            audit_log.verify(tx)
    database.close()
