"""What ``consortium init`` takes and refuses, and what it writes for machines that are not this one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from casemate.deployment import read_plan, write_deployment
from casemate_schemas.codec import encode
from casemate_schemas.errors import ManifestError, SetupError
from support.command_line import casemate
from support.consortium import consortium_for_tests

SERVER = """
[[nats]]
name = "nats-{n}"
host = "nats-{n}.example.org"
listen = "0.0.0.0"
store_dir = "/var/lib/casemate-nats"
certificate_file = "/etc/casemate/tls/nats-{n}.pem"
key_file = "/etc/casemate/tls/nats-{n}.key"
"""


@pytest.fixture
def plan(tmp_path: Path) -> str:
    keys = consortium_for_tests()
    (tmp_path / "manifest.bin").write_bytes(encode(keys.chain))
    first = f"""
manifest = "manifest.bin"
consortium = "{keys.consortium.id.hex()}"
home = "/etc/casemate"
public_url = "https://casemate.example.org"
workers = ["worker-1", "worker-2"]
ca_file = "/etc/casemate/tls/ca.pem"
"""
    return first + "".join(SERVER.format(n=n) for n in (1, 2, 3))


def _written(folder: Path, text: str) -> Path:
    (folder / "plan.toml").write_text(text)
    return folder / "plan.toml"


def test_three_servers_know_each_other_and_listen_with_tls(plan: str, tmp_path: Path) -> None:
    write_deployment(read_plan(_written(tmp_path, plan)), tmp_path / "out")
    configs = [json.loads((tmp_path / f"out/nats/nats-{n}/nats-server.json").read_text()) for n in (1, 2, 3)]
    for n, config in enumerate(configs, start=1):
        assert (config["server_name"], config["host"]) == (f"nats-{n}", "0.0.0.0")
        assert config["client_advertise"] == f"nats-{n}.example.org:4222"
        assert config["tls"]["handshake_first"] is True
        assert config["cluster"]["tls"]["verify"] is True
        assert config["cluster"]["routes"] == [f"nats-route://nats-{m}.example.org:6222" for m in (1, 2, 3)]
        assert config["jetstream"]["sync_interval"] == "always"
        assert config["accounts"] == configs[0]["accounts"]
    gateway = (tmp_path / "out/gateways/gateway/settings.toml").read_text()
    assert "stream_replicas = 3" in gateway and 'state_dir = "/etc/casemate/gateways/gateway/state"' in gateway
    assert ",".join(f"tls://nats-{n}.example.org:4222" for n in (1, 2, 3)) in gateway


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace('ca_file = "/etc/casemate/tls/ca.pem"', ""), "ca_file"),
        (lambda text: text.replace('key_file = "/etc/casemate/tls/nats-2.key"', ""), "of every server"),
        (lambda text: text.partition(SERVER.format(n=3))[0], "one NATS server, or three"),
        (lambda text: text.replace('"worker-2"', '"worker-1"'), "a name of its own"),
        (lambda text: text.replace('"worker-2"', '"Worker.2"'), "workers.1"),
        (lambda text: text.replace("home", "hom"), "hom"),
        (lambda text: text.partition("ca_file")[0] + '[[nats]]\nname="a"\nhost="h.org"\nstore_dir="/s"', "beyond this"),
        (lambda text: text + "]", "not a TOML file"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_is_written(
    plan: str, tmp_path: Path, change: Callable[[str], str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _written(tmp_path, change(plan))
    with pytest.raises(SetupError, match=says):
        read_plan(path)
    command = ["consortium", "init", str(path), "--out", str(tmp_path / "out")]
    assert casemate(*command) == 2
    assert not (tmp_path / "out").exists() and says in capsys.readouterr().err


def test_another_consortiums_manifest_is_refused(plan: str, tmp_path: Path) -> None:
    other = plan.replace(consortium_for_tests().consortium.id.hex(), "ab" * 32)
    with pytest.raises(ManifestError):
        write_deployment(read_plan(_written(tmp_path, other)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_where_everything_is(plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["consortium", "init", str(_written(tmp_path, plan)), "--out", str(tmp_path / "out")]
    assert casemate(*command) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path}/out/workers/worker-2\n" in told and f"{tmp_path}/out/nats/nats-3\n" in told
    assert (tmp_path / "out/workers/worker-2/nats.seed").read_text() not in told
    assert casemate(*command) == 2
