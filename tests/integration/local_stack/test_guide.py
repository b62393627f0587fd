"""docs/verify-it-yourself.md, by its very commands: whoever changes what they do has to change the guide."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from casemate_attestation.simulated_chip import WORKER_PACKAGES, measure_worker_image

CHECKOUT = Path(__file__).parents[3]
GUIDE = CHECKOUT / "docs" / "verify-it-yourself.md"
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def script() -> str:
    """All commands of the guide, in one shell: each block's output after a line with its number."""
    blocks = _BLOCK.findall(GUIDE.read_text(encoding="utf-8"))
    assert len(blocks) >= 14
    numbered = (f"echo '=== {number}'\n{block}" for number, block in enumerate(blocks))
    return "trap 'echo \"failed: $BASH_COMMAND\" >> failed.log' ERR\nset -u\n" + "\n".join(numbered)


@dataclass(frozen=True)
class Run:
    """What came of the commands: each block's output, the commands that failed, and all error output."""

    outputs: dict[str, str]
    failed: list[str]
    errors: str

    def of(self, command: str) -> str:
        """What the one block that holds ``command`` printed."""
        found = [text for block, text in self.outputs.items() if command in block]
        assert len(found) == 1, self
        return found[0]


def checkout(folder: Path) -> tuple[Path, dict[str, str]]:
    """A folder that looks like a checkout, and an environment in which it is set up."""
    work, home, tools = folder / "checkout", folder / "home", folder / "tools"
    for new in (work, home, tools):
        new.mkdir()
    for room in ("schemas", "attestation", "privacy", "models", "messaging", "enclave_worker", "sdk"):
        (work / room).symlink_to(CHECKOUT / room)
    for name, command in {"python": "", "casemate": " -m casemate"}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n')
        (tools / name).chmod(0o755)
    return work, {"HOME": str(home), "PATH": f"{tools}:/usr/bin:/bin", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def run(folder: Path) -> Run:
    """Follows the guide; whatever happens, nothing is left running."""
    work, environment = checkout(folder)
    out, err = folder / "out", folder / "err"
    with out.open("wb") as stdout, err.open("wb") as stderr, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(["bash", "-c", script()], cwd=work, env=environment, stdout=stdout, stderr=stderr, timeout=280)
    if (work / ".casemate-demo" / "supervisor.json").exists():
        subprocess.run([folder / "tools" / "casemate", "down", "--dir", ".casemate-demo"], cwd=work, env=environment)
    numbered = re.split(r"^=== (\d+)\n", out.read_text(), flags=re.MULTILINE)
    blocks = _BLOCK.findall(GUIDE.read_text(encoding="utf-8"))
    outputs = {blocks[int(number)]: text for number, text in zip(numbered[1::2], numbered[2::2], strict=True)}
    return Run(outputs, (work / "failed.log").read_text().splitlines(), err.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="the local stack's children end with it on Linux only")
@pytest.mark.timeout(340)
def test_the_guide_does_what_it_says(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert [line.split()[1:3] for line in done.failed] == [
        ["diff", "enclave_worker/casemate_worker/training/noise.py"],
        ["casemate", "attestation"],  # the changed reference value is not listed
        ["diff", "worker.txt"],
    ], done

    # 1. The members' image.
    assert measure_worker_image().hex() in done.of("measure --simulated\n")
    agreed = done.of("reference verify worker.reference")
    assert agreed.splitlines()[-2:] == ["✓ signed by member north", "✓ listed in manifest 1"]

    # 2. One line, another measurement, and it is seen where.
    changed = done.of("diff enclave_worker")
    assert [line[0] for line in changed.splitlines() if line[0] in "<>"] == ["<", ">"], changed
    assert "✗ not listed in manifest 1" in done.of("reference verify changed.reference")
    differences = done.of("diff worker.txt")
    seen = {name for name in WORKER_PACKAGES if f"{name}:" in differences}
    assert seen == {"casemate_worker"}

    # 3. No keys, no charge.
    verdicts = done.of("casemate workers list --json")
    assert "✗ refused" in verdicts and "measurement: expected" in verdicts and "✓ accepted" in verdicts, verdicts
    logged = done.of("grep -h evidence_outside_policy")
    assert '"program":"worker"' in logged and '"program":"key-broker"' in logged, logged
    ledger = done.of("casemate budget")
    assert ledger.count("clara@university") == 1, ledger

    # 4. Until all members say so.
    assert "manifest 2 is published" in done.of("casemate consortium publish")
    assert "sealed" in done.of("jobs watch")
    assert not (tmp_path / "checkout" / ".casemate-demo").exists()
