"""Which workers there are, as they say themselves, and which of them are to take no more jobs.

One message a worker and subject in the stream WORKERS, the newest alone. A worker announces itself every few seconds and
looks then whether it was told to drain. An order is for one run of the program: started again it takes jobs again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, ClassVar, Final, Literal

from casemate_schemas import subjects
from casemate_schemas.codec import Name, UnixMs, WireModel, decode, encode
from casemate_schemas.errors import MalformedError, NotFoundError
from nats.aio.client import Client
from pydantic import Field

from .connection import REQUEST_TIMEOUT_S, repeated, translated
from .direct import Stored, read_all, read_last

MAX_PRESENCE_BYTES: Final = 1024
_BATCH: Final = 256

WorkerState = Literal["waiting", "working", "draining"]
Instance = Annotated[bytes, Field(min_length=16, max_length=16)]
"""Drawn at random by each run of a worker."""


class Presence(WireModel):
    """What a worker says of itself: its word alone, and no reason to trust it with anything."""

    KIND: ClassVar[str] = "worker-presence"

    version: Literal[1] = 1
    worker: Name
    instance: Instance
    state: WorkerState
    since: UnixMs
    """When this run began."""
    manifest_number: Annotated[int, Field(ge=1, le=1 << 32)]


class DrainOrder(WireModel):
    """That one run of a worker is to end the job under way and take no other."""

    KIND: ClassVar[str] = "drain-order"

    version: Literal[1] = 1
    worker: Name
    instance: Instance


class PresenceStore:
    """The stream over one connection. Workers announce themselves and read their own orders, gateways do the rest."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)

    async def announce(self, presence: Presence) -> None:
        """Replaces what the worker said before. Raises :class:`UnavailableError`."""
        with translated("announcing a worker"):
            await self._js.publish(subjects.worker_presence(presence.worker), encode(presence))

    async def is_to_drain(self, worker: str, instance: bytes) -> bool:
        """Whether this run of the worker was told to drain. Raises :class:`UnavailableError`, :class:`MalformedError`."""
        try:
            stored = await read_last(self._client, subjects.WORKER_STREAM, subjects.worker_drain(worker))
        except NotFoundError:
            return False
        order = decode(DrainOrder, stored.data, max_bytes=MAX_PRESENCE_BYTES)
        return order.worker == worker and order.instance == instance

    async def find(self, worker: str) -> tuple[Presence, int]:
        """(what a worker said last, when NATS heard it). Raises :class:`NotFoundError`, :class:`UnavailableError`."""
        found = [entry async for entry in self._read(subjects.worker_presence(worker))]
        if not found:
            raise NotFoundError("no worker of that name announced itself")
        return found[-1]

    async def all(self) -> list[tuple[Presence, int]]:
        """Every worker of the last day, and when NATS heard it (Unix ms). Raises :class:`UnavailableError`."""
        return [entry async for entry in self._read(subjects.EVERY_WORKER_PRESENCE)]

    async def drain(self, presence: Presence) -> None:
        """Tells that run of a worker to drain. Raises :class:`UnavailableError`."""
        order = DrainOrder(worker=presence.worker, instance=presence.instance)
        with translated("draining a worker"):
            await repeated(lambda: self._js.publish(subjects.worker_drain(presence.worker), encode(order)))

    async def _read(self, subject: str) -> AsyncIterator[tuple[Presence, int]]:
        async for stored in read_all(self._client, subjects.WORKER_STREAM, subject, batch=_BATCH):
            if (presence := _presence(stored)) is not None:
                yield presence, stored.stored_ms


def _presence(stored: Stored) -> Presence | None:
    """None for what no worker of ours would say, or of another worker."""
    try:
        presence = decode(Presence, stored.data, max_bytes=MAX_PRESENCE_BYTES)
    except MalformedError:
        return None
    return presence if stored.subject == subjects.worker_presence(presence.worker) else None
