"""What an operator needs to run NATS, gateways, workers and key brokers on several machines, written from one small file.

Every server gets its configuration, every program its settings and the seed of a NATS user of its own. The manifest says
who the members and their key brokers are; nothing here is signed, and nothing here can weaken what key brokers demand.
"""

from __future__ import annotations

import ipaddress
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Self

from casemate_messaging.accounts import User, accounts
from casemate_messaging.files import create_private, read_file
from casemate_messaging.server import MAX_PAYLOAD_BYTES, ServerTls, create_user_key
from casemate_schemas.codec import Name, decode, encode
from casemate_schemas.consortium import MAX_CHAIN_BYTES, Consortium, ManifestChain, verify_versions
from casemate_schemas.errors import SetupError
from casemate_schemas.subjects import SYSTEM_ACCOUNT
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

MAX_PLAN_BYTES: Final = 64 << 10
CLUSTER_NAME: Final = "casemate"
SERVER_COUNTS: Final = (1, 3)
"""One server, or three of which any one may die."""

_FOLDERS: Final = {"gateway": "gateways", "worker": "workers", "key_broker": "key-brokers"}

Host = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.:-]{1,253}$")]
Port = Annotated[int, Field(ge=1, le=65535)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class NatsServer(_Part):
    """One nats-server. Files and folders are paths on its own machine."""

    name: Name
    host: Host
    """Where programs and the other servers reach it; its certificate is for that name."""
    port: Port = 4222
    cluster_port: Port = 6222
    listen: Host | None = None
    """What it listens on, if not ``host``; ``0.0.0.0``, say."""
    store_dir: Path
    certificate_file: Path | None = None
    key_file: Path | None = None


class DeploymentPlan(_Part):
    """The operator's file. Relative paths in it are relative to it."""

    manifest: Path
    """The consortium's manifest chain."""
    consortium: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Its id, from someone who signed it: the manifest must begin with it."""
    home: Path | None = None
    """The folder on each machine that its part of the output will lie in; the output folder itself if not given."""
    gateways: Annotated[tuple[Name, ...], Field(min_length=1, max_length=16)] = ("gateway",)
    public_url: str | None = None
    """The gateways' common origin, as clients see it."""
    workers: Annotated[tuple[Name, ...], Field(max_length=256)] = ()
    guest: str | None = None
    """How workers ask their chip, if not ``configfs`` (``simulated`` under a simulated manifest)."""
    ca_file: Path | None = None
    """Certificates that vouch for the servers', on every machine."""
    nats: Annotated[tuple[NatsServer, ...], Field(min_length=1, max_length=3)]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.nats) not in SERVER_COUNTS:
            raise ValueError("expected one NATS server, or three")
        names = [*self.gateways, *self.workers, *(server.name for server in self.nats)]
        if len(set(names)) != len(names):
            raise ValueError("expected a name of its own for every gateway, worker and server")
        with_tls = [s.certificate_file is not None and s.key_file is not None for s in self.nats]
        if any(with_tls) != all(with_tls) or (any(with_tls) and self.ca_file is None):
            raise ValueError("TLS wants certificate_file and key_file of every server, and ca_file")
        if not all(with_tls) and not all(_is_loopback(server.host) for server in self.nats):
            raise ValueError(
                "beyond this machine NATS needs TLS: certificate_file and key_file of every server, and ca_file"
            )
        return self

    @property
    def nats_url(self) -> str:
        """All servers, for a program."""
        scheme = "nats" if self.ca_file is None else "tls"
        return ",".join(f"{scheme}://{_at(server.host, server.port)}" for server in self.nats)


def read_plan(path: Path) -> DeploymentPlan:
    """The plan in a TOML file. Raises :class:`SetupError` that names the field."""
    try:
        plan = DeploymentPlan.model_validate(tomllib.loads(read_file(path, MAX_PLAN_BYTES).decode("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"{path} is not a TOML file") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        raise SetupError(f"{path}: {'.'.join(map(str, first['loc'])) or 'plan'}: {first['msg']}") from error
    return plan.model_copy(update={"manifest": path.parent / plan.manifest})


def write_deployment(plan: DeploymentPlan, out: Path) -> list[Path]:
    """Writes everything below the new folder ``out``; returns the folders, one for each program and server.

    1. The manifest is the consortium's, signed as it must be.
    2. Every gateway, worker and key broker gets a NATS user: a seed file (mode 600) that exists nowhere else.
    3. Every NATS server gets its configuration, with each user's permissions.
    4. Every program gets its settings and the manifest.

    Nothing is overwritten. Raises :class:`SetupError`, :class:`ManifestError` or :class:`MalformedError`.
    """
    chain = decode(ManifestChain, read_file(plan.manifest, MAX_CHAIN_BYTES), max_bytes=MAX_CHAIN_BYTES)
    consortium = verify_versions(chain, consortium=bytes.fromhex(plan.consortium))[-1]  # 1
    settings = dict(_settings(plan, consortium, plan.home or out.absolute()))
    try:
        out.mkdir(mode=0o700, parents=True)
        for group in (*_FOLDERS.values(), "nats"):
            (out / group).mkdir(mode=0o700)
        users = []
        for (role, name), _ in settings.items():  # 2
            folder = out / _folder(role, name)
            folder.mkdir(mode=0o700)
            users.append(User(role, name, create_user_key(folder / "nats.seed")))  # type: ignore[arg-type]
        for server in plan.nats:  # 3
            folder = out / "nats" / server.name
            folder.mkdir(mode=0o700)
            create_private(folder / "nats-server.json", json.dumps(nats_config(plan, server, users), indent=2).encode())
        for (role, name), values in settings.items():  # 4
            folder = out / _folder(role, name)
            create_private(folder / "manifest.bin", encode(chain))
            lines = (f"{key} = {json.dumps(value)}\n" for key, value in values.items())
            create_private(folder / "settings.toml", "".join(lines).encode())
    except OSError as error:
        raise SetupError(f"cannot write into {out}, which must not exist yet: {error.strerror}") from error
    return [*(out / _folder(*key) for key in settings), *(out / "nats" / server.name for server in plan.nats)]


def nats_config(plan: DeploymentPlan, server: NatsServer, users: Sequence[User]) -> dict[str, Any]:
    """One server's configuration; public keys, and no secret.

    It syncs before it acknowledges, says nothing before the TLS handshake, and opens no port for monitoring. Servers of a
    cluster show each other their certificates.
    """
    listen = server.listen or server.host
    config: dict[str, Any] = {
        "server_name": server.name,
        "host": listen,
        "port": server.port,
        "client_advertise": _at(server.host, server.port),
        "max_payload": MAX_PAYLOAD_BYTES,
        "jetstream": {"store_dir": str(server.store_dir), "sync_interval": "always"},
        "system_account": SYSTEM_ACCOUNT,
        "accounts": accounts(users),
    }
    if server.certificate_file is not None and server.key_file is not None:
        config["tls"] = ServerTls(server.certificate_file, server.key_file).section()
    if len(plan.nats) > 1:
        config["cluster"] = _cluster(plan, server, listen)
    return config


def _cluster(plan: DeploymentPlan, server: NatsServer, listen: str) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "name": CLUSTER_NAME,
        "host": listen,
        "port": server.cluster_port,
        "advertise": _at(server.host, server.cluster_port),
        "routes": [f"nats-route://{_at(other.host, other.cluster_port)}" for other in plan.nats],
    }
    if server.certificate_file is not None and server.key_file is not None:
        files = {"cert_file": str(server.certificate_file), "key_file": str(server.key_file)}
        cluster["tls"] = {**files, "ca_file": str(plan.ca_file), "verify": True, "min_version": "1.3"}
    return cluster


def _settings(
    plan: DeploymentPlan, consortium: Consortium, home: Path
) -> Iterator[tuple[tuple[str, str], dict[str, object]]]:
    """((role, name), settings) of every program. Paths and public facts only."""
    simulated = consortium.manifest.simulation
    guest = {"guest": "simulated"} if simulated else {} if plan.guest is None else {"guest": plan.guest}
    chip = {"simulated_chip_socket": "simulated-chip/chip.sock"} if simulated else {}
    for name in plan.gateways:
        own = {"nats_user": name, "stream_replicas": len(plan.nats)}
        url = {} if plan.public_url is None else {"public_url": plan.public_url}
        yield ("gateway", name), {**_common(plan, home, "gateway", name), **own, **url}
    for name in plan.workers:
        own = {"name": name, "scratch_dir": str(home / _folder("worker", name))}
        yield ("worker", name), {**_common(plan, home, "worker", name), **own, **guest, **chip}
    for broker in consortium.manifest.key_brokers:
        folder = home / _folder("key_broker", broker.id)
        keys = {"guest": "sev-guest"} if broker.hosted == "enclave" else {"keys_file": str(folder / "key-broker.key")}
        if broker.hosted == "enclave" and simulated:
            keys = {"guest": "simulated", "simulated_chip_socket": "simulated-chip/kb.sock"}
        yield (
            ("key_broker", broker.id),
            {**_common(plan, home, "key_broker", broker.id), "key_broker": broker.id, **keys},
        )


def _common(plan: DeploymentPlan, home: Path, role: str, name: str) -> dict[str, object]:
    folder = home / _folder(role, name)
    trust = {} if plan.ca_file is None else {"nats_ca_file": str(plan.ca_file)}
    return {
        "nats_url": plan.nats_url,
        **trust,
        "nats_seed_file": str(folder / "nats.seed"),
        "consortium": plan.consortium,
        "manifest_file": str(folder / "manifest.bin"),
        "state_dir": str(folder / "state"),
    }


def _folder(role: str, name: str) -> Path:
    return Path(_FOLDERS[role]) / name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _at(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
