"""``casemate up`` and ``casemate down`` as an operator types them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

CASEMATE = [sys.executable, "-I", "-m", "casemate"]


def casemate(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command, in its own folder and with an empty HOME."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "COLUMNS": "200", **environment}
    return subprocess.run([*CASEMATE, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=150)


def processes_of(folder: Path) -> dict[int, str]:
    """Processes whose command line or working directory lies in ``folder``."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                if str(folder) in command or str((entry / "cwd").readlink()).startswith(str(folder)):
                    found[int(entry.name)] = command
            except OSError:
                continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.timeout(300)
def test_it_comes_up_answers_comes_back_and_goes_down_without_a_trace(tmp_path: Path) -> None:
    folder = tmp_path / "stack"
    folder.mkdir()
    first = casemate(folder, "up", "--detach", "--workers", "1", "--hosted", "east")
    assert first.returncode == 0, first.stderr
    assert "SIMULATED" in first.stdout and "in an enclave (SIMULATED: it protects nothing)" in first.stdout
    facts = json.loads((folder / ".casemate" / "stack.json").read_text())
    clara = str(folder / ".casemate" / "members" / "university" / "clara.key")
    connection = {"CASEMATE_URL": facts["url"], "CASEMATE_IDENTITY": clara}
    listed = casemate(folder, "datasets", "list", **connection)
    assert listed.returncode == 0, listed.stderr
    assert "SIMULATED" in listed.stdout
    assert len(processes_of(folder)) >= 8  # supervisor, NATS, chip, gateway, four key brokers, a worker

    found = json.loads(casemate(folder, "doctor", ".casemate", "--json").stdout)
    assert len(found["findings"]) > 100
    assert {finding["check"] for finding in found["findings"] if not finding["ok"]} <= {"open files"}

    sam = connection | {"CASEMATE_IDENTITY": str(folder / ".casemate" / "members" / "north" / "sam.key")}
    present = json.loads(casemate(folder, "workers", "list", "--json", **sam).stdout)
    assert [(worker["worker"], worker["state"]) for worker in present["present"]] == [("worker-1", "waiting")]
    (worker,) = (pid for pid, command in processes_of(folder).items() if "casemate_worker" in command)
    handle = os.pidfd_open(worker)
    assert casemate(folder, "workers", "drain", "worker-1", **connection).returncode == 1, "clara is no admin"
    drained = casemate(folder, "workers", "drain", "worker-1", **sam)
    assert drained.returncode == 0 and "worker-1 was waiting" in drained.stdout, drained.stderr
    _wait_for_end(handle)
    assert '"event":"draining"' in (folder / ".casemate" / "logs" / "worker-1.log").read_text()

    again = casemate(folder, "up", "--detach")
    assert again.returncode == 2
    assert "running already" in again.stderr

    down = casemate(folder, "down")
    assert down.returncode == 0, down.stderr
    assert processes_of(folder) == {}
    assert casemate(folder, "down").returncode == 2

    second = casemate(folder, "up", "--detach")
    assert second.returncode == 0, second.stderr
    again_facts = json.loads((folder / ".casemate" / "stack.json").read_text())
    assert again_facts["consortium"] == facts["consortium"]
    attested = casemate(folder, "key-broker", "attest", "east", **connection | {"CASEMATE_URL": again_facts["url"]})
    assert attested.returncode == 0, attested.stderr
    assert "the manifest lists the keys that it holds" in attested.stdout, "the same keys, out of the sealed state"
    assert casemate(folder, "down").returncode == 0
    assert processes_of(folder) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children with their parent on Linux only")
@pytest.mark.timeout(200)
def test_a_killed_supervisor_takes_its_programs_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "stack"
    folder.mkdir()
    assert casemate(folder, "up", "--detach", "--workers", "1").returncode == 0
    supervisor = json.loads((folder / ".casemate" / "supervisor.json").read_text())["pid"]
    handles = [os.pidfd_open(pid) for pid in processes_of(folder)]
    os.kill(supervisor, 9)
    for handle in handles:
        _wait_for_end(handle)
    assert processes_of(folder) == {}
    assert casemate(folder, "down").returncode == 2  # the stale pid file is not taken for a running stack


def _wait_for_end(handle: int) -> None:
    ended, _, _ = select.select([handle], [], [], 30)
    os.close(handle)
    assert ended
