"""A short ``make chaos``; the long one is for whoever changes the road."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from casemate.local_stack.layout import Layout
from faults.chaos import JOBS_PER_ROUND, TARGETS, digest, run, schedule
from support.stack import copy_of

JOBS = 6
DIGEST = "765698c12d53887cac1628b689f04c8d1c4a68c54a9836f0f21d0621c5baf4a0"
"""Of seed 1 and 100 jobs. Another kind of fault, or of target, makes another schedule."""
SEED = "2346"
"""A job is cancelled, one loses its submission; nats-server, a worker and a key broker die, and a worker's clock is wrong."""


def test_a_seed_is_a_schedule() -> None:
    """The same one each time and everywhere, another for each seed, and nothing is left out."""
    first, again, other = schedule("1", 100), schedule("1", 100), schedule("2", 100)
    assert first == again != other
    assert digest(first) == DIGEST != digest(other)
    ids = [job_id for planned in first for job_id in planned.jobs]
    assert len(ids) == len(set(ids)) == 100
    assert max(len(planned.jobs) for planned in first) == JOBS_PER_ROUND
    faults = list(itertools.chain.from_iterable(planned.faults for planned in first))
    assert {fault.kind for fault in faults} == set(TARGETS)
    assert all(fault.target in TARGETS[fault.kind] for fault in faults)


@pytest.mark.timeout(300)
async def test_a_few_jobs_under_half_of_the_faults(founded: Layout, tmp_path: Path) -> None:
    total = await run(SEED, schedule(SEED, JOBS), copy_of(founded, tmp_path / "stack"), tmp_path)
    assert total.total() == JOBS
