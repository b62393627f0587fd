"""Files are read whole or not at all, and written whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
import tracemalloc
from pathlib import Path

import pytest
from casemate_messaging import files
from casemate_messaging.files import create_private, read_file, write_durably
from casemate_schemas.errors import SetupError


def test_a_file_is_replaced_whole_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "pin"
    path.write_bytes(b"older")
    path.chmod(0o644)
    write_durably(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["pin"]


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content")
        real_fsync(descriptor)

    def replace(draft: Path, target: Path) -> Path:
        seen.append("name")
        return real_replace(draft, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_durably(tmp_path / "pin", b"content")
    assert seen == ["content", "name", "folder"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pin"
    path.write_bytes(b"older")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, b"newer")
    assert path.read_bytes() == b"older"
    monkeypatch.undo()
    write_durably(path, b"newest")
    assert path.read_bytes() == b"newest"


def test_a_link_left_where_the_draft_goes_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    (tmp_path / "pin.new").symlink_to(victim)
    write_durably(tmp_path / "pin", b"secret")
    assert victim.read_bytes() == b"untouched"
    assert not (tmp_path / "pin").is_symlink()


def test_a_new_file_takes_no_other_ones_place(tmp_path: Path) -> None:
    create_private(tmp_path / "key", b"secret")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("key", "link"):
        with pytest.raises(FileExistsError):
            create_private(tmp_path / name, b"other")
    assert (tmp_path / "key").read_bytes() == b"secret" and not (tmp_path / "elsewhere").exists()


def test_a_file_of_as_many_bytes_as_may_be_and_of_one_more(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    assert read_file(path, 8) == b"12345678"
    with pytest.raises(SetupError, match="at most 7 bytes"):
        read_file(path, 7)
    for nothing in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SetupError, match="cannot read"):
            read_file(nothing, 8)


def test_a_small_file_takes_little_memory_whatever_it_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"small")
    tracemalloc.start()
    try:
        assert read_file(path, 64 << 30) == b"small"
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("size", "whole"), [(8, True), (9, False)])
def test_what_does_not_say_how_large_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, whole: bool
) -> None:
    monkeypatch.setattr(files, "_PIPE_BYTES", 8)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(bytes(size),))
    writer.start()
    try:
        if whole:
            assert read_file(path, 1 << 20) == bytes(size)
        else:
            with pytest.raises(SetupError, match="at most 8 bytes"):
                read_file(path, 1 << 20)
    finally:
        writer.join()
