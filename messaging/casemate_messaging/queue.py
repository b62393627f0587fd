"""The work queue: at least one delivery of each job to one worker at a time, until one acknowledges."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

from casemate_schemas import subjects
from casemate_schemas.codec import Name, WireModel, decode, encode
from casemate_schemas.errors import CasemateError, MalformedError, UnavailableError
from casemate_schemas.job_state import JobRecord
from casemate_schemas.subjects import ResourceClass
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from pydantic import Field

from .connection import REQUEST_TIMEOUT_S, publish_once, translated
from .publishing import Publisher
from .tasks import end

_MAX_ITEM_BYTES: Final = 128 << 10
_ROOM_BYTES: Final = 256
"""What a message of the queue holds beside a record."""
_SHORT_REPLY: Final = 9
_MAX_DIGITS: Final = 18
_ANSWER_S: Final = 2.0
_NOTHING: Final = frozenset({"404", "408"})
"""There is nothing, or there was nothing until the wish expired."""


class WorkItem(WireModel):
    """A message of the queue: which job, and its record as whoever queued it wrote it, to be claimed without a reading."""

    KIND: ClassVar[str] = "work-item"

    version: Literal[1] = 1
    job_id: Name
    revision: Annotated[int, Field(ge=1)] | None = None
    record: Annotated[bytes, Field(max_length=_MAX_ITEM_BYTES)] | None = None
    """A :class:`JobRecord`, encoded."""


@dataclass(frozen=True)
class Backlog:
    """How many messages no worker has been given yet, and how many workers wait for one."""

    undelivered: int
    waiting_workers: int


@dataclass(frozen=True)
class Delivery:
    """One delivery of one job. ``count`` is 1 for the first; ``redeliver`` by doing nothing until the ack wait is over.

    ``known`` is the job's record and revision when it was queued, if whoever did knew: a guess to begin with.
    """

    job_id: str
    count: int
    _message: Msg
    known: tuple[JobRecord, int] | None = None

    async def ack(self) -> None:
        """The job is done: removes it. Nothing waits for the server's word on that, for nothing hangs on it.

        What has been done is in the job's record, on the disk before this. An acknowledgement that is lost on its way, or
        forgotten in a crash, costs one more delivery: whoever gets that reads that the job has ended, and acknowledges again.

        Raises :class:`UnavailableError` if there is no connection any more to send it on.
        """
        with translated("acknowledging a job"):
            await self._message.ack()

    async def nak(self, delay_s: float) -> None:
        """Not now: deliver again after ``delay_s`` seconds."""
        with translated("handing back a job"):
            await self._message.nak(delay=delay_s)

    async def term(self) -> None:
        """Never again: removes the job, whose record says why."""
        with translated("ending a job"):
            await self._message.term()

    async def in_progress(self) -> None:
        """Still at work: starts the ack wait anew."""
        with translated("keeping a job"):
            await self._message.in_progress()

    @contextlib.asynccontextmanager
    async def kept(self, every_s: float) -> AsyncIterator[None]:
        """Says :meth:`in_progress` every ``every_s`` seconds while the block runs (a third of the ack wait is good)."""
        task = asyncio.create_task(self._keep(every_s))
        try:
            yield
        finally:
            await end([task])

    async def _keep(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            with contextlib.suppress(CasemateError):
                await self.in_progress()


class WorkQueue:
    """The work-queue stream of one resource class. The gateway publishes and removes, workers pull."""

    def __init__(self, client: Client, resource_class: ResourceClass = "cpu") -> None:
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        self._publisher = Publisher(client)
        self._resource_class = resource_class
        self._stream = subjects.work_stream(resource_class)
        self._client = client
        self._inbox: Subscription | None = None
        self._arrived = asyncio.Queue[Msg](1)

    async def publish(self, job_id: str, known: tuple[JobRecord, int] | None = None) -> bool:
        """Queues a job; False if it is already queued or being worked on (or by this call, had NATS broken off).

        The queue follows from the records. On a single server it is not synced: what a power cut takes from it, a gateway
        puts back. ``known`` is the record, and its revision, that the job was queued with.

        Raises :class:`StorageFullError` or :class:`UnavailableError`: then it is safe to try again.
        """
        subject = subjects.work(self._resource_class, job_id)
        with translated("queueing a job"):
            return await publish_once(self._publisher, subject, _item(job_id, known))

    async def backlog(self) -> Backlog:
        """How full the queue is. For the gateway: workers have no permission. Raises :class:`UnavailableError`."""
        with translated("looking at the work queue"):
            info = await self._js.consumer_info(self._stream, subjects.WORKER_CONSUMER)
        return Backlog(info.num_pending or 0, info.num_waiting or 0)

    async def remove(self, job_id: str) -> None:
        """Takes a job out of the queue, whether or not a worker has it: for cancelled jobs and dead letters."""
        with translated("removing a job from the queue"):
            await self._js.purge_stream(self._stream, subject=subjects.work(self._resource_class, job_id))

    async def pull(self, timeout_s: float) -> Delivery | None:
        """The next job, or None if there is none for ``timeout_s`` seconds (0: if there is none now). One caller at a time.

        The server says when it has nothing, and is given time to say so: a client that stopped listening at the same moment
        could be sent a job that nobody works on until its ack wait is over.

        Raises :class:`UnavailableError` if NATS cannot be asked.
        """
        wish = b'{"batch":1,"expires":%d}' % int(timeout_s * 1e9) if timeout_s else b'{"batch":1,"no_wait":true}'
        with translated("pulling a job"):
            inbox = self._inbox or await self._listen()
            try:
                await self._client.publish(subjects.next_delivery(self._resource_class), wish, reply=inbox.subject)
                async with asyncio.timeout(timeout_s + _ANSWER_S):
                    message = await self._arrived.get()
            except (TimeoutError, asyncio.CancelledError) as error:
                with contextlib.suppress(CasemateError):
                    await self.close()  # an answer that comes later is not taken for the next wish's: it finds nobody
                if isinstance(error, asyncio.CancelledError):
                    raise
                raise UnavailableError("the work queue does not answer") from error
        if message.headers is not None and (status := message.headers.get("Status")) is not None:
            if status in _NOTHING:
                return None
            raise UnavailableError(f"the work queue answered {status}")
        return await self._delivery(message)

    async def close(self) -> None:
        """Stops pulling; what was not acknowledged is delivered to others after the ack wait, what nobody looked at at once."""
        inbox, self._inbox = self._inbox, None
        if inbox is not None:
            with translated("leaving the queue"):
                await inbox.unsubscribe()
                while not self._arrived.empty():
                    if (message := self._arrived.get_nowait()).reply:  # a status has none
                        await message.nak()

    async def _listen(self) -> Subscription:
        """An inbox of its own: what is delivered comes under the job's subject and not under that of the wish."""
        self._arrived = asyncio.Queue(1)  # whatever else a server sends stays within the subscription's bounds
        self._inbox = await self._client.subscribe(self._client.new_inbox(), cb=self._arrived.put)
        return self._inbox

    async def _delivery(self, message: Msg) -> Delivery | None:
        """What the message says; one that names no job is removed, for no later delivery would be better."""
        try:
            item = decode(WorkItem, message.data, max_bytes=_MAX_ITEM_BYTES)
            return Delivery(item.job_id, _count(message.reply), message, _known(item))
        except MalformedError:
            with translated("removing a malformed delivery"):
                await message.term()
            return None


def _item(job_id: str, known: tuple[JobRecord, int] | None) -> bytes:
    """A record that is large is left to be read."""
    if known is not None and len(record := encode(known[0])) <= _MAX_ITEM_BYTES - _ROOM_BYTES:
        return encode(WorkItem(job_id=job_id, revision=known[1], record=record))
    return encode(WorkItem(job_id=job_id))


def _known(item: WorkItem) -> tuple[JobRecord, int] | None:
    """A record that cannot be read, or is another job's, is no guess: the one that is stored will be read."""
    if item.record is None or item.revision is None:
        return None
    with contextlib.suppress(MalformedError):
        record = decode(JobRecord, item.record, max_bytes=_MAX_ITEM_BYTES)
        return (record, item.revision) if record.job_id == item.job_id else None
    return None


def _count(reply: str) -> int:
    """Which delivery it is, as the subject of its acknowledgement says (NATS ADR-15: 9 tokens, or 11 and more).

    Raises :class:`MalformedError`.
    """
    tokens = reply.split(".", 12)
    count = tokens[4] if len(tokens) == _SHORT_REPLY else tokens[6] if len(tokens) > _SHORT_REPLY else ""
    if not (count.isascii() and count.isdecimal() and len(count) <= _MAX_DIGITS):
        raise MalformedError("a delivery does not say which one it is")
    return int(count)
