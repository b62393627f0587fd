"""Jobs that people must approve, on a whole consortium of real programs, by the commands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import casemate as cm
import pytest
import pytest_asyncio
from casemate.client import Consortium
from casemate.identity import load_keys, new_person, save_keys
from casemate.jobs import Job
from casemate_schemas.errors import AuthenticationError, CasemateError, ConflictError, LicenceError, NotFoundError
from casemate_schemas.identity import Role
from support.road import COLLEAGUE, SCIENTIST, Road, casemate, ended, licence, request, running_road, until

PEOPLE: dict[str, tuple[Role, ...]] = {
    "nora@north": ("steward",),
    "nils@north": ("steward",),
    "nell@north": ("steward",),
    "erik@east": ("steward",),
    "sam@university": ("admin",),
}
QUICK = {"gateway": {"precheck_retry_s": 0.2}, "worker-1": {"retry_delay_s": 0.2}}
EXAMPLE = licence("any@north")


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def road(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Road]:
    """A consortium of its own: people are revoked in it."""
    folder = tmp_path_factory.mktemp("approvals") / "road"
    async with running_road(
        folder, members=("north", "east", "university"), workers=1, overrides=QUICK, more_people=PEOPLE
    ) as running:
        yield running


async def push(road: Road, name: str) -> list[str]:
    """North's data, whose training two stewards must approve, each beside another of the same member."""
    asked = cm.Approvals(count=2, by=cm.RoleIs(principal="approver", role="steward"), four_eyes=True, valid_s=24 * 3600)
    permissions = tuple(
        item.model_copy(update={"approvals": asked}) if item.action == "train" else item for item in EXAMPLE.permissions
    )
    return await road.push(name, "north", permissions=permissions)


async def submitted(consortium: Consortium, datasets: list[str]) -> Job:
    """A job that is known to wait for people: its submitter is told for whom."""
    job = await consortium.train(**request(datasets))
    await told(job, "0 of 2")
    return job


async def told(job: Job, words: str) -> None:
    """The submitter reads these words of north's."""
    async with asyncio.timeout(30), aclosing(job.events()) as changes:
        async for _ in changes:
            if words in job.awaited(await job.status()).get("north", ""):
                return


def claimed(road: Road) -> list[Any]:
    """What workers were given to do so far."""
    lines = (road.layout.logs / "worker-1.log").read_text().splitlines()
    return [event for event in map(json.loads, lines) if "job_id" in event]


async def test_two_people_of_one_member_let_a_job_run(road: Road) -> None:
    """It waits without a worker; one person counts once, one of another member not at all; then it runs to its result."""
    datasets = await push(road, "approved")
    async with road.connected(SCIENTIST) as consortium:
        job = await submitted(consortium, datasets)
        assert "cardio" not in await casemate(road, "nora@north", "approvals", "list")
        (item,) = json.loads(await casemate(road, "nora@north", "approvals", "list", "--json"))["pending"]
        assert (item["job_id"], item["submitter"], item["datasets"]) == (job.id, SCIENTIST, datasets)
        shown = await casemate(road, "nora@north", "approvals", "show", job.id)
        for words in (
            f"{SCIENTIST} asks to train, for research",
            "approved@north: ε ",
            "ε 0 of 40 were spent before it",
            "lets scientists list approved@north",
            "to train: 0 of 2 approvals",
            f"released: weights, to {SCIENTIST}",
        ):
            assert words in shown, shown
        with pytest.raises(NotFoundError):
            await casemate(road, COLLEAGUE, "approvals", "show", job.id)
        asked = await casemate(road, "nora@north", "approvals", "approve", job.id, stdin="y\n")
        assert "Approve it as nora@north?" in asked and "to train: 1 of 2 approvals" in asked
        await told(job, "approved@north has 1 of 2 to train")
        assert "1 of 2" in await casemate(road, SCIENTIST, "jobs", "status", job.id)
        for person in ("nora@north", "erik@east"):
            (after,) = json.loads(await casemate(road, person, "approvals", "approve", job.id, "--yes", "--json"))
            assert (after["state"], after["uses"][0]["awaited"][0]["missing"]) == ("awaiting", 1)
        status = await job.status()
        assert (status.state, status.attempt) == ("awaiting_approval", 0) and claimed(road) == []
        (after,) = json.loads(await casemate(road, "nils@north", "approvals", "approve", job.id, "--yes", "--json"))
        assert after["state"] == "approved"
        assert (await ended(job)).state == "sealed"
        assert (await job.result()).verification
    assert await road.charged(datasets) == [[job.id]]


async def test_one_no_ends_a_job(road: Road) -> None:
    datasets = await push(road, "denied")
    async with road.connected(SCIENTIST) as consortium:
        job = await submitted(consortium, datasets)
        await casemate(road, "nora@north", "approvals", "approve", job.id, "--yes")
        refused = await casemate(road, "nils@north", "approvals", "deny", job.id, "--yes")
        assert "is denied" in refused and "nils@north denied it" in refused
        status = await ended(job)
        assert (status.state, status.reason, status.attempt) == ("refused", "licence_forbids", 0)
        assert job.refusals(status) == {"north": "nils@north denied this job"}
        with pytest.raises(LicenceError, match="nils@north denied"):
            await job.result()
    assert await road.charged(datasets) == [[]]


async def test_a_lost_key_is_one_revocation(road: Road, tmp_path: Path) -> None:
    """Of an approver: what they said counts no longer, nor can they say more. Of the scientist: the job is refused."""
    datasets = await push(road, "revoked")
    async with road.connected(SCIENTIST) as consortium, road.connected("nell@north") as lost:
        job = await submitted(consortium, datasets)
        await casemate(road, "nell@north", "approvals", "approve", job.id, "--yes")
        await told(job, "1 of 2")
        (still,) = await lost.approval(job.id)
        north = str(road.layout.member_keys("north"))
        with pytest.raises(AuthenticationError, match="not signed by its member"):
            await casemate(
                road, "sam@north", "identity", "revoke", "nell", "--key", str(road.layout.member_keys("east"))
            )
        words = await casemate(road, "sam@north", "identity", "revoke", "nell", "--key", north)
        assert "delegations of nell@north that begin before" in words
        with pytest.raises(AuthenticationError, match="revoked"):
            await lost.deny(still)
        log = road.layout.logs / "key-broker-north.log"
        await until(lambda: '"event":"revocation"' in log.read_text(), "north to have heard of it")
        (after,) = json.loads(await casemate(road, "nils@north", "approvals", "approve", job.id, "--yes", "--json"))
        assert (after["state"], [(given["person"], given["counts"]) for given in after["given"]]) == (
            "awaiting",
            [("nell@north", False), ("nils@north", True)],
        )
        await casemate(road, "sam@university", "identity", "revoke", "clara", "--key", _keys(road, "university"))
        with pytest.raises(CasemateError, match="revoked"):
            await consortium.train(**request(datasets))
        await until(
            lambda: '"event":"revocation","member":"university"' in log.read_text(), "north to have heard of clara"
        )
        await casemate(road, "nora@north", "approvals", "approve", job.id, "--yes")
    university = load_keys(road.layout.member_keys("university"))
    again = new_person(
        university, consortium=bytes.fromhex(consortium.id), member="university", person="clara", roles=("scientist",)
    )
    save_keys(tmp_path / "clara.key", again)
    async with road.connected(SCIENTIST, identity=tmp_path / "clara.key", state_dir=tmp_path) as renewed:
        status = await ended(await renewed.job(job.id))
        assert (status.state, status.reason, status.attempt) == ("refused", "not_authenticated", 0)
        job = await submitted(renewed, datasets)
        for person in ("nora@north", "nils@north"):
            await casemate(road, person, "approvals", "approve", job.id, "--yes")
        assert (await ended(job)).state == "sealed"
        with pytest.raises(ConflictError, match="given the keys already"):
            await _denied(road, "nora@north", job)
    assert await road.charged(datasets) == [[job.id]]


async def _denied(road: Road, person: str, job: Job) -> None:
    """The person denies a job that waits no more, by its terms."""
    terms = job._expected().terms
    assert terms is not None
    async with road.connected(person) as consortium:
        (shown,) = await consortium.approval(terms.hex())
        await consortium.deny(shown)


def _keys(road: Road, member: str) -> str:
    return str(road.layout.member_keys(member))
