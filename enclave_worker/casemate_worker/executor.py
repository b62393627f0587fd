"""The training process from the parent's side: started early, fed as plaintext comes out of envelopes, ended for sure."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Self, TypeVar

from casemate_schemas.audit import AuditCounts
from casemate_schemas.codec import WireModel, decode, encode
from casemate_schemas.errors import CasemateError, MalformedError, TrainingError, error_from_reason
from casemate_schemas.job import JobSpec
from casemate_schemas.metrics import MetricSums
from casemate_schemas.result import ClippingStrategy

from .environment import MOST_THREADS, reproducible_kernels
from .frames import Coming, Done, Failure, Progress, Start, Train, frame, pieces, read_frame_async

_M = TypeVar("_M", bound=WireModel)


@dataclass(frozen=True)
class StepDone:
    """So many steps are done."""

    step: int


@dataclass(frozen=True)
class CheckpointReady:
    """The trainer's whole state after ``step``, as it comes out of the child, for whoever wants it now. Confidential."""

    step: int
    state: AsyncGenerator[bytes] = field(repr=False)


@dataclass(frozen=True)
class Trained:
    """The final weights, as safetensors, and their metrics if the plan has some; or, of an audit, its counts alone."""

    weights: AsyncGenerator[bytes] = field(repr=False)
    """As they come out of the child, to be taken before the next report is asked for."""
    weights_bytes: int
    metrics: MetricSums | None = None
    audit: AuditCounts | None = None
    clipping: dict[str, ClippingStrategy] = field(default_factory=dict)
    """How each parameter's gradients were clipped, by name."""


Report = StepDone | CheckpointReady | Trained


class TrainingProcess:
    """One child for one attempt. Use as an async context manager: leaving it kills the child.

    It computes what a stranger's model says, so it is believed as little as possible: once it was fed data, all that can
    leave it besides checkpoints and weights is a count of steps, one after another, or the one failure.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise TrainingError("the training process has no pipes")
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self.isolation = ""
        self._last_step = 0
        self._has_metrics = False
        self._is_audit = False
        self._parameters: frozenset[str] = frozenset()
        self._has_data = False

    @classmethod
    async def start(cls, threads: int, *, simulation: bool = False) -> Self:
        """Starts the child, with an environment that holds nothing, and asks it to get ready; does not wait for that.

        Outside simulation :meth:`prepare` raises :class:`SetupError` where the child could use a GPU.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-m",
            "casemate_worker.child",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={"OMP_NUM_THREADS": str(min(threads, MOST_THREADS)), **reproducible_kernels()},
            cwd="/",
        )
        child = cls(process)
        child._stdin.write(frame(b"S", encode(Start(threads=threads, simulation=simulation))))
        return child

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    async def prepare(self, spec: JobSpec, weights: AsyncIterator[bytes]) -> None:
        """Hands over the model; returns once it is built and checked, which begins when ``weights`` has ended.

        Raises what the child found wrong with it (:class:`ModelError` and the like), and what ``weights`` raises.
        """
        self.isolation = (await self._expect(b"R")).decode("ascii")
        self._last_step = spec.plan.training.steps
        self._has_metrics = spec.plan.metrics is not None
        self._is_audit = spec.plan.audit is not None
        self._parameters = frozenset(parameter.name for parameter in spec.model.parameters)
        await self._write(b"S", encode(spec))
        await self._write_all(b"W", weights)
        await self._write(b"p", b"")
        await self._expect(b"R")

    async def feed(self, plaintext: AsyncIterator[bytes]) -> None:
        """Streams one dataset's plaintext; datasets come in the order of the plan."""
        self._has_data = True
        await self._write_all(b"D", plaintext)
        await self._write(b"d", b"")

    async def train(self, seed: bytes, checkpoint: AsyncIterator[bytes] | None) -> AsyncIterator[Report]:
        """Starts training, from ``checkpoint`` if there is one, and reports until :class:`Trained`.

        Raises :class:`TrainingError`, and nothing that tells more.
        """
        if checkpoint is not None:
            await self._write_all(b"C", checkpoint)
        await self._write(b"c", b"")
        await self._write(b"T", encode(Train(seed=seed)))
        done, metrics, audit = 0, None, None
        wanted = self._has_metrics, self._is_audit
        while True:
            tag, payload = await self._next()
            if tag == b"P":
                done = self._counted(payload, done)
                yield StepDone(done)
            elif tag == b"C" and not self._is_audit:
                state = self._coming(b"c", _decoded(Coming, payload).bytes)
                yield CheckpointReady(done, state)
                await _drained(state)
            elif tag == b"M" and self._has_metrics and metrics is None and done == self._last_step:
                metrics = _decoded(MetricSums, payload)
            elif tag == b"A" and self._is_audit and audit is None and done == self._last_step:
                audit = _decoded(AuditCounts, payload)
            elif tag == b"W" and done == self._last_step and (metrics is not None, audit is not None) == wanted:
                told = self._told(payload)
                weights = self._coming(b"w", told.weights_bytes)
                yield Trained(weights, told.weights_bytes, metrics, audit, dict(told.clipping))
                await _drained(weights)
                return
            else:
                raise TrainingError("the training process is out of step")

    async def close(self) -> None:
        """Kills the child if it is still there, and waits for its end."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, 9)
        self._stdin.close()
        await self._process.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _counted(self, payload: bytes, done: int) -> int:
        """The next step: any of the plan's to begin with (a checkpoint may have been resumed), then by ones."""
        step = _decoded(Progress, payload).step
        if not 0 < step <= self._last_step or (done and step != done + 1):
            raise TrainingError("the training process is out of step")
        return step

    def _told(self, payload: bytes) -> Done:
        """How it clipped, of the model's own parameters: any other name could tell something of the data."""
        told = _decoded(Done, payload)
        if not told.clipping.keys() <= self._parameters or (self._is_audit and told.weights_bytes):
            raise TrainingError("the training process is out of step")
        return told

    async def _coming(self, tag: bytes, size: int) -> AsyncGenerator[bytes]:
        """So many bytes, as they come."""
        while size:
            got, payload = await self._next()
            if got != tag or not 0 < len(payload) <= size:
                raise TrainingError("the training process is out of step")
            size -= len(payload)
            yield payload

    async def _expect(self, tag: bytes) -> bytes:
        got, payload = await self._next()
        if got != tag:
            raise TrainingError("the training process is out of step")
        return payload

    async def _next(self) -> tuple[bytes, bytes]:
        try:
            tag, payload = await read_frame_async(self._stdout)
        except MalformedError as error:
            raise TrainingError("the training process ended") from error
        if tag == b"E" and self._has_data:
            raise TrainingError("training failed")
        if tag == b"E":
            failure = decode(Failure, payload)
            raise error_from_reason(failure.reason, failure.message)
        return tag, payload

    async def _write(self, tag: bytes, payload: bytes | memoryview) -> None:
        try:
            self._stdin.write(frame(tag, payload))
            await self._stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise await self._reason(error) from error

    async def _write_all(self, tag: bytes, parts: AsyncIterator[bytes]) -> None:
        async for part in parts:
            for piece in pieces(part):
                await self._write(tag, piece)

    async def _reason(self, error: BaseException) -> CasemateError:
        """What the child said before it closed its end, if it said something."""
        with contextlib.suppress(TrainingError):
            while True:
                try:
                    await self._next()
                except TrainingError:
                    raise
                except CasemateError as told:
                    return told
        return TrainingError("the training process ended")


async def _drained(pieces: AsyncGenerator[bytes]) -> None:
    """Drops what nobody took."""
    async for _ in pieces:
        pass


def _decoded(kind: type[_M], payload: bytes) -> _M:
    try:
        return decode(kind, payload)
    except MalformedError as error:
        raise TrainingError("the training process is out of step") from error
