"""Every fault there is, mixed over many jobs, by a schedule that follows from a seed: ``make chaos SEED=1 JOBS=100``.

The same seed gives the same jobs by id, in the same rounds, and has the same faults happen to the same programs or jobs so
many seconds after the round's submits; all of it is drawn beforehand and printed, with a digest to compare runs by. What
the programs make of it (who claims which job, who is the first to get to a point, which message the proxy meets) is their
own. Jobs come in rounds, each on a dataset of its own. After each round all is healed, whoever got no answer submits again,
and every job has to end; then :meth:`support.invariants.Invariants.check_invariants` must hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from casemate.local_stack.layout import Layout
from casemate_schemas.errors import CasemateError
from support.byzantine import ByzantineProxy
from support.faults import Bench, Orders, running_bench, through
from support.invariants import Run
from support.stack import MEMBERS, WORKERS, found_in
from support.waiting import POLL_S

JOBS_PER_ROUND: Final = 4
FAULTS_PER_ROUND: Final = 2
FIRST_S: Final = 2.0
"""Faults begin within so many seconds of a round's submits."""

SPAN_S: Final = 4.0
"""How long what has an end lasts."""

SUBMIT_S: Final = 15.0
PATIENCE_S: Final = 240.0
DEADLINE_S: Final = 3600.0
DOOMED_S: Final = 45.0
"""Deadline of jobs under a NATS that lies: it ends those that were garbled as they were stored."""

_BROKERS: Final = tuple(f"key-broker-{name}" for name in MEMBERS)
TARGETS: Final[dict[str, tuple[str, ...]]] = {
    "worker dies": ("pull", "reserved", "checkpointed", "uploaded", "receipt", "receipts", "released", "told"),
    "worker sleeps": ("reserved", "uploaded", "committing", "receipts"),
    "worker's clock": ("-7200000", "7200000"),
    "key broker dies": tuple(f"{when}-{op}" for when in ("before", "after") for op in ("precheck", "grant", "commit")),
    "key broker sleeps": _BROKERS,
    "killed": ("gateway", "nats", "nats", *_BROKERS),
    "connections cut": ("all",),
    "byzantine": ("all",),
    "full disk": ("nats",),
    "cancelled": ("0", "1"),
    "submitted twice": ("0", "1"),
    "ciphertext lost": ("0", "1"),
    "submission lost": ("0", "1"),
}
"""What can happen, and to whom: a program, a point of the launcher's, or the number of a job."""

_ORDERED: Final = frozenset({"worker dies", "worker sleeps", "key broker dies"})
"""Happens to the first that reaches the point, whenever that is."""


@dataclass(frozen=True)
class Fault:
    kind: str
    target: str
    after_s: float


@dataclass(frozen=True)
class Round:
    jobs: tuple[str, ...]
    faults: tuple[Fault, ...]

    def suffers(self, *kinds: str) -> bool:
        return any(fault.kind in kinds for fault in self.faults)


def schedule(seed: str, jobs: int) -> list[Round]:
    """Rounds of ``jobs`` jobs in all. Kinds are dealt as cards are: none comes again before each has come once."""
    draw, deck, rounds = random.Random(seed), list[str](), list[Round]()
    each = min(JOBS_PER_ROUND, max(2, jobs // 3))
    for first in range(0, jobs, each):
        faults = []
        for _ in range(FAULTS_PER_ROUND):
            if not deck:
                deck = draw.sample(sorted(TARGETS), len(TARGETS))
            kind = deck.pop()
            faults.append(Fault(kind, draw.choice(TARGETS[kind]), round(draw.uniform(0, FIRST_S), 2)))
        ids = tuple(f"{draw.getrandbits(128):032x}" for _ in range(min(each, jobs - first)))
        rounds.append(Round(ids, tuple(faults)))
    return rounds


def digest(rounds: list[Round]) -> str:
    """What two runs of the same schedule have in common, whoever ran them."""
    return hashlib.sha256(json.dumps([asdict(planned) for planned in rounds]).encode()).hexdigest()


class Chaos:
    """One stack and what is done to it."""

    def __init__(self, bench: Bench, proxy: ByzantineProxy) -> None:
        self._bench = bench
        self._proxy = proxy
        self._dataset = ""
        self._ids: tuple[str, ...] = ()

    async def round(self, planned: Round) -> Counter[str]:
        """One round; how many of its jobs ended in which state.

        1. Jobs are submitted while the faults happen.
        2. All is healed, and whoever was not told that the gateway has the job submits it again.
        3. All end; what must hold holds.
        4. Nothing but what was called off, destroyed or garbled ends without a result.
        """
        self._dataset = await self._bench.new_dataset()
        self._ids = planned.jobs
        hostile = planned.suffers("byzantine")
        doomed = hostile or planned.suffers("ciphertext lost", "submission lost")
        deadline_s = DOOMED_S if hostile else DEADLINE_S
        submits = [asyncio.create_task(self._submitted(job_id, deadline_s)) for job_id in self._ids]  # 1
        await asyncio.gather(*(self._happen(fault) for fault in planned.faults))
        runs = await asyncio.gather(*submits)
        await self._healed(planned)  # 2
        runs = [run or await self._submitted(job_id, deadline_s) for run, job_id in zip(runs, self._ids, strict=True)]
        acknowledged = [run for run in runs if run is not None]
        if len(acknowledged) < len(planned.jobs) and not hostile:
            raise AssertionError("a submit is refused although nothing is wrong any more")
        await self._bench.settled(acknowledged, PATIENCE_S)  # 3
        found = await self._bench.check_invariants(acknowledged, hostile=hostile)
        if not doomed and found["sealed"] + found["cancelled"] < len(planned.jobs):  # 4
            raise AssertionError(f"jobs ended without a result: {dict(found)}")
        return found

    async def _submitted(self, job_id: str, deadline_s: float) -> Run | None:
        with contextlib.suppress(CasemateError, TimeoutError):
            async with asyncio.timeout(SUBMIT_S):
                return await self._bench.submit(dataset=self._dataset, job_id=job_id, deadline_s=deadline_s)
        return None

    async def _happen(self, fault: Fault) -> None:
        bench, target = self._bench, fault.target
        if fault.kind not in _ORDERED:
            await asyncio.sleep(fault.after_s)
        match fault.kind:
            case "worker dies" | "key broker dies":
                bench.orders.die(target)
            case "worker sleeps":
                bench.orders.stop(target)
            case "worker's clock":
                bench.orders.skew(WORKERS[0], int(target))
                await bench.kill(WORKERS[0])
            case "key broker sleeps":
                with bench.paused(target):
                    await asyncio.sleep(SPAN_S)
            case "killed":
                await bench.kill(target)
            case "connections cut":
                self._proxy.cut()
            case "byzantine":
                self._proxy.is_hostile = True
                await asyncio.sleep(2 * SPAN_S)
                self._proxy.is_hostile = False
            case "full disk":
                with contextlib.suppress(CasemateError):
                    async with bench.full_disk():
                        await asyncio.sleep(SPAN_S)
            case _:
                await self._meddle(fault.kind, self._ids[int(target)])

    async def _meddle(self, kind: str, job_id: str) -> None:
        """What is done to one job, if it is there by then."""
        with contextlib.suppress(CasemateError, TimeoutError):
            match kind:
                case "cancelled":
                    await (await self._bench.scientist.job(job_id)).cancel()
                case "submitted twice":
                    async with asyncio.timeout(SUBMIT_S):
                        while self._bench.scientist._session.state.job(job_id) is None:  # noqa: ASYNC110 - a file
                            await asyncio.sleep(POLL_S)
                    await self._submitted(job_id, DEADLINE_S)
                case "submission lost":
                    record, _ = await self._bench.records.get(job_id)
                    await self._bench.lose_blob(record.submission)
                case "ciphertext lost":
                    record, _ = await self._bench.records.get(job_id)
                    await self._bench.lose_ciphertext(record.job_envelope)

    async def _healed(self, planned: Round) -> None:
        """No order stands, nobody sleeps, every message is what was sent. A clock is right again once its program restarts."""
        self._bench.orders.forget()
        for name in WORKERS:
            with contextlib.suppress(CasemateError, ProcessLookupError):
                self._bench.go_on(name)
        if planned.suffers("byzantine"):
            self._proxy.cut()
        if planned.suffers("worker's clock"):
            await self._bench.kill(WORKERS[0])


def say(line: str) -> None:
    """One line of the log, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def run(seed: str, rounds: list[Round], layout: Layout, folder: Path) -> Counter[str]:
    """All rounds on one stack; how the jobs ended."""
    total = Counter[str]()
    async with AsyncExitStack() as exits:
        orders = Orders(folder / "orders")
        stack, proxy = await exits.enter_async_context(through(seed, layout, orders))
        bench = await exits.enter_async_context(running_bench(stack, orders))
        chaos = Chaos(bench, proxy)
        for number, planned in enumerate(rounds, start=1):
            say(json.dumps({"round": number, **asdict(planned)}))
            began = time.monotonic()
            found = await chaos.round(planned)
            await bench.cleared()
            total += found
            say(json.dumps({"round": number, "ended": dict(found), "seconds": round(time.monotonic() - began, 1)}))
        say(json.dumps({"jobs": total.total(), "ended": dict(total), "messages": dict(proxy.deeds)}))
    return total


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--jobs", type=int, default=100)
    options = parser.parse_args()
    rounds, began = schedule(options.seed, options.jobs), time.monotonic()
    say(json.dumps({"seed": options.seed, "jobs": options.jobs, "schedule": digest(rounds)}))
    with tempfile.TemporaryDirectory() as folder:
        layout = found_in(Path(folder) / "stack")
        asyncio.run(run(options.seed, rounds, layout, Path(folder)))
    say(json.dumps({"held": digest(rounds), "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
