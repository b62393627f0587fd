"""Workers that announce themselves are listed, and one that is to drain hears of it, in its present run only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from casemate_gateway.routes import workers
from casemate_messaging.connection import settle
from casemate_messaging.logs import ProgramLog
from casemate_messaging.presence import Presence, PresenceStore
from casemate_schemas import subjects
from casemate_schemas.api import WORKERS_PATH
from casemate_schemas.codec import encode
from casemate_worker.presence import Announcer
from casemate_worker.settings import Settings
from nats.aio.client import Client
from support.gateway import Caller, House, now_ms
from support.nats import WORKERS


def _announcer(house: House, client: Client, name: str, folder: Path) -> Announcer:
    settings = Settings(
        name=name,
        nats_url=house.stack.url,
        nats_seed_file=house.stack.seeds[name],
        consortium=house.keys.consortium.id.hex(),
        manifest_file=house.settings.manifest_file,
        scratch_dir=folder,
        presence_s=0.05,
    )
    return Announcer(
        settings,
        client,
        is_working=lambda: True,
        manifest_number=lambda: 7,
        clock=lambda: 1234,
        log=ProgramLog("worker"),
    )


PRESENCE = Presence(worker="worker-1", instance=bytes(16), state="waiting", since=1, manifest_number=1)


async def _listed(caller: Caller) -> dict[str, Any]:
    reply = await caller.get(WORKERS_PATH)
    assert reply.status == 200
    return {worker["worker"]: worker for worker in reply.json["workers"]}


async def _until(caller: Caller, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    while not holds(found := await _listed(caller)):
        pass
    return found


async def test_a_worker_is_listed_and_drained(running_house: House, tmp_path: Path) -> None:
    admin = running_house.caller("north", roles=("admin",))
    assert await _listed(admin) == {}
    assert (await admin.post(f"{WORKERS_PATH}/worker-1/drain")).status == 404
    clients = [await running_house.client(name) for name in WORKERS]
    first, other = (_announcer(running_house, *pair, tmp_path) for pair in zip(clients, WORKERS, strict=True))
    running = [asyncio.create_task(announcer.run()) for announcer in (first, other)]
    try:
        async with asyncio.timeout(20):
            found = await _until(running_house.caller("clara"), lambda found: found.keys() == set(WORKERS))
        assert found["worker-1"]["state"] == "working" and found["worker-1"]["since"] == 1234
        assert found["worker-1"]["manifest_number"] == 7
        assert abs(found["worker-1"]["heard"] - now_ms()) < 60_000

        refused = await running_house.caller("north", roles=("scientist", "steward")).post(
            f"{WORKERS_PATH}/worker-1/drain"
        )
        assert refused.status == 403 and not first.drained.is_set()
        drained = await admin.post(f"{WORKERS_PATH}/worker-1/drain")
        assert (drained.status, drained.json["worker"]) == (202, "worker-1")
        async with asyncio.timeout(20):
            await first.drained.wait()
            await _until(admin, lambda found: found["worker-1"]["state"] == "draining")
        assert not other.drained.is_set()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    again = _announcer(running_house, clients[0], "worker-1", tmp_path)  # the next run takes jobs
    task = asyncio.create_task(again.run())
    async with asyncio.timeout(20):
        begun = await _until(admin, lambda found: found["worker-1"]["state"] == "working")
        await _until(
            admin, lambda found: found["worker-1"]["heard"] > begun["worker-1"]["heard"]
        )  # it has looked since
    assert not again.drained.is_set()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_who_has_been_silent_is_said_to_be(running_house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SILENT_MS", -60_000)
    store = PresenceStore(await running_house.client("worker-1"))
    await store.announce(PRESENCE)
    assert (await _listed(running_house.caller("clara")))["worker-1"]["state"] == "silent"


async def test_nobody_announces_or_orders_another(running_house: House) -> None:
    worker = await running_house.client("worker-2")
    subjects_of_others = (
        subjects.worker_presence("worker-1"),
        subjects.worker_drain("worker-1"),
        subjects.worker_drain("worker-2"),
    )
    for subject in subjects_of_others:
        await worker.publish(subject, encode(PRESENCE))
    await settle(worker)
    refused = [str(error).lower() for error in running_house.stack.errors["worker-2"]]
    assert len(refused) == 3 and all("permissions violation" in error for error in refused)
    admin = running_house.caller("north", roles=("admin",))
    for name in ("worker-1", "no-one", "a.b", "UPPER"):
        assert (await admin.post(f"{WORKERS_PATH}/{name}/drain")).status == 404
    assert await _listed(admin) == {}


async def test_what_a_worker_says_of_another_is_left_out(running_house: House) -> None:
    js = (await running_house.client("worker-1")).jetstream()
    liar = Presence(worker="worker-2", instance=bytes(16), state="waiting", since=1, manifest_number=1)
    for said in (encode(liar), b"nonsense"):
        await js.publish(subjects.worker_presence("worker-1"), said)
        assert await _listed(running_house.caller("clara")) == {}
