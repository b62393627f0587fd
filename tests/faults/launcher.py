"""Runs the real worker or key broker, and kills, stops or holds it where a test has laid an order for that.

``python -I launcher.py ORDERS PROGRAM MODULE --settings FILE``. Functions of the program are wrapped before its own
``main()`` runs; where a point of its road is reached, these files in the folder ORDERS decide:

    die@WHO@POINT    is taken away, and the program kills itself with SIGKILL.
    stop@WHO@POINT   is taken away, and the program stops itself with SIGSTOP until somebody sends SIGCONT.
    hold@WHO@POINT   the program waits there, otherwise alive, for as long as the file is there.
    skew@PROGRAM     holds by how many milliseconds the program's clock is wrong from its next start on.

WHO is a program's name or ``anyone``: the first to reach the point. What it did stands in ``died@PROGRAM``,
``stopped@PROGRAM`` (both empty) or ``held@PROGRAM`` (which names the point). A worker that died stays away until ``died@PROGRAM``
is removed, although its supervisor starts it again: the other worker has to end its job.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POLL_S = 0.02

ORDERS, PROGRAM = Path(sys.argv[1]), sys.argv[2]


def at(point: str) -> bool:
    """Obeys orders to die or stop here; whether to be held."""
    for who in (PROGRAM, "anyone"):
        if _taken(f"die@{who}@{point}"):
            (ORDERS / f"died@{PROGRAM}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if _taken(f"stop@{who}@{point}"):
            (ORDERS / f"stopped@{PROGRAM}").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
    held = any((ORDERS / f"hold@{who}@{point}").exists() for who in (PROGRAM, "anyone"))
    if held:
        (ORDERS / f"held@{PROGRAM}").write_text(point)
    else:
        (ORDERS / f"held@{PROGRAM}").unlink(missing_ok=True)
    return held


def _taken(order: str) -> bool:
    """Whether this process took the order away: of any number that try, one does."""
    try:
        (ORDERS / order).unlink()
    except FileNotFoundError:
        return False
    return True


async def reached(point: str) -> None:
    while at(point):  # noqa: ASYNC110 - the other side is another process
        await asyncio.sleep(POLL_S)


def reached_in_thread(point: str) -> None:
    while at(point):
        time.sleep(POLL_S)


def wrap(
    owner: type,
    name: str,
    *,
    before: str | None = None,
    after: str | None = None,
    when: Callable[..., bool] = lambda *_, **__: True,
) -> None:
    """Makes a coroutine function pass points ``before`` and ``after``, if ``when`` says so of its arguments."""
    original = getattr(owner, name)

    @functools.wraps(original)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        here = when(*args, **kwargs)
        if before is not None and here:
            await reached(before)
        result = await original(*args, **kwargs)
        if after is not None and here:
            await reached(after)
        return result

    setattr(owner, name, wrapped)


def wrap_worker() -> None:
    """The road of one attempt, in the order in which its points are passed."""
    from casemate_messaging.events import EventLog
    from casemate_messaging.queue import Delivery, WorkQueue
    from casemate_worker.executor import StepDone, TrainingProcess
    from casemate_worker.sealed_output import SealedOutput
    from casemate_worker.worker import Worker

    wrap(WorkQueue, "pull", before="pull")
    wrap(Worker, "_move", before="reserved", when=lambda _, attempt, state, **__: state == "running")
    train = TrainingProcess.train

    async def stepping(*args: Any) -> Any:
        async for report in train(*args):
            if report == StepDone(1):
                await reached("first-step")
            yield report

    TrainingProcess.train = stepping  # type: ignore[method-assign]
    wrap(Worker, "_revise", after="checkpointed", when=lambda _, attempt, **changes: "checkpoint" in changes)
    wrap(SealedOutput, "put", after="uploaded", when=lambda _, kind, *__, **___: kind == "result")
    wrap(Worker, "_ask", before="committing", after="receipt", when=lambda _, name, op, request: op == "commit")
    wrap(Worker, "_move", before="receipts", when=lambda _, attempt, state, **__: state == "sealed")
    wrap(EventLog, "publish", before="released", when=lambda _, event: event.state == "sealed")
    wrap(Delivery, "ack", before="told")


def wrap_key_broker() -> None:
    """Each operation: ``before-OP``, and ``after-OP`` when all is on the disk and the answer not yet sent."""
    from casemate_key_broker.service import KeyBroker

    def wrapped_op(op: str) -> Callable[[KeyBroker, bytes], bytes]:
        original: Callable[[KeyBroker, bytes], bytes] = getattr(KeyBroker, op)

        @functools.wraps(original)
        def wrapped(self: KeyBroker, payload: bytes) -> bytes:
            reached_in_thread(f"before-{op}")
            answer = original(self, payload)
            reached_in_thread(f"after-{op}")
            return answer

        return wrapped

    for op in ("precheck", "grant", "commit"):
        setattr(KeyBroker, op, wrapped_op(op))


def skew_clock() -> None:
    """Makes the program's time of day wrong, if there is an order; what it measures spans of time with is right."""
    try:
        ahead_ns = int((ORDERS / f"skew@{PROGRAM}").read_text()) * 1_000_000
    except FileNotFoundError:
        return
    true_time_ns = time.time_ns
    time.time_ns = lambda: true_time_ns() + ahead_ns  # type: ignore[assignment]


def main() -> None:
    module = sys.argv[3]
    skew_clock()
    sys.argv = [module, *sys.argv[4:]]
    if module == "casemate_worker":
        while (ORDERS / f"died@{PROGRAM}").exists():
            time.sleep(POLL_S)
        from casemate_worker.__main__ import main as run

        wrap_worker()
    else:
        from casemate_key_broker.__main__ import main as run

        wrap_key_broker()
    run()


if __name__ == "__main__":
    main()
