"""The sealed state: what the host sees of it, what it can do to it, and what a crash leaves."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from casemate_key_broker import sealed_database
from casemate_key_broker.clock import MonotoneClock
from casemate_key_broker.database import get_meta, set_meta
from casemate_key_broker.sealed_database import FILE_NAME, SealedDatabase
from casemate_schemas.errors import IntegrityError, SetupError, StorageFullError

KEY = b"\x11" * 32
_HEADER_BYTES = sealed_database._HEADER_BYTES


def _clock(now: int = 1_000) -> MonotoneClock:
    return MonotoneClock(lambda: now)


@contextlib.contextmanager
def opened(folder: Path, key: bytes = KEY, clock: MonotoneClock | None = None) -> Iterator[SealedDatabase]:
    database = SealedDatabase(folder / "state", key, clock or _clock())
    try:
        yield database
    finally:
        database.close()


def _put(database: SealedDatabase, name: str, value: object) -> None:
    with database.transaction() as tx:
        set_meta(tx, name, value)


def _get(database: SealedDatabase, name: str) -> object:
    with database.transaction() as tx:
        return get_meta(tx, name)


def _file(folder: Path) -> Path:
    return folder / "state" / FILE_NAME


def test_what_was_left_without_an_error_is_there_again_and_nothing_else_is(tmp_path: Path) -> None:
    class Stop(Exception): ...

    def give_up(database: SealedDatabase) -> None:
        with database.transaction() as tx:
            set_meta(tx, "given up", 1)
            raise Stop

    with opened(tmp_path) as database:
        _put(database, "kept", (b"\x00\xff", 7, "ü", None, 0.1))
        with pytest.raises(Stop):
            give_up(database)
        with database.transaction() as tx:
            tx.executemany("INSERT INTO meta VALUES (?, ?)", (row for row in [("a", b"\x01"), ("b", b"\x02")]))
            taken = tx.execute("INSERT OR IGNORE INTO used_nonces VALUES (?, 1) RETURNING nonce", (b"n",)).fetchall()
            assert taken == [(b"n",)]
            tx.execute("DELETE FROM meta WHERE name = ?", ("b",))
    for _ in range(2):  # from the journal, then from the snapshot that the start before made of it
        with opened(tmp_path) as database:
            assert _get(database, "kept") == (b"\x00\xff", 7, "ü", None, 0.1)
            with database.transaction() as tx:
                assert tx.execute("SELECT name FROM meta WHERE name IN ('a', 'b', 'given up')").fetchall() == [("a",)]
                assert tx.execute("SELECT nonce FROM used_nonces").fetchall() == [(b"n",)]


def test_each_transaction_is_on_the_disk_before_it_ends(tmp_path: Path) -> None:
    with opened(tmp_path) as database:
        for number in range(3):
            _put(database, "n", number)
            copy = tmp_path / f"copy-{number}"
            shutil.copytree(tmp_path / "state", copy / "state")
            with opened(copy) as seen:
                assert _get(seen, "n") == number
        size = _file(tmp_path).stat().st_size
        assert _get(database, "n") == 2
        assert _file(tmp_path).stat().st_size == size, "reading writes nothing"


def test_the_host_reads_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as database:
        _put(database, "canary-name", b"canary-value" * 8)
        journal = _file(tmp_path).read_bytes()
    with opened(tmp_path):
        snapshot = _file(tmp_path).read_bytes()
    for data in (journal, snapshot):
        assert b"canary" not in data and b"SQLite" not in data and b"INSERT" not in data
    files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
    assert files == {FILE_NAME: 0o600, "lock": 0o600}


def test_another_image_or_chip_does_not_open_it(tmp_path: Path) -> None:
    with opened(tmp_path) as database:
        _put(database, "n", 1)
    with pytest.raises(IntegrityError, match="another image or chip"), opened(tmp_path, b"\x12" * 32):
        pass
    with opened(tmp_path) as database:
        assert _get(database, "n") == 1


def test_only_one_process_opens_it(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(SetupError, match="another process"), opened(tmp_path):
        pass


def _frames(folder: Path) -> list[tuple[int, int]]:
    """Where each frame begins and ends."""
    data, at, found = _file(folder).read_bytes(), _HEADER_BYTES, []
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        found.append((at, end))
        at = end
    return found


def _written(folder: Path, records: int) -> bytes:
    with opened(folder) as database:
        for number in range(records):
            _put(database, f"n{number}", number)
        return _file(folder).read_bytes()


def test_cut_anywhere_in_the_last_record_the_rest_opens_and_goes_on(tmp_path: Path) -> None:
    data = _written(tmp_path, 2)
    *_, (start, end) = _frames(tmp_path)
    torn = [data[:cut] for cut in (start, start + 3, start + 4, start + 19, end - 1)]
    torn += [data[:start] + bytes(end - start), data[: end - 1] + bytes((data[end - 1] ^ 1,))]
    for after_the_crash in torn:
        _file(tmp_path).write_bytes(after_the_crash)
        with opened(tmp_path) as database:
            assert (_get(database, "n0"), _get(database, "n1")) == (0, None)
            _put(database, "n2", 2)
        with opened(tmp_path) as database:
            assert (_get(database, "n0"), _get(database, "n2")) == (0, 2)


def test_whatever_else_the_host_changes_is_found(tmp_path: Path) -> None:
    data = _written(tmp_path, 3)
    header, snapshot, first, second, third = 0, *(start for start, _ in _frames(tmp_path))
    one, two, rest = data[first:second], data[second:third], data[third:]
    changed = {
        "salt": data[: _HEADER_BYTES - 1] + bytes((data[_HEADER_BYTES - 1] ^ 1,)) + data[_HEADER_BYTES:],
        "magic": b"X" + data[header + 1 :],
        "snapshot": data[: snapshot + 9] + bytes((data[snapshot + 9] ^ 1,)) + data[snapshot + 10 :],
        "record": data[: second + 9] + bytes((data[second + 9] ^ 1,)) + data[second + 10 :],
        "order": data[:first] + two + one + rest,
        "left out": data[:first] + two + rest,
        "twice": data[:second] + one + two + rest,
        "nothing": b"",
    }
    for name, bad in changed.items():
        _file(tmp_path).write_bytes(bad)
        with pytest.raises(IntegrityError), opened(tmp_path):
            pytest.fail(f"opened with {name} changed")


def test_a_record_of_an_earlier_life_opens_in_no_later_one(tmp_path: Path) -> None:
    before = _written(tmp_path, 1)
    start, end = _frames(tmp_path)[-1]
    with opened(tmp_path) as database:
        _put(database, "n1", 1)
        following = _file(tmp_path).read_bytes()
    _file(tmp_path).write_bytes(following + before[start:end])
    with opened(tmp_path) as database:
        assert _get(database, "n1") == 1
    assert before[:_HEADER_BYTES] != following[:_HEADER_BYTES], "each start has a salt, hence keys, of its own"


def test_two_continuations_of_one_old_file_share_no_keystream(tmp_path: Path) -> None:
    old = _written(tmp_path, 1)
    ciphertexts = []
    for value in (b"\x00" * 64, b"\xff" * 64):
        _file(tmp_path).write_bytes(old)
        with opened(tmp_path) as database:
            _put(database, "secret", value)
            ciphertexts.append(_file(tmp_path).read_bytes()[_frames(tmp_path)[-1][0] + 4 :])
    first, second = ciphertexts
    same = sum(a ^ b in (0x00, 0xFF) for a, b in zip(first, second, strict=True))
    assert same < len(first) // 4


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_without_room_nothing_counts_and_the_next_record_has_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with opened(tmp_path) as database:
        _put(database, "n0", 0)
        before = _file(tmp_path).read_bytes()
        real, refused = getattr(os, step), iter([True])

        def fails_once(*args: object) -> object:
            if next(refused, False):
                raise OSError(errno.ENOSPC, "full")
            return real(*args)

        monkeypatch.setattr(os, step, fails_once)
        with pytest.raises(StorageFullError):
            _put(database, "n1", 1)
        monkeypatch.undo()
        assert _file(tmp_path).read_bytes() == before, "what is reported as not written is cut off"
        assert _get(database, "n1") is None
        _put(database, "n2", 2)
        after = _file(tmp_path).read_bytes()
        assert after[:_HEADER_BYTES] != before[:_HEADER_BYTES], "the host may hold the frame that failed"
    with opened(tmp_path) as database:
        assert (_get(database, "n0"), _get(database, "n1"), _get(database, "n2")) == (0, None, 2)


def test_after_a_failed_disk_nothing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as database:
        _put(database, "n0", 0)

        def fails(_: int) -> None:
            raise OSError(errno.EIO, "broken")

        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(IntegrityError):
            _put(database, "n1", 1)
        monkeypatch.undo()
        with pytest.raises(IntegrityError, match="restart"):
            _get(database, "n0")
    with opened(tmp_path) as database:
        assert _get(database, "n0") == 0


def test_a_new_file_that_may_be_in_place_or_not_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what is written to the old one would be nowhere after a restart."""
    monkeypatch.setattr(sealed_database, "MIN_JOURNAL_BYTES", 1)
    with opened(tmp_path) as database:
        _put(database, "n", b"x" * 300_000)
        real = os.fsync

        def fails_for_folders(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.ENOSPC, "full")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fails_for_folders)
        with pytest.raises(IntegrityError):
            _put(database, "m", 1)
        monkeypatch.undo()
        with pytest.raises(IntegrityError, match="restart"):
            _put(database, "m", 2)
    with opened(tmp_path) as database:
        assert (_get(database, "n"), _get(database, "m")) == (b"x" * 300_000, None)


def test_a_long_journal_becomes_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_database, "MIN_JOURNAL_BYTES", 1)
    with opened(tmp_path) as database:
        salts, longest = set(), 0
        for number in range(60):
            _put(database, "same", (number, b"x" * 8192))
            salts.add(_file(tmp_path).read_bytes()[:_HEADER_BYTES])
            longest = max(longest, len(_frames(tmp_path)))
        assert 2 <= len(salts) <= 10 and longest < 60
        assert _file(tmp_path).stat().st_size < 60 * 8192
    with opened(tmp_path) as database:
        assert _get(database, "same") == (59, b"x" * 8192)


def test_time_goes_on_from_the_newest_record(tmp_path: Path) -> None:
    with opened(tmp_path, clock=_clock(5_000)) as database:
        _put(database, "n", 1)
    set_back = _clock(1_000)
    with opened(tmp_path, clock=set_back):
        assert set_back() == 5_000
    set_back.raise_to(7_000)
    set_back.raise_to(6_000)
    assert set_back() == 7_000
