"""What an installation without extras can do, and what it says about the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import casemate
import pytest

HEAVY = ("torch", "nats", "nkeys", "opacus", "scipy", "sklearn", "pydantic_settings")


def run(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)


def without(*packages: str) -> str:
    """Code that makes ``packages`` look as if they were not installed."""
    return f"import sys\nfor name in {packages!r}: sys.modules[name] = None\n"


def test_import_casemate_brings_neither_torch_nor_nats_nor_anything_slow() -> None:
    found = run(f"import casemate, sys\nprint([m for m in {(*HEAVY, 'aiohttp', 'numpy')!r} if m in sys.modules])")
    assert found.stdout == "[]\n", found.stderr


def test_every_public_name_loads_without_the_extras() -> None:
    code = without(*HEAVY[:4], "sklearn", "pydantic_settings")
    code += "import casemate\nfor name in casemate.__all__: getattr(casemate, name)\n"
    code += "import casemate.verification, casemate.results, casemate.cli, casemate.cli.jobs, casemate.cli.results\n"
    code += "import casemate.cli.datasets, casemate.entry\n"
    found = run(code)
    assert found.returncode == 0, found.stderr


def test_public_names_are_listed_and_unknown_ones_refused() -> None:
    assert set(casemate.__all__) <= set(dir(casemate))
    with pytest.raises(AttributeError):
        _ = casemate.nothing  # type: ignore[attr-defined]


def test_a_users_own_modules_do_not_get_in_the_way(tmp_path: Path) -> None:
    for name in ("schemas.py", "attestation.py", "models.py", "privacy.py", "results.py"):
        (tmp_path / name).write_text("raise SystemExit('the user\\'s own file was imported')\n")
    found = run("import casemate\nfor name in casemate.__all__: getattr(casemate, name)", cwd=tmp_path)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("entry", "extra"), [("gateway", "gateway"), ("key_broker", "key-broker"), ("worker", "worker")]
)
def test_a_program_without_its_extra_says_the_one_line_that_mends_it(entry: str, extra: str) -> None:
    found = run(without("nats", "nkeys", "pydantic_settings", "torch") + f"from casemate import entry\nentry.{entry}()")
    assert found.returncode == 2
    assert found.stderr == f"this needs more packages:  pip install 'casemate[{extra}]'\n"


def test_a_broken_program_is_not_called_a_missing_extra() -> None:
    found = run(without("casemate_gateway.__main__") + "from casemate import entry\nentry.gateway()")
    assert found.returncode == 1 and "pip install" not in found.stderr
