"""The program itself, as a process: ready, killed, restarted, stopped; and how much memory an upload takes."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from casemate_messaging.jobs import JobStore
from casemate_messaging.queue import WorkQueue
from casemate_schemas.api import ENVELOPES_PATH, JOBS_PATH
from support.gateway import House
from support.gateway_process import program, settings_file
from support.http import signed_request
from support.waiting import record_once

MIB = 1 << 20


async def test_it_is_ready_and_ends_cleanly(a_house: House, tmp_path: Path) -> None:
    async with program(settings_file(tmp_path, a_house)) as gateway:
        a_house.origin = gateway.ready["address"]
        clara = a_house.caller("clara")
        await a_house.submitted(clara)
        job_id = (await clara.get(JOBS_PATH)).json["jobs"][0]["job_id"]
        events = f"{a_house.origin}{JOBS_PATH}/{job_id}/events"
        request = signed_request(clara.person.signing, clara.person.delegation, "GET", events)
        async with a_house.session.get(events, headers=request.headers) as response:
            assert (await response.content.readuntil(b"\n\n")).startswith(b"id: ")
            gateway.process.send_signal(signal.SIGTERM)
            assert await response.read() == b""
        assert await asyncio.wait_for(gateway.process.wait(), 10) == 0


async def test_killed_while_it_asks_and_started_again(a_house: House, tmp_path: Path) -> None:
    settings = settings_file(tmp_path, a_house)
    asked, never = asyncio.Event(), asyncio.Event()

    async def silent(_: object) -> Any:
        asked.set()
        await never.wait()
        return "yes", None

    north = await a_house.key_broker("north", silent)
    async with program(settings) as gateway:
        a_house.origin = gateway.ready["address"]
        _, reply = await a_house.submitted(a_house.caller("clara"))
        await asked.wait()
        os.kill(gateway.process.pid, signal.SIGKILL)
        assert await gateway.process.wait() == -signal.SIGKILL
    never.set()
    await a_house.key_broker("clara")
    async with program(settings) as gateway:
        a_house.origin = gateway.ready["address"]
        queue = WorkQueue(await a_house.client("worker-1"))
        delivery = await queue.pull(20)
        assert delivery is not None
        assert delivery.job_id == reply.json["job_id"]
        jobs = JobStore(await a_house.client("gateway"))
        await record_once(jobs, delivery.job_id, lambda record: record.state == "queued")
    assert len(north.asked) == 2


async def test_an_upload_takes_bounded_memory(a_house: House, tmp_path: Path) -> None:
    size = 160 * MIB
    async with program(settings_file(tmp_path, a_house)) as gateway:
        a_house.origin = gateway.ready["address"]
        clara = a_house.caller("clara")
        small = await clara.post(ENVELOPES_PATH, a_house.envelope(clara, "dataset", bytes(MIB)))
        assert small.status == 201
        before = gateway.memory_bytes("VmHWM")
        envelope = a_house.envelope(clara, "dataset", secrets.token_bytes(MIB) * (size // MIB))
        assert (await clara.post(ENVELOPES_PATH, envelope)).status == 201
        grown = gateway.memory_bytes("VmHWM") - before
        assert grown < size // 3, f"grew by {grown / MIB:.0f} MiB"


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"consortium": "00" * 32}, 2, "another consortium"),
        ({"nats_url": "nats://127.0.0.1:1", "nats_connect_s": 0.5}, 1, "no NATS server answers"),
    ],
)
async def test_it_says_why_it_cannot_run(
    a_house: House, tmp_path: Path, changes: dict[str, Any], status: int, says: str
) -> None:
    settings = settings_file(tmp_path, a_house, **changes)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "casemate_gateway", "--settings", str(settings), stderr=asyncio.subprocess.PIPE
    )
    _, told = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == status
    assert says in told.decode()
    assert "Traceback" not in told.decode()


async def test_a_seed_that_others_can_read(a_house: House, tmp_path: Path) -> None:
    seed = tmp_path / "open.nk"
    seed.write_bytes(a_house.stack.seeds["gateway"].read_bytes())
    seed.chmod(0o644)
    settings = settings_file(tmp_path, a_house, nats_seed_file=str(seed))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "casemate_gateway", "--settings", str(settings), stderr=asyncio.subprocess.PIPE
    )
    _, told = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, "chmod 600" in told.decode()) == (2, True)
