"""What a program believes of manifests: forward only, on the disk before it is used, whatever NATS or a file offers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from casemate_messaging.logs import ProgramLog
from casemate_messaging.manifests import FILE_NAME, ManifestFollower, TrustedManifests
from casemate_messaging.settings import ProgramSettings
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import Consortium, ManifestChain, SignedManifest
from casemate_schemas.errors import (
    CasemateError,
    IntegrityError,
    ManifestError,
    NotFoundError,
    SetupError,
    StorageFullError,
    UnavailableError,
)
from support.consortium import ConsortiumKeys, amended, consortium_for_tests

KEYS = consortium_for_tests()
SECOND = amended(KEYS, name="second")
THIRD = amended(SECOND, name="third")
FORK = amended(KEYS, name="another second")
QUORUM_LACKING = amended(KEYS, name="third", signers=("north", "south"))


def last(keys: ConsortiumKeys) -> SignedManifest:
    return keys.chain.manifests[-1]


def settings_in(folder: Path, chain: ManifestChain = KEYS.chain, *, keeps: bool = True) -> ProgramSettings:
    (folder / "manifest").write_bytes(encode(chain))
    return ProgramSettings(
        nats_url="nats://127.0.0.1:1",
        nats_seed_file=folder / "seed",
        consortium=KEYS.consortium.id.hex(),
        manifest_file=folder / "manifest",
        state_dir=folder / "state" if keeps else None,
    )


def test_it_goes_forward_one_by_one_and_never_back() -> None:
    manifests = TrustedManifests(KEYS.chain, KEYS.consortium.id)
    with pytest.raises(ManifestError, match="does not follow"):
        manifests.offer(last(THIRD))
    with pytest.raises(ManifestError, match="quorum"):
        manifests.offer(last(QUORUM_LACKING))
    assert manifests.offer(last(SECOND)) and manifests.offer(last(THIRD))
    assert manifests.current == THIRD.consortium
    assert [version.manifest.number for version in manifests.versions] == [1, 2, 3]
    for older in (KEYS, SECOND, THIRD):
        assert not manifests.offer_chain(older.chain)
    assert manifests.current == THIRD.consortium
    assert decode(ManifestChain, manifests.encoded) == THIRD.chain


@pytest.mark.parametrize("offered", [last(FORK), FORK.chain])
def test_a_fork_is_refused_however_it_comes(offered: SignedManifest | ManifestChain) -> None:
    manifests = TrustedManifests(SECOND.chain, KEYS.consortium.id)
    with pytest.raises(ManifestError, match="fork"):
        manifests.offer_chain(offered) if isinstance(offered, ManifestChain) else manifests.offer(offered)
    assert manifests.current == SECOND.consortium


def test_a_restart_does_not_go_back_behind_what_was_accepted(tmp_path: Path) -> None:
    """The manifest file may stay at the first version for ever."""
    settings = settings_in(tmp_path)
    TrustedManifests.open(settings).offer_chain(THIRD.chain)
    assert TrustedManifests.open(settings).current == THIRD.consortium
    settings_in(tmp_path, FORK.chain)
    with pytest.raises(ManifestError, match="fork"):
        TrustedManifests.open(settings)
    settings_in(tmp_path, amended(THIRD, name="fourth").chain)
    assert TrustedManifests.open(settings).current.manifest.number == 4
    (tmp_path / "state" / FILE_NAME).write_bytes(b"rubbish")
    with pytest.raises(IntegrityError):
        TrustedManifests.open(settings)


def test_what_cannot_be_kept_or_used_is_not_accepted(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    manifests = TrustedManifests.open(settings)

    def refuse(consortium: Consortium) -> None:
        kept = (tmp_path / "state" / FILE_NAME).read_bytes()
        assert decode(ManifestChain, kept) == SECOND.chain, "on the disk before it is used"
        assert consortium == SECOND.consortium and manifests.current == KEYS.consortium
        raise SetupError("cannot go on")

    manifests.before_use = refuse
    with pytest.raises(SetupError, match="cannot go on"):
        manifests.offer(last(SECOND))
    assert manifests.current == KEYS.consortium
    (tmp_path / "state" / FILE_NAME).unlink()
    (tmp_path / "state" / FILE_NAME).mkdir()
    with pytest.raises(StorageFullError):
        manifests.offer(last(SECOND))
    assert manifests.current == KEYS.consortium


class Store:
    """NATS: what it answers for each number; anything that is no manifest is raised."""

    def __init__(self, **stored: Any) -> None:
        self.stored: dict[int, SignedManifest | CasemateError] = {int(name[1:]): item for name, item in stored.items()}

    async def get(self, number: int) -> SignedManifest:
        found = self.stored.get(number, NotFoundError("none"))
        if isinstance(found, CasemateError):
            raise found
        return found


def follower(store: Store, folder: Path) -> tuple[TrustedManifests, ManifestFollower]:
    settings = settings_in(folder, keeps=False)
    manifests = TrustedManifests.open(settings)
    loose: Any = store
    return manifests, ManifestFollower(manifests, loose, settings, ProgramLog("test"))


def logged(capfd: pytest.CaptureFixture[str]) -> list[tuple[str, str, int, str | None]]:
    events = map(json.loads, capfd.readouterr().err.splitlines())
    return [(event["level"], event["event"], event["number"], event.get("reason")) for event in events]


async def test_it_catches_up_over_nats(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = Store(n2=last(SECOND), n3=last(THIRD))
    manifests, following = follower(store, tmp_path)
    assert await following.catch_up()
    assert manifests.current == THIRD.consortium
    assert not await following.catch_up()
    assert logged(capfd) == [("info", "manifest", 3, None)]


@pytest.mark.parametrize(
    "offered", [last(KEYS), last(SECOND), last(FORK), last(QUORUM_LACKING)], ids=["first", "same", "fork", "no quorum"]
)
async def test_an_older_chain_a_fork_or_too_few_hands_are_logged_once_and_change_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], offered: SignedManifest
) -> None:
    """A hostile NATS answers with what it likes; once it answers rightly, the program moves on."""
    store = Store(n2=last(SECOND), n3=offered)
    manifests, following = follower(store, tmp_path)
    assert await following.catch_up()
    if offered is not last(SECOND):
        for _ in range(3):
            assert not await following.catch_up()
    assert manifests.current == SECOND.consortium
    told = logged(capfd)
    assert told[-1] == ("info", "manifest", 2, None)
    assert [event for event in told if event[1] == "manifest_refused"] == [
        ("error", "manifest_refused", 3, "manifest_refused")
    ]
    store.stored[3] = last(THIRD)
    assert await following.catch_up()
    assert manifests.current == THIRD.consortium


async def test_what_is_withheld_can_come_by_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = Store(n2=UnavailableError("away"))
    manifests, following = follower(store, tmp_path)
    assert not await following.catch_up()
    settings_in(tmp_path, SECOND.chain)
    assert await following.catch_up()
    assert manifests.current == SECOND.consortium
    settings_in(tmp_path, FORK.chain)
    assert not await following.catch_up()
    (tmp_path / "manifest").unlink()
    assert not await following.catch_up()
    store.stored[3] = last(THIRD)
    assert await following.catch_up()
    assert [event[1:] for event in logged(capfd)] == [
        ("manifest_refused", 2, "unavailable"),
        ("manifest", 2, None),
        ("manifest_refused", 3, "manifest_refused"),
        ("manifest_refused", 3, "unavailable"),
        ("manifest", 3, None),
    ]


async def test_a_program_that_cannot_go_on_is_told(tmp_path: Path) -> None:
    manifests, following = follower(Store(n2=last(SECOND)), tmp_path)

    def refuse(_: Consortium) -> None:
        raise SetupError("not listed any more")

    manifests.before_use = refuse
    with pytest.raises(SetupError, match="not listed"):
        await following.catch_up()
