"""Watchers or pollers, in a process of their own: what ``gateway.py`` loads a gateway with.

Each has a connection of its own, as people's programs would. This asks as cheaply as it can, a socket and a signature,
so that the figures are the gateway's: how late it was itself, and how much of a core it took, comes with what it saw.
The plan comes as JSON on standard input, a line is written once all are there, and what was seen when its time is over.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import resource
import secrets
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from casemate_schemas.api import DELEGATION_HEADER, SIGNATURE_LABEL, SIGNATURE_TAG, SIGNED_COMPONENTS
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

LOOK_S = 0.01
"""How often it looks how late it is."""

_EMPTY = f"sha-256=:{base64.b64encode(hashlib.sha256(b'').digest()).decode('ascii')}:"
_COVERED = " ".join(f'"{name}"' for name in SIGNED_COMPONENTS)


@dataclass(frozen=True)
class Asker:
    """A person's program: a key, a delegation in base64, and the job that it looks at."""

    key: Ed25519PrivateKey
    delegation: str
    path: str

    @classmethod
    def of(cls, seed: str, delegation: str, path: str) -> Self:
        """From the plan's strings; ``seed`` in hexadecimal."""
        return cls(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed)), delegation, path)

    def request(self, origin: str) -> bytes:
        """A signed ``GET`` (RFC 9421), as it goes over the wire."""
        created, nonce = int(time.time()), secrets.token_hex(16)
        public = self.key.public_key().public_bytes_raw().hex()
        told = f'({_COVERED});created={created};keyid="{public}";nonce="{nonce}";tag="{SIGNATURE_TAG}"'
        covered = ("GET", origin + self.path, _EMPTY, self.delegation)
        lines = [f'"{name}": {value}' for name, value in zip(SIGNED_COMPONENTS, covered, strict=True)]
        signature = self.key.sign("\n".join([*lines, f'"@signature-params": {told}']).encode("ascii"))
        return (
            f"GET {self.path} HTTP/1.1\r\nHost: {origin.partition('://')[2]}\r\nContent-Digest: {_EMPTY}\r\n"
            f"{DELEGATION_HEADER}: {self.delegation}\r\nSignature-Input: {SIGNATURE_LABEL}={told}\r\n"
            f"Signature: {SIGNATURE_LABEL}=:{base64.b64encode(signature).decode('ascii')}:\r\n\r\n"
        ).encode("ascii")


@dataclass
class Seen:
    """What came back."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    events: int = 0
    late_s: list[float] = field(default_factory=list)


async def connected(origin: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the gateway."""
    host, _, port = origin.partition("://")[2].rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer; a body of announced length is read and dropped."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if length := int(headers.get("content-length", 0)):
        await reader.readexactly(length)
    return int(first.split(" ")[1]), headers


async def poll(origin: str, asker: Asker, seen: Seen, after_s: float) -> None:
    """Waits, asks, waits as long as it is told to, and asks again, for ever, over one connection."""
    await asyncio.sleep(after_s)
    reader, writer = await connected(origin)
    while True:
        request = asker.request(origin)
        began = time.perf_counter()
        writer.write(request)
        status, headers = await answer(reader)
        seen.seconds.append(time.perf_counter() - began)
        seen.statuses[status] += 1
        await asyncio.sleep(float(headers.get("retry-after", 60)) * random.uniform(0.9, 1.1))


async def watch(origin: str, asker: Asker, seen: Seen, after_s: float, there: asyncio.Semaphore) -> None:
    """Reads a job's events until it ends; says when the answer has begun."""
    await asyncio.sleep(after_s)
    reader, writer = await connected(origin)
    writer.write(asker.request(origin))
    status, _ = await answer(reader)
    seen.statuses[status] += 1
    there.release()
    while line := await reader.readline():
        seen.events += line.startswith(b"data:")


async def look(seen: Seen) -> None:
    """How late this process is when it wants to do something, for ever."""
    while True:
        due = time.perf_counter() + LOOK_S
        await asyncio.sleep(LOOK_S)
        seen.late_s.append(time.perf_counter() - due)


async def run(plan: dict[str, Any]) -> Seen:
    """All at once until the time is over; it begins once all watch."""
    seen, there, origin = Seen(), asyncio.Semaphore(0), str(plan["origin"])
    askers = [Asker.of(*asker) for asker in plan["askers"]]
    gap_s = plan["over_s"] / max(1, len(askers))
    tasks = [asyncio.create_task(look(seen))]
    for number, asker in enumerate(askers):
        work = poll(origin, asker, seen, number * gap_s)
        if plan["kind"] == "watch":
            work.close()
            work = watch(origin, asker, seen, number * gap_s, there)
        tasks.append(asyncio.create_task(work))
    if plan["kind"] == "watch":
        for _ in askers:
            await there.acquire()
    print("there", flush=True)
    done, _ = await asyncio.wait(tasks, timeout=plan["seconds"], return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return seen


def main() -> None:
    """One plan."""
    seen = asyncio.run(run(json.load(sys.stdin)))
    used = resource.getrusage(resource.RUSAGE_SELF)
    told = {
        "seconds": seen.seconds,
        "statuses": seen.statuses,
        "events": seen.events,
        "late_s": sorted(seen.late_s),
        "cpu_s": used.ru_utime + used.ru_stime,
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
