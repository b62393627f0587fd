"""The work queue: at least one delivery of each job to one worker at a time, until one acknowledges."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from casemate_schemas import subjects
from casemate_schemas.errors import CasemateError, MalformedError
from casemate_schemas.subjects import ResourceClass
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from .connection import REQUEST_TIMEOUT_S, publish_once, translated

_MAX_JOB_ID_BYTES: Final = 65


@dataclass(frozen=True)
class Delivery:
    """One delivery of one job. ``count`` is 1 for the first; ``redeliver`` by doing nothing until the ack wait is over."""

    job_id: str
    count: int
    _message: Msg

    async def ack(self) -> None:
        """The job is done: removes it, and waits until the server has said so (double ack).

        Raises :class:`UnavailableError` if it did not say so, as after a crash in which it forgot the delivery; the job
        may then be delivered again.
        """
        with translated("acknowledging a job"):
            await self._message.ack_sync(timeout=REQUEST_TIMEOUT_S)

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
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            with contextlib.suppress(CasemateError):
                await self.in_progress()


class WorkQueue:
    """The work-queue stream of one resource class. The gateway publishes and removes, workers pull."""

    def __init__(self, client: Client, resource_class: ResourceClass = "cpu") -> None:
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        self._resource_class = resource_class
        self._stream = subjects.work_stream(resource_class)
        self._subscription: JetStreamContext.PullSubscription | None = None

    async def publish(self, job_id: str) -> bool:
        """Queues a job, durably; False if it is already queued or being worked on (or by this call, had NATS broken off).

        Raises :class:`StorageFullError` or :class:`UnavailableError`: then it is safe to try again.
        """
        subject = subjects.work(self._resource_class, job_id)
        with translated("queueing a job"):
            return await publish_once(self._js, subject, job_id.encode("ascii"))

    async def remove(self, job_id: str) -> None:
        """Takes a job out of the queue, whether or not a worker has it: for cancelled jobs and dead letters."""
        with translated("removing a job from the queue"):
            await self._js.purge_stream(self._stream, subject=subjects.work(self._resource_class, job_id))

    async def pull(self, timeout_s: float) -> Delivery | None:
        """The next job, or None if there is none for ``timeout_s`` seconds. One caller at a time.

        Raises :class:`UnavailableError` if NATS cannot be asked.
        """
        with translated("pulling a job"):
            if self._subscription is None:
                self._subscription = await self._js.pull_subscribe_bind(
                    consumer=subjects.WORKER_CONSUMER, stream=self._stream
                )
            try:
                (message,) = await self._subscription.fetch(1, timeout=timeout_s)
            except TimeoutError:
                return None
        return await self._delivery(message)

    async def close(self) -> None:
        """Stops pulling; what was not acknowledged is delivered to others after the ack wait."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with translated("leaving the queue"):
                await subscription.unsubscribe()

    async def _delivery(self, message: Msg) -> Delivery | None:
        """What the message says; one that names no job is removed, for no later delivery would be better."""
        try:
            job_id = subjects.token(message.data[:_MAX_JOB_ID_BYTES].decode("ascii"))
            with translated("reading a delivery"):
                return Delivery(job_id, message.metadata.num_delivered, message)
        except (MalformedError, UnicodeDecodeError):
            with translated("removing a malformed delivery"):
                await message.term()
            return None
