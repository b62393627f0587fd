"""The state of an enclave-hosted key broker: in the enclave's memory, and on the host's disk as ciphertext only.

One file: a header with a random salt, a snapshot of the whole SQLite database, then a journal of one record for each
transaction: its statements and their parameters. Snapshot and records are frames of a 4-byte big-endian length and
AES-256-GCM ciphertext::

    key       HKDF-SHA256(state key, salt, "casemate/v1/sealed-state")
    nonce     the frame's number from 0, 12 bytes
    data      chain hash over the header and all frames before it

The state key comes from the chip and never leaves the enclave. The salt is fresh each time the file is begun, and it is
begun at every start and after every failure, so no key meets the same nonce twice, not even when a host restores an old
file and lets it be continued. A frame opens in its own place after its own predecessors, or not at all. What is left to
the host is to cut frames off the end, or to bring back an older file: a rollback, which heads that others have seen reveal.

A frame that was torn by a crash is the last one, and was never answered: it is dropped. (NIST SP 800-38D, section 8.2.1;
RFC 5869; SQLite, "sqlite3_serialize".)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

from casemate_messaging.files import sync
from casemate_schemas.codec import domain_digest, pack, unpack
from casemate_schemas.errors import CasemateError, IntegrityError, MalformedError, SetupError, StorageFullError
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .clock import MonotoneClock
from .database import Transaction, get_meta, prepare_schema, private_folder, set_meta, translated

FILE_NAME: Final = "sealed-state"
STATE_KEY_BYTES: Final = 32
MIN_JOURNAL_BYTES: Final = 4 << 20
"""A new snapshot is made once the journal is longer than this, and longer than the snapshot it follows."""

_MAGIC: Final = b"CASEMATE SEALED STATE v1\n"
_SALT_BYTES: Final = 32
_HEADER_BYTES: Final = len(_MAGIC) + _SALT_BYTES
_TAG_BYTES: Final = 16
_MAX_FRAME_BYTES: Final = 1 << 30
_MAX_FILE_BYTES: Final = 3 << 30
_INFO: Final = b"casemate/v1/sealed-state"
_TIME: Final = "newest-time"
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Statement = tuple[str, tuple[Any, ...]]


class SealedDatabase:
    """As :class:`~.database.Database`, for its threads together; the disk below it may be hostile."""

    def __init__(self, folder: Path, state_key: bytes, clock: MonotoneClock) -> None:
        """Open or make the state in ``folder`` (mode 0700). ``clock`` goes on from the newest time in it.

        Raises :class:`SetupError` if another process has it open or a newer release wrote it, and
        :class:`IntegrityError` if it does not open with this key (another image's, or another chip's) or was changed.
        """
        private_folder(folder)
        self._path = folder / FILE_NAME
        self._state_key = state_key
        self._clock = clock
        self._thread_lock = threading.RLock()
        self._broken = False
        self._journal: _Journal | None = None
        self._process_lock = _lock(folder / "lock")
        self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """All of the block or nothing of it; once the block is left without an error it is sealed and on the disk.

        Raises as :meth:`.Database.transaction`.
        """
        with self._thread_lock, translated():
            journal = self._ready_journal()
            recorder = _Recorder(self._db)
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield recorder
                self._commit(recorder, journal)
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def snapshot(self) -> bytes:
        """All of the state, in clear: for another enclave's eyes only."""
        with self._thread_lock, translated():
            return self._db.serialize()

    def replace(self, snapshot: bytes) -> None:
        """Another state in the place of this one, which is gone. Raises as :meth:`transaction`."""
        with self._thread_lock, translated():
            try:
                self._take(snapshot)
                self._clock.raise_to(get_meta(self._db, _TIME) or 0)
                self._begin_file()
            except BaseException:
                self._broken = True  # the file is not this state's
                raise

    def scrub(self) -> None:
        """Another file begins with what is left. An older one that the host kept opens for this image on this chip still."""
        with self._thread_lock, translated():
            if self._broken:
                raise IntegrityError("an earlier write failed: only a restart reads what is on the disk")
            self._begin_file()

    def close(self) -> None:
        """Waits for a transaction under way."""
        with self._thread_lock:
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            self._db.close()
            if self._process_lock >= 0:
                os.close(self._process_lock)
                self._process_lock = -1

    def _ready_journal(self) -> _Journal:
        if self._broken:
            raise IntegrityError("an earlier write failed: only a restart reads what is on the disk")
        if self._journal is None:
            self._begin_file()
        elif self._journal.is_long:
            with contextlib.suppress(StorageFullError):  # there may still be room for the next record
                self._begin_file()
        return cast(_Journal, self._journal)

    def _commit(self, recorder: _Recorder, journal: _Journal) -> None:
        """On the disk first: then what was answered is there, and what is there but was not answered can be asked again.

        After a failure another file is begun: the host may hold the frame that failed, and no frame of another content
        may ever be sealed under its key and number.
        """
        record = None
        if recorder.statements:
            set_meta(recorder, _TIME, self._clock())
            record = pack(recorder.statements)
        try:
            if record is not None:
                journal.append(record)
            self._db.execute("COMMIT")
        except StorageFullError:
            self._journal = None
            journal.close()
            raise
        except BaseException:
            self._broken = True
            raise

    def _open(self) -> None:
        with translated():
            if self._path.exists():
                self._load()
            else:
                self._prepare()
            self._db.execute("BEGIN IMMEDIATE")
            prepare_schema(self._db)
            self._clock.raise_to(get_meta(self._db, _TIME) or 0)
            self._db.execute("COMMIT")
        self._begin_file()

    def _load(self) -> None:
        frames = _read_frames(self._path, self._state_key)
        self._take(next(frames))
        for record in frames:
            for sql, parameters in _decoded(record):
                self._db.execute(sql, parameters).fetchall()

    def _take(self, snapshot: bytes) -> None:
        self._db.deserialize(snapshot)
        self._prepare()

    def _prepare(self) -> None:
        """What a snapshot does not bring along. Deleted rows are overwritten, or the next snapshot would have them still."""
        self._db.execute("PRAGMA foreign_keys=ON")
        self._db.execute("PRAGMA secure_delete=ON").fetchone()

    def _begin_file(self) -> None:
        """Another file with a salt of its own that begins with all there is, in the place of the one so far."""
        try:
            following = _Journal.create(self._path, self._state_key, self._db.serialize())
        except IntegrityError:
            self._broken = True
            raise
        if self._journal is not None:
            self._journal.close()
        self._journal = following


class _Recorder:
    """A :data:`Transaction` that remembers what it changed."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.statements: list[Statement] = []

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> sqlite3.Cursor:
        cursor = self._db.execute(sql, parameters)
        if cursor.description is None or sql.lstrip()[:6].upper() not in ("SELECT", "PRAGMA"):
            self.statements.append((sql, tuple(parameters)))
        return cursor

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]], /) -> sqlite3.Cursor:
        rows = [tuple(row) for row in parameters]
        cursor = self._db.executemany(sql, rows)
        self.statements += [(sql, row) for row in rows]
        return cursor


class _Journal:
    """The open file, at whose end the next frame goes."""

    def __init__(self, descriptor: int, sealer: _Sealer, size: int) -> None:
        self._descriptor = descriptor
        self._sealer = sealer
        self._size = size
        self._snapshot_size = size

    @classmethod
    def create(cls, path: Path, state_key: bytes, snapshot: bytes) -> _Journal:
        """Beside ``path``, then renamed: whenever the power fails, there is the old file or the whole new one.

        Raises :class:`StorageFullError` if the old file is still there, :class:`IntegrityError` if nobody knows.
        """
        header = _MAGIC + secrets.token_bytes(_SALT_BYTES)
        sealer = _Sealer(header, state_key)
        draft = path.with_suffix(".new")
        try:
            draft.unlink(missing_ok=True)
            descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _failure(error) from error
        try:
            data = header + sealer.seal(snapshot)
            _put_in_place(descriptor, data, draft, path)
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(
                OSError
            ):  # the room that it takes is the journal's; after the rename it is not there
                draft.unlink(missing_ok=True)
            raise
        return cls(descriptor, sealer, len(data))

    @property
    def is_long(self) -> bool:
        """Whether reading it takes longer than reading another snapshot would."""
        return self._size - self._snapshot_size > max(MIN_JOURNAL_BYTES, self._snapshot_size)

    def append(self, record: bytes) -> None:
        """Returns once the record is on the disk.

        Raises :class:`StorageFullError` if nothing of it is there, :class:`IntegrityError` if nobody knows.
        """
        frame = self._sealer.seal(record)
        try:
            _write_whole(self._descriptor, frame)
        except OSError as error:
            self._cut_off()
            raise _failure(error) from error
        self._size += len(frame)

    def close(self) -> None:
        os.close(self._descriptor)

    def _cut_off(self) -> None:
        """A record that is reported as not written must not be there after a restart."""
        try:
            os.ftruncate(self._descriptor, self._size)
            os.fsync(self._descriptor)
        except OSError as error:
            raise IntegrityError("the sealed state cannot be written") from error


class _Sealer:
    """Seals and opens frames in their order."""

    def __init__(self, header: bytes, state_key: bytes) -> None:
        key = HKDF(SHA256(), STATE_KEY_BYTES, salt=header[len(_MAGIC) :], info=_INFO).derive(state_key)
        self._aead = AESGCM(key)
        self._number = 0
        self._chain = domain_digest("sealed-state", header)

    def seal(self, plaintext: bytes) -> bytes:
        """The next frame, its length in front."""
        if len(plaintext) + _TAG_BYTES > _MAX_FRAME_BYTES:
            raise StorageFullError(f"expected at most {_MAX_FRAME_BYTES} bytes of state")
        ciphertext = self._aead.encrypt(self._nonce, plaintext, self._chain)
        self._advance(ciphertext)
        return len(ciphertext).to_bytes(4, "big") + ciphertext

    def open(self, ciphertext: bytes) -> bytes | None:
        """The plaintext of the next frame; ``None`` if it is none."""
        try:
            plaintext = self._aead.decrypt(self._nonce, ciphertext, self._chain)
        except InvalidTag:
            return None
        self._advance(ciphertext)
        return plaintext

    @property
    def _nonce(self) -> bytes:
        return self._number.to_bytes(12, "big")

    def _advance(self, ciphertext: bytes) -> None:
        self._chain = domain_digest("sealed-frame", self._chain + ciphertext)
        self._number += 1


def _read_frames(path: Path, state_key: bytes) -> Iterator[bytes]:
    """The plaintexts of all frames that were written whole; the first one always was.

    Raises :class:`IntegrityError` for what neither writing nor a crash while writing leaves behind.
    """
    try:
        with path.open("rb") as file:
            data = memoryview(file.read(_MAX_FILE_BYTES + 1))
    except OSError as error:
        raise IntegrityError("the sealed state cannot be read") from error
    if len(data) > _MAX_FILE_BYTES:
        raise IntegrityError(f"expected at most {_MAX_FILE_BYTES} bytes of sealed state")
    if bytes(data[: len(_MAGIC)]) != _MAGIC or len(data) < _HEADER_BYTES:
        raise IntegrityError("expected a sealed state of version 1")
    sealer, at = _Sealer(bytes(data[:_HEADER_BYTES]), state_key), _HEADER_BYTES
    while True:
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        plaintext = sealer.open(bytes(data[at + 4 : end]))
        if plaintext is None:
            break
        yield plaintext
        at = end
    if at == _HEADER_BYTES:
        raise IntegrityError("the sealed state does not open: another image or chip sealed it, or it was changed")
    if end < len(data) and any(data[at:]):
        raise IntegrityError("a frame of the sealed state, and not the last one, was changed")


def _decoded(record: bytes) -> tuple[Statement, ...]:
    try:
        return tuple(unpack(record, max_bytes=len(record)))
    except MalformedError as error:
        raise IntegrityError("a record of the sealed state does not decode") from error


def _write_whole(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _put_in_place(descriptor: int, data: bytes, draft: Path, path: Path) -> None:
    try:
        _write_whole(descriptor, data)
    except OSError as error:
        raise _failure(error) from error
    try:
        draft.rename(path)
        sync(path.parent)
    except OSError as error:
        raise IntegrityError("the sealed state cannot be written") from error


def _lock(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SetupError(f"cannot open the state in {path.parent}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise SetupError("another process has this state open") from error
    return descriptor


def _failure(error: OSError) -> CasemateError:
    if error.errno in _NO_ROOM:
        return StorageFullError("no room left for the key broker's state")
    return IntegrityError("the sealed state cannot be written")
