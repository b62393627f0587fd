"""Reading stored messages in batches by JetStream's direct get (NATS ADR-31).

Unlike a consumer this leaves nothing on the server, survives its restart, bounds what is in flight by the batch, and
needs permission for one request subject only. nats-py 2.16 has no call for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from casemate_schemas.errors import NotFoundError, UnavailableError
from nats.aio.client import Client
from nats.aio.msg import Msg

from .connection import REQUEST_TIMEOUT_S, repeated, translated

_END_OF_BATCH: Final = "204"
_NOT_FOUND: Final = "404"
_BEHIND_S: Final = 0.1
REPLICA_LAG_S: Final = 3.0
"""Longer than a replica that answers is behind, as far as was seen: a server that comes back after a crash."""


@dataclass(frozen=True)
class Stored:
    """One stored message and its place in the stream."""

    sequence: int
    data: bytes = field(repr=False)
    subject: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def stored_ms(self) -> int:
        """When NATS stored it, Unix ms. Raises :class:`UnavailableError` if the server does not say."""
        try:
            return int(datetime.fromisoformat(self.headers["Nats-Time-Stamp"]).timestamp() * 1000)
        except (KeyError, ValueError) as error:
            raise UnavailableError("NATS does not say when it stored a message") from error


async def read_last(client: Client, stream: str, subject: str, *, patience_s: float = 0.0) -> Stored:
    """The newest message of ``subject``, as any replica has it. Raises :class:`NotFoundError`, :class:`UnavailableError`.

    What must have been stored is looked for again for ``patience_s`` seconds, more and more rarely: the replica may be behind.
    """
    until, where = asyncio.get_running_loop().time() + patience_s, f"$JS.API.DIRECT.GET.{stream}.{subject}"
    wait_s = _BEHIND_S
    while True:
        with translated(f"reading from {stream}"):
            reply = await repeated(lambda: client.request(where, timeout=REQUEST_TIMEOUT_S))
        status = _status(reply)
        if status != _NOT_FOUND or asyncio.get_running_loop().time() >= until:
            break
        await asyncio.sleep(wait_s)
        wait_s *= 2
    if status is not None:
        raise _refusal(status, stream)
    return _stored(reply, stream)


async def read_batch(client: Client, stream: str, subject: str, *, start: int, limit: int) -> list[Stored]:
    """Up to ``limit`` messages of ``subject``, in order, from sequence ``start`` on; empty if there are none.

    Raises :class:`UnavailableError` if the server does not answer or a message went missing on the way.
    """
    request = json.dumps({"seq": max(1, start), "next_by_subj": subject, "batch": limit}).encode()
    with translated(f"reading from {stream}"):
        return await repeated(lambda: _read_batch(client, stream, request, limit))


async def read_all(client: Client, stream: str, subject: str, *, batch: int, start: int = 1) -> AsyncIterator[Stored]:
    """Every message of ``subject`` from sequence ``start`` on, the oldest first, ``batch`` of them in memory.

    Raises as :func:`read_batch`.
    """
    while found := await read_batch(client, stream, subject, start=start, limit=batch):
        for stored in found:
            yield stored
        start = found[-1].sequence + 1


async def _read_batch(client: Client, stream: str, request: bytes, limit: int) -> list[Stored]:
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    try:
        await client.publish(f"$JS.API.DIRECT.GET.{stream}", request, reply=inbox)
        found: list[Stored] = []
        while True:
            message = await subscription.next_msg(timeout=REQUEST_TIMEOUT_S)
            status = _status(message)
            if status in (_END_OF_BATCH, _NOT_FOUND):
                return found
            if status is not None:
                raise _refusal(status, stream)
            if len(found) == limit:
                raise UnavailableError(f"{stream} sent more than the {limit} messages asked for")
            found.append(_stored(message, stream))
    finally:
        await subscription.unsubscribe()


def _status(message: Msg) -> str | None:
    return None if message.data else (message.headers or {}).get("Status")


def _refusal(status: str, stream: str) -> NotFoundError | UnavailableError:
    if status == _NOT_FOUND:
        return NotFoundError(f"nothing of that name in {stream}")
    return UnavailableError(f"{stream} answered with status {status[:3]}; try again")


def _stored(message: Msg, stream: str) -> Stored:
    headers = message.headers or {}
    try:
        return Stored(int(headers["Nats-Sequence"]), message.data, headers.get("Nats-Subject", ""), headers)
    except (KeyError, ValueError) as error:
        raise UnavailableError(f"{stream} sent a message without a sequence; try again") from error
