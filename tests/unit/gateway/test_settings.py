"""The settings file, and the environment on top of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from casemate_gateway.settings import Settings
from casemate_schemas.errors import SetupError

GOOD = f"""
nats_url = "nats://127.0.0.1:4222"
nats_seed_file = "gateway.nk"
consortium = "{"ab" * 32}"
manifest_file = "consortium.manifest"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    return path


def test_a_file_is_enough(tmp_path: Path) -> None:
    settings = Settings.load(written(tmp_path, GOOD + "port = 0\nheartbeat_s = 2.5\n"))
    assert (settings.port, settings.heartbeat_s, settings.host) == (0, 2.5, "127.0.0.1")
    assert settings.manifest_file == Path("consortium.manifest")


def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASEMATE_GATEWAY_NATS_URL", "nats://cluster.example:4222")
    monkeypatch.setenv("CASEMATE_GATEWAY_MAX_UPLOADS", "3")
    settings = Settings.load(written(tmp_path, GOOD))
    assert (settings.nats_url, settings.max_uploads) == ("nats://cluster.example:4222", 3)


@pytest.mark.parametrize(
    "wrong",
    [
        "max_envelop_bytes = 1",
        "port = 70000",
        "heartbeat_s = 0",
        "heartbeat_s = nan",
        "max_uploads = 0",
        'public_url = "consortium.example"',
        'public_url = "https://consortium.example/path"',
        "not toml",
    ],
)
def test_wrong_settings_say_which(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(SetupError) as caught:
        Settings.load(written(tmp_path, GOOD + wrong))
    assert wrong.split()[0] in str(caught.value) or wrong == "not toml"


def test_a_missing_field_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="consortium"):
        Settings.load(written(tmp_path, GOOD.replace("consortium =", "# consortium =")))
    with pytest.raises(SetupError, match="cannot read"):
        Settings.load(tmp_path / "none.toml")
