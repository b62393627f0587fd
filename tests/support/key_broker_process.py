"""The key broker program as a real process, to be started, asked and killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from casemate_schemas.codec import encode
from support.key_brokers import Bench


class KeyBrokerProcess:
    """``python -m casemate_key_broker`` for one of the bench's key brokers."""

    def __init__(
        self, bench: Bench, name: str, nats_url: str, seed_file: Path, *, chip_socket: Path | None = None
    ) -> None:
        """With ``chip_socket`` it is a hosted one, which makes its own keys: no manifest lists it before it has begun."""
        self.name = name
        self._bench = bench
        self.events: list[dict[str, object]] = []
        self.told: list[str] = []
        """What it logged since it was started last."""
        folder = bench.folder / f"{name}-process"
        folder.mkdir()
        self.state_dir = folder / "state"
        self.settings_file = folder / "settings.toml"
        keys_file, self._manifest_file = folder / "keys", folder / "manifest"
        self.offer_manifests()
        settings = {
            "key_broker": name,
            "nats_url": nats_url,
            "nats_seed_file": str(seed_file),
            "consortium": bench.consortium.id.hex(),
            "manifest_file": str(self._manifest_file),
            "manifest_poll_s": 0.05,
            "state_dir": str(self.state_dir),
        }
        if chip_socket is None:
            keys_file.touch(mode=0o600)
            keys_file.write_text(bench.key_brokers[name].to_text())
            settings["keys_file"] = str(keys_file)
        else:
            settings |= {"guest": "simulated", "simulated_chip_socket": str(chip_socket)}
        self.settings_file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    def offer_manifests(self) -> None:
        """The bench's chain as it is now, in the program's manifest file."""
        draft = self._manifest_file.with_suffix(".new")
        draft.write_bytes(encode(self._bench.chain))
        draft.replace(self._manifest_file)

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    async def start(self, **environment: str) -> None:
        """Returns once it serves, or has ended."""
        self.events, self.told = [], []
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "casemate_key_broker",
            "--settings",
            str(self.settings_file),
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **environment},
        )
        ready = asyncio.Event()
        self._reader = asyncio.create_task(self._read(ready))
        await ready.wait()

    async def kill(self) -> None:
        """kill -9."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """SIGTERM; its exit status."""
        return await self._end(signal.SIGTERM)

    async def wait(self) -> int:
        """Its exit status, once it ends."""
        status = await self.process.wait()
        if self._reader is not None:
            await self._reader
        return status

    async def _end(self, number: signal.Signals) -> int:
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.wait()

    async def _read(self, ready: asyncio.Event) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            if line.startswith(b"{"):
                self.events.append(json.loads(line))
            else:
                self.told.append(line.decode())
            if self.events and self.events[-1]["event"] == "ready":
                ready.set()
        ready.set()
