"""A key broker restored from an older copy of its state meets its own newer head in NATS, and gives no keys."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from casemate_schemas.errors import RolledBackError
from casemate_schemas.requests import EndorseState, LedgerHead, ShowState, StateShown
from support.north import North


async def test_an_older_state_gives_no_keys_until_an_owner_endorses_it(north: North, tmp_path: Path) -> None:
    dataset = await north.register()
    jobs = [await north.accepted(dataset) for _ in range(2)]
    await north.grant(jobs[0])
    await north.process.stop()
    old = shutil.copytree(north.process.state_dir, tmp_path / "old")
    await north.process.start()
    grant = await north.grant(jobs[1])
    newest = await north.anchored()
    assert (newest.entries, newest.ledger) == (2, grant.header.ledger_head)

    await north.restarted_from(old)
    for job in jobs:
        with pytest.raises(RolledBackError):
            await north.grant(job, attempt=2)
    with pytest.raises(RolledBackError):
        await north.accepted(dataset)
    assert await north.anchored() == newest, "the newer head stays where others find it"
    shown = await north.steward(ShowState())
    assert isinstance(shown, StateShown) and shown.ahead is not None
    assert shown.ahead.peek(LedgerHead) == newest and shown.head.entries == 1

    endorsed = await north.steward(EndorseState(ahead=shown.ahead.digest))
    assert isinstance(endorsed, StateShown) and endorsed.ahead is None and endorsed.head.branch == 1
    await north.grant(jobs[1], attempt=2)
    assert (await north.anchored()).branch == 1
    await north.process.stop()
    await north.process.start()
    await north.grant(jobs[1], attempt=3)

    await north.restarted_from(old)
    with pytest.raises(RolledBackError):
        await north.grant(jobs[0], attempt=3)


async def test_after_a_crash_and_in_its_newest_state_it_goes_on(north: North) -> None:
    dataset = await north.register()
    job = await north.accepted(dataset)
    await north.grant(job)
    await north.process.kill()
    await north.process.start()
    await north.grant(job, attempt=2)
    shown = await north.steward(ShowState())
    assert isinstance(shown, StateShown) and shown.ahead is None
