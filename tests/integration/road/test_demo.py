"""``casemate demo`` as a user runs it, beside files of their own that have our rooms' names; nothing stays behind.

Programs of the stack get an empty environment, so what they might leave lies in the system's folder for temporary files.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from casemate.local_stack.supervisor import process_start
from check_demo import problems
from support.canaries import with_descendants

_COMMAND = (sys.executable, "-c", "from casemate.cli import main; main()", "demo", "--json", "out.json")
"""As the console script does, but with the current folder first on the path, as in a notebook."""

_OWN_FILES = ("schemas.py", "attestation.py")
_SAMPLE_S = 0.05


@dataclass
class Demo:
    """A running demo and every process that was ever seen below it, by pid and start."""

    folder: Path
    process: asyncio.subprocess.Process
    seen: dict[int, str] = field(default_factory=dict)

    def look(self) -> set[int]:
        """Its processes now."""
        now = set(with_descendants(self.process.pid))
        self.seen |= {pid: start for pid in now if (start := process_start(pid)) is not None}
        return now

    async def ended(self, until: Callable[[set[int]], bool] = lambda _: False) -> bool:
        """Looks on until the demo has ended (True), or ``until`` holds of its processes."""
        waiting = asyncio.create_task(self.process.wait())
        try:
            while not waiting.done():
                if until(self.look()):
                    return False
                await asyncio.wait({waiting}, timeout=_SAMPLE_S)
            return True
        finally:
            waiting.cancel()

    def left(self) -> dict[str, list[str]]:
        """What is still there: processes, and files outside ``out.json`` and the user's own."""
        files = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if not path.is_dir()}
        folders = {path.name for path in (self.folder / "work").iterdir() if path.is_dir()}
        expected = {"work/out.json", *(f"work/{name}" for name in _OWN_FILES), "stdout", "stderr"}
        return {
            "processes": [str(pid) for pid, start in self.seen.items() if process_start(pid) == start],
            "files": sorted(files - expected),
            "folders": sorted(folders),
        }


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[Demo]:
    """A demo that has just been started, in a process group of its own; killed if the test fails."""
    for name in ("work", "home", "temporary"):
        (tmp_path / name).mkdir()
    for name in _OWN_FILES:
        (tmp_path / "work" / name).write_text("raise ImportError('a user\\'s own file was taken for one of ours')\n")
    environment = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary"), "PATH": "/usr/bin:/bin"}
    before = _temporary()
    with (tmp_path / "stdout").open("wb") as out, (tmp_path / "stderr").open("wb") as err:
        process = await asyncio.create_subprocess_exec(
            *_COMMAND,
            cwd=tmp_path / "work",
            env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            yield Demo(tmp_path, process)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    assert not {name for name in _temporary() - before if "casemate" in name or "nats" in name}


def _temporary() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).iterdir()}


async def test_it_ends_by_itself_with_true_figures_and_leaves_nothing(demo: Demo) -> None:
    async with asyncio.timeout(150):
        await demo.ended()
    errors = (demo.folder / "stderr").read_text()
    assert demo.process.returncode == 0, errors
    outcome = json.loads((demo.folder / "work" / "out.json").read_text())
    assert list(problems(outcome)) == []
    assert [owner["dataset"] for owner in outcome["owners"]] == ["cells@north", "cells@south", "cells@east"]
    assert all(owner["epsilon"] <= 3.0 and owner["delta"] == 1e-3 for owner in outcome["owners"])
    shown = (demo.folder / "stdout").read_text()
    assert shown.count("SIMULATED") >= 3 and f"{outcome['accuracy']:.1%}" in shown
    assert len(demo.seen) > 8, "the search for processes did not see the stack"
    assert demo.left() == {"processes": [], "files": [], "folders": []}


async def test_control_c_in_the_middle_leaves_nothing(demo: Demo) -> None:
    """As a terminal does it: every process in the foreground gets the signal, while a worker trains."""
    async with asyncio.timeout(120):
        assert not await demo.ended(until=lambda pids: any(map(_is_training, pids)))
        os.killpg(demo.process.pid, signal.SIGINT)
        await demo.ended()
    assert demo.process.returncode not in (0, None)
    errors = (demo.folder / "stderr").read_text()
    assert "interrupted" in errors and "Traceback" not in errors
    assert len(demo.seen) > 8
    assert demo.left() == {"processes": [], "files": [], "folders": []}


def _is_training(pid: int) -> bool:
    try:
        return b"casemate_worker.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
