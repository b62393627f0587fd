"""What a worker checks of Grants, one wrong field at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from casemate_schemas.codec import digest_of, encode
from casemate_schemas.errors import ConflictError, MalformedError, ReleaseError, SealError, SignatureError
from casemate_schemas.evidence import Evidence
from casemate_schemas.grant import Grant, GrantHeader, GrantSecrets, grant_info
from casemate_schemas.sealing import SealingKey, seal_secret
from casemate_schemas.signatures import SigningKey, sign
from casemate_schemas.terms import Terms
from casemate_worker.attempt import Attempt
from casemate_worker.keys import Keys, check_cover, check_grant, committed_digest, request_grant
from support.results import Worker as Keeper
from support.results import World, unchanged

OTHER = b"\x0b" * 32
CONTENT_KEY = b"\x01" * 32
SHARE = b"\x02" * 32


@dataclass(frozen=True)
class Case:
    """A worker's evidence and the Grant that north gave for it."""

    w: World
    worker: Keeper
    evidence: Evidence
    terms: Terms
    header: GrantHeader

    def check(self, **changed: Any) -> None:
        check_grant(self.header.model_copy(update=changed), "north", self.evidence, self.w.consortium)

    async def ask(self, answer: bytes) -> Keys:
        async def said(*_: object) -> bytes:
            return answer

        attempt: Any = Attempt(
            routing=None,
            consortium=self.w.consortium,
            number=1,
            record=None,
            signing=self.worker.keys.signing,  # type: ignore[arg-type]
            sealing=self.worker.keys.sealing,
        )
        keys = Keys()
        await request_grant("north", attempt, self.evidence, self.w.consortium, said, keys)
        return keys

    def answer(
        self,
        header: GrantHeader | None = None,
        *,
        keys: tuple[bytes, ...] = (CONTENT_KEY,),
        sealed_for: GrantHeader | None = None,
        sealed_to: SealingKey | None = None,
        signer: SigningKey | None = None,
    ) -> bytes:
        header = header or self.header
        info = grant_info(sealed_for or header)
        public = (sealed_to or self.worker.keys.sealing).public
        sealed = seal_secret(encode(GrantSecrets(content_keys=keys, seed_share=SHARE)), public, info=info)
        return encode(sign(Grant(header=header, sealed_secrets=sealed), signer or self.w.brokers["north"].signing))


@pytest.fixture
def case(w: World) -> Case:
    signed, worker = w.terms(), Keeper(1)
    evidence = w.evidence(worker, signed, unchanged, unchanged)
    header = w.grant("north", signed, evidence, unchanged).peek(Grant).header
    return Case(w, worker, evidence, signed.peek(Terms), header)


def test_the_right_grant_passes(case: Case) -> None:
    case.check()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("key_broker", "south", "key broker"),
        ("consortium", OTHER, "consortium"),
        ("manifest", OTHER, "manifest"),
        ("manifest_number", 2, "manifest number"),
        ("job_id", "f" * 32, "job"),
        ("terms", OTHER, "terms"),
        ("attempt", 2, "attempt"),
        ("evidence", OTHER, "evidence"),
        ("worker_key", OTHER, "worker key"),
    ],
)
def test_a_grant_with_one_wrong_field_is_refused(case: Case, field: str, value: object, named: str) -> None:
    with pytest.raises(ReleaseError, match=f"another {named} than"):
        case.check(**{field: value})


async def test_what_a_grant_holds_is_opened(case: Case) -> None:
    keys = await case.ask(case.answer())
    assert keys.content_key(case.header.envelopes[0]).to_bytes() == CONTENT_KEY
    assert (keys.shares, keys.headers["north"]) == ((SHARE,), case.header)
    with pytest.raises(ReleaseError):
        keys.content_key(OTHER)


async def test_a_grant_that_is_not_the_key_brokers_or_not_for_this_worker_is_refused(case: Case) -> None:
    """1. signature; 2. fields; 3. seal: to this key, for this header, one key an envelope."""
    attested = case.header.model_copy(update={"ledger_head": OTHER})
    wrong: list[tuple[type[Exception], bytes]] = [
        (SignatureError, case.answer(signer=case.w.brokers["south"].signing)),
        (SignatureError, case.answer(signer=case.worker.keys.signing)),
        (ReleaseError, case.answer(case.header.model_copy(update={"attempt": 2}))),
        (SealError, case.answer(sealed_to=SealingKey.generate())),
        (SealError, case.answer(attested, sealed_for=case.header)),
        (ReleaseError, case.answer(keys=(CONTENT_KEY, CONTENT_KEY))),
        (MalformedError, case.answer() + b"\x00"),
    ]
    for error, answer in wrong:
        with pytest.raises(error):
            await case.ask(answer)


def granted(case: Case, **changed: dict[str, Any]) -> Keys:
    """All three headers, some of them changed."""
    keys, signed = Keys(), case.w.terms()
    for name in case.terms.key_brokers:
        header = case.w.grant(name, signed, case.evidence, unchanged).peek(Grant).header
        keys.headers[name] = header.model_copy(update=changed.get(name, {}))
    return keys


def test_owners_grants_cover_what_the_terms_name(case: Case) -> None:
    check_cover(granted(case), case.terms)
    check_cover(granted(case, lab={"envelopes": (OTHER,)}), case.terms)
    for owner in ("north", "south"):
        for field in ("envelopes", "licences"):
            with pytest.raises(ReleaseError, match=owner):
                check_cover(granted(case, **{owner: {field: (OTHER,)}}), case.terms)


def test_a_key_broker_that_holds_a_commit_grants_no_dataset(case: Case) -> None:
    released: dict[str, Any] = {"envelopes": (), "committed": OTHER}
    check_cover(granted(case, north=released, south=released), case.terms)
    with pytest.raises(ReleaseError, match="north"):
        check_cover(granted(case, north=released | {"licences": (OTHER,)}), case.terms)
    with pytest.raises(ReleaseError, match="north"):
        check_cover(granted(case, north={"envelopes": ()}), case.terms)


def test_no_other_key_broker_covers_for_an_owner(case: Case) -> None:
    mine = granted(case).headers["north"]
    swapped = granted(case, north={"envelopes": (OTHER,)}, lab={"envelopes": mine.envelopes, "licences": mine.licences})
    with pytest.raises(ReleaseError, match="north"):
        check_cover(swapped, case.terms)


def test_the_first_key_broker_decides_what_is_committed(case: Case) -> None:
    result, rival = b"\x0c" * 32, b"\x0d" * 32
    assert case.terms.key_brokers[0] == "lab"
    assert committed_digest(granted(case), case.terms) is None
    for also in (
        {},
        {"north": {"committed": result}},
        {"north": {"committed": result}, "south": {"committed": result}},
    ):
        assert committed_digest(granted(case, lab={"committed": result}, **also), case.terms) == result
    for wrong in ({"north": {"committed": result}}, {"lab": {"committed": result}, "south": {"committed": rival}}):
        with pytest.raises(ConflictError):
            committed_digest(granted(case, **wrong), case.terms)


def test_the_resume_key_depends_on_every_share_and_the_terms(case: Case) -> None:
    shares = {"lab": b"a" * 32, "north": b"b" * 32}
    key = Keys(seed_shares=shares).resume_key(OTHER)
    assert key == Keys(seed_shares=dict(reversed(shares.items()))).resume_key(OTHER)
    others = [
        Keys(seed_shares=shares | {"lab": b"c" * 32}).resume_key(OTHER),
        Keys(seed_shares=shares | {"north": b"c" * 32}).resume_key(OTHER),
        Keys(seed_shares=shares | {"south": b"c" * 32}).resume_key(OTHER),
        Keys(seed_shares={"lab": b"a" * 32}).resume_key(OTHER),
        Keys(seed_shares=shares).resume_key(digest_of(case.terms)),
    ]
    assert key not in others and len(set(others)) == len(others)


async def test_secrets_do_not_show(case: Case) -> None:
    shown = repr(await case.ask(case.answer()))
    assert "north" in shown
    assert all(str(secret)[2:-1] not in shown and secret.hex() not in shown for secret in (CONTENT_KEY, SHARE))
