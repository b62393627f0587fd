"""The key broker's operations as its program serves them: off the event loop, anchored, each answer logged."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from casemate_messaging.logs import ProgramLog
from casemate_messaging.rpc import Handler
from casemate_schemas.errors import (
    AuthenticationError,
    CasemateError,
    IntegrityError,
    ManifestError,
    UnavailableError,
)

from . import hosted
from .anchoring import Anchoring
from .service import KeyBroker

Operation = Callable[[bytes], bytes]

_ASKED_BY_PEOPLE: Final = frozenset({"precheck", "message"})
"""A person knows the newest manifest, for a new member's delegation, before the key broker has looked for it."""

_MOVING: Final = frozenset({"precheck", "message", "grant", "commit"})
"""Operations that move the state."""

_DECIDING: Final = _MOVING - {"message"}
"""Of these, those that a state that was set back never answers. By messages its owners look at it, and endorse it."""

_JUDGES: Final = 4
"""Threads for prechecks; accounting may keep a core busy for seconds."""


class Handlers:
    """The operations off the event loop, each answer logged by its reason code; a broken state stops the program."""

    def __init__(
        self,
        broker: Callable[[], KeyBroker],
        catch_up: Callable[[], Awaitable[bool]],
        log: ProgramLog,
        stop: asyncio.Event,
        *,
        attester: hosted.Attester | None = None,
        anchoring: Anchoring | None = None,
        max_concurrency: int = 16,
    ) -> None:
        """``broker`` gives the key broker as it is now; ``catch_up`` takes a newer manifest up, if there is one.

        ``attester`` answers for a hosted one. ``anchoring`` keeps the ledger's head where others see it. Prechecks, which
        anyone can make take seconds, are given at most half of ``max_concurrency`` places, and threads of their own.
        """
        operations: dict[str, Callable[[], Operation]] = {
            "precheck": lambda: broker().precheck,
            "message": lambda: broker().message,
            "nonce": lambda: broker().nonce,
            "grant": lambda: broker().grant,
            "commit": lambda: broker().commit,
        }
        if attester is not None:
            operations["evidence"] = lambda: attester.evidence
        self.by_op: dict[str, Handler] = {op: self._handler(op, operation) for op, operation in operations.items()}
        self._judging = ThreadPoolExecutor(_JUDGES, thread_name_prefix="precheck")
        self._judged = 0
        self._max_judged = max(1, max_concurrency // 2)
        self._anchoring = anchoring
        self._catch_up = catch_up
        self._log = log
        self._stop = stop
        self._failure: IntegrityError | None = None

    def close(self) -> None:
        """Prechecks that no thread has begun are not begun any more."""
        self._judging.shutdown(wait=False, cancel_futures=True)

    def raise_for_failure(self) -> None:
        """Raises the :class:`IntegrityError` that stopped the program, if one did."""
        if self._failure is not None:
            raise self._failure

    def _handler(self, op: str, operation: Callable[[], Operation]) -> Handler:
        async def handle(payload: bytes) -> bytes:
            start = time.monotonic()
            try:
                if self._failure is not None:
                    raise UnavailableError("stopping")
                with self._place(op):
                    answer = await self._anchored(op, operation, payload)
            except IntegrityError as error:
                self._failure = error
                self._stop.set()
                raise
            except CasemateError as error:
                self._log.warning("refused", op=op, reason=error.reason, duration_ms=_since(start))
                raise
            self._log.info("answered", op=op, duration_ms=_since(start))
            return answer

        return handle

    async def _anchored(self, op: str, operation: Callable[[], Operation], payload: bytes) -> bytes:
        """The answer, once the newest head was met before it and the head after it was left."""
        if self._anchoring is None or op not in _MOVING:
            return await self._answered(op, operation, payload)
        await self._anchoring.meet()
        try:
            answer = await self._answered(op, operation, payload)
        except IntegrityError:
            raise  # of a broken state there is nothing to leave
        except CasemateError:
            await self._anchoring.leave(decided=False)
            raise
        await self._anchoring.leave(decided=op in _DECIDING)
        return answer

    async def _answered(self, op: str, operation: Callable[[], Operation], payload: bytes) -> bytes:
        """The answer. Whoever is refused for what a newer manifest may say otherwise is judged by that one, if there is one."""
        try:
            return await self._off_the_loop(op, operation(), payload)
        except (AuthenticationError, ManifestError, UnavailableError):
            if op not in _ASKED_BY_PEOPLE or not await self._catch_up():
                raise
        return await self._off_the_loop(op, operation(), payload)

    async def _off_the_loop(self, op: str, operation: Operation, payload: bytes) -> bytes:
        """The answer, from a thread: whatever there is to judge, no other operation waits for it."""
        if op != "precheck":
            return await asyncio.to_thread(operation, payload)
        return await asyncio.get_running_loop().run_in_executor(self._judging, operation, payload)

    @contextlib.contextmanager
    def _place(self, op: str) -> Iterator[None]:
        """One of the places for such operations. Raises :class:`UnavailableError` if all are taken."""
        if op != "precheck":
            yield
            return
        if self._judged >= self._max_judged:
            raise UnavailableError("judging other jobs: ask again")
        self._judged += 1
        try:
            yield
        finally:
            self._judged -= 1


def _since(start: float) -> float:
    return round((time.monotonic() - start) * 1000, 1)
