"""What can be seen in settings and the files that they name, without asking anyone."""

from __future__ import annotations

import ipaddress
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from casemate_messaging.connection import server_urls
from casemate_messaging.server import public_user_key
from casemate_schemas.consortium import Consortium, verify_versions
from casemate_schemas.errors import CasemateError, SetupError

from .findings import Finding
from .programs import Program
from .tls import check_certificate, check_key, is_loopback

_SPARE_FILES: Final = 256
"""What a gateway opens besides connections."""


def check_program(program: Program) -> Iterator[Finding]:
    """All that concerns one program alone."""
    yield Finding(program.about, "settings", str(program.file))
    yield from _seed(program)
    yield from _transport(program)
    yield from _manifest(program)
    yield from _state_dir(program)
    if program.kind == "gateway":
        yield from _public_url(program)
        yield _open_files(program)
        yield from _metrics(program)
    if (keys := program.value("keys_file")) is not None:
        yield check_key(program.about, "keys_file", keys)


def check_shared(programs: Sequence[Program]) -> Iterator[Finding]:
    """That no two programs use one folder or one NATS user."""
    seen: dict[Path, Program] = {}
    users: dict[str, Program] = {}
    for program in programs:
        folder = program.settings.state_dir
        if folder is not None and (other := seen.setdefault(folder.resolve(), program)) is not program:
            yield Finding(
                program.about,
                "state_dir",
                f"{folder}, which is also that of {other.about}",
                "a folder of its own",
                f"set another state_dir in {program.file}",
            )
        if program.kind != "gateway" and (other := users.setdefault(program.user, program)) is not program:
            fix = f"give {program.file} a name, a NATS user and a seed of its own"
            yield Finding(program.about, "NATS user", f"the user of {other.file} as well", "one of its own", fix)


def consortium_of(program: Program) -> Consortium:
    """The newest consortium in its manifest file. Raises :class:`CasemateError`."""
    return verify_versions(program.settings.manifest_chain(), consortium=program.settings.consortium_id)[-1]


def hosts_of(program: Program) -> list[str]:
    """The hosts in its ``nats_url``."""
    return [urlsplit(url).hostname or "" for url in server_urls(program.settings.nats_url)]


def _seed(program: Program) -> Iterator[Finding]:
    path = program.settings.nats_seed_file
    found = check_key(program.about, "nats_seed_file", path)
    yield found
    if found.ok:
        try:
            yield Finding(program.about, "nkey", public_user_key(path))
        except SetupError as error:
            fix = "put the seed there that 'casemate consortium init' wrote for this program"
            yield Finding(program.about, "nkey", str(error), "a user's seed, which begins with SU", fix)


def _transport(program: Program) -> Iterator[Finding]:
    settings = program.settings
    try:
        secure = server_urls(settings.nats_url)[0].startswith("tls://")
        settings.nats_tls()
    except SetupError as error:
        yield Finding(
            program.about, "nats_url", str(error), "URLs and TLS files that go together", f"correct {program.file}"
        )
        if (key := settings.nats_key_file) is not None:
            yield check_key(program.about, "nats_key_file", key)
        return
    far = [host for host in hosts_of(program) if not is_loopback(host)]
    if not secure and far:
        fix = "tls:// in nats_url, nats_ca_file, and tls with handshake_first in NATS' configuration"
        yield Finding(program.about, "nats_url", f"nats:// to {far[0]}", "tls:// beyond this machine", fix)
    else:
        yield Finding(program.about, "nats_url", settings.nats_url)
    for name in ("nats_ca_file", "nats_certificate_file"):
        if (path := getattr(settings, name)) is not None:
            yield from check_certificate(program.about, name, path)
    if settings.nats_key_file is not None:
        yield check_key(program.about, "nats_key_file", settings.nats_key_file)


def _manifest(program: Program) -> Iterator[Finding]:
    try:
        consortium = consortium_of(program)
    except CasemateError as error:
        fix = "manifest_file = the consortium's own chain, consortium = the SHA-256 of its first manifest"
        expected = f"a chain that begins with consortium {program.settings.consortium[:12]}…"
        yield Finding(program.about, "manifest_file", str(error), expected, fix)
        return
    manifest = consortium.manifest
    yield Finding(
        program.about, "manifest_file", f"manifest {manifest.number} of consortium {consortium.id.hex()[:12]}…"
    )
    guest = program.value("guest")
    if program.kind == "worker" or guest is not None:
        kind = "simulated" if manifest.simulation else "real"
        if manifest.simulation != (guest == "simulated"):
            wanted = "'simulated'" if manifest.simulation else "'configfs', 'sev-guest' or 'azure-vtpm'"
            yield Finding(
                program.about, "guest", f"{guest!r} under a manifest that is {kind}", wanted, f"guest = {wanted}"
            )
        else:
            yield Finding(program.about, "guest", f"{guest!r}, and the manifest is {kind}")
    if program.kind == "key-broker" and program.user not in {broker.id for broker in manifest.key_brokers}:
        known = ", ".join(broker.id for broker in manifest.key_brokers)
        fix = "key_broker = the id that the manifest lists it by, or a manifest that lists it"
        yield Finding(
            program.about, "key_broker", f"{program.user}, which the manifest does not list", f"one of {known}", fix
        )


def _state_dir(program: Program) -> Iterator[Finding]:
    folder = program.settings.state_dir
    if folder is None:
        if program.kind == "gateway":
            fix = "state_dir = a folder of its own, mode 700"
            yield Finding(
                program.about, "state_dir", "none", "one, so that no restart goes back behind a manifest", fix
            )
        return
    if not folder.exists():
        if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK):
            fix = f"install -d -m 700 {folder}, owned by the program's user"
            yield Finding(program.about, "state_dir", f"no folder {folder}, and none can be made", "a folder", fix)
        else:
            yield Finding(program.about, "state_dir", f"{folder}, made at the first start")
        return
    mode = folder.stat().st_mode & 0o777
    if mode & 0o077:
        yield Finding(program.about, "state_dir", f"mode {mode:o}", "mode 700", f"chmod 700 {folder}")
    elif not os.access(folder, os.W_OK):
        yield Finding(
            program.about, "state_dir", "a folder that cannot be written", "one that can", f"chown it: {folder}"
        )
    else:
        yield Finding(program.about, "state_dir", f"{folder}, its owner's alone")


def _public_url(program: Program) -> Iterator[Finding]:
    host, public_url = str(program.value("host")), program.value("public_url")
    fix = 'public_url = "https://…", the origin that clients use, and a TLS proxy there'
    if public_url is None:
        if is_loopback(host):
            yield Finding(program.about, "public_url", "none: for clients on this machine")
        else:
            yield Finding(
                program.about, "public_url", f"none, listening on {host}", "the origin that clients sign for", fix
            )
        return
    parts = urlsplit(public_url)
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        yield Finding(program.about, "public_url", public_url, "https:// beyond this machine", fix)
    else:
        yield Finding(program.about, "public_url", public_url)


def _open_files(program: Program) -> Finding:
    """In this shell; a service manager may set another bound."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = int(program.value("max_connections")) + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        fix = f"ulimit -n {wanted} (systemd: LimitNOFILE={wanted}), or a lower max_connections"
        return Finding(program.about, "open files", f"at most {soft}", f"{wanted} for max_connections", fix)
    return Finding(program.about, "open files", f"up to {soft}" if soft != resource.RLIM_INFINITY else "without bound")


def _metrics(program: Program) -> Iterator[Finding]:
    if program.value("metrics_port") is None:
        return
    host = str(program.value("metrics_host"))
    fix = 'metrics_host = "127.0.0.1", or an address of the operator\'s own network'
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        public = address.is_unspecified or address.is_global
    except ValueError:
        public = host != "localhost"
    if public:
        yield Finding(program.about, "metrics_host", host, "an address that only operators reach", fix)
    else:
        yield Finding(program.about, "metrics_host", host)
