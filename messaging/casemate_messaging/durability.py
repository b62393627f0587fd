"""Whether every NATS server that keeps our streams syncs to its disk before it acknowledges, in its own words.

The servers tell it to the system account alone. The configuration that :mod:`~casemate_messaging.accounts` writes hands one
of its services on to the gateway's account: ``$SYS.REQ.SERVER.PING.JSZ``, which each server of a cluster answers for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Final

import nats.errors
from casemate_schemas.errors import SetupError
from casemate_schemas.subjects import SERVER_STATUS
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from pydantic import BaseModel, Field, ValidationError

from .connection import MIN_SERVER_VERSION, REQUEST_TIMEOUT_S, translated

MAX_ANSWERS: Final = 64
_MORE_S: Final = 1.0
"""How long to wait for another server after the last that answered, if it is not known how many there are."""

_HOW_TO_TELL: Final = (
    "the configuration that 'casemate consortium init' writes hands $SYS.REQ.SERVER.PING.JSZ on to the gateway's account "
    "(docs/operating.md)"
)


@dataclass(frozen=True)
class ServerStatus:
    """One server of those that answered."""

    name: str
    version: str
    syncs_always: bool
    """It syncs before it acknowledges."""
    at_ms: int
    """Its clock when it answered, Unix ms."""
    heard_ms: int
    """Ours when the answer came, or 0."""
    stored_bytes: int
    max_bytes: int
    """How much it may store, all streams together."""
    cluster_size: int
    """How many servers with JetStream there are as far as it knows; 1 alone."""

    @property
    def is_recent(self) -> bool:
        """Whether it is at least :data:`~casemate_messaging.connection.MIN_SERVER_VERSION`."""
        major, minor, *_ = (*self.version.split("."), "0")
        return (major.isdecimal() and minor.isdecimal()) and (int(major), int(minor)) >= MIN_SERVER_VERSION


async def servers_with_streams(client: Client, clock_ms: Callable[[], int] = lambda: 0) -> list[ServerStatus]:
    """What each server with JetStream says of itself; empty if this user or its account may not ask.

    A server that is away is not among them. Raises :class:`~casemate_schemas.errors.UnavailableError`.
    """
    with translated("asking NATS about its servers"):
        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox, max_msgs=MAX_ANSWERS)
        try:
            await client.publish(SERVER_STATUS, b"", reply=inbox)
            return await _answers(subscription, clock_ms)
        finally:
            await subscription.unsubscribe()


async def check_durability(client: Client) -> None:
    """Raises :class:`SetupError` unless every server that answers syncs before it acknowledges, and at least one does.

    Also raises :class:`~casemate_schemas.errors.UnavailableError`.
    """
    if (problem := durability_problem(await servers_with_streams(client))) is not None:
        raise SetupError(f"{problem}; --allow-unsafe-durability goes on all the same")


def durability_problem(servers: Sequence[ServerStatus]) -> str | None:
    """What is wrong, and what mends it; None if nothing is."""
    if not servers:
        return f"NATS does not tell this user whether it syncs before it acknowledges: {_HOW_TO_TELL}"
    for server in servers:
        if not server.syncs_always:
            return (
                f"NATS server {server.name} acknowledges what a power cut could still lose: "
                'set sync_interval: "always" in the section jetstream of its configuration, and restart it'
            )
    return None


class _Server(BaseModel):
    name: Annotated[str, Field(max_length=256)]
    ver: Annotated[str, Field(max_length=64)]
    time: datetime


class _Config(BaseModel):
    max_storage: int = 0
    sync_always: bool = False


class _MetaCluster(BaseModel):
    cluster_size: Annotated[int, Field(ge=1)] = 1


class _JetStream(BaseModel):
    disabled: bool = False
    storage: int = 0
    config: _Config = _Config()
    meta_cluster: _MetaCluster = _MetaCluster()


class _Answer(BaseModel):
    """The parts of NATS' ``ServerAPIJszResponse`` that are looked at."""

    server: _Server
    data: _JetStream


async def _answers(subscription: Subscription, clock_ms: Callable[[], int]) -> list[ServerStatus]:
    """Until all servers that any of them knows of have answered, or no other one does."""
    found: dict[str, ServerStatus] = {}
    wait_s = REQUEST_TIMEOUT_S
    while len(found) < max((server.cluster_size for server in found.values()), default=1):
        try:
            message = await subscription.next_msg(wait_s)
        except (nats.errors.TimeoutError, TimeoutError):
            break
        if (status := _status(message, clock_ms())) is not None:
            found[status.name] = status
        elif message.headers:
            break  # nobody to ask: the account has no such service
        wait_s = _MORE_S
    return list(found.values())


def _status(message: Msg, heard_ms: int) -> ServerStatus | None:
    """What a server says; None if it keeps no streams, or if this is no answer."""
    try:
        answer = _Answer.model_validate_json(message.data)
    except ValidationError:
        return None
    if answer.data.disabled:
        return None
    return ServerStatus(
        name=answer.server.name,
        version=answer.server.ver,
        syncs_always=answer.data.config.sync_always,
        at_ms=int(answer.server.time.timestamp() * 1000),
        heard_ms=heard_ms,
        stored_bytes=answer.data.storage,
        max_bytes=answer.data.config.max_storage,
        cluster_size=answer.data.meta_cluster.cluster_size,
    )
