from __future__ import annotations

import pytest
from support.results import World, world


@pytest.fixture(scope="session")
def w() -> World:
    """A lab, two hospitals and everybody's keys."""
    return world()
