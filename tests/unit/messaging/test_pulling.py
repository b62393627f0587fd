"""What a worker that stops asking for a job leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from casemate_messaging.queue import WorkItem, WorkQueue
from casemate_schemas.codec import encode

REPLY = "$JS.ACK.WORK_cpu.workers.1.10.11.1700000000.0"


class Message(SimpleNamespace):
    """A delivery of the job ``job_id``."""

    def __init__(self, job_id: str) -> None:
        super().__init__(data=encode(WorkItem(job_id=job_id)), headers=None, reply=REPLY, handed_back=0)

    async def nak(self) -> None:
        self.handed_back += 1


class Client:
    """One server: keeps wishes and under which inbox they were made; answers to inboxes that are left find nobody."""

    def __init__(self) -> None:
        self.wishes: list[str] = []
        self.inboxes: dict[str, Callable[[Any], Awaitable[None]]] = {}

    def jetstream(self, **_: object) -> None:
        return None

    def new_inbox(self) -> str:
        return f"_INBOX.{len(self.wishes)}"

    async def subscribe(self, subject: str, cb: Callable[[Any], Awaitable[None]]) -> SimpleNamespace:
        self.inboxes[subject] = cb

        async def unsubscribe() -> None:
            del self.inboxes[subject]

        return SimpleNamespace(subject=subject, unsubscribe=unsubscribe)

    async def publish(self, subject: str, payload: bytes, *, reply: str) -> None:
        self.wishes.append(reply)

    async def answer(self, number: int, message: Message) -> None:
        if (heard := self.inboxes.get(self.wishes[number])) is not None:
            await heard(message)


async def wished(queue: WorkQueue, client: Client, count: int) -> asyncio.Task[Any]:
    pulling = asyncio.create_task(queue.pull(30))
    while len(client.wishes) < count:  # noqa: ASYNC110 - once the task has begun
        await asyncio.sleep(0)
    return pulling


async def test_a_job_that_comes_as_the_wish_is_given_up_is_handed_back_at_once() -> None:
    client: Any = Client()
    queue, job = WorkQueue(client), Message("a")
    pulling = await wished(queue, client, 1)
    await client.answer(0, job)
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    assert job.handed_back == 1 and client.inboxes == {}


async def test_what_nobody_asked_for_is_not_hoarded() -> None:
    """A server that lies is held up in its subscription, whose backlog the client bounds."""
    client: Any = Client()
    queue = WorkQueue(client)
    pulling = await wished(queue, client, 1)
    await client.answer(0, Message("a"))
    await pulling
    await client.answer(0, Message("b"))
    third = asyncio.create_task(client.answer(0, Message("c")))
    await asyncio.sleep(0)
    assert not third.done()
    third.cancel()
    await queue.close()
