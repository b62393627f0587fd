from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.key_brokers import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A consortium with key brokers that open on first use."""
    made = Bench(tmp_path)
    yield made
    made.close()
