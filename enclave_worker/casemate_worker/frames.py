"""How the worker and its training process talk: tagged, length-prefixed frames over two pipes.

::

    parent -> child   S start   W weights   p prepare   D data of one dataset   C checkpoint   T train
    child -> parent   R ready   P progress  C checkpoint, then c its pieces   M metrics   A audit
                      W done, then w the weights' pieces   E error

Both ends are the same measured program, so frames are bounded and checked, but not signed.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import Annotated, BinaryIO, ClassVar, Final

from casemate_schemas.codec import WireModel
from casemate_schemas.errors import MalformedError
from casemate_schemas.job import MAX_STEPS
from casemate_schemas.result import Clipping
from pydantic import Field

PIECE_BYTES: Final = 1 << 20
MAX_FRAME_BYTES: Final = PIECE_BYTES + 64
MAX_OUTPUT_BYTES: Final = 8 << 30
_HEAD: Final = struct.Struct(">cI")

OutputBytes = Annotated[int, Field(ge=0, le=MAX_OUTPUT_BYTES)]


class Start(WireModel):
    """First frame to the child: how many threads it may use, and whether real data may come."""

    KIND: ClassVar[str] = "training-start"

    threads: Annotated[int, Field(ge=1, le=256)]
    simulation: bool


class Train(WireModel):
    """Last frame to the child: go, with this seed."""

    KIND: ClassVar[str] = "training-go"

    seed: Annotated[bytes, Field(min_length=32, max_length=32, repr=False)]


class Progress(WireModel):
    """Steps done so far."""

    KIND: ClassVar[str] = "training-progress"

    step: Annotated[int, Field(ge=0, le=MAX_STEPS)]


class Coming(WireModel):
    """A checkpoint follows, of that size: whoever takes it need not hold it."""

    KIND: ClassVar[str] = "training-checkpoint"

    bytes: OutputBytes


class Done(WireModel):
    """Training is over: how it computed, as far as the terms leave that open, and the size of the weights that follow."""

    KIND: ClassVar[str] = "training-done"

    clipping: Clipping
    weights_bytes: OutputBytes


class Failure(WireModel):
    """Why the child gave up: a reason code, and before any data was opened a sentence about the model."""

    KIND: ClassVar[str] = "training-failure"

    reason: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=2000)]


def frame(tag: bytes, payload: bytes | memoryview) -> bytes:
    """One frame's bytes."""
    if len(payload) > MAX_FRAME_BYTES:
        raise MalformedError("frame is too large")
    return _HEAD.pack(tag, len(payload)) + payload


def pieces(data: bytes | memoryview) -> Iterator[memoryview]:
    """``data`` in pieces that fit a frame; none for no data."""
    view = memoryview(data)
    for start in range(0, len(view), PIECE_BYTES):
        yield view[start : start + PIECE_BYTES]


def read_frame(stream: BinaryIO) -> tuple[bytes, bytes]:
    """The next frame, blocking. Raises :class:`MalformedError`, also at the end of the stream."""
    tag, length = _head(_exactly(stream, _HEAD.size))
    return tag, _exactly(stream, length)


async def read_frame_async(stream: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The next frame. Raises :class:`MalformedError`, also at the end of the stream."""
    try:
        tag, length = _head(await stream.readexactly(_HEAD.size))
        return tag, await stream.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise MalformedError("the other end closed the pipe") from error


def _head(data: bytes) -> tuple[bytes, int]:
    tag, length = _HEAD.unpack(data)
    if length > MAX_FRAME_BYTES:
        raise MalformedError("frame is too large")
    return tag, length


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise MalformedError("the other end closed the pipe")
    return data
