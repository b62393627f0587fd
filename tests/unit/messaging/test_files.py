from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from casemate_messaging.files import write_durably


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
