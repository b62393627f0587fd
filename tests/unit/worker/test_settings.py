from __future__ import annotations

from pathlib import Path

import pytest
from casemate_schemas.errors import SetupError
from casemate_worker.settings import Settings

GOOD = f"""
name = "worker-1"
nats_url = "nats://127.0.0.1:4222"
nats_seed_file = "worker-1.nk"
consortium = "{"ab" * 32}"
manifest_file = "consortium.manifest"
scratch_dir = "/tmp"
"""


def test_the_environment_wins_and_simulation_is_never_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(GOOD + "threads = 2\n")
    assert (Settings.load(path).threads, Settings.load(path).guest) == (2, "configfs")
    monkeypatch.setenv("CASEMATE_WORKER_THREADS", "4")
    assert Settings.load(path).threads == 4


@pytest.mark.parametrize("wrong", ["threads = 0", "heartbeat_s = nan", 'guest = "none"', "surprise = 1"])
def test_wrong_settings_say_which_and_not_what(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(GOOD + wrong)
    with pytest.raises(SetupError, match=wrong.split()[0]):
        Settings.load(path)
