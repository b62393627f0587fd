"""Jobs for later: key brokers are asked at once, and no worker begins before its time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from support.road import SCIENTIST, Road, ended, request

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_job_for_later_is_approved_at_once_and_begun_by_no_worker_before_its_time(road: Road) -> None:
    datasets = await road.push("scheduled", "north")
    async with road.connected(SCIENTIST) as consortium:
        tomorrow = await consortium.train(
            **request(datasets, not_before=datetime.now(UTC) + timedelta(hours=23), priority="high")
        )
        async for event in tomorrow.events():
            if event.state == "queued":
                break
        begins = datetime.now(UTC) + timedelta(seconds=3)
        soon = await consortium.train(**request(datasets, not_before=begins, priority="low"))
        assert (await ended(soon)).state == "sealed"
        times = {event.state: event.at async for event in soon.events()}
        assert begins.timestamp() * 1000 <= times["claimed"]
        assert (await tomorrow.status()).state == "queued"
        assert (await tomorrow.cancel()).state == "cancelled"
    assert await road.charged(datasets) == [[soon.id]]
