"""The worker's program around its work."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from casemate_messaging.logs import ProgramLog
from casemate_schemas.errors import IntegrityError
from casemate_worker import __main__ as program
from support.consortium import consortium_for_tests


async def test_a_worker_that_can_hear_of_no_newer_manifest_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Follower:
        def __init__(self, *_: object) -> None: ...

        async def catch_up(self) -> bool:
            return False

        async def run(self) -> None:
            raise IntegrityError("broken")

    class Worker:
        def __init__(self, *_: object, **__: object) -> None:
            self.drained = asyncio.Event()
            self.announcer = SimpleNamespace(run=self.drained.wait)

        pull_wait_s = 5.0

        async def pull(self, wait_s: float) -> None:
            await asyncio.sleep(wait_s)

        async def close(self) -> None: ...

    closed: list[bool] = []

    async def close() -> None:
        closed.append(True)

    async def connect(*_: object, **__: object) -> Any:
        return SimpleNamespace(close=close)

    manifests = SimpleNamespace(current=consortium_for_tests().consortium)
    monkeypatch.setattr("casemate_messaging.manifests.TrustedManifests.open", lambda _: manifests)
    monkeypatch.setattr(program, "guest_driver", lambda *_: None)
    monkeypatch.setattr(program, "ManifestStore", lambda _: None)
    for name, made in {"connect": connect, "ManifestFollower": Follower, "Worker": Worker}.items():
        monkeypatch.setattr(program, name, made)
    settings = cast("Any", SimpleNamespace(nats_url="", nats_seed_file="", name="worker", nats_tls=lambda: None))
    with pytest.raises(IntegrityError, match="broken"):
        await asyncio.wait_for(program._serve([settings], ProgramLog("worker")), 10)
    assert closed
