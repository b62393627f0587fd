from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import casemate as cm
import pytest
import pytest_asyncio
from casemate_schemas.admission import Submission
from support.road import SCIENTIST, Road, ended, request, running_road

QUICK = {"retry_delay_s": 0.2, "rpc_timeout_s": 10.0}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def road(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Road]:
    """One running consortium for all tests of this folder that do not harm it. East's key broker is hosted."""
    overrides = {
        "gateway": {"precheck_retry_s": 0.2, "key_broker_timeout_s": 3.0},
        "worker-1": QUICK,
        "worker-2": QUICK,
    }
    async with running_road(tmp_path_factory.mktemp("road") / "stack", overrides=overrides, hosted=("east",)) as found:
        yield found


@dataclass(frozen=True)
class Trained:
    """A job of clara's on data of north and south, sealed, and its result."""

    datasets: list[str]
    request: dict[str, Any]
    submission: Submission
    result: cm.Result


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def trained(road: Road) -> Trained:
    """One job that was done, for tests of what may be done with it."""
    datasets = await road.push("shared", "north", "south")
    wanted = request(datasets, job_id=secrets.token_hex(16))
    async with road.connected(SCIENTIST) as consortium:
        job = await consortium.train(**wanted)
        assert (await ended(job)).state == "sealed"
        known = consortium._session.state.job(job.id)
        assert known is not None
        return Trained(datasets, wanted, known.submission, await job.result())
