"""The training process for real: what it can reach, what it tells, how it ends."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from casemate_models.building import read_weights
from casemate_models.pipeline import write_columns
from casemate_models.tensors import write_tensors
from casemate_models.tracing import trace
from casemate_privacy.auditing import audit_report
from casemate_schemas.codec import digest_of, encode
from casemate_schemas.dataset import Column, DatasetCard
from casemate_schemas.errors import MalformedError, ModelError, ParameterError, TrainingError
from casemate_schemas.job import SGD, Audit, DatasetUse, JobSpec, Plan, Privacy, Rational, Training
from casemate_schemas.model import ModelSpec
from casemate_schemas.pipeline import PipelineSpec
from casemate_schemas.sections import pack_sections
from casemate_schemas.signatures import Signed
from casemate_worker.executor import CheckpointReady, StepDone, Trained, TrainingProcess
from casemate_worker.isolation import SECCOMP
from support.reports import in_pieces, whole
from torch import nn

ROWS = 60
SEED = bytes(range(32))
NOBODY = Signed(kind="delegation", payload=b"", signer=bytes(32), signature=bytes(64))


def card(owner: str) -> DatasetCard:
    columns = (
        Column(name="a", dtype="float64", lower=-1.0, upper=1.0),
        Column(name="b", dtype="float64", lower=-1.0, upper=1.0),
        Column(name="outcome", dtype="float64", lower=0.0, upper=1.0),
    )
    return DatasetCard(name="points", owner=owner, columns=columns, row_bound=ROWS)


def plaintext(owner: str) -> bytes:
    rng = np.random.default_rng(len(owner))
    a, b = rng.uniform(-1, 1, ROWS), rng.uniform(-1, 1, ROWS)
    columns = {"a": a, "b": b, "outcome": (a + b > 0).astype(np.float64)}
    return pack_sections({"card": encode(card(owner)), "columns": write_columns(columns, card(owner))})


def job(steps: int = 20, every: int = 10, sigma: float = 1.0, mechanism: Any = "hardened") -> tuple[JobSpec, bytes]:
    model, weights = trace(nn.Sequential(nn.Linear(2, 1)), (2,))
    uses = tuple(
        DatasetUse(
            dataset=f"points@{owner}",
            envelope=bytes(32),
            card=digest_of(card(owner)),
            licence=bytes(32),
            key_broker=owner,
            row_bound=ROWS,
            sample_rate=Rational.of(Fraction(1, 4)),
        )
        for owner in ("east", "north")
    )
    training = Training(
        loss="binary_cross_entropy",
        optimizer=SGD(lr=0.5),
        steps=steps,
        clipping_norm=1.0,
        noise_multiplier=sigma,
        mechanism=mechanism,
        checkpoint_every_steps=every,
    )
    plan = Plan(
        purpose="test",
        datasets=uses,
        pipeline=PipelineSpec(features=("a", "b"), target="outcome", target_kind="binary"),
        training=training,
        privacy=Privacy(epsilon=3.0, delta=1e-3),
        recipients=(NOBODY,),
    )
    return JobSpec(job_id="0" * 32, salt=bytes(32), model=model, plan=plan), weights


def weights_with(model: ModelSpec, weights: bytes, value: float) -> bytes:
    """The same tensors, filled with one value."""
    return write_tensors({n: np.full_like(t.numpy(), value) for n, t in read_weights(model, weights).items()})


async def prepared(process: TrainingProcess, spec: JobSpec, weights: bytes) -> None:
    await process.prepare(spec, in_pieces(weights))
    for owner in ("east", "north"):
        await process.feed(in_pieces(plaintext(owner)))


async def trained(spec: JobSpec, weights: bytes, seed: bytes, checkpoint: bytes | None = None) -> list[object]:
    async with await TrainingProcess.start(1) as process:
        await prepared(process, spec, weights)
        resumed = None if checkpoint is None else in_pieces(checkpoint)
        return [await whole(report) async for report in process.train(seed, resumed)]


async def test_it_trains_reports_every_step_and_hands_over_checkpoints() -> None:
    spec, weights = job()
    reports = await trained(spec, weights, SEED)
    assert [r.step for r in reports if isinstance(r, StepDone)] == list(range(1, 21))
    assert [r.step for r in reports if isinstance(r, CheckpointReady)] == [10]
    assert isinstance(reports[-1], Trained)
    before, after = read_weights(spec.model, weights), read_weights(spec.model, reports[-1].weights)
    assert any((before[name] != after[name]).any() for name in before)


async def test_an_audit_hands_over_counts_in_place_of_weights_and_checkpoints() -> None:
    spec, weights = job()
    changes = {"kind": "privacy_audit", "release": ("audit",), "audit": Audit(canaries=100)}
    audit = spec.model_copy(update={"plan": Plan.model_validate(spec.plan.model_dump() | changes)})
    *steps, last = await trained(audit, weights, SEED)
    assert [r.step for r in steps if isinstance(r, StepDone)] == list(range(1, 21)) and len(steps) == 20
    assert isinstance(last, Trained) and last.weights == b"" and last.audit is not None
    assert audit_report(audit.plan, last.audit).canaries == 100
    assert set(last.clipping) == set(read_weights(spec.model, weights))


@pytest.mark.parametrize("mechanism", ["hardened", "exact"])
async def test_a_resumed_run_ends_where_an_uninterrupted_one_does_and_another_seed_elsewhere(mechanism: str) -> None:
    spec, weights = job(mechanism=mechanism)
    whole = await trained(spec, weights, SEED)
    (checkpoint,) = [r for r in whole if isinstance(r, CheckpointReady)]
    resumed = await trained(spec, weights, SEED, checkpoint.state)
    other = await trained(spec, weights, bytes(32), checkpoint.state)
    assert [r.step for r in resumed if isinstance(r, StepDone)] == list(range(11, 21))
    assert isinstance(whole[-1], Trained)
    assert resumed[-1] == whole[-1]
    assert other[-1] != whole[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
async def test_it_is_cut_off_and_its_environment_is_empty() -> None:
    spec, weights = job()
    os.environ["CASEMATE_TEST_CANARY"] = "canary"
    try:
        async with await TrainingProcess.start(1) as process:
            await process.prepare(spec, in_pieces(weights))
            assert process.isolation == SECCOMP
            proc = Path(f"/proc/{process.pid}")
            status = (proc / "status").read_text()
            assert "Seccomp:\t2" in status
            assert "NoNewPrivs:\t1" in status
            assert b"canary" not in (proc / "environ").read_bytes()
            assert b"canary" not in (proc / "cmdline").read_bytes()
            sockets = [os.readlink(fd) for fd in (proc / "fd").iterdir() if os.readlink(fd).startswith("socket")]
            assert len(sockets) <= 1  # standard input, which asyncio makes from a socket pair
    finally:
        del os.environ["CASEMATE_TEST_CANARY"]


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_isolation_refuses_every_way_out() -> None:
    program = """
import os, socket, subprocess, sys
from casemate_worker.isolation import isolate
before = socket.socket()
print(isolate())
tries = {
    "inet": lambda: socket.socket(socket.AF_INET), "unix": lambda: socket.socket(socket.AF_UNIX),
    "pair": socket.socketpair, "connect": lambda: before.connect(("127.0.0.1", 9)),
    "bind": lambda: before.bind(("127.0.0.1", 0)), "exec": lambda: subprocess.run(["/bin/true"], check=True),
    "execv": lambda: os.execv("/bin/true", ["true"]),
}
for name, attempt in tries.items():
    try:
        attempt()
        print(name, "REACHED")
    except PermissionError:
        print(name, "refused")
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    first, *rest = done.stdout.splitlines()
    assert first == SECCOMP
    assert len(rest) == 7
    assert all(line.endswith("refused") for line in rest)
    assert socket.socket().close() is None  # only that process was cut off


@pytest.mark.skipif(sys.platform != "linux", reason="reads limits in /proc")
async def test_once_it_has_data_it_can_write_to_no_file() -> None:
    spec, weights = job(steps=100_000, every=100_000)
    async with await TrainingProcess.start(1) as process:
        await prepared(process, spec, weights)
        reports = process.train(SEED, None)
        await anext(reports)
        limits = Path(f"/proc/{process.pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max file size")]
    assert line.split()[3:5] == ["0", "0"]


async def test_a_bad_model_is_named_before_any_data() -> None:
    spec, weights = job()
    hostile = spec.model.model_copy(update={"nodes": spec.model.nodes[:-1]})
    broken = spec.model_copy(update={"model": ModelSpec.model_construct(**dict(hostile))})
    async with await TrainingProcess.start(1) as process:
        with pytest.raises((ModelError, MalformedError)):
            await process.prepare(broken, in_pieces(weights))
    async with await TrainingProcess.start(1) as process:
        with pytest.raises((ModelError, MalformedError)):
            await process.prepare(spec, in_pieces(weights[:-4]))


async def test_noise_that_would_add_to_epsilon_is_refused_before_any_data() -> None:
    spec, weights = job(steps=100_000)
    strict = spec.plan.model_copy(update={"privacy": spec.plan.privacy.model_copy(update={"epsilon": 1e-3})})
    async with await TrainingProcess.start(1) as process:
        with pytest.raises(ParameterError, match="use mechanism='exact'"):
            await process.prepare(spec.model_copy(update={"plan": strict}), in_pieces(weights))


async def test_a_model_that_does_not_train_is_found_out_before_any_data() -> None:
    """The graph is lawful, but a harmless record's gradient is not finite."""
    spec, weights = job()
    huge = weights_with(spec.model, weights, 3e38)
    async with await TrainingProcess.start(1) as process:
        with pytest.raises(ModelError, match="not finite"):
            await process.prepare(spec, in_pieces(huge))


@pytest.mark.parametrize("data", [b"", b"garbage", plaintext("south"), plaintext("east")[:-1]])
async def test_whatever_is_wrong_with_data_is_one_and_the_same_reason(data: bytes) -> None:
    spec, weights = job()
    async with await TrainingProcess.start(1) as process:
        await process.prepare(spec, in_pieces(weights))
        await process.feed(in_pieces(data))
        await process.feed(in_pieces(plaintext("north")))
        with pytest.raises(TrainingError) as caught:
            [report async for report in process.train(SEED, None)]
    assert str(caught.value) == "training failed"


class Trap(nn.Module):
    """Overflows, in value and gradient, for a record with a feature at the upper end of its bounds, and for no other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trap = x * 2.0
        for _ in range(7):
            trap = trap * trap
        return self.linear(x + trap * 0.0)  # type: ignore[no-any-return]


async def test_a_model_that_breaks_on_a_chosen_value_learns_nothing_by_it() -> None:
    """The steps, the checkpoints and the end are those of a run without that record; an infinite or missing value is clamped."""
    model, weights = trace(Trap(), (2,))
    spec = job(sigma=0.5)[0].model_copy(update={"model": model})

    async def told(value: float) -> tuple[list[object], dict[str, np.ndarray]]:
        rng = np.random.default_rng(5)
        columns = {name: rng.uniform(-0.5, 0.5, ROWS) for name in ("a", "b")}
        columns["outcome"] = (columns["a"] > 0).astype(np.float64)
        columns["a"][:20] = value
        async with await TrainingProcess.start(1) as process:
            await process.prepare(spec, in_pieces(weights))
            for owner in ("east", "north"):
                data = {"card": encode(card(owner)), "columns": write_columns(columns, card(owner))}
                await process.feed(in_pieces(pack_sections(data)))
            reports = [await whole(report) async for report in process.train(SEED, None)]
        (trained,) = [report for report in reports if isinstance(report, Trained)]
        shown = [(type(report), report.step if isinstance(report, StepDone) else None) for report in reports]
        return shown, {name: tensor.numpy() for name, tensor in read_weights(model, trained.weights).items()}

    harmless, weights_without = await told(0.25)
    for value in (1.0, np.inf, np.nan):
        steps, found = await told(value)
        assert steps == harmless and len(steps) > spec.plan.training.steps
        assert all(np.isfinite(array).all() for array in found.values())
    caught = (await told(1.0))[1]
    assert any(not np.array_equal(caught[name], weights_without[name]) for name in caught)


async def test_a_killed_child_is_a_failed_training_and_leaves_nothing() -> None:
    spec, weights = job(steps=100_000, every=100_000)
    async with await TrainingProcess.start(1) as process:
        await prepared(process, spec, weights)
        reports = process.train(SEED, None)
        await anext(reports)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(TrainingError):
            [report async for report in reports]
    assert not Path(f"/proc/{process.pid}").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_it_dies_with_its_parent_however_that_ends() -> None:
    program = """
import asyncio
from casemate_worker.executor import TrainingProcess
async def main():
    process = await TrainingProcess.start(1)
    print((await process._next())[1].decode(), process.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-I", "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline().split()[-1])
    child = os.pidfd_open(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    ready, _, _ = select.select([child], [], [], 30)
    os.close(child)
    assert ready
