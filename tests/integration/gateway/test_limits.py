"""A gateway under members, strangers and watchers who ask for more than their share."""

from __future__ import annotations

import asyncio
import re
import socket

import pytest
from casemate_messaging.events import EventLog
from casemate_schemas.api import JOBS_PATH
from casemate_schemas.job_state import event_of
from support.gateway import House
from support.http import signed_request
from support.sealed_jobs import sealed_job


async def test_a_member_who_asks_too_often_waits_and_the_others_do_not(a_house: House) -> None:
    async with a_house.gateway_running(request_burst_per_member=3, requests_per_s_per_member=0.01):
        clara, north = a_house.caller("clara"), a_house.caller("north")
        assert [(await clara.get(JOBS_PATH)).status for _ in range(3)] == [200] * 3
        refused = await clara.get(JOBS_PATH)
        assert (refused.status, refused.json["reason"]) == (429, "throttled")
        assert 90 <= int(refused.headers["Retry-After"]) <= 100
        assert (await north.get(JOBS_PATH)).status == 200


async def test_a_head_that_never_ends_is_hung_up_on(a_house: House) -> None:
    async with a_house.gateway_running(idle_connection_s=0.2):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(a_house.origin.rpartition(":")[2]))
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n")
        dripping = asyncio.create_task(drip(writer))
        assert await reader.read() == b""
        dripping.cancel()
        writer.close()


async def drip(writer: asyncio.StreamWriter) -> None:
    """A header line that grows, so that the connection is never quiet."""
    writer.write(b"X-Slow: ")
    while True:
        writer.write(b"a")
        await asyncio.sleep(0.02)


async def test_connections_above_the_bound_are_closed_and_room_comes_back(a_house: House) -> None:
    async with a_house.gateway_running(max_connections=2):
        port = int(a_house.origin.rpartition(":")[2])
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for reader, writer in held:
            assert await answer(reader, writer) == b"HTTP/1.1 200 OK\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""
        writer.close()
        held[0][1].close()
        await held[0][1].wait_closed()
        while (line := await once(port)) == b"":
            pass
        assert line == b"HTTP/1.1 200 OK\r\n"
        held[1][1].close()


async def once(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await answer(reader, writer)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    return await reader.readline()


async def test_metrics_count_requests_and_jobs_and_name_nobody(a_house: House) -> None:
    async with a_house.gateway_running(metrics_port=0) as gateway:
        clara = a_house.caller("clara")
        await a_house.key_broker("clara")
        await a_house.key_broker("north")
        submission, _ = await a_house.submitted(clara)
        assert (await clara.get("/v1/jobs/" + "0" * 32)).status == 404
        await gateway.admission.reconcile()
        async with a_house.session.get(f"{gateway.metrics.address}/metrics") as response:
            assert response.status == 200
            text = await response.text()
        async with a_house.session.get(f"{a_house.origin}/metrics") as response:
            assert response.status == 404
    assert sample(text, 'casemate_gateway_requests_total{method="POST",route="/v1/jobs",status="202"}') == 1
    assert sample(text, 'casemate_gateway_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"}') == 1
    assert sample(text, "casemate_gateway_watchers") == 0
    assert sum(sample(text, f'casemate_jobs{{state="{state}"}}') for state in ("awaiting_approval", "queued")) == 1
    for secret in ("clara", "north", submission.routing.digest.hex(), "0" * 32):
        assert secret not in text


def sample(text: str, name: str) -> float:
    (found,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found)


@pytest.mark.parametrize("what", ["result", "events"])
async def test_who_does_not_read_is_hung_up_on_and_gives_its_place_back(a_house: House, what: str) -> None:
    async with a_house.gateway_running(body_idle_s=0.3) as gateway:
        clara = a_house.caller("clara")
        path, _, _ = await sealed_job(a_house, clara, size=1 << 20)
        log, places = EventLog(gateway.client), gateway.downloads if what == "result" else gateway.event_streams
        if what == "events":
            event = event_of((await gateway.jobs.get(path.rpartition("/")[2]))[0]).model_copy(
                update={"state": "running"}
            )
            await asyncio.gather(*(log.publish(event) for _ in range(1000)))
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            deaf.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # the kernel then keeps little for it
            deaf.connect(("127.0.0.1", int(a_house.origin.rpartition(":")[2])))
            signed = signed_request(
                clara.person.signing, clara.person.delegation, "GET", f"{a_house.origin}{path}/{what}"
            )
            head = [f"GET {path}/{what} HTTP/1.1", "Host: x", *(f"{n}: {v}" for n, v in signed.headers.items())]
            deaf.sendall("\r\n".join([*head, "", ""]).encode())
            async with asyncio.timeout(20):
                while not places.held():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                while places.held():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
