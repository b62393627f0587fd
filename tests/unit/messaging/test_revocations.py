"""What a program believes of revocations: the union of all that members signed, on the disk before it counts."""

from __future__ import annotations

from typing import Any

import pytest
from casemate_messaging import revocations as under_test
from casemate_messaging.direct import Stored
from casemate_messaging.logs import ProgramLog
from casemate_messaging.revocations import RevocationFollower, TrustedRevocations
from casemate_messaging.settings import ProgramSettings
from casemate_schemas.codec import encode
from casemate_schemas.consortium import Member, verify_delegation
from casemate_schemas.errors import AuthenticationError, IntegrityError, MalformedError, TooLargeError, UnavailableError
from casemate_schemas.identity import Revocation
from casemate_schemas.keyring import KeyRing
from casemate_schemas.signatures import Signed, sign
from support.consortium import NOW_MS, amended, consortium_for_tests

KEYS = consortium_for_tests()
NORA = KEYS.person("north", "nora")


def revocation(member: str = "north", person: str = "nora", *, by: KeyRing | None = None, **changed: Any) -> Signed:
    fields: dict[str, Any] = {
        "consortium": KEYS.consortium.id,
        "member": member,
        "person": person,
        "before": NOW_MS + 1,
        "created": NOW_MS,
    }
    return sign(Revocation(**(fields | changed)), (by or KEYS.members[member]).signing)


def trusted(**options: Any) -> TrustedRevocations:
    return TrustedRevocations(lambda: (KEYS.consortium,), **options)


def is_revoked(revocations: TrustedRevocations, person: str = "nora", *, begins: int = NOW_MS) -> bool:
    signed = KEYS.person("north", person, not_before=begins).delegation
    try:
        verify_delegation(signed, revocations.applied_to(KEYS.consortium), at=begins)
    except AuthenticationError as error:
        return "north has revoked" in str(error)
    return False


def test_it_ends_what_began_before_and_nothing_else() -> None:
    revocations = trusted()
    assert not is_revoked(revocations)
    assert revocations.offer(revocation())
    assert is_revoked(revocations) and not is_revoked(revocations, begins=NOW_MS + 1)
    assert not is_revoked(revocations, "nils")
    other = KEYS.person("south", "nora").delegation
    assert verify_delegation(other, revocations.applied_to(KEYS.consortium), at=NOW_MS).member == "south"


def test_it_only_grows() -> None:
    """In whatever order, and however often."""
    early, late = revocation(before=NOW_MS - 5), revocation(before=NOW_MS + 5)
    for order in ((early, late), (late, early)):
        revocations = trusted()
        assert [revocations.offer(item) for item in (*order, *order)] == [True, order[0] is early, False, False]
        assert is_revoked(revocations, begins=NOW_MS + 4) and not is_revoked(revocations, begins=NOW_MS + 5)


def test_only_a_members_own_word_about_its_own_people_counts() -> None:
    revocations = trusted()
    for wrong in (
        revocation(by=KEYS.members["south"]),
        revocation(by=NORA.keys),
        revocation(consortium=bytes(32)),
        revocation("nobody", by=KEYS.members["north"]),
    ):
        with pytest.raises(AuthenticationError):
            revocations.offer(wrong)
    with pytest.raises(AuthenticationError):
        revocations.offer(NORA.delegation)
    assert not is_revoked(revocations)


def test_it_is_kept_before_it_counts_and_heard_of_once_it_does() -> None:
    happened: list[str] = []

    def keep(found: Revocation, signed: Signed) -> None:
        happened.append(f"kept {found.person}, in force: {is_revoked(revocations)}")
        assert signed == revocation()

    revocations = trusted(keep=keep, after_news=lambda: happened.append(f"in force: {is_revoked(revocations)}"))
    revocations.offer(revocation())
    revocations.offer(revocation())
    assert happened == ["kept nora, in force: False", "in force: True"]

    def full(*_: object) -> None:
        raise UnavailableError("no room")

    revocations = trusted(keep=full)
    with pytest.raises(UnavailableError):
        revocations.offer(revocation())
    assert not is_revoked(revocations)


def test_what_was_kept_is_verified_again() -> None:
    assert is_revoked(trusted(known=[revocation()]))
    with pytest.raises(IntegrityError):
        trusted(known=[revocation(by=KEYS.members["south"])])


def test_it_outlives_its_members_key() -> None:
    new = KeyRing.generate()
    members = tuple(
        Member(id=m.id, name=m.name, signing_key=new.signing.public, sealing_key=new.sealing.public)
        if m.id == "north"
        else m
        for m in KEYS.consortium.manifest.members
    )
    later = amended(KEYS, members=members)
    both = TrustedRevocations(lambda: (KEYS.consortium, later.consortium), known=[revocation()])
    assert both.offer(revocation(person="nils", by=new)) and is_revoked(both) and is_revoked(both, "nils")


def test_one_member_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "MAX_PEOPLE", 2)
    revocations = trusted()
    assert all(revocations.offer(revocation(person=name)) for name in ("ann", "bob"))
    with pytest.raises(TooLargeError):
        revocations.offer(revocation())
    assert revocations.offer(revocation(person="bob", before=NOW_MS + 9))
    assert revocations.offer(revocation("south"))


class Stream:
    """What NATS holds, by sequence."""

    def __init__(self, *messages: bytes) -> None:
        self.messages = list(messages)
        self.asked: list[int] = []
        self.away = False

    async def read(self, start: int) -> list[Stored]:
        self.asked.append(start)
        if self.away:
            raise UnavailableError("away")
        return [Stored(n, data) for n, data in enumerate(self.messages, 1) if n >= start][:64]


def follower(revocations: TrustedRevocations, stream: Stream) -> RevocationFollower:
    settings = ProgramSettings.model_construct(manifest_poll_s=1.0)
    return RevocationFollower(revocations, stream, settings, ProgramLog("test"))  # type: ignore[arg-type]


async def test_it_reads_what_is_new_past_rubbish_and_all_of_it_now_and_then() -> None:
    revocations = trusted()
    junk = [b"", b"x" * 5000, encode(revocation(by=KEYS.members["south"]))] * 30
    stream = Stream(*junk, encode(revocation()))
    following = follower(revocations, stream)
    await following.catch_up()
    assert is_revoked(revocations) and stream.asked == [1, 65]
    stream.away = True
    await following.catch_up()
    stream.away = False
    stream.messages.append(encode(revocation(person="nils")))
    await following.catch_up()
    assert is_revoked(revocations, "nils") and stream.asked[2:] == [92, 92]
    stream.messages = [encode(revocation(person="nell"))]  # the store was set up anew
    for _ in range(28):
        await following.catch_up()
    assert is_revoked(revocations, "nell") and stream.asked.count(1) == 2


async def test_it_stops_the_program_if_the_disk_is_broken() -> None:
    def broken(*_: object) -> None:
        raise IntegrityError("broken")

    with pytest.raises(IntegrityError):
        await follower(trusted(keep=broken), Stream(encode(revocation()))).catch_up()


def test_rubbish_is_refused_by_its_type() -> None:
    with pytest.raises((MalformedError, AuthenticationError)):
        trusted().offer(sign(KEYS.consortium.manifest, KEYS.members["north"].signing))
