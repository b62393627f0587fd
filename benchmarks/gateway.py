"""One gateway process while many look at their jobs: status, event streams and a long queue, all at once.

A gateway and a nats-server that syncs every message to the disk, each a process of its own. In the store lie 10,000 queued
jobs of four members, no worker takes any. 1,000 people's programs watch a job's events each; 1,000 others ask for a job's
status and come back when ``Retry-After`` says so. Once all watch, half of the watched jobs are cancelled one
after the other, so that streams have something to tell. Every request is signed, and the gateway checks it.

``status_p99_ms``: from sending ``GET /v1/jobs/{id}`` to its whole answer, as the asker sees it, over all those of the pollers,
the first of each included. Watchers and pollers are two processes of their own, which run on one core at most
(``_gateway_load.py``). Beside it stands what else the machine was busy with, without which the figure says little:
``load_late_p99_ms`` is how late the pollers' process itself came to do things, which counts in ``status_p99_ms``;
``others_cores`` what ran besides gateway, NATS and load. ``gateway_cpu_ms`` is the gateway's processor time over the
polls that it answered, with all else that it did meanwhile: streams, events, cancelling, looking through its jobs.
``gateway_rss_mib``: the most memory that the gateway held.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

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
from support.gateway_process import Program, program, settings_file
from support.nats import NatsStack

MIB = 1 << 20


@dataclass(frozen=True)
class Load:
    """How many of each, and for how long."""

    jobs: int
    watchers: int
    pollers: int
    seconds: float
    come_s: float
    """Over how long the pollers begin; watchers do in half of it."""
    settle_s: float
    """How long the gateway has for reading the jobs that it finds when it starts."""


FULL = Load(jobs=10_000, watchers=1000, pollers=1000, seconds=60, come_s=10, settle_s=10)
QUICK = Load(jobs=2000, watchers=200, pollers=200, seconds=10, come_s=2, settle_s=2)


@dataclass(frozen=True)
class Used:
    """Processor time in seconds since each of them began, and when that was looked at."""

    gateway: float
    nats: float
    machine: float
    at: float

    @classmethod
    def of(cls, gateway: int, nats: int) -> Self:
        """Of two processes, and of the whole machine."""
        user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
        tick = os.sysconf("SC_CLK_TCK")
        whole = (user + nice + system + irq + soft) / tick
        return cls(cpu_seconds(gateway), cpu_seconds(nats), whole, time.monotonic())


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Measured:
    """What the two processes of the load saw, and what all took while there were pollers."""

    polls: dict[str, Any]
    watching: dict[str, Any]
    before: Used
    after: Used
    memory_bytes: int


@dataclass(frozen=True)
class Watched:
    """A job and somebody whom it concerns."""

    caller: Caller
    job_id: str

    @property
    def caller_strings(self) -> tuple[str, str]:
        """The caller's signing seed in hexadecimal and delegation in base64: keys that were made for this run."""
        person = self.caller.person
        return person.signing.to_bytes().hex(), base64.b64encode(encode(person.delegation)).decode("ascii")


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


def plan(kind: str, jobs: list[Watched], origin: str, over_s: float, seconds: float) -> bytes:
    """What a process of the load is to do (``_gateway_load.py``)."""
    suffix = "/events" if kind == "watch" else ""
    askers = [(*job.caller_strings, f"{JOBS_PATH}/{job.job_id}{suffix}") for job in jobs]
    told = {"kind": kind, "origin": origin, "over_s": over_s, "seconds": seconds, "askers": askers}
    return json.dumps(told).encode()


@asynccontextmanager
async def loading(told: bytes) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of the load, at work."""
    command = (sys.executable, str(Path(__file__).with_name("_gateway_load.py")))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=64 * MIB)
    os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
    assert process.stdin is not None
    process.stdin.write(told)
    process.stdin.close()
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line(process: asyncio.subprocess.Process) -> str:
    """The next thing that a process of the load says."""
    assert process.stdout is not None
    return (await process.stdout.readline()).decode()


async def cancel(jobs: list[Watched], every_s: float) -> None:
    """Ends one job after the other, so that there is something to see."""
    for job in jobs:
        await job.caller.post(f"{JOBS_PATH}/{job.job_id}/cancel")
        await asyncio.sleep(every_s)


async def measured(load: Load, gateway: Program, nats_pid: int, jobs: list[Watched]) -> Measured:
    """First the watchers come, over some seconds; then the pollers, over as long as they are told to wait; then it goes on."""
    watched, polled = jobs[: load.watchers], jobs[load.watchers : load.watchers + load.pollers]
    origin = gateway.ready["address"]
    whole_s = load.seconds + load.come_s
    async with loading(plan("watch", watched, origin, load.come_s / 2, whole_s + 2)) as watchers:
        assert await line(watchers) == "there\n"
        before = Used.of(gateway.process.pid, nats_pid)
        cancelling = asyncio.create_task(cancel(watched[: load.watchers // 2], 2 * whole_s / load.watchers))
        async with loading(plan("poll", polled, origin, load.come_s, whole_s)) as pollers:
            assert await line(pollers) == "there\n"
            polls = json.loads(await line(pollers))
        after = Used.of(gateway.process.pid, nats_pid)
        cancelling.cancel()
        watching = json.loads(await line(watchers))
        await asyncio.gather(cancelling, return_exceptions=True)
    return Measured(polls, watching, before, after, gateway.memory_bytes("VmHWM"))


async def run(load: Load) -> Measured:
    """What was seen."""
    with tempfile.TemporaryDirectory(prefix="casemate-gateway-") as folder:
        async with AsyncExitStack() as exits:
            stack = NatsStack(Path(folder) / "nats")
            exits.push_async_callback(stack.close)
            await stack.start()
            built = await exits.enter_async_context(house(Path(folder), stack))
            callers = {member: built.caller(member) for member in MEMBERS}
            jobs = await fill(built, callers, load.jobs)
            gateway = await exits.enter_async_context(program(settings_file(Path(folder), built)))
            for caller in callers.values():
                caller.origin = gateway.ready["address"]
            await asyncio.sleep(load.settle_s)
            return await measured(load, gateway, stack.server.pid, jobs)


def main() -> None:
    """Measure, print and write."""
    options = arguments(__doc__ or "")
    load = QUICK if options.quick else FULL
    seen = asyncio.run(run(load))
    in_order = sorted(seen.polls["seconds"])
    p50, p99 = (1000 * quantile(in_order, part) for part in (0.5, 0.99))
    took_s = seen.after.at - seen.before.at
    gateway_s, nats_s = seen.after.gateway - seen.before.gateway, seen.after.nats - seen.before.nats
    load_s = seen.polls["cpu_s"] + seen.watching["cpu_s"]
    others = (seen.after.machine - seen.before.machine - gateway_s - nats_s - load_s) / took_s
    Console().print(
        f"{load.jobs} queued jobs, {load.watchers} watchers (who were told {seen.watching['events']} events),"
        f" {load.pollers} pollers: {len(in_order)} polls; load of the machine {os.getloadavg()[0]:.1f}"
    )
    statuses = seen.polls["statuses"]
    metrics = (
        Metric("status_p99_ms", p99, "ms", 250),
        Metric("status_p50_ms", p50, "ms"),
        Metric("status_refused", sum(statuses.values()) - statuses.get("200", 0), "polls", 0),
        Metric("gateway_cpu_ms", 1000 * gateway_s / len(in_order), "ms/poll"),
        Metric("gateway_cores", gateway_s / took_s, "cores"),
        Metric("nats_cores", nats_s / took_s, "cores"),
        Metric("load_cores", load_s / took_s, "cores"),
        Metric("others_cores", others, "cores"),
        Metric("load_late_p99_ms", 1000 * quantile(seen.polls["late_s"], 0.99), "ms"),
        Metric("gateway_rss_mib", seen.memory_bytes / MIB, "MiB"),
    )
    runs = {
        "load": asdict(load),
        "polls": len(in_order),
        "statuses": statuses,
        "events": seen.watching["events"],
        "slowest_ms": 1000 * in_order[-1],
        "latest_ms": 1000 * seen.polls["late_s"][-1],
    }
    report(metrics, runs, machine("aiohttp", "nats-py"), options.json)


def quantile(in_order: list[float], part: float) -> float:
    """The value below which that part of them lies."""
    return in_order[round(part * (len(in_order) - 1))]


if __name__ == "__main__":
    main()
