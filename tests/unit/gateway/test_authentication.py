"""Who asks: each check of the authenticator, broken once."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from casemate_gateway.authentication import Authenticated, Authenticator, People
from casemate_gateway.limits import TokenBuckets
from casemate_schemas.codec import encode
from casemate_schemas.errors import AuthenticationError, CasemateError, MalformedError, SignatureError, ThrottledError
from casemate_schemas.grant import NonceRequest
from casemate_schemas.keyring import KeyRing
from casemate_schemas.signatures import sign
from hypothesis import given
from hypothesis import strategies as st
from support.consortium import DAY_MS, NOW_MS, ConsortiumKeys, PersonKeys, consortium_for_tests
from support.http import SignedRequest, signed_request

ORIGIN = "https://consortium.example"
JOBS = f"{ORIGIN}/v1/jobs"
NOW = NOW_MS + DAY_MS


class Nonces:
    """The contract of the nonce bucket, in memory."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    async def first_use(self, key: str) -> bool:
        new = key not in self.seen
        self.seen.add(key)
        return new


def tokens(count: int = 1000) -> TokenBuckets:
    """So many requests for each member, and no more: the clock stands still."""
    return TokenBuckets(1.0, count, lambda: 0.0)


@pytest.fixture
def keys() -> ConsortiumKeys:
    return consortium_for_tests()


@pytest.fixture
def clara(keys: ConsortiumKeys) -> PersonKeys:
    return keys.person("clara")


@pytest.fixture
def nonces() -> Nonces:
    return Nonces()


@pytest.fixture
def authenticator(keys: ConsortiumKeys, nonces: Nonces) -> Authenticator:
    return Authenticator(lambda: keys.consortium, nonces, tokens(), origin=ORIGIN, clock=lambda: NOW)  # type: ignore[arg-type]


def received(request: SignedRequest) -> web.Request:
    """The request as the server has it: the path without the origin."""
    return make_mocked_request(request.method, request.url.removeprefix(ORIGIN), headers=request.headers)


def by(person: PersonKeys, **options: object) -> SignedRequest:
    options = {"method": "POST", "url": JOBS, "body": b"body", "now_ms": NOW, **options}
    return signed_request(person.signing, person.delegation, **options)  # type: ignore[arg-type]


async def test_a_signed_request_is_its_signers(authenticator: Authenticator, clara: PersonKeys) -> None:
    found = await authenticator.authenticate(received(by(clara, url=JOBS + "?page=2&x=%20y")))
    assert found.person.signing_key == clara.signing.public
    assert (found.person.member, found.person.delegation.person) == ("clara", "someone")
    assert found.content_digest == hashlib.sha256(b"body").digest()


def header(person: PersonKeys) -> str:
    return base64.b64encode(encode(person.delegation)).decode()


def test_a_person_who_was_known_is_looked_at_again(keys: ConsortiumKeys, clara: PersonKeys) -> None:
    """The signature under a delegation is verified once a manifest; whether it still counts, each time."""
    people, consortium = People(), keys.consortium
    first = people.find(header(clara), consortium, at=NOW)
    assert people.find(header(clara), consortium, at=NOW) is first
    for changed, at in (
        (replace(consortium, revoked={("clara", "someone"): NOW_MS + 1}), NOW),
        (consortium, first.delegation.expires),
        (consortium, NOW_MS - DAY_MS),
        (replace(consortium, id=b"x" * 32), NOW),
    ):
        with pytest.raises(AuthenticationError):
            people.find(header(clara), changed, at=at)
    members = tuple(m.model_copy(update={"signing_key": b"k" * 32}) for m in consortium.manifest.members)
    rotated = consortium.manifest.model_copy(update={"members": members})
    with pytest.raises(AuthenticationError):
        people.find(header(clara), replace(consortium, manifest=rotated, digest=b"d" * 32), at=NOW)


def test_only_so_many_people_are_remembered_and_nobody_whom_no_member_knows(keys: ConsortiumKeys) -> None:
    people, verified = People(most=2), [keys.person("clara", name) for name in ("a", "b", "c")]
    found = [people.find(header(person), keys.consortium, at=NOW) for person in verified]
    assert people.find(header(verified[2]), keys.consortium, at=NOW) is found[2]
    assert people.find(header(verified[0]), keys.consortium, at=NOW) is not found[0]
    forged = keys.person("clara", signed_by=KeyRing.generate().signing)
    for _ in range(2):
        with pytest.raises(AuthenticationError):
            people.find(header(forged), keys.consortium, at=NOW)


@pytest.mark.parametrize("offset_s", [-60, 0, 60])
async def test_the_window_is_closed(authenticator: Authenticator, clara: PersonKeys, offset_s: int) -> None:
    assert isinstance(
        await authenticator.authenticate(received(by(clara, now_ms=NOW + offset_s * 1000))), Authenticated
    )


@pytest.mark.parametrize("offset_s", [-61, 61, -DAY_MS // 2000, DAY_MS])
async def test_outside_the_window(authenticator: Authenticator, clara: PersonKeys, offset_s: int) -> None:
    with pytest.raises(SignatureError):
        await authenticator.authenticate(received(by(clara, now_ms=NOW + offset_s * 1000)))


async def test_a_signature_past_its_own_expiry(authenticator: Authenticator, clara: PersonKeys) -> None:
    with pytest.raises(SignatureError):
        await authenticator.authenticate(received(by(clara, now_ms=NOW - 10_000, expires_ms=NOW - 1000)))


async def test_a_member_who_asks_too_often_is_told_to_wait_and_a_replay_costs_it_nothing(
    keys: ConsortiumKeys, clara: PersonKeys, nonces: Nonces
) -> None:
    authenticator = Authenticator(lambda: keys.consortium, nonces, tokens(2), origin=ORIGIN, clock=lambda: NOW)  # type: ignore[arg-type]
    first = received(by(clara))
    await authenticator.authenticate(first)
    for _ in range(5):
        with pytest.raises(AuthenticationError, match="received before"):
            await authenticator.authenticate(first)
    await authenticator.authenticate(received(by(clara)))
    third = received(by(clara))
    with pytest.raises(ThrottledError):
        await authenticator.authenticate(third)
    assert len(nonces.seen) == 2


async def test_a_replay_is_refused(authenticator: Authenticator, clara: PersonKeys, nonces: Nonces) -> None:
    request = by(clara)
    await authenticator.authenticate(received(request))
    with pytest.raises(AuthenticationError, match="received before"):
        await authenticator.authenticate(received(request))
    assert len(nonces.seen) == 1


async def test_a_nonce_is_its_signers_own(
    authenticator: Authenticator, keys: ConsortiumKeys, clara: PersonKeys
) -> None:
    nonce = "the-same-nonce-16"
    await authenticator.authenticate(received(by(clara, nonce=nonce)))
    await authenticator.authenticate(received(by(keys.person("north"), nonce=nonce)))


@pytest.mark.parametrize("nonce", ["", "short", "x" * 129])
async def test_unusable_nonces(authenticator: Authenticator, clara: PersonKeys, nonce: str) -> None:
    with pytest.raises(AuthenticationError, match="nonce"):
        await authenticator.authenticate(received(by(clara, nonce=nonce)))


async def test_an_unsigned_nonce_fills_no_store(
    authenticator: Authenticator, clara: PersonKeys, nonces: Nonces
) -> None:
    request = by(clara)
    request.method = "GET"
    with pytest.raises(SignatureError):
        await authenticator.authenticate(received(request))
    assert nonces.seen == set()


@pytest.mark.parametrize(
    "change",
    [
        {"method": "GET"},
        {"url": f"{ORIGIN}/v1/job"},
        {"url": f"{JOBS}?page=2"},
        {"url": f"{ORIGIN}/v1/%6Aobs"},
    ],
)
async def test_a_changed_request(authenticator: Authenticator, clara: PersonKeys, change: dict[str, str]) -> None:
    request = by(clara)
    for name, value in change.items():
        setattr(request, name, value)
    with pytest.raises(SignatureError):
        await authenticator.authenticate(received(request))


async def test_a_request_signed_for_another_gateway(authenticator: Authenticator, clara: PersonKeys) -> None:
    request = by(clara, url="https://elsewhere.example/v1/jobs")
    request.url = JOBS
    request.headers["Host"] = "elsewhere.example"
    with pytest.raises(SignatureError):
        await authenticator.authenticate(received(request))


async def test_a_changed_digest(authenticator: Authenticator, clara: PersonKeys) -> None:
    request = by(clara)
    request.headers["Content-Digest"] = by(clara, body=b"other").headers["Content-Digest"]
    with pytest.raises(SignatureError):
        await authenticator.authenticate(received(request))


async def test_a_changed_signature(authenticator: Authenticator, clara: PersonKeys) -> None:
    request = by(clara)
    request.headers["Signature"] = by(clara).headers["Signature"]
    with pytest.raises(SignatureError):
        await authenticator.authenticate(received(request))


@pytest.mark.parametrize("missing", ["@method", "@target-uri", "content-digest", "casemate-delegation"])
async def test_an_uncovered_component(authenticator: Authenticator, clara: PersonKeys, missing: str) -> None:
    covered = ("@method", "@target-uri", "content-digest", "casemate-delegation")
    request = by(clara, components=tuple(name for name in covered if name != missing))
    with pytest.raises(SignatureError):
        await authenticator.authenticate(received(request))


@pytest.mark.parametrize("wrong", [{"label": "other"}, {"tag": "casemate-v2"}, {"key_id": "00" * 32}])
async def test_another_label_tag_or_key(authenticator: Authenticator, clara: PersonKeys, wrong: dict[str, str]) -> None:
    with pytest.raises(SignatureError):
        await authenticator.authenticate(received(by(clara, **wrong)))


@pytest.mark.parametrize("name", ["Signature", "Signature-Input"])
async def test_no_signature(authenticator: Authenticator, clara: PersonKeys, name: str) -> None:
    request = by(clara)
    del request.headers[name]
    with pytest.raises(SignatureError):
        await authenticator.authenticate(received(request))


@pytest.mark.parametrize("name", ["Content-Digest", "Casemate-Delegation"])
async def test_no_digest_or_delegation(authenticator: Authenticator, clara: PersonKeys, name: str) -> None:
    request = by(clara)
    del request.headers[name]
    with pytest.raises((AuthenticationError, SignatureError)):
        await authenticator.authenticate(received(request))


@pytest.mark.parametrize(
    "digest",
    [
        "sha-512=:" + base64.b64encode(b"x" * 64).decode() + ":",
        "sha-256=:" + base64.b64encode(b"x" * 31).decode() + ":",
        "sha-256=1",
        "sha-256",
        "nonsense ::",
        "sha-256=:"
        + base64.b64encode(b"x" * 32).decode()
        + ":, sha-512=:"
        + base64.b64encode(b"x" * 64).decode()
        + ":",
    ],
)
async def test_a_digest_of_another_kind(authenticator: Authenticator, clara: PersonKeys, digest: str) -> None:
    with pytest.raises(AuthenticationError, match="Content-Digest"):
        await authenticator.authenticate(received(by(clara, digest=digest)))


@pytest.mark.parametrize(
    "delegation",
    [
        {"member": "north", "signed_by": "clara"},
        {"member": "clara", "not_before": NOW - 31 * DAY_MS},
        {"member": "clara", "not_before": NOW + DAY_MS},
        {"member": "clara", "consortium": b"\x07" * 32},
        {"member": "nobody", "signed_by": "clara"},
    ],
    ids=["another member's", "expired", "not yet valid", "another consortium", "no member"],
)
async def test_a_delegation_that_does_not_hold(
    authenticator: Authenticator, keys: ConsortiumKeys, delegation: dict[str, object]
) -> None:
    if signer := delegation.pop("signed_by", None):
        delegation = {**delegation, "signed_by": keys.members[str(signer)].signing}
    with pytest.raises(AuthenticationError):
        await authenticator.authenticate(received(by(keys.person(**delegation))))  # type: ignore[arg-type]


async def test_a_delegation_that_its_person_signed(authenticator: Authenticator, keys: ConsortiumKeys) -> None:
    own = KeyRing.generate()
    with pytest.raises(AuthenticationError):
        await authenticator.authenticate(received(by(keys.person("clara", keys=own, signed_by=own.signing))))


async def test_somebody_elses_delegation(authenticator: Authenticator, keys: ConsortiumKeys, clara: PersonKeys) -> None:
    north = keys.person("north")
    with pytest.raises(SignatureError):
        await authenticator.authenticate(received(by(PersonKeys(north.keys, clara.delegation))))


async def test_a_signed_message_that_is_no_delegation(authenticator: Authenticator, keys: ConsortiumKeys) -> None:
    clara = keys.person("clara")
    other = sign(NonceRequest(job_id="0" * 32, terms=b"t" * 32, attempt=1), keys.members["clara"].signing)
    with pytest.raises((AuthenticationError, SignatureError)):
        await authenticator.authenticate(received(by(PersonKeys(clara.keys, other))))


@pytest.mark.parametrize("value", ["", "%%%", "AAAA", base64.b64encode(b"x" * 9000).decode()])
async def test_a_header_that_holds_no_delegation(authenticator: Authenticator, clara: PersonKeys, value: str) -> None:
    request = by(clara)
    request.headers["Casemate-Delegation"] = value
    with pytest.raises(AuthenticationError):
        await authenticator.authenticate(received(request))


async def test_an_absolute_request_target(authenticator: Authenticator, clara: PersonKeys) -> None:
    request = by(clara)
    raw = make_mocked_request("POST", JOBS, headers=request.headers)
    with pytest.raises((MalformedError, SignatureError)):
        await authenticator.authenticate(raw)


@given(
    signature_input=st.text(st.characters(codec="ascii", exclude_categories=("Cc",)), max_size=200),
    signature=st.text(st.characters(codec="ascii", exclude_categories=("Cc",)), max_size=200),
    digest=st.text(st.characters(codec="latin-1", exclude_categories=("Cc",)), max_size=100),
)
def test_no_header_leads_outside_the_error_tree(signature_input: str, signature: str, digest: str) -> None:
    keys = consortium_for_tests()
    authenticator = Authenticator(lambda: keys.consortium, Nonces(), tokens(), origin=ORIGIN, clock=lambda: NOW)  # type: ignore[arg-type]
    request = by(_CLARA)
    request.headers |= {"Signature-Input": signature_input, "Signature": signature, "Content-Digest": digest}
    with pytest.raises(CasemateError):
        authenticator.authenticate(received(request)).send(None)


_CLARA = consortium_for_tests().person("clara")


def test_delegations_fit_their_header() -> None:
    assert len(base64.b64encode(encode(_CLARA.delegation))) < 4096
