from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from casemate_messaging.setup import StreamSettings
from support.nats import NatsStack, nats_stack

__all__ = ["nats_stack"]


@pytest.fixture
def blob() -> Callable[[int], tuple[bytes, bytes]]:
    """``blob(size)``: that many reproducible bytes that look random, and their SHA-256."""

    def make(size: int) -> tuple[bytes, bytes]:
        data = random.Random(size).randbytes(size)
        return data, hashlib.sha256(data).digest()

    return make


@pytest.fixture
async def impatient(tmp_path: Path) -> AsyncIterator[NatsStack]:
    """A stack that delivers again after half a second, three times in all."""
    stack = NatsStack(tmp_path / "impatient")
    try:
        await stack.start(StreamSettings(ack_wait_s=0.5, max_deliver=3))
        yield stack
    finally:
        await stack.close()
