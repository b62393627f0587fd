"""Request and reply between programs, with errors of our own tree on both sides.

A reply is one status byte and then, for 0, the answer; for 1, an :class:`RpcError`. Only a reason code crosses: the text
of an error stays in the program that raised it, unless the handler says by :class:`PublicError` that it may go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, ClassVar, Final

from casemate_schemas.codec import WireModel, decode, encode
from casemate_schemas.errors import (
    CasemateError,
    MalformedError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
    error_from_reason,
)
from casemate_schemas.job_state import ReasonCode
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from pydantic import Field

from .connection import settle, translated
from .tasks import end

logger = logging.getLogger(__name__)

MAX_RPC_BYTES: Final = (1 << 20) - 1024
"""Bound on a request and on an answer, in bytes: below the server's bound on one message, with room for framing."""

MAX_MESSAGE_CHARS: Final = 500
CLOSE_GRACE_S: Final = 5.0

Handler = Callable[[bytes], Awaitable[bytes]]

_OK: Final = b"\x00"
_ERROR: Final = b"\x01"
_MAX_ERROR_BYTES: Final = 4096


class RpcError(WireModel):
    """Why there is no answer."""

    KIND: ClassVar[str] = "rpc-error"

    reason: ReasonCode
    message: Annotated[str, Field(max_length=MAX_MESSAGE_CHARS)]


class PublicError(Exception):
    """Raised by a handler to send ``error``'s text along with its reason: it says nothing the caller does not know."""

    def __init__(self, error: CasemateError) -> None:
        super().__init__(str(error))
        self.error = error


async def call(client: Client, subject: str, payload: bytes, timeout_s: float) -> bytes:
    """The answer to one request.

    Raises :class:`TooLargeError` for a request over :data:`MAX_RPC_BYTES`, :class:`UnavailableError` if nobody serves
    ``subject`` or no answer comes in time (the other side may have acted all the same), :class:`MalformedError` for a
    reply that is none, and the other side's error, by its reason.
    """
    if len(payload) > MAX_RPC_BYTES:
        raise TooLargeError(f"a request holds at most {MAX_RPC_BYTES} bytes, this one {len(payload)}")
    with translated(f"calling {subject}"):
        reply = await client.request(subject, payload, timeout=timeout_s)
    status, body = reply.data[:1], reply.data[1:]
    if status == _OK:
        return body
    if status != _ERROR:
        raise MalformedError(f"{subject} sent a reply without a status")
    problem = decode(RpcError, body, max_bytes=_MAX_ERROR_BYTES)
    text = "".join(c if c.isprintable() else " " for c in problem.message)
    raise error_from_reason(problem.reason, f"{subject} refused: {text or problem.reason}")


class RpcServer:
    """Serves operations of one subject prefix; made by :func:`serve`."""

    def __init__(self, client: Client, handlers: Mapping[str, Handler], max_concurrency: int) -> None:
        self._client = client
        self._handlers = dict(handlers)
        self._max_concurrency = max_concurrency
        self._running: set[asyncio.Task[None]] = set()
        self._subscription: Subscription | None = None

    async def start(self, subject_prefix: str) -> None:
        """Begins to listen. Raises :class:`UnavailableError`."""
        with translated(f"serving {subject_prefix}"):
            self._subscription = await self._client.subscribe(f"{subject_prefix}.*", cb=self._accept)
            await settle(self._client)

    async def close(self) -> None:
        """Stops listening, gives handlers under way :data:`CLOSE_GRACE_S` to answer, then cancels them."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(CasemateError), translated("stopping to serve"):
                await subscription.unsubscribe()
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=CLOSE_GRACE_S)
            await end(late)

    async def __aenter__(self) -> RpcServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _accept(self, message: Msg) -> None:
        """Runs a handler beside the others; more than there is room for are told to come back."""
        if len(self._running) >= self._max_concurrency:
            await self._reply(message, _failure(UnavailableError.reason, ""))
            return
        task = asyncio.create_task(self._handle(message))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _handle(self, message: Msg) -> None:
        op = message.subject.rpartition(".")[2]
        try:
            frame = _OK + await self._answer(op, message.data)
        except PublicError as error:
            frame = _failure(error.error.reason, str(error.error))
        except CasemateError as error:
            logger.info("rpc_refused op=%s reason=%s", op if op in self._handlers else "unknown", error.reason)
            frame = _failure(error.reason, "")
        except Exception as error:
            # Text and trace of what nobody foresaw may hold anything: only the type is told, and only here.
            logger.error("rpc_failed op=%s error=%s", op, type(error).__name__)
            frame = _failure(CasemateError.reason, "")
        await self._reply(message, frame)

    async def _answer(self, op: str, payload: bytes) -> bytes:
        handler = self._handlers.get(op)
        if handler is None:
            raise NotFoundError("no such operation")
        if len(payload) > MAX_RPC_BYTES:
            raise TooLargeError(f"a request holds at most {MAX_RPC_BYTES} bytes, this one {len(payload)}")
        answer = await handler(payload)
        if len(answer) > MAX_RPC_BYTES:
            raise CasemateError("the answer is too large to send")
        return answer

    async def _reply(self, message: Msg, frame: bytes) -> None:
        if message.reply:
            with contextlib.suppress(CasemateError), translated("replying"):
                await self._client.publish(message.reply, frame)


async def serve(
    client: Client, subject_prefix: str, handlers: Mapping[str, Handler], *, max_concurrency: int = 16
) -> RpcServer:
    """Answers requests to ``<subject_prefix>.<op>`` with ``handlers[op]``, at most ``max_concurrency`` at a time.

    An unknown op is :class:`NotFoundError` to the caller; over the bound it is :class:`UnavailableError`; an error
    outside our tree is ``internal`` and nothing more. Raises :class:`UnavailableError` if NATS cannot be told.
    """
    server = RpcServer(client, handlers, max_concurrency)
    await server.start(subject_prefix)
    return server


def _failure(reason: str, message: str) -> bytes:
    return _ERROR + encode(RpcError(reason=reason, message=message[:MAX_MESSAGE_CHARS]))
