"""``kill -9`` of a key broker: what it decided stands, what it did not answer is asked again, nobody pays twice."""

from __future__ import annotations

import pytest
from support.faults import Bench
from support.stack import MEMBERS

pytestmark = pytest.mark.asyncio(loop_scope="session")

KINDS = pytest.mark.parametrize(
    "name",
    [pytest.param(name, id=kind) for name, kind in zip(MEMBERS, ("deciding", "owner", "submitter"), strict=True)],
)


@KINDS
async def test_between_decision_and_answer(bench: Bench, name: str) -> None:
    """Three times in one job: after the precheck, after the reservation, after the commit."""
    program = f"key-broker-{name}"
    for op in ("precheck", "grant", "commit"):
        bench.orders.die(f"after-{op}", program)
    run = await bench.submit()
    await bench.check_one_result(run)
    assert bench.orders.all_obeyed()
    assert (await bench.record(run)).attempt >= 3
