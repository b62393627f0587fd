"""Publishing to streams, many messages at a time, each acknowledged: what every write of a job goes through.

nats-py's own ``JetStreamContext.publish`` takes twice the time: a random token, an ``asyncio.wait_for`` and a data class filled
by reflection for each message. This one counts its tokens and reads the one number that is needed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final

import nats.errors
import nats.js.errors
from casemate_schemas.errors import UnavailableError
from nats.aio.client import Client
from nats.aio.msg import Msg

from .connection import REQUEST_TIMEOUT_S

_MAX_ANSWER_BYTES: Final = 4096
_NO_RESPONDERS: Final = "503"


class Publisher:
    """One connection's publishes to streams. Answers come back to one inbox, told apart by the last token of its subject."""

    def __init__(self, client: Client, *, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._inbox = ""
        self._count = 0
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
        self._listening = asyncio.Lock()

    async def publish(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> int:
        """Returns the message's sequence in its stream, once the stream has acknowledged it: at least 1.

        Raises errors of NATS, after ``timeout_s`` seconds without an answer too, and :class:`UnavailableError` for an answer
        that is none. The message may have been stored all the same.
        """
        if not self._inbox:
            await self._listen()
        self._count += 1
        token, loop = str(self._count), asyncio.get_running_loop()
        answer: asyncio.Future[Msg] = loop.create_future()
        self._waiting[token] = answer
        timer = loop.call_later(self._timeout_s, _give_up, answer)
        try:
            headers = None if headers is None else dict(headers)
            await self._client.publish(subject, payload, reply=self._inbox + token, headers=headers)
            return _sequence(await answer)
        finally:
            timer.cancel()
            del self._waiting[token]

    async def _listen(self) -> None:
        """Once for all publishes: a subscription is in force for what is published after it on the same connection."""
        async with self._listening:
            if not self._inbox:
                inbox = self._client.new_inbox() + "."
                await self._client.subscribe(inbox + "*", cb=self._answered)
                self._inbox = inbox

    async def _answered(self, message: Msg) -> None:
        """An answer that nobody waits for any more is dropped."""
        answer = self._waiting.get(message.subject.rpartition(".")[2])
        if answer is not None and not answer.done():
            answer.set_result(message)


def _give_up(answer: asyncio.Future[Msg]) -> None:
    if not answer.done():
        answer.set_exception(nats.errors.TimeoutError())


def _sequence(message: Msg) -> int:
    """What the stream's answer says. Raises errors of NATS, :class:`UnavailableError`."""
    if not message.data and (message.headers or {}).get("Status") == _NO_RESPONDERS:
        raise nats.js.errors.NoStreamResponseError
    answer = _object(message.data)
    if isinstance(problem := answer.get("error"), dict):
        raise _refusal(problem)
    sequence = answer.get("seq")
    if type(sequence) is not int or not 1 <= sequence < 1 << 64:
        raise UnavailableError("a stream did not say that it has stored a message; try again")
    return sequence


def _object(data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data) if len(data) <= _MAX_ANSWER_BYTES else None
    except (ValueError, RecursionError) as error:
        raise UnavailableError("a stream answered with something that is no JSON; try again") from error
    if not isinstance(answer, dict):
        raise UnavailableError("a stream answered with something else than an acknowledgement; try again")
    return answer


def _refusal(problem: dict[str, Any]) -> nats.js.errors.APIError:
    """The error that JetStream describes, by its numbers; of a description that is none, nothing is kept."""
    code, err_code, text = problem.get("code"), problem.get("err_code"), problem.get("description")
    return nats.js.errors.APIError(
        code=code if type(code) is int else None,
        err_code=err_code if type(err_code) is int else None,
        description=text if isinstance(text, str) else None,
    )
