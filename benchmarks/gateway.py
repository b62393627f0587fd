"""One gateway process while many look at their jobs: status, event streams and a long queue, all at once.

A gateway and a nats-server that syncs every message to the disk, each a process of its own. In the store lie 10,000 queued
jobs of four members, no worker takes any. 1,000 people's programs watch a job's events each; 1,000 others ask for a job's
status and come back when ``Retry-After`` says so. Once all watch, half of the watched jobs are cancelled one
after the other, so that streams have something to tell. Every request is signed, and the gateway checks it.

``status_p99_ms``: from sending ``GET /v1/jobs/{id}`` to its whole answer, over all those of the pollers, the first of each
included. The load comes from this process, which signs and awaits beside the gateway on the same machine: its own delays
count as the gateway's. ``gateway_rss_mib``: the most memory that the gateway held.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp
from _bench import Metric, arguments, machine, report
from casemate_messaging.jobs import JobStore
from casemate_schemas.admission import Routing
from casemate_schemas.api import JOBS_PATH
from casemate_schemas.codec import encode
from casemate_schemas.job_state import Approval, JobRecord
from casemate_schemas.signatures import sign
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.consortium import MEMBERS
from support.gateway import Caller, House, house, now_ms
from support.gateway_process import program, settings_file
from support.http import signed_request
from support.nats import NatsStack

MIB = 1 << 20


@dataclass(frozen=True)
class Load:
    """How many of each, and for how long."""

    jobs: int
    watchers: int
    pollers: int
    seconds: float
    settle_s: float
    """How long the gateway has for reading the jobs that it finds when it starts."""


FULL = Load(jobs=10_000, watchers=1000, pollers=1000, seconds=60, settle_s=10)
QUICK = Load(jobs=2000, watchers=200, pollers=200, seconds=10, settle_s=2)


@dataclass
class Seen:
    """What came back."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    events: int = 0
    watching: int = 0
    another: asyncio.Event = field(default_factory=asyncio.Event)
    """One more watches."""


@dataclass(frozen=True)
class Watched:
    """A job and somebody whom it concerns."""

    caller: Caller
    job_id: str


def queued_job(house: House, member: str, caller: Caller) -> JobRecord:
    """A job's record as it is once its key brokers have said yes."""
    now, job_id = now_ms(), secrets.token_hex(16)
    routing = Routing(
        consortium=house.keys.consortium.id,
        job_id=job_id,
        terms=secrets.token_bytes(32),
        job_envelope=secrets.token_bytes(32),
        job_key_broker=member,
        key_brokers=(member,),
        recipients=(caller.person.signing.public,),
        created=now,
        deadline=now + 3600_000,
    )
    return JobRecord(
        job_id=job_id,
        state="queued",
        routing=encode(sign(routing, caller.person.signing)),
        delegation=encode(caller.person.delegation),
        job_envelope=routing.job_envelope,
        submission=secrets.token_bytes(32),
        approvals={member: Approval(verdict="yes", answer=secrets.token_bytes(400))},
        created=now,
        updated=now,
        deadline=routing.deadline,
    )


async def fill(house: House, callers: dict[str, Caller], count: int) -> list[Watched]:
    """Puts so many jobs where the gateway will find them; whose they are."""
    store, places, found = JobStore(await house.client("gateway")), asyncio.Semaphore(64), list[Watched]()

    async def put(member: str, caller: Caller) -> None:
        async with places:
            record = queued_job(house, member, caller)
            await store.create(record)
            found.append(Watched(caller, record.job_id))

    people = list(callers.items())
    await asyncio.gather(*(put(*people[number % len(people)]) for number in range(count)))
    return found


async def ask(session: aiohttp.ClientSession, caller: Caller, method: str, path: str) -> tuple[int, float, float]:
    """(status, seconds, when to come back) of one signed request."""
    signed = signed_request(caller.person.signing, caller.person.delegation, method, caller.origin + path)
    began = time.perf_counter()
    async with session.request(method, signed.url, headers=signed.headers) as response:
        await response.read()
        return response.status, time.perf_counter() - began, float(response.headers.get("Retry-After", 60))


async def poll(session: aiohttp.ClientSession, job: Watched, seen: Seen) -> None:
    """Asks, waits as long as it is told to, and asks again, for ever."""
    while True:
        status, took_s, after_s = await ask(session, job.caller, "GET", f"{JOBS_PATH}/{job.job_id}")
        seen.seconds.append(took_s)
        seen.statuses[status] += 1
        await asyncio.sleep(after_s * random.uniform(0.9, 1.1))


async def watch(session: aiohttp.ClientSession, job: Watched, seen: Seen) -> None:
    """Reads a job's events until it ends."""
    path = f"{JOBS_PATH}/{job.job_id}/events"
    signed = signed_request(job.caller.person.signing, job.caller.person.delegation, "GET", job.caller.origin + path)
    async with session.get(signed.url, headers=signed.headers) as response:
        response.raise_for_status()
        seen.watching += 1
        seen.another.set()
        async for line in response.content:
            seen.events += line.startswith(b"data:")


async def cancel(session: aiohttp.ClientSession, jobs: list[Watched], every_s: float) -> None:
    """Ends one job after the other, so that there is something to see."""
    for job in jobs:
        await ask(session, job.caller, "POST", f"{JOBS_PATH}/{job.job_id}/cancel")
        await asyncio.sleep(every_s)


async def measured(load: Load, session: aiohttp.ClientSession, jobs: list[Watched]) -> Seen:
    """First the watchers come, over some seconds; then the pollers, over as long as they are told to wait; then it goes on."""
    seen = Seen()
    async with asyncio.TaskGroup() as tasks:
        begun = list[asyncio.Task[None]]()
        for job in jobs[: load.watchers]:
            begun.append(tasks.create_task(watch(session, job, seen)))
            await asyncio.sleep(5 / load.watchers)
        while seen.watching < load.watchers:
            await seen.another.wait()
            seen.another.clear()
        begun.append(tasks.create_task(cancel(session, jobs[: load.watchers // 2], load.seconds / load.watchers)))
        for job in jobs[load.watchers : load.watchers + load.pollers]:
            begun.append(tasks.create_task(poll(session, job, seen)))
            await asyncio.sleep(10 / load.pollers)
        await asyncio.sleep(load.seconds)
        for task in begun:
            task.cancel()
    return seen


async def run(load: Load) -> tuple[Seen, int]:
    """What was seen, and the gateway's highest memory in bytes."""
    with tempfile.TemporaryDirectory(prefix="casemate-gateway-") as folder:
        async with AsyncExitStack() as exits:
            stack = NatsStack(Path(folder) / "nats")
            exits.push_async_callback(stack.close)
            await stack.start()
            built = await exits.enter_async_context(house(Path(folder), stack))
            connector, no_limit = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
            session = await exits.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=no_limit))
            callers = {member: built.caller(member) for member in MEMBERS}
            jobs = await fill(built, callers, load.jobs)
            settings = settings_file(Path(folder), built)
            gateway = await exits.enter_async_context(program(settings))
            for caller in callers.values():
                caller.origin = gateway.ready["address"]
            await asyncio.sleep(load.settle_s)
            seen = await measured(load, session, jobs)
            return seen, gateway.memory_bytes("VmHWM")


def main() -> None:
    """Measure, print and write."""
    options = arguments(__doc__ or "")
    load = QUICK if options.quick else FULL
    seen, memory = asyncio.run(run(load))
    in_order = sorted(seen.seconds)
    p50, p99 = (1000 * in_order[round(part * (len(in_order) - 1))] for part in (0.5, 0.99))
    Console().print(
        f"{load.jobs} queued jobs, {load.watchers} watchers (who were told {seen.events} events), {load.pollers} pollers:"
        f" {len(in_order)} polls; load of the machine {os.getloadavg()[0]:.1f}"
    )
    metrics = (
        Metric("status_p99_ms", p99, "ms", 250),
        Metric("status_p50_ms", p50, "ms"),
        Metric("status_refused", seen.statuses.total() - seen.statuses[200], "polls", 0),
        Metric("gateway_rss_mib", memory / MIB, "MiB"),
    )
    runs = {"load": asdict(load), "polls": len(in_order), "events": seen.events, "slowest_ms": 1000 * in_order[-1]}
    report(metrics, runs, machine("aiohttp", "nats-py"), options.json)


if __name__ == "__main__":
    main()
