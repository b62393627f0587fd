"""An operator's folder: a gateway, a worker, a key broker, and NATS' configuration, all right until a test makes it wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from casemate.doctor.examination import examine
from casemate.doctor.findings import Finding
from casemate.doctor.programs import Given, Kind
from casemate_messaging.accounts import User
from casemate_messaging.server import EmbeddedServer, ServerTls, create_user_key, server_config
from casemate_schemas.codec import encode

from .consortium import ConsortiumKeys, consortium_for_tests

USERS: dict[Kind, tuple[str, str]] = {
    "gateway": ("gateway", "gateway"),
    "worker": ("worker", "worker-1"),
    "key-broker": ("key_broker", "north"),
}


class AlteredServer(EmbeddedServer):
    """A nats-server whose configuration was edited by hand."""

    def __init__(
        self, folder: Path, users: list[User], alter: Callable[[dict[str, Any]], None], **options: Any
    ) -> None:
        super().__init__(folder, users, **options)
        self._alter = alter

    def _write_config(self) -> Path:
        path = super()._write_config()
        config = json.loads(path.read_text())
        self._alter(config)
        path.write_text(json.dumps(config))
        return path


class OperatorSite:
    """Files in a folder; ``values`` are the settings by program, ``config`` is NATS' configuration."""

    def __init__(self, folder: Path, nats_url: str = "nats://127.0.0.1:4222") -> None:
        self.folder = folder
        self.keys: ConsortiumKeys = consortium_for_tests()
        manifest = folder / "manifest.bin"
        manifest.write_bytes(encode(self.keys.chain))
        key_broker_keys = folder / "key-broker.key"
        key_broker_keys.touch(mode=0o600)
        key_broker_keys.write_text(self.keys.key_brokers["north"].to_text())
        self.seeds = {kind: folder / f"{kind}.nk" for kind in USERS}
        self.users = [User(*USERS[kind], create_user_key(seed)) for kind, seed in self.seeds.items()]  # type: ignore[arg-type]
        common = {"nats_url": nats_url, "consortium": self.keys.consortium.id.hex(), "manifest_file": str(manifest)}
        own: dict[Kind, dict[str, Any]] = {
            "gateway": {"max_connections": 64, "port": 0},
            "worker": {"name": "worker-1", "scratch_dir": str(folder), "guest": self.guest},
            "key-broker": {"key_broker": "north", "keys_file": str(key_broker_keys)},
        }
        self.values: dict[Kind, dict[str, Any]] = {}
        for kind, values in own.items():
            state = folder / f"{kind}.state"
            state.mkdir(mode=0o700)
            private = {"nats_seed_file": str(self.seeds[kind]), "state_dir": str(state)}
            self.values[kind] = {**common, **private, **values}
        self.config = server_config(self.users, folder, port=4222)

    @property
    def guest(self) -> str:
        return "simulated" if self.keys.consortium.manifest.simulation else "configfs"

    def server(
        self, alter: Callable[[dict[str, Any]], None] = lambda _: None, tls: ServerTls | None = None
    ) -> EmbeddedServer:
        """A real one with these users."""
        return AlteredServer(self.folder / "nats", self.users, alter, tls=tls)

    def given(self) -> Given:
        """The files, written."""
        given = Given()
        for kind, values in self.values.items():
            path = self.folder / f"{kind}.toml"
            path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
            given.settings.append((kind, path))
        config = self.folder / "nats.json"
        config.write_text(json.dumps(self.config))
        given.nats_configs.append(config)
        return given

    async def examined(self, *, live: bool = False, now_ms: Callable[[], int] = lambda: 0) -> list[Finding]:
        """What the doctor finds."""
        return [finding async for finding in examine(self.given(), clock_ms=now_ms, live=live)]

    async def wrong(self, *, live: bool = False, now_ms: Callable[[], int] = lambda: 0) -> list[Finding]:
        """What the doctor finds wrong."""
        return [finding for finding in await self.examined(live=live, now_ms=now_ms) if not finding.ok]
