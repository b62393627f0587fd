"""The key broker's one SQLite file: one writer, every transaction on the disk before it counts.

WAL and ``synchronous=FULL`` make a returned :meth:`Database.transaction` survive a crash of program, system or power;
``locking_mode=EXCLUSIVE`` keeps a second process out. (SQLite, "Write-Ahead Logging" and "PRAGMA Statements".)
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from casemate_schemas.codec import pack, unpack
from casemate_schemas.errors import CasemateError, IntegrityError, SetupError, StorageFullError


class Transaction(Protocol):
    """What is inside of :meth:`State.transaction`; whoever takes one takes part in that transaction."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> sqlite3.Cursor:
        """One statement. The same statements over the same state must change the same, so: no random(), no time."""
        ...

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]], /) -> sqlite3.Cursor:
        """One statement that changes something, for each of the parameters."""
        ...


class State(Protocol):
    """The state of one key broker, wherever it is kept (here, or sealed: :mod:`.sealed_database`)."""

    def transaction(self) -> contextlib.AbstractContextManager[Transaction]:
        """See :meth:`Database.transaction`."""
        ...

    def scrub(self) -> None:
        """What was deleted before leaves the disk; a start does the same. Raises as :meth:`transaction`."""
        ...

    def close(self) -> None:
        """Waits for a transaction under way."""
        ...


FILE_NAME: Final = "key-broker.sqlite"
_SCHEMA_VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE datasets (
  dataset TEXT PRIMARY KEY, lineage BLOB NOT NULL UNIQUE, envelope BLOB NOT NULL, licence BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE versions (
  envelope BLOB PRIMARY KEY, dataset TEXT NOT NULL REFERENCES datasets, card BLOB NOT NULL, head BLOB NOT NULL,
  person TEXT NOT NULL, at INTEGER NOT NULL
) STRICT;
CREATE TABLE licences (
  licence BLOB PRIMARY KEY, dataset TEXT NOT NULL REFERENCES datasets, number INTEGER NOT NULL, signed BLOB NOT NULL,
  person TEXT NOT NULL, at INTEGER NOT NULL, UNIQUE (dataset, number)
) STRICT;

CREATE TABLE dataset_keys (
  id BLOB PRIMARY KEY, owner TEXT NOT NULL, private BLOB NOT NULL, envelope BLOB UNIQUE, at INTEGER NOT NULL
) STRICT;

CREATE TABLE answers (
  routing BLOB PRIMARY KEY, terms BLOB NOT NULL, submitter BLOB NOT NULL, answer BLOB NOT NULL, at INTEGER NOT NULL
) STRICT;
CREATE INDEX answers_by_submitter ON answers (submitter, at);
CREATE TABLE terms (
  terms BLOB PRIMARY KEY, job_id TEXT NOT NULL, routing BLOB NOT NULL REFERENCES answers, signed BLOB NOT NULL,
  job_head BLOB
) STRICT;
CREATE TABLE pending (
  terms BLOB PRIMARY KEY, job_id TEXT NOT NULL, member TEXT NOT NULL, person TEXT NOT NULL, signed BLOB NOT NULL,
  words TEXT NOT NULL, answer BLOB NOT NULL, deadline INTEGER NOT NULL
) STRICT;
CREATE INDEX pending_by_submitter ON pending (member, person);
CREATE TABLE approvals (
  terms BLOB NOT NULL, licence BLOB NOT NULL, member TEXT NOT NULL, person TEXT NOT NULL, signer BLOB NOT NULL,
  decision TEXT NOT NULL, signed BLOB NOT NULL, delegation BLOB NOT NULL, at INTEGER NOT NULL, deadline INTEGER NOT NULL,
  PRIMARY KEY (terms, licence, member, person)
) STRICT, WITHOUT ROWID;
CREATE TABLE revocations (
  member TEXT NOT NULL, person TEXT NOT NULL, signed BLOB NOT NULL, PRIMARY KEY (member, person)
) STRICT, WITHOUT ROWID;
CREATE TABLE used_nonces (nonce BLOB PRIMARY KEY, expires INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX used_nonces_by_expiry ON used_nonces (expires);
CREATE TABLE worker_verdicts (
  worker BLOB NOT NULL, genuine INTEGER NOT NULL, at INTEGER NOT NULL, verdict BLOB NOT NULL, UNIQUE (worker, genuine)
) STRICT;
CREATE TABLE grants (
  terms BLOB NOT NULL REFERENCES terms, attempt INTEGER NOT NULL, worker_key BLOB NOT NULL, evidence BLOB NOT NULL,
  at INTEGER NOT NULL, PRIMARY KEY (terms, attempt, worker_key)
) STRICT, WITHOUT ROWID;

CREATE TABLE ledger (
  number INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, terms BLOB, event TEXT NOT NULL, entry BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX one_reservation ON ledger (terms) WHERE event <> 'commit';
CREATE UNIQUE INDEX one_commit ON ledger (terms) WHERE event = 'commit';
CREATE TABLE charges (
  lineage BLOB NOT NULL, number INTEGER NOT NULL REFERENCES ledger, PRIMARY KEY (lineage, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE spent (lineage BLOB PRIMARY KEY, curve BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE renewals (
  ended BLOB PRIMARY KEY, dataset TEXT NOT NULL, number INTEGER NOT NULL REFERENCES ledger
) STRICT, WITHOUT ROWID;
CREATE TABLE standings (
  lineage BLOB NOT NULL, number INTEGER NOT NULL REFERENCES ledger, epsilon REAL NOT NULL, estimate REAL,
  PRIMARY KEY (lineage, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE losses (
  lineage BLOB PRIMARY KEY, number INTEGER NOT NULL, curve BLOB NOT NULL, composed BLOB NOT NULL
) STRICT;
CREATE TABLE receipts (terms BLOB PRIMARY KEY, receipt BLOB NOT NULL) STRICT;

CREATE TABLE audit (number INTEGER PRIMARY KEY, entry BLOB NOT NULL, head BLOB NOT NULL) STRICT;
CREATE TABLE audit_tree (
  level INTEGER NOT NULL, position INTEGER NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (level, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE requests (
  sender BLOB NOT NULL, id BLOB NOT NULL, at INTEGER NOT NULL, PRIMARY KEY (sender, id)
) STRICT, WITHOUT ROWID;
"""


class Database:
    """The open state of one key broker, for its threads together."""

    def __init__(self, folder: Path) -> None:
        """Open or make the state in ``folder`` (mode 0700).

        Raises :class:`SetupError` if others can read the folder, another process has it open or a newer release wrote
        it, and :class:`IntegrityError` if SQLite finds the file broken.
        """
        private_folder(folder)
        path = folder / FILE_NAME
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
        except (OSError, sqlite3.Error) as error:
            raise SetupError(f"cannot open the state in {folder}") from error
        self._lock = threading.RLock()
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """All of the block or nothing of it; once the block is left without an error it is on the disk.

        Raises :class:`StorageFullError` if there is no room for it and :class:`IntegrityError` for any other failure of
        the file: what happened to the transaction is then unknown, and only a restart reads what is there.
        """
        with self._lock, translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def scrub(self) -> None:
        """Deleted rows were overwritten with zeros in their pages; this puts those pages in place of the older ones in the
        database file, and empties the write-ahead log, which held them too.
        """
        with self._lock, translated():
            busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise IntegrityError("the write-ahead log could not be emptied")

    def back_up(self, path: Path) -> None:
        """A copy of the whole state, as it is between two transactions, in a new file. Raises :class:`SetupError`."""
        with self._lock, translated():
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            except OSError as error:
                raise SetupError(f"cannot write {path}: {error.strerror}") from error
            with contextlib.closing(sqlite3.connect(path)) as copy:
                self._db.backup(copy)

    def close(self) -> None:
        """Waits for a transaction under way."""
        with self._lock:
            self._db.close()

    def _prepare(self) -> None:
        try:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.execute("PRAGMA secure_delete=ON").fetchone()
        except sqlite3.Error as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise SetupError("another process has this state open") from error
            raise IntegrityError("the state is not a readable SQLite file") from error
        with self.transaction() as tx:
            prepare_schema(tx)
            if tx.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise IntegrityError("SQLite finds the state broken")
        self.scrub()


def prepare_schema(tx: Transaction) -> None:
    """Makes the tables in a new state. Raises :class:`SetupError` if another release wrote it."""
    (version,) = tx.execute("PRAGMA user_version").fetchone()
    if version == 0:
        for statement in _SCHEMA.split(";")[:-1]:
            tx.execute(statement)
        tx.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
    elif version != _SCHEMA_VERSION:
        raise SetupError(f"the state has schema {version}, this release reads schema {_SCHEMA_VERSION}")


def private_folder(folder: Path) -> None:
    """Makes ``folder`` if need be. Raises :class:`SetupError` unless it is this user's alone."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise SetupError(f"cannot make the state folder {folder}: {error.strerror}") from error
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise SetupError(f"expected {folder} to be this user's alone (chmod 700)")


def get_meta(tx: Transaction, name: str) -> Any:
    """The value kept under ``name``, or ``None``."""
    row = tx.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else unpack(row[0])


def set_meta(tx: Transaction, name: str, value: Any) -> None:
    """Keep one small ``value`` under ``name``."""
    tx.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, pack(value)))


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """SQLite's errors as errors of our tree."""
    try:
        yield
    except CasemateError:
        raise
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise StorageFullError("no room left for the key broker's state") from error
        raise IntegrityError(f"the state cannot be read or written ({type(error).__name__})") from error
