from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.key_brokers import MEMBERS, Bench

member_run_and_hosted = pytest.mark.parametrize("bench", [(), MEMBERS], ids=["member-run", "hosted"], indirect=True)


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """A consortium with key brokers that open on first use; in enclaves those that the parameter names."""
    made = Bench(tmp_path, hosted=getattr(request, "param", ()))
    yield made
    made.close()
