"""The embedded server as a process: it keeps what it acknowledged, and never outlives its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from casemate_messaging.blobs import BlobStore
from casemate_messaging.events import EventLog
from casemate_messaging.jobs import JobStore
from casemate_messaging.queue import WorkQueue
from casemate_messaging.server import EmbeddedServer
from casemate_schemas.errors import SetupError
from casemate_schemas.job_state import JobRecord, advance, event_of
from support.nats import NatsStack

JOB = "a" * 32
DONE = "b" * 32


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_killed_and_restarted_it_has_all_it_acknowledged(impatient: NatsStack, blob) -> None:
    """kill -9, the same port, the same store; and connections made before come back by themselves.

    What was in the work queue may be gone, as it is not synced: it is put there again from the record, once and not twice.
    If the server remembers a delivery that it no longer has, the message in its place comes after the ack wait.
    """
    gateway, worker = await impatient.connect("gateway"), await impatient.connect("worker-1")
    data, digest = blob(2 << 20)

    async def pieces():
        yield data

    await BlobStore(gateway).put(digest, len(data), pieces())
    record = JobRecord(
        job_id=JOB, routing=b"r", job_envelope=digest, submission=digest, approvals={}, created=1, updated=1
    )
    await JobStore(gateway).create(record)
    record = await JobStore(gateway).change(JOB, lambda r: advance(r, "queued", now_ms=2))
    sequence = await EventLog(gateway).publish(event_of(record))
    queue = WorkQueue(worker)
    await WorkQueue(gateway).publish(DONE)
    done = await queue.pull(10)
    assert done is not None
    await done.ack()
    await WorkQueue(gateway).publish(JOB)
    url = impatient.url

    os.kill(impatient.server.pid, signal.SIGKILL)
    assert await impatient.server.wait() == -signal.SIGKILL
    assert await impatient.server.start() == url

    assert (await JobStore(worker).get(JOB))[0] == record
    assert b"".join([chunk async for chunk in BlobStore(worker).get(digest)]) == data
    assert [(s, e.state) async for s, e in EventLog(gateway).replay(JOB)] == [(sequence, "queued")]
    await WorkQueue(gateway).publish(JOB)
    while (delivery := await queue.pull(10)) is None or delivery.job_id == DONE:
        pass
    assert delivery.job_id == JOB
    await delivery.ack()
    assert await queue.pull(0) is None
    await JobStore(worker).change(JOB, lambda r: advance(r, "claimed", now_ms=3))


async def test_a_delivery_is_not_lost_with_the_server(impatient: NatsStack) -> None:
    """Pulled before the kill and never acknowledged: delivered again after the restart, over the old connection.

    Published again as a gateway that reconciles does: the queue's file may not have been written yet.
    """
    gateway, queue = await impatient.connect("gateway"), WorkQueue(await impatient.connect("worker-1"))
    await WorkQueue(gateway).publish(JOB)
    assert await queue.pull(10) is not None
    os.kill(impatient.server.pid, signal.SIGKILL)
    await impatient.server.wait()
    await impatient.server.start()
    await WorkQueue(gateway).publish(JOB)
    async with asyncio.timeout(20):
        while (again := await queue.pull(0.5)) is None:
            pass
        assert again.job_id == JOB
        await again.ack()
        while (await gateway.jetstream().stream_info("WORK_cpu")).state.messages:  # noqa: ASYNC110 - the server's
            await asyncio.sleep(0.02)


async def test_a_second_start_is_refused_and_a_second_stop_is_not(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, [])
    await server.start()
    pid = server.pid
    with pytest.raises(SetupError):
        await server.start()
    await server.stop()
    await server.stop()
    assert not alive(pid)
    with pytest.raises(SetupError):
        _ = server.pid


async def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "a", []) as first:
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(SetupError, match="nats-server ended"):
            await EmbeddedServer(tmp_path / "b", [], port=port).start()


async def test_its_files_are_for_the_owner_alone(nats_stack: NatsStack) -> None:
    """And no seed is in any of them, nor on the command line, nor in the environment."""
    folder = nats_stack.seeds["gateway"].parent
    for path in (folder / "nats", folder / "nats" / "store", folder / "nats" / "nats-server.conf"):
        assert path.stat().st_mode & 0o077 == 0, path
    proc = Path(f"/proc/{nats_stack.server.pid}")
    visible = [proc / "cmdline", proc / "environ", *(p for p in (folder / "nats").rglob("*") if p.is_file())]
    for seed in nats_stack.seeds.values():
        secret = seed.read_bytes()
        assert [path for path in visible if secret in path.read_bytes()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
async def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import asyncio, pathlib, sys
        from casemate_messaging.server import EmbeddedServer

        async def main():
            server = EmbeddedServer(pathlib.Path(sys.argv[1]), [])
            await server.start()
            print(server.pid, flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
        """
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(tmp_path), stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    child = os.pidfd_open(pid)
    try:
        assert alive(pid)
        parent.kill()
        await parent.wait()
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(child, ended.set)
        await asyncio.wait_for(ended.wait(), 20)
    finally:
        asyncio.get_running_loop().remove_reader(child)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child, signal.SIGKILL)
        os.close(child)
