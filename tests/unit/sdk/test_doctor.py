"""The doctor on files alone: nothing wrong in a good folder, and each planted mistake found, with its fix."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from casemate.doctor.live import MAX_SKEW_MS, check_servers
from casemate.doctor.nats_config import check_config
from casemate_messaging.durability import ServerStatus
from casemate_messaging.server import ServerTls, create_user_key
from casemate_schemas.codec import encode
from support.command_line import casemate
from support.operator_site import OperatorSite
from support.tls import Authority


@pytest.fixture
def site(tmp_path: Path) -> OperatorSite:
    return OperatorSite(tmp_path)


Plant = Callable[[OperatorSite], object]


def _chmod(name: str, mode: int) -> Plant:
    return lambda site: (site.folder / name).chmod(mode)


def _set(kind: Any, **values: Any) -> Plant:
    return lambda site: site.values[kind].update(values)


def _config(*path: str, **values: Any) -> Plant:
    def plant(site: OperatorSite) -> None:
        section: Any = site.config
        for name in path:
            section = section[name]
        section.update(values)

    return plant


def _permit(account: str, subject: str) -> Plant:
    return lambda site: site.config["accounts"][account]["users"][0]["permissions"]["publish"]["allow"].append(subject)


def _forbid(account: str, subject: str) -> Plant:
    return lambda site: site.config["accounts"][account]["users"][0]["permissions"]["publish"]["allow"].remove(subject)


def _swap_seeds(site: OperatorSite) -> None:
    site.values["gateway"]["nats_seed_file"] = str(site.seeds["worker"])


def _unknown_seed(site: OperatorSite) -> None:
    create_user_key(site.folder / "new.nk")
    site.values["worker"]["nats_seed_file"] = str(site.folder / "new.nk")


def _share_state(site: OperatorSite) -> None:
    site.values["worker"]["state_dir"] = site.values["gateway"]["state_dir"]


def _store_nowhere(site: OperatorSite) -> None:
    site.config["jetstream"]["store_dir"] = str(site.folder / "no" / "such")


def _other_chain(site: OperatorSite) -> None:
    from support.consortium import amended

    later = amended(site.keys).chain.manifests[-1:]
    (site.folder / "manifest.bin").write_bytes(encode(site.keys.chain.model_copy(update={"manifests": later})))


OTHER_GUEST = {"configfs": "simulated", "simulated": "configfs"}

PLANTED: dict[str, tuple[Plant, str, str]] = {
    "seed others can read": (_chmod("gateway.nk", 0o644), "nats_seed_file", "chmod 600"),
    "no seed": (_set("gateway", nats_seed_file="/nonexistent/seed"), "nats_seed_file", "put it at"),
    "another user's seed": (_swap_seeds, "its key at", "nats_seed_file = the seed that was made for gateway"),
    "a seed NATS does not know": (_unknown_seed, "its key at", "add its public key"),
    "a misspelt setting": (_set("worker", thread=2), "settings", "correct"),
    "nats:// beyond loopback": (_set("worker", nats_url="nats://nats.example.org:4222"), "nats_url", "tls://"),
    "mixed schemes": (_set("worker", nats_url="nats://127.0.0.1:1,tls://127.0.0.1:2"), "nats_url", "correct"),
    "another consortium's manifest": (_set("gateway", consortium="ab" * 32), "manifest_file", "first manifest"),
    "a chain without its beginning": (_other_chain, "manifest_file", "first manifest"),
    "wrong kind of guest": (lambda s: s.values["worker"].update(guest=OTHER_GUEST[s.guest]), "guest", "guest = "),
    "unlisted key broker": (_set("key-broker", key_broker="west"), "key_broker", "a manifest that lists it"),
    "key broker's keys in the open": (_chmod("key-broker.key", 0o640), "keys_file", "chmod 600"),
    "gateway without state_dir": (lambda s: s.values["gateway"].pop("state_dir"), "state_dir", "state_dir ="),
    "state_dir in the open": (_chmod("worker.state", 0o755), "state_dir", "chmod 700"),
    "shared state_dir": (_share_state, "state_dir", "another state_dir"),
    "no public_url": (_set("gateway", host="0.0.0.0"), "public_url", "https://"),
    "public_url in clear": (_set("gateway", public_url="http://casemate.example.org"), "public_url", "https://"),
    "too few open files": (_set("gateway", max_connections=1 << 20), "open files", "LimitNOFILE"),
    "public metrics": (_set("gateway", metrics_port=9090, metrics_host="0.0.0.0"), "metrics_host", "127.0.0.1"),
    "sync_interval": (_config("jetstream", sync_interval="2m"), "sync_interval", 'sync_interval: "always"'),
    "no JetStream": (_config(jetstream=None), "jetstream", "jetstream {"),
    "small max_payload": (_config(max_payload=65536), "max_payload", "max_payload: 1048576"),
    "no folder to store in": (_store_nowhere, "store_dir", "install -d -m 700"),
    "no TLS beyond loopback": (_config(host="0.0.0.0"), "tls", "handshake_first: true"),
    "a worker may too much": (_permit("WORKERS", ">"), "permissions of worker worker-1", "consortium init"),
    "a worker may too little": (_forbid("WORKERS", "casemate.event.*"), "permissions of worker", "consortium init"),
    "no way to ask about syncing": (
        lambda s: s.config["accounts"]["SYS"]["exports"].clear(),
        "services of account SYS",
        "consortium init",
    ),
    "no system account": (lambda s: s.config.pop("system_account"), "system_account", "SYS"),
    "cluster in clear": (
        _config(server_name="nats-1", cluster={"name": "c", "host": "0.0.0.0", "routes": ["a", "b", "c"]}),
        "cluster tls",
        "verify: true",
    ),
    "cluster of two": (
        _config(server_name="nats-1", cluster={"name": "c", "host": "127.0.0.1", "routes": ["a", "b"]}),
        "cluster routes",
        "every server",
    ),
}


async def test_nothing_is_wrong_in_a_good_folder(site: OperatorSite) -> None:
    found = await site.examined()
    assert [str(finding) for finding in found if not finding.ok] == []
    assert len(found) > 20


@pytest.mark.parametrize("name", PLANTED)
async def test_a_planted_mistake_is_found_and_its_fix_named(site: OperatorSite, name: str) -> None:
    plant, check, fix = PLANTED[name]
    before = {(finding.about, finding.check) for finding in await site.examined()}
    plant(site)
    wrong = await site.wrong()
    assert any(finding.check.startswith(check) and fix in finding.fix for finding in wrong), wrong
    assert all(finding.found and finding.expected for finding in wrong)
    assert len(wrong) <= 3 and len(before) > 20


def test_no_configuration_makes_the_doctor_stumble(site: OperatorSite) -> None:
    for path in ("accounts", "jetstream", "tls", "cluster", "host", "system_account", "max_payload"):
        for value in (5, "text", [], [5], {"a": 5}, None):
            found = list(check_config(site.folder / "nats.json", {**site.config, path: value}))
            assert len(found) >= 5 and all(str(finding) for finding in found)


def test_a_rule_that_allows_more_is_found_however_it_is_written(site: OperatorSite) -> None:
    for verb in ("publish", "subscribe"):
        for rule in (None, ">", [">"], {"allow": ">"}, {"allow": [">"]}, {"allow": 5}, 5, {}):
            config = copy.deepcopy(site.config)
            config["accounts"]["CASEMATE"]["users"][0]["permissions"][verb] = rule
            wrong = [finding for finding in check_config(site.folder / "nats.json", config) if not finding.ok]
            assert any("too wide" in finding.found for finding in wrong), (verb, rule)


def _tls(site: OperatorSite, **changes: Any) -> Authority:
    """The site with TLS; ``changes`` to the section."""
    ours = Authority(site.folder, "ours")
    tls = ServerTls(*ours.issue("server"), ours.file).section()
    site.config |= {"host": "0.0.0.0", "client_advertise": "127.0.0.1:4222", "tls": {**tls, **changes}}
    certificate, key = ours.issue("gateway")
    site.values["gateway"] |= {
        "nats_url": "tls://127.0.0.1:4222",
        "nats_ca_file": str(ours.file),
        "nats_certificate_file": str(certificate),
        "nats_key_file": str(key),
    }
    return ours


@pytest.mark.parametrize(
    ("plant", "check", "fix"),
    [
        (lambda s: _tls(s, handshake_first=False), "handshake_first", "handshake_first: true"),
        (lambda s: _tls(s) and s.config.update(client_advertise="nats.example.org:1"), "cert_file for", "subject alt"),
        (lambda s: _tls(s) and (s.folder / "ours.server.key").chmod(0o640), "key_file", "chmod 600"),
        (lambda s: _tls(s) and (s.folder / "ours.gateway.key").chmod(0o644), "nats_key_file", "chmod 600"),
        (lambda s: _tls(s) and (s.folder / "ours.server.pem").write_text("none"), "cert_file", "put one at"),
    ],
)
async def test_mistakes_with_tls(site: OperatorSite, plant: Plant, check: str, fix: str) -> None:
    plant(site)
    wrong = [f for f in await site.wrong() if "valid now" not in f.expected]
    assert any(finding.check.startswith(check) and fix in finding.fix for finding in wrong), wrong


async def test_certificates_that_end_within_the_week(site: OperatorSite) -> None:
    _tls(site)
    wrong = await site.wrong()
    assert {finding.check for finding in wrong} == {"cert_file", "nats_ca_file", "nats_certificate_file"}
    assert all("renew" in finding.fix for finding in wrong)


async def test_a_disk_that_is_nearly_full(site: OperatorSite, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(site.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    (wrong,) = await site.wrong()
    assert (wrong.check, "make room" in wrong.fix) == ("store_dir", True)


def _status(**changes: Any) -> ServerStatus:
    fields: dict[str, Any] = {"name": "nats-1", "version": "2.15.1", "syncs_always": True, "at_ms": 0, "heard_ms": 0}
    fields |= {"stored_bytes": 1, "max_bytes": 100, "cluster_size": 1}
    return ServerStatus(**{**fields, **changes})


@pytest.mark.parametrize(
    ("status", "replicas", "check", "fix"),
    [
        ({"version": "2.11.9"}, 1, "version", "update nats-server"),
        ({"version": "2.9"}, 1, "version", "update nats-server"),
        ({"version": "?"}, 1, "version", "update nats-server"),
        ({"syncs_always": False}, 1, "durability", 'sync_interval: "always"'),
        ({"at_ms": MAX_SKEW_MS + 1}, 1, "its clock", "NTP"),
        ({"heard_ms": MAX_SKEW_MS + 1}, 1, "its clock", "NTP"),
        ({"stored_bytes": 91}, 1, "store", "max_file_store"),
        ({"cluster_size": 3}, 3, "cluster", "start the others"),
    ],
)
def test_what_a_server_says_of_itself(status: dict[str, Any], replicas: int, check: str, fix: str) -> None:
    assert [finding for finding in check_servers("gateway", [_status()], 1) if not finding.ok] == []
    (wrong,) = (finding for finding in check_servers("gateway", [_status(**status)], replicas) if not finding.ok)
    assert wrong.check == check and fix in wrong.fix


def test_fewer_replicas_than_servers_and_a_nats_that_does_not_say() -> None:
    three = [_status(name=f"nats-{n}", cluster_size=3) for n in range(3)]
    (wrong,) = (finding for finding in check_servers("gateway", three, 1) if not finding.ok)
    assert "stream_replicas = 3" in wrong.fix
    (silent,) = check_servers("gateway", [], 1)
    assert silent.check == "durability" and "consortium init" in silent.fix


async def test_no_secret_is_shown(site: OperatorSite) -> None:
    _unknown_seed(site)
    said = "".join(str(finding) for finding in await site.examined())
    for seed in (*site.seeds.values(), site.folder / "new.nk"):
        assert seed.read_text() not in said


def test_the_command_says_it_in_lines_and_in_json(site: OperatorSite, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["doctor", "--offline", "--gateway", str(site.folder / "gateway.toml")]
    site.given()
    assert casemate(*arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 wrong, ")
    site.seeds["gateway"].chmod(0o644)
    assert casemate(*arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("WRONG")).endswith(f"fix: chmod 600 {site.seeds['gateway']}")
    assert casemate(*arguments, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["wrong"] == 1
    assert [finding["fix"] for finding in told["findings"] if not finding["ok"]] == [
        f"chmod 600 {site.seeds['gateway']}"
    ]
    assert casemate("doctor") == 2
