"""The quorum changes what it accepts, by the commands; everyone follows without a restart, and nobody goes back."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import casemate as cm
import pytest
from casemate.amendments import Proposal
from casemate.identity import load_keys, new_person, save_keys
from casemate_schemas import subjects
from casemate_schemas.api import CONSORTIUM_PATH, MANIFEST_PATH
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import ManifestChain, SignedManifest
from casemate_schemas.errors import ManifestError
from casemate_schemas.identity import Role
from support.road import SCIENTIST, Road, ask, casemate, ended, request, running_road, until

OFFICER, ADMIN = "sam@university", "sam@north"
"""The university's key broker is asked first, for the job's own key, so a bad worker is refused there."""
OTHER_IMAGE = "5a" * 48
PROGRAMS = ("key-broker-north", "key-broker-university", "worker-1")


def events(road: Road, program: str, name: str) -> list[dict[str, Any]]:
    """What a program logged under that name."""
    lines = (road.layout.logs / f"{program}.log").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


async def signed(road: Road, proposal: Path, *members: str) -> None:
    for member in members:
        await casemate(road, ADMIN, "consortium", "sign", str(proposal), "--key", str(road.layout.member_keys(member)))


async def moved_on(road: Road, number: int) -> None:
    """Every program has taken the manifest up, in the process that was there before."""
    await until(
        lambda: all(any(e["number"] == number for e in events(road, name, "manifest")) for name in PROGRAMS),
        f"everyone to follow manifest {number}",
    )


@pytest.fixture
async def road(tmp_path: Path) -> AsyncIterator[Road]:
    quick: dict[str, object] = {"manifest_poll_s": 0.1}
    overrides = {
        "gateway": {"precheck_retry_s": 0.2, **quick},
        "worker-1": {"retry_delay_s": 0.02, **quick},
        "north": quick,
        "university": quick,
    }
    members = ("north", "university")
    officer: dict[str, tuple[Role, ...]] = {OFFICER: ("admin",)}
    async with running_road(
        tmp_path / "stack", members=members, workers=1, overrides=overrides, more_people=officer
    ) as found:
        yield found


async def test_a_manifest_change_reaches_everyone_and_stays(road: Road, tmp_path: Path) -> None:
    """
    1. Under manifest 1 the worker is accepted. Key brokers tell their people so.
    2. Manifest 2 lists another image only. It takes the whole quorum; then the worker is refused, nothing restarted.
    3. Manifest 3 lists it again, and lets a member in: a job signed under manifest 1 goes on, and is done.
    4. The new member's scientist submits a job of their own.
    5. Manifests that were valid once are offered again, by all roads: nobody goes back, nor after a restart.
    """
    pids = {name: program.pid for name, program in road.stack.programs.items()}
    university = cm.MemberIs(principal="submitter", member="university")
    either = cm.AnyOf(rules=(university, cm.MemberIs(principal="submitter", member="west")))
    reader = cm.AnyOf(rules=tuple(cm.MemberIs(principal="recipient", member=m) for m in ("university", "west")))
    permissions = (
        cm.Permission(action="list", rule=cm.RoleIs(principal="submitter", role="scientist")),
        cm.Permission(action="train", rule=either),
        cm.Permission(action="read_result", rule=reader),
    )
    datasets = await road.push("shared", "north", permissions=permissions)
    async with road.connected(SCIENTIST) as consortium:
        first = await consortium.train(**request(datasets))  # 1
        assert (await ended(first)).state == "sealed"
        assert "✓ accepted" in await casemate(road, ADMIN, "workers", "list")
        await _amend_away(road, tmp_path)  # 2
        second = await consortium.train(**request(datasets))
        await until(
            lambda: any(e["reason"] == "evidence_outside_policy" for e in events(road, "worker-1", "gave_up")),
            "the worker to be refused",
        )
        (worker,) = json.loads(await casemate(road, OFFICER, "workers", "list", "--json"))["workers"]
        assert (worker["accepted"], worker["genuine"], worker["manifest_number"]) == (False, True, 2)
        assert [check["name"] for check in worker["failed"]] == ["measurement"]
        shown = await casemate(road, OFFICER, "workers", "list")
        assert "✗ refused" in shown and "measurement: expected 5a5a5a" in shown and "SIMULATED" in shown
        await _amend_back(road, tmp_path, image=worker["measurement"])  # 3
        assert (await ended(second)).state == "sealed"
        await second.result()
    await _newcomer_trains(road, tmp_path, datasets)  # 4
    assert pids == {name: program.pid for name, program in road.stack.programs.items()}
    await _offered_again(road)  # 5


async def _amend_away(road: Road, folder: Path) -> None:
    """Only another image is accepted from now on."""
    proposal, image = folder / "second", json.loads(await casemate(road, ADMIN, "consortium", "show", "--json"))
    (measurement,) = image["manifest"]["attestation"]["measurements"]
    told = await casemate(
        road,
        ADMIN,
        *("consortium", "amend", "--add-measurement", OTHER_IMAGE, "--remove-measurement", measurement),
        *("--out", str(proposal)),
    )
    assert f"+ attestation.measurements: {OTHER_IMAGE}" in told
    assert f"- attestation.measurements: {measurement}" in told
    await signed(road, proposal, "north")
    with pytest.raises(ManifestError, match="quorum of 2"):
        await casemate(road, ADMIN, "consortium", "publish", str(proposal))
    await _refused_by_the_gateway(road, proposal)
    await signed(road, proposal, "university")
    assert "manifest 2 is published" in await casemate(road, ADMIN, "consortium", "publish", str(proposal))
    await moved_on(road, 2)


async def _refused_by_the_gateway(road: Road, proposal: Path) -> None:
    """Also when the command's own check is left out."""
    lacking = decode(Proposal, proposal.read_bytes())
    body = encode(SignedManifest(payload=lacking.payload, signatures=lacking.signatures))
    status, problem, _ = await ask(road, load_keys(road.layout.person_keys(ADMIN)), "POST", MANIFEST_PATH, body)
    assert (status, problem["reason"]) == (409, "manifest_refused")


async def _amend_back(road: Road, folder: Path, *, image: str) -> None:
    """The installed image is accepted again, and a member more, with a key broker that is there already."""
    proposal, newcomer = folder / "third", folder / "west.member"
    await casemate(
        road, ADMIN, "consortium", "new-member", "west", "--key", str(folder / "west.key"), "--out", str(newcomer)
    )
    change = ("--add-measurement", image, "--add-member", str(newcomer), "--served-by", "university")
    told = await casemate(road, ADMIN, "consortium", "amend", *change, "--out", str(proposal))
    assert "+ key_brokers[university].serves: west" in told and "+ members[west].signing_key" in told
    await signed(road, proposal, "north", "university")
    await casemate(road, ADMIN, "consortium", "publish", str(proposal))
    await moved_on(road, 3)


async def _newcomer_trains(road: Road, folder: Path, datasets: list[str]) -> None:
    consortium = bytes.fromhex(road.layout.read_facts().consortium)
    west = load_keys(folder / "west.key")
    person = new_person(west, consortium=consortium, member="west", person="clara", roles=("scientist",))
    save_keys(folder / "clara.key", person)
    options = {"identity": folder / "clara.key", "state_dir": folder / "west-state"}
    async with road.connected("clara@west", **options) as connection:
        assert connection.manifest.number == 3
        job = await connection.train(**request(datasets))
        assert (await ended(job)).state == "sealed"
        assert (await job.result()).verification


async def _offered_again(road: Road) -> None:
    """By an admin, by NATS under the next number, and by the manifest file that was there at the founding."""
    admin = load_keys(road.layout.person_keys(ADMIN))
    _, _, body = await ask(road, admin, "GET", CONSORTIUM_PATH)
    chain = decode(ManifestChain, body)
    for older in chain.manifests:
        status, _, _ = await ask(road, admin, "POST", MANIFEST_PATH, encode(older))
        assert status == 200
    async with road.nats("gateway") as host:
        await host.jetstream().publish(subjects.manifest(4), encode(chain.manifests[1]))
    await until(lambda: all(events(road, name, "manifest_refused") for name in PROGRAMS), "everyone to refuse it")
    for name in PROGRAMS:
        os.kill(road.stack.programs[name].pid, signal.SIGKILL)
    await until(lambda: all(len(events(road, name, "ready")) == 2 for name in PROGRAMS), "all to be back")
    assert {events(road, name, "ready")[-1]["number"] for name in PROGRAMS} == {3}
    shown = json.loads(await casemate(road, ADMIN, "consortium", "show", "--json"))
    assert (shown["manifest"]["number"], shown["simulation"]) == (3, True)
    assert "west" in [member["id"] for member in shown["manifest"]["members"]]
    printed = await casemate(road, ADMIN, "consortium", "show")
    assert "SIMULATED" in printed and OTHER_IMAGE in printed and "member west" in printed
