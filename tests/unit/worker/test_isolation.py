"""What keeps worker and training process apart; that the latter is cut off is tested with a real one, in integration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from casemate_schemas.errors import SetupError
from casemate_worker import __main__ as program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl and oom_score_adj are Linux's")


def printed(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_private_memory_is_not_dumpable_and_leaves_no_core() -> None:
    code = """
import ctypes, resource
from casemate_worker.isolation import keep_memory_private
get = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
print(get())
keep_memory_private()
print(get(), *resource.getrlimit(resource.RLIMIT_CORE))
"""
    assert printed(code) == ["1", "0", "0", "0"]


def test_the_training_process_is_the_first_to_run_out_of_memory() -> None:
    code = """
from pathlib import Path
from casemate_worker.isolation import die_before_parent
die_before_parent()
print(Path("/proc/self/oom_score_adj").read_text())
"""
    assert printed(code) == ["1000"]


def test_a_worker_keeps_its_memory_private_before_it_reads_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: list[str] = []
    monkeypatch.setattr(program, "keep_memory_private", lambda: called.append("private"))

    def load(_: Path) -> None:
        called.append("settings")
        raise SetupError("none")

    monkeypatch.setattr(program.Settings, "load", load)
    monkeypatch.setattr(sys, "argv", ["casemate-worker", "--settings", str(tmp_path / "settings.toml")])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert (ended.value.code, called) == (2, ["private", "settings"])
