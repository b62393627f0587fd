"""Workers that are not what they should be get no key from anyone, and do not stop one that is.

One chip boots another program; one is no chip of this consortium's. The honest worker's own chip comes up last.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from casemate_attestation.guest import GuestDriver
from casemate_attestation.simulated_chip import (
    ChipServer,
    Launch,
    SimulatedAuthority,
    SimulatedChip,
    SimulatedKeys,
    measure_worker_image,
)
from casemate_messaging.jobs import JobStore
from casemate_messaging.rpc import call
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import ManifestChain, verify_chain
from casemate_schemas.errors import CasemateError
from casemate_schemas.grant import GrantRequest
from casemate_schemas.sealing import SealingKey
from casemate_schemas.signatures import sign
from casemate_schemas.subjects import WorkerOp, key_broker_op
from casemate_worker.attempt import begin_attempt
from casemate_worker.evidence import gather_evidence
from support.road import SCIENTIST, Road, ended, request, running_road, until

OTHER_PROGRAM = hashlib.sha384(b"another program").digest()
CODES = {"worker-2": "evidence_outside_policy", "worker-3": "evidence_not_genuine"}


@dataclass(frozen=True)
class Machine:
    """A chip that measures whatever boots as ``measurement``."""

    chip: SimulatedChip
    measurement: bytes

    def launch(self, measurement: bytes, host_data: bytes = bytes(32)) -> Launch:
        return self.chip.launch(self.measurement, host_data)


@contextlib.asynccontextmanager
async def served(machine: Any, socket: Path) -> AsyncIterator[None]:
    """The machine's chip behind a socket, as the simulated chip's own program serves it."""
    launch = partial(ChipServer(machine, bytes(32))._launch, measure_worker_image)
    async with await asyncio.start_unix_server(launch, socket):
        yield


def refusals(road: Road, worker: str) -> list[str]:
    """Why a worker gave up, by its own log."""
    lines = (road.layout.logs / f"{worker}.log").read_text().splitlines()
    return [event["reason"] for event in map(json.loads, lines) if event["event"] == "gave_up"]


@pytest.fixture
async def strangers(tmp_path: Path) -> AsyncIterator[tuple[Road, SimulatedChip]]:
    """A consortium with three workers, each at a chip of its own, and the stranger's chip; none serves yet."""
    stranger = await asyncio.to_thread(lambda: SimulatedAuthority(SimulatedKeys.generate()).issue_chip())
    overrides: dict[str, dict[str, object]] = {
        f"worker-{number}": {"simulated_chip_socket": str(tmp_path / f"{number}"), "retry_delay_s": 0.1}
        for number in (1, 2, 3)
    }
    members = ("north", "university")
    async with running_road(tmp_path / "stack", members=members, workers=3, overrides=overrides) as road:
        yield road, stranger


async def test_only_the_attested_worker_gets_keys(strangers: tuple[Road, SimulatedChip], tmp_path: Path) -> None:
    road, stranger = strangers
    chip = SimulatedChip.load(road.layout.chip)
    bad = {"worker-2": Machine(chip, OTHER_PROGRAM), "worker-3": Machine(stranger, measure_worker_image())}
    datasets = await road.push("guarded", "north")
    async with contextlib.AsyncExitStack() as chips:
        for worker, machine in bad.items():
            await chips.enter_async_context(served(machine, tmp_path / worker[-1]))
        async with road.connected(SCIENTIST) as consortium:
            job = await consortium.train(**request(datasets))
            await until(lambda: all(refusals(road, worker) for worker in bad), "both bad workers to be refused")
            assert {worker: set(refusals(road, worker)) for worker in bad} == {w: {code} for w, code in CODES.items()}
            for worker, machine in bad.items():
                told = await _refused_by(road, job.id, worker, machine.launch(b""))
                assert told == dict.fromkeys(("north", "university"), CODES[worker])
            honest = chip.launch(measure_worker_image())
            told = await _refused_by(road, job.id, "worker-2", honest, other_key=True)
            assert told == dict.fromkeys(("north", "university"), "evidence_outside_policy")
            assert await road.charged(datasets) == [[]]
            good = Machine(chip, measure_worker_image())
            await chips.enter_async_context(served(good, tmp_path / "1"))
            assert (await ended(job)).state == "sealed"
            assert (await job.result()).verification.simulation
    assert set(refusals(road, "worker-1")) <= {"unavailable"}
    async with road.nats("gateway") as host:
        assert (await JobStore(host).get(job.id))[0].worker == "worker-1"
    assert await road.charged(datasets) == [[job.id]]


async def _refused_by(
    road: Road, job_id: str, worker: str, guest: GuestDriver, *, other_key: bool = False
) -> dict[str, str]:
    """What each key broker refuses a worker with that asks all of them, whoever refused it before.

    With ``other_key`` it presents its report for a sealing key that the report was not made for.
    """
    consortium = verify_chain(decode(ManifestChain, road.layout.manifest.read_bytes(), max_bytes=1 << 20))
    async with road.nats("gateway") as host, road.nats(worker) as client:

        async def ask(name: str, op: WorkerOp, payload: bytes) -> bytes:
            return await call(client, key_broker_op(name, op), payload, 10.0)

        record, _ = await JobStore(host).get(job_id)
        attempt = begin_attempt(record.model_copy(update={"attempt": 99}), consortium)
        evidence = await gather_evidence(attempt, consortium, guest, ask)
        if other_key:
            claims = evidence.claims.model_copy(update={"sealing_key": SealingKey.generate().public})
            evidence = evidence.model_copy(update={"claims": claims})
        told = {}
        for name in attempt.routing.key_brokers:
            with pytest.raises(CasemateError) as refused:
                await ask(name, "grant", encode(sign(GrantRequest(evidence=evidence), attempt.signing)))
            told[name] = refused.value.reason
    return told
