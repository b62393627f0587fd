from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.gateway import House, house
from support.nats import NatsStack, nats_stack

__all__ = ["a_house", "nats_stack", "running_house"]


@pytest.fixture
async def a_house(tmp_path: Path, nats_stack: NatsStack) -> AsyncIterator[House]:
    """Everything but a running gateway."""
    async with house(tmp_path, nats_stack) as found:
        yield found


@pytest.fixture
async def running_house(a_house: House) -> AsyncIterator[House]:
    """Everything, and a gateway."""
    async with a_house.gateway_running():
        yield a_house
