"""What a publisher makes of what comes back, be it from a NATS that lies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import nats.errors
import nats.js.errors
import pytest
from casemate_messaging.connection import translated
from casemate_messaging.publishing import Publisher
from casemate_messaging.queue import _count
from casemate_schemas.errors import ConflictError, MalformedError, StorageFullError, UnavailableError


class Client:
    """Keeps what is published, to be answered when the test wants it."""

    def __init__(self) -> None:
        self.published: list[tuple[str, bytes, str, dict[str, str] | None]] = []
        self.subscriptions: list[str] = []

    def new_inbox(self) -> str:
        return "_INBOX.x"

    async def subscribe(self, subject: str, cb: Callable[[Any], Awaitable[None]]) -> None:
        await asyncio.sleep(0)
        self.subscriptions.append(subject)
        self.heard = cb

    async def publish(self, subject: str, payload: bytes, *, reply: str, headers: dict[str, str] | None) -> None:
        self.published.append((subject, payload, reply, headers))

    async def answer(self, number: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        await self.heard(SimpleNamespace(subject=self.published[number][2], data=data, headers=headers))

    async def has(self, count: int) -> None:
        while len(self.published) < count:  # noqa: ASYNC110 - once the task has begun
            await asyncio.sleep(0)


async def answered(data: bytes, headers: dict[str, str] | None = None) -> int:
    client: Any = Client()
    publishing = asyncio.create_task(Publisher(client).publish("s", b"x"))
    await client.has(1)
    await client.answer(0, data, headers)
    with translated("storing"):
        return await publishing


async def test_each_publish_has_its_own_answer_whatever_their_order() -> None:
    client: Any = Client()
    publisher = Publisher(client)
    publishing = [asyncio.create_task(publisher.publish(f"s.{n}", b"x", {"N": str(n)})) for n in range(3)]
    await client.has(3)
    for number in (2, 0, 1):
        await client.answer(number, b'{"stream":"S","seq":%d}' % (number + 10))
    assert await asyncio.gather(*publishing) == [10, 11, 12]
    assert [(subject, headers) for subject, _, _, headers in client.published] == [
        (f"s.{n}", {"N": str(n)}) for n in range(3)
    ]
    assert client.subscriptions == ["_INBOX.x.*"]


async def test_an_answer_that_comes_twice_or_too_late_or_to_nobody_is_dropped() -> None:
    client: Any = Client()
    publisher = Publisher(client, timeout_s=0.01)
    with pytest.raises(nats.errors.TimeoutError):
        await publisher.publish("s", b"x")
    await client.answer(0, b'{"stream":"S","seq":1}')
    await client.heard(SimpleNamespace(subject="_INBOX.x.nobody", data=b'{"stream":"S","seq":2}', headers=None))
    again = asyncio.create_task(Publisher(client).publish("s", b"x"))
    await client.has(2)
    await client.answer(1, b'{"stream":"S","seq":3}')
    await client.answer(1, b'{"stream":"S","seq":4}')
    assert await again == 3


async def test_who_gives_up_leaves_nothing_behind() -> None:
    client: Any = Client()
    publisher = Publisher(client)
    publishing = asyncio.create_task(publisher.publish("s", b"x"))
    await client.has(1)
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing
    assert publisher._waiting == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff",
        b"[" * 4000,
        b'{"seq":7}' + b" " * 4096,
        b'{"seq":true}',
        b'{"seq":0}',
        b'{"seq":-1}',
        b'{"seq":18446744073709551616}',
        b'{"seq":1.0}',
        b'{"seq":"1"}',
        b'{"error":"no"}',
    ],
)
async def test_what_is_no_acknowledgement_stores_nothing(data: bytes) -> None:
    with pytest.raises(UnavailableError):
        await answered(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 3"},"seq":9}', ConflictError),
        (b'{"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"}}', StorageFullError),
        (b'{"error":{"code":500}}', UnavailableError),
        (b'{"error":{"code":[],"err_code":"10071","description":5}}', UnavailableError),
        (b'{"error":{},"seq":9}', UnavailableError),
    ],
)
async def test_a_refusal_is_told_by_its_numbers(data: bytes, expected: type[Exception]) -> None:
    with pytest.raises(expected):
        await answered(data)


async def test_nobody_there_is_said_at_once() -> None:
    client: Any = Client()
    publishing = asyncio.create_task(Publisher(client).publish("s", b"x"))
    await client.has(1)
    await client.answer(0, b"", {"Status": "503"})
    with pytest.raises(nats.js.errors.NoStreamResponseError):
        await publishing


@pytest.mark.parametrize(
    ("reply", "count"),
    [
        ("$JS.ACK.WORK_cpu.workers.3.10.11.1700000000.0", 3),
        ("$JS.ACK.hub.acc.WORK_cpu.workers.4.10.11.1700000000.0.tok", 4),
        ("$JS.ACK.hub.acc.WORK_cpu.workers.5.10.11.1700000000.0", 5),
    ],
)
def test_which_delivery_it_is(reply: str, count: int) -> None:
    assert _count(reply) == count


@pytest.mark.parametrize(
    "reply", ["", "x", "$JS.ACK.S.C", "$JS.ACK.S.C.-1.1.1.1.1", "$JS.ACK.S.C." + "9" * 5000 + ".1.1.1.1"]
)
def test_a_delivery_that_does_not_say_which_it_is_is_refused(reply: str) -> None:
    with pytest.raises(MalformedError):
        _count(reply)
