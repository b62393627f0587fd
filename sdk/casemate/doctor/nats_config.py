"""What can be seen in a NATS server's configuration file, in the JSON form that ``casemate consortium init`` writes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from casemate_messaging.accounts import User, accounts
from casemate_messaging.files import read_file
from casemate_messaging.server import MAX_PAYLOAD_BYTES
from casemate_schemas.errors import CasemateError
from casemate_schemas.subjects import GATEWAY_ACCOUNT, SYSTEM_ACCOUNT, WORKER_ACCOUNT, key_broker_account, token

from .findings import Finding
from .tls import check_certificate, check_key, is_loopback

MAX_CONFIG_BYTES: Final = 4 << 20
LEAST_FREE_BYTES: Final = 1 << 30
LEAST_FREE_SHARE: Final = 0.05
_KEY_BROKER_ACCOUNTS: Final = "KEY_BROKER_"
_INBOX: Final = "_INBOX_"


def read_config(path: Path) -> dict[str, Any] | Finding:
    """The configuration, or why it cannot be read."""
    try:
        value = json.loads(read_file(path, MAX_CONFIG_BYTES))
    except CasemateError as error:
        return Finding(f"nats {path}", "configuration", str(error), "a file to read", "name another --nats-config")
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    fix = "write it by 'casemate consortium init', or have the running servers asked: --gateway FILE"
    return Finding(f"nats {path}", "configuration", "not JSON", "the form that 'consortium init' writes", fix)


def check_config(path: Path, config: Mapping[str, Any]) -> Iterator[Finding]:
    """All that concerns one server's configuration."""
    about = f"nats {config.get('server_name') or path}"
    yield from _jetstream(about, config)
    yield from _transport(about, config)
    yield from _cluster(about, config)
    yield from _accounts(about, config)


def users_of(config: Mapping[str, Any]) -> list[User]:
    """Its users of ours: the account says in which role, the inboxes under which name."""
    found = []
    for account, section in _map(config, "accounts").items():
        for entry in _entries(section, "users"):
            user = _user(str(account), entry)
            if user is not None:
                found.append(user)
    return found


def _user(account: str, entry: Mapping[str, Any]) -> User | None:
    key = str(entry.get("nkey", ""))
    if account.startswith(_KEY_BROKER_ACCOUNTS):
        return User("key_broker", account.removeprefix(_KEY_BROKER_ACCOUNTS), key)
    inboxes = sorted(s for s in _allowed(entry, "subscribe") if s.startswith(_INBOX))
    try:
        name = token(inboxes[0].removeprefix(_INBOX).partition(".")[0])
    except (IndexError, CasemateError):
        name = "unnamed"
    if account == GATEWAY_ACCOUNT:
        return User("gateway", name, key)
    return User("worker", name, key) if account == WORKER_ACCOUNT else None


def _jetstream(about: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    section = config.get("jetstream")
    if not section or str(section).lower() in ("disabled", "disable"):
        fix = 'jetstream { store_dir: …, sync_interval: "always" }'
        yield Finding(about, "jetstream", "not enabled", "enabled", fix)
        return
    options = section if isinstance(section, dict) else {}
    if options.get("sync_interval") == "always":
        yield Finding(about, "sync_interval", "always")
    else:
        found = str(options.get("sync_interval", "none: two minutes"))
        yield Finding(about, "sync_interval", found, "always", 'sync_interval: "always" in the section jetstream')
    payload = config.get("max_payload", MAX_PAYLOAD_BYTES)
    if isinstance(payload, int) and payload >= MAX_PAYLOAD_BYTES:
        yield Finding(about, "max_payload", str(payload))
    else:
        yield Finding(
            about, "max_payload", str(payload), f"at least {MAX_PAYLOAD_BYTES}", f"max_payload: {MAX_PAYLOAD_BYTES}"
        )
    yield from _store(about, options.get("store_dir"))


def _store(about: str, store_dir: object) -> Iterator[Finding]:
    """Only where the folder, or the one that it will be made in, is on this machine."""
    if not isinstance(store_dir, str):
        fix = "store_dir: a folder on a disk that lasts, in the section jetstream"
        yield Finding(about, "store_dir", "none: a temporary folder", "a folder that lasts", fix)
        return
    folder = Path(store_dir)
    existing = folder if folder.exists() else folder.parent
    if not existing.is_dir():
        fix = f"install -d -m 700 {folder}, owned by nats-server's user"
        yield Finding(about, "store_dir", f"no folder {folder}, and none to make it in", "a folder", fix)
        return
    if not os.access(existing, os.W_OK):
        yield Finding(
            about,
            "store_dir",
            f"{existing}, not writable",
            "a writable folder",
            f"chown it to nats-server's user: {existing}",
        )
        return
    usage = shutil.disk_usage(existing)
    if usage.free < max(LEAST_FREE_BYTES, LEAST_FREE_SHARE * usage.total):
        found = f"{usage.free >> 20} MiB free of {usage.total >> 20} on its disk"
        expected = f"{LEAST_FREE_BYTES >> 30} GiB and {LEAST_FREE_SHARE:.0%} at least"
        yield Finding(about, "store_dir", found, expected, "make room, or move store_dir to a larger disk")
        return
    yield Finding(about, "store_dir", f"{folder}, {usage.free >> 30} GiB free on its disk")


def _transport(about: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    host, tls = _listening(config), _map(config, "tls")
    if not tls:
        if is_loopback(host):
            yield Finding(about, "tls", "none: for programs on this machine")
        else:
            fix = 'tls { cert_file: …, key_file: …, handshake_first: true, min_version: "1.3" }'
            yield Finding(about, "tls", f"none, listening on {host}", "TLS beyond this machine", fix)
        return
    if tls.get("handshake_first") is True:
        yield Finding(about, "handshake_first", "true")
    else:
        found = str(tls.get("handshake_first", "none"))
        yield Finding(about, "handshake_first", found, "true", "handshake_first: true in the section tls")
    advertised = str(config.get("client_advertise", "")).rpartition(":")[0]
    yield from _pair(about, tls, hosts=tuple(filter(None, [advertised])))


def _pair(about: str, tls: Mapping[str, Any], *, hosts: tuple[str, ...]) -> Iterator[Finding]:
    """A section's files, where this is the machine that has them."""
    certificate, key = Path(str(tls.get("cert_file", ""))), Path(str(tls.get("key_file", "")))
    if certificate.parent.is_dir():
        yield from check_certificate(about, "cert_file", certificate, hosts=hosts)
    if key.parent.is_dir():
        yield check_key(about, "key_file", key)


def _cluster(about: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    cluster = _map(config, "cluster")
    if not cluster:
        return
    listed = cluster.get("routes")
    routes = len(listed) if isinstance(listed, list) else 0
    if routes not in (3, 5):
        yield Finding(
            about,
            "cluster routes",
            f"{routes} servers",
            "3 servers, or 5",
            "list every server of the cluster in routes",
        )
    else:
        yield Finding(about, "cluster routes", f"{routes} servers")
    if not config.get("server_name"):
        fix = "server_name: one of its own for each server"
        yield Finding(about, "server_name", "none", "one, which JetStream in a cluster needs", fix)
    if not _map(cluster, "tls") and not is_loopback(_listening(cluster)):
        fix = "tls { cert_file: …, key_file: …, ca_file: …, verify: true } in the section cluster"
        yield Finding(about, "cluster tls", "none", "TLS between servers, both showing certificates", fix)


def _accounts(about: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Every user and every service against what this release makes of the same users."""
    users = users_of(config)
    if config.get("system_account") == SYSTEM_ACCOUNT:
        yield Finding(about, "system_account", SYSTEM_ACCOUNT)
    else:
        fix = f'system_account: "{SYSTEM_ACCOUNT}"'
        yield Finding(about, "system_account", str(config.get("system_account")), SYSTEM_ACCOUNT, fix)
    try:
        expected = accounts(users)
    except CasemateError as error:
        yield Finding(
            about, "users", str(error), "names of a-z, 0-9 and hyphens", "write it by 'casemate consortium init'"
        )
        return
    for user in users:
        yield _permissions(about, user, _entry(config, user), _entry({"accounts": expected}, user))
    for account, section in expected.items():
        yield _services(about, account, _map(_map(config, "accounts"), account), section)


def _permissions(about: str, user: User, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Finding:
    check = f"permissions of {user.role.replace('_', ' ')} {user.name}"
    wide, missing = [], []
    for verb in ("publish", "subscribe"):
        has, wants = _allowed(found, verb), _allowed(expected, verb)
        denied = _map(_map(found, "permissions"), verb).get("deny")
        if not has and not denied:
            wide.append(f"{verb} everything")
        wide += [f"{verb} {subject}" for subject in sorted(has - wants)]
        missing += [f"{verb} {subject}" for subject in sorted(wants - has)]
    responses = [bool(_map(entry, "permissions").get("allow_responses")) for entry in (found, expected)]
    if responses != [responses[1]] * 2:
        (wide if responses[0] else missing).append("allow_responses")
    if not wide and not missing:
        return Finding(about, check, "as this release wants them")
    said = "; ".join(f"{word} {_some(items)}" for word, items in (("too wide:", wide), ("missing:", missing)) if items)
    fix = "take them from a configuration that 'casemate consortium init' of this release writes"
    return Finding(about, check, said, "as casemate_schemas.subjects has them", fix)


def _services(about: str, account: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Finding:
    check = f"services of account {account}"
    wrong = []
    for verb in ("exports", "imports"):
        has, wants = ({_canonical(item) for item in _entries(section, verb)} for section in (found, expected))
        wrong += [f"too wide: {verb} {item}" for item in sorted(has - wants)]
        wrong += [f"missing: {verb} {item}" for item in sorted(wants - has)]
    if bool(found.get("jetstream")) != bool(expected.get("jetstream")):
        wrong.append(f"jetstream {found.get('jetstream', 'not enabled')}")
    if not wrong:
        return Finding(about, check, "as this release wants them")
    fix = "take them from a configuration that 'casemate consortium init' of this release writes"
    return Finding(about, check, _some(wrong), "as casemate_messaging.accounts has them", fix)


def _entry(config: Mapping[str, Any], user: User) -> Mapping[str, Any]:
    account = {"key_broker": key_broker_account(user.name), "gateway": GATEWAY_ACCOUNT, "worker": WORKER_ACCOUNT}[
        user.role
    ]
    entries = _entries(_map(_map(config, "accounts"), account), "users")
    return next((entry for entry in entries if entry.get("nkey") == user.public_key), {})


def _allowed(entry: Mapping[str, Any], verb: str) -> set[str]:
    """NATS takes a subject, a list of them, or a section with ``allow``."""
    rule = _map(entry, "permissions").get(verb)
    rule = rule.get("allow") if isinstance(rule, dict) else rule
    return {str(subject) for subject in (rule if isinstance(rule, list) else [rule] if rule else [])}


def _listening(section: Mapping[str, Any]) -> str:
    """The address, which may be given as ``host`` or in ``listen``; NATS' default is every one."""
    listen = str(section.get("listen", "")).rpartition(":")[0]
    return str(section.get("host") or section.get("net") or listen or "0.0.0.0")  # noqa: S104 - what NATS would do


def _map(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _entries(value: Any, name: str) -> list[Mapping[str, Any]]:
    found = value.get(name) if isinstance(value, dict) else None
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _canonical(item: Mapping[str, Any]) -> str:
    return json.dumps(item, sort_keys=True)


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
