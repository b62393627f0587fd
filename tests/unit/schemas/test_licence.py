"""What licences allow: each rule, approvals, what results inherit, and the form they cross a wire in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import pytest
from casemate_schemas.approval import Approval, verify_approval
from casemate_schemas.codec import decode, digest_of, encode
from casemate_schemas.errors import (
    ApprovalMissingError,
    AuthenticationError,
    CasemateError,
    LicenceError,
    ParameterError,
    SignatureError,
)
from casemate_schemas.job import Plan
from casemate_schemas.keyring import KeyRing
from casemate_schemas.licence import (
    Action,
    Actor,
    AllOf,
    Allowed,
    AnyOf,
    Approvals,
    AtLeast,
    Awaiting,
    Before,
    DerivedLicence,
    ForPurpose,
    Licence,
    MemberIs,
    ModelLicence,
    Permission,
    Question,
    Refused,
    RoleIs,
    Rule,
    VerifiedApproval,
    WithMeasurement,
    WithModel,
    check_licence,
    conjunction,
    evaluate,
    evaluate_all,
    obligation_of,
)
from casemate_schemas.lineage import Inherited, lineage_of
from casemate_schemas.result import ResultManifest
from casemate_schemas.signatures import SigningKey, sign
from pydantic import ValidationError

from .conftest import NOW as FOUNDED
from .conftest import Parties
from .test_terms import a_plan, a_use

NOW = 1000
CLARA = Actor("university", ("scientist",), "clara")
MAX = Actor("mallory-inc", ("scientist",), "max")
BY_UNIVERSITY = MemberIs(principal="submitter", member="university")
TO_UNIVERSITY = MemberIs(principal="recipient", member="university")
ACTIONS: tuple[Action, ...] = get_args(Action)


def licence(rule: Rule, action: Action = "train", /, approvals: Approvals | None = None, **changes: object) -> Licence:
    fields: dict[str, object] = {
        "number": 1,
        "dataset": "cardio@north",
        "permissions": (Permission(action=action, rule=rule, approvals=approvals),),
        "epsilon": 10.0,
        "epsilon_per_job": 3.0,
        "delta": 1e-3,
        "expires": 2000,
    }
    return Licence.model_validate({**fields, **changes})


def asks(**changes: Any) -> Question:
    return Question(**{"action": "train", "now": NOW, "submitter": CLARA, **changes})


SOMEBODY = (sign(licence(BY_UNIVERSITY), SigningKey.generate()),)


def allowed(rule: Rule, **question: Any) -> bool:
    return evaluate(licence(rule), asks(**question)) == Allowed()


@pytest.mark.parametrize(
    ("rule", "question", "expected"),
    [
        (BY_UNIVERSITY, {}, True),
        (BY_UNIVERSITY, {"submitter": MAX}, False),
        (RoleIs(principal="submitter", role="scientist"), {}, True),
        (RoleIs(principal="submitter", role="admin"), {}, False),
        (TO_UNIVERSITY, {"recipients": (CLARA,)}, True),
        (TO_UNIVERSITY, {"recipients": (CLARA, MAX)}, False),
        (TO_UNIVERSITY, {"recipients": ()}, False),
        (MemberIs(principal="approver", member="university"), {"recipients": (CLARA,)}, False),
        (ForPurpose(purpose="cardiology"), {"purpose": "cardiology"}, True),
        (ForPurpose(purpose="cardiology"), {"purpose": "marketing"}, False),
        (ForPurpose(purpose="cardiology"), {}, False),
        (Before(time=NOW + 1), {}, True),
        (Before(time=NOW), {}, False),
        (WithModel(model=b"m" * 32), {"model": b"m" * 32}, True),
        (WithModel(model=b"m" * 32), {"model": b"x" * 32}, False),
        (WithModel(model=b"m" * 32), {}, False),
        (WithMeasurement(measurement=b"m" * 48), {"measurement": b"m" * 48}, True),
        (WithMeasurement(measurement=b"m" * 48), {"measurement": b"x" * 48}, False),
        (WithMeasurement(measurement=b"m" * 48), {}, False),
        (WithMeasurement(measurement=b"m" * 48), {"no_worker_yet": True}, True),
        (AllOf(rules=(BY_UNIVERSITY, Before(time=NOW))), {}, False),
        (AnyOf(rules=(BY_UNIVERSITY, Before(time=NOW))), {}, True),
        (AtLeast(count=2, rules=(BY_UNIVERSITY, Before(time=NOW), Before(time=NOW + 1))), {}, True),
        (AtLeast(count=3, rules=(BY_UNIVERSITY, Before(time=NOW), Before(time=NOW + 1))), {}, False),
    ],
)
def test_each_rule_decides_as_it_says(rule: Rule, question: dict[str, object], expected: bool) -> None:
    assert allowed(rule, **question) is expected


def test_a_rule_is_judged_for_each_recipient_by_itself() -> None:
    """Readers of either lab may read together; one of neither spoils it."""
    rule = AnyOf(rules=(TO_UNIVERSITY, MemberIs(principal="recipient", member="mallory-inc")))
    stranger = Actor("elsewhere", ("scientist",))
    for recipients, expected in (((CLARA, MAX), True), ((CLARA, stranger), False), ((), False)):
        assert allowed(rule, recipients=recipients) is expected


@pytest.mark.parametrize(
    ("changes", "question", "words"),
    [
        ({}, {"action": "list"}, "no permission to list"),
        ({}, {"now": 2000}, "expired"),
        ({"purposes": ("care", "research")}, {"purpose": "marketing"}, "for care or research only"),
        ({"purposes": ("research",)}, {}, "for research only"),
        ({}, {"submitter": MAX}, "does not let this party train"),
    ],
)
def test_what_forbids_is_named(changes: dict[str, object], question: dict[str, Any], words: str) -> None:
    with pytest.raises(LicenceError, match=words):
        check_licence(licence(BY_UNIVERSITY, **changes), asks(**question))
    check_licence(licence(BY_UNIVERSITY, purposes=("research",)), asks(purpose="research"))
    check_licence(licence(BY_UNIVERSITY, "list", purposes=("research",)), asks(action="list"))


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"epsilon_per_job": 11.0},
        {"delta": 0.0},
        {"delta": 1.0},
        {"permissions": ()},
        {
            "permissions": (
                Permission(action="train", rule=BY_UNIVERSITY),
                Permission(action="train", rule=TO_UNIVERSITY),
            )
        },
        {"dataset": "no-owner"},
        {"purposes": ("research", "care")},
        {"purposes": ("care", "care")},
        {"regions": ("Germany",)},
        {"regions": ("FR", "DE")},
        {"retention_days": 0},
        {"legal_basis": "x" * 201},
    ],
)
def test_senseless_licences_cannot_be_made(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        licence(BY_UNIVERSITY, **changes)


def test_an_empty_combination_cannot_be_made() -> None:
    for make in (lambda: AllOf(rules=()), lambda: AnyOf(rules=()), lambda: AtLeast(count=2, rules=(BY_UNIVERSITY,))):
        with pytest.raises(ValidationError):
            make()


def test_no_action_hands_out_raw_data() -> None:
    """Nothing that can be allowed, and nothing that a job can release, is a dataset."""
    assert set(ACTIONS) == {
        *("list", "train", "evaluate", "statistics"),
        *("predict", "deploy", "read_result", "read_metrics"),
    }
    with pytest.raises(ValidationError):
        Permission(action="read_data", rule=BY_UNIVERSITY)  # type: ignore[arg-type]
    plan = a_plan(SOMEBODY)
    for release in (("dataset",), ("columns",), ("weights", "columns")):
        with pytest.raises(ValidationError, match="release"):
            Plan(**{**dict(plan), "release": release})


# --- every rule kind x action x member, and what is derived, three levels deep -----------------------------------------

PEOPLE = {name: Actor(name, ("scientist",)) for name in ("north", "south", "lab", "east")}
MODEL, IMAGE = b"\x01" * 32, b"\x02" * 48
Seen = Callable[[str, str, str], bool]
"""What an oracle looks at: the submitter's member, the recipient's, and the circumstances in words."""

CIRCUMSTANCES: dict[str, dict[str, Any]] = {
    "usual": {"now": NOW, "purpose": "research", "model": MODEL, "measurement": IMAGE},
    "late": {"now": NOW + 500, "purpose": "research", "model": MODEL, "measurement": IMAGE},
    "odd": {"now": NOW, "purpose": "marketing", "model": b"\x09" * 32, "measurement": b"\x09" * 48},
}


def _said(words: str, *, of: str = "submitter") -> Rule:
    return MemberIs(principal=of, member=words)  # type: ignore[arg-type]


KINDS: dict[str, tuple[Rule, Seen]] = {
    "member (submitter)": (_said("lab"), lambda s, r, c: s == "lab"),
    "member (recipient)": (_said("lab", of="recipient"), lambda s, r, c: r == "lab"),
    "role": (RoleIs(principal="submitter", role="steward"), lambda s, r, c: False),
    "role (recipient)": (RoleIs(principal="recipient", role="scientist"), lambda s, r, c: True),
    "for_purpose": (ForPurpose(purpose="research"), lambda s, r, c: c != "odd"),
    "before": (Before(time=NOW + 500), lambda s, r, c: c != "late"),
    "with_model": (WithModel(model=MODEL), lambda s, r, c: c != "odd"),
    "with_measurement": (WithMeasurement(measurement=IMAGE), lambda s, r, c: c != "odd"),
    "all_of": (AllOf(rules=(_said("south"), _said("lab", of="recipient"))), lambda s, r, c: (s, r) == ("south", "lab")),
    "any_of": (AnyOf(rules=(_said("north"), _said("east"))), lambda s, r, c: s in "north east"),
    "at_least": (
        AtLeast(count=2, rules=(_said("south"), _said("east", of="recipient"), Before(time=NOW + 500))),
        lambda s, r, c: [s == "south", r == "east", c != "late"].count(True) > 1,
    ),
}


@dataclass(frozen=True)
class Made:
    """An artefact as the oracle sees it: what its own inputs were, and the rule kind if it is an owner's."""

    inputs: tuple[Made, ...] = ()
    kind: str = ""
    action: str = ""

    def lets(self, action: str, submitter: str, recipient: str, circumstances: str) -> bool:
        if self.inputs:
            return all(item.lets(action, submitter, recipient, circumstances) for item in self.inputs)
        return self.action == action and KINDS[self.kind][1](submitter, recipient, circumstances)

    def licence(self) -> Licence | DerivedLicence:
        if self.inputs:
            return conjunction(item.licence() for item in self.inputs)
        rule, action = KINDS[self.kind][0], self.action
        return licence(rule, action, dataset=f"{self.action.replace('_', '-')}@north")  # type: ignore[arg-type]


def _levels(kind: str, action: str) -> tuple[Made, ...]:
    """A dataset, and what was made of it with ever more parties' data: trained, fine-tuned, predicted."""
    data = Made(kind=kind, action=action)
    kinds = list(KINDS)
    partner = Made(kind=kinds[(kinds.index(kind) + 1) % len(kinds)], action=action)
    trained = Made((data, Made(kind="role (recipient)", action=action)))
    tuned = Made((trained, Made(kind="with_model", action=action)))
    return data, trained, tuned, Made((tuned, Made((partner,)), data))


@pytest.mark.parametrize("kind", KINDS)
def test_table_of_every_rule_kind_action_member_and_level(kind: str) -> None:
    rows = held = 0
    for action in ACTIONS:
        for made in _levels(kind, action):
            own = made.licence()
            derived = own if isinstance(own, DerivedLicence) else conjunction([own])
            for asked, submitter, recipient, name in product(ACTIONS, PEOPLE, PEOPLE, CIRCUMSTANCES):
                question = Question(
                    action=asked,
                    submitter=PEOPLE[submitter],
                    recipients=(PEOPLE[recipient],),
                    **CIRCUMSTANCES[name],
                )
                expected = made.lets(asked, submitter, recipient, name)
                found = evaluate_all(derived, question)
                assert isinstance(found, Allowed) == expected, (kind, action, asked, submitter, recipient, name, found)
                rows, held = rows + 1, held + expected
    assert rows == 8 * 4 * 8 * 4 * 4 * 3
    assert (held == 0) == (kind == "role")


@pytest.mark.parametrize(
    ("level", "submitter", "recipient", "circumstances", "expected"),
    [
        (0, "south", "lab", "usual", True),
        (0, "south", "lab", "late", True),
        (0, "south", "lab", "odd", True),
        (0, "south", "east", "usual", False),
        (0, "lab", "lab", "usual", False),
        (1, "south", "lab", "usual", True),
        (1, "south", "north", "usual", False),
        (2, "south", "lab", "usual", True),
        (2, "south", "lab", "odd", False),
        (2, "north", "lab", "usual", False),
        (3, "south", "lab", "usual", False),
        (3, "north", "lab", "usual", False),
    ],
)
def test_rows_of_the_table_written_by_hand(
    level: int, submitter: str, recipient: str, circumstances: str, expected: bool
) -> None:
    """South trains for the lab under all_of(submitter south, recipient lab): fine-tuning adds a licence for one model
    only, and predicting adds one for submitters of north or east, whom the first licence does not let in."""
    own = _levels("all_of", "predict")[level].licence()
    derived = own if isinstance(own, DerivedLicence) else conjunction([own])
    people = {"submitter": PEOPLE[submitter], "recipients": (PEOPLE[recipient],)}
    question = Question(action="predict", **people, **CIRCUMSTANCES[circumstances])  # type: ignore[arg-type]
    assert isinstance(evaluate_all(derived, question), Allowed) is expected


def test_a_conjunction_is_flat_and_holds_each_licence_once() -> None:
    north, south = licence(BY_UNIVERSITY), licence(BY_UNIVERSITY, dataset="cardio@south")
    base = ModelLicence(number=1, model="base@east", digest=bytes(32), permissions=north.permissions, expires=1500)
    trained = conjunction([north, south])
    tuned = conjunction([trained, base, north])
    assert conjunction([tuned, trained]) == tuned == conjunction([base, south, north])
    assert {item.subject for item in tuned.licences} == {"cardio@north", "cardio@south", "base@east"}
    assert evaluate_all(trained, asks(now=1600)) == Allowed()
    assert evaluate_all(tuned, asks(now=1600)) == Refused("the licence of base@east has expired")
    many = [licence(BY_UNIVERSITY, number=number) for number in range(1, 258)]
    assert len(conjunction(many[:256]).licences) == 256
    for wrong in ([], many):
        with pytest.raises(LicenceError, match="inherits 1 to 256"):
            conjunction(wrong)


def test_the_lineage_of_a_result_names_every_dataset_behind_it() -> None:
    def use(owner: str, licence: bytes = bytes(32)) -> Inherited:
        return Inherited(subject=f"cardio@{owner}", licence=licence, key_broker=owner)

    trained = lineage_of(a_plan(SOMEBODY, a_use("north"), a_use("south")))
    assert trained == (use("north"), use("south"))
    tuned = lineage_of(a_plan(SOMEBODY, a_use("east", licence=b"2" * 32), a_use("north")), [trained])
    assert tuned == (use("east", b"2" * 32), use("north"), use("south"))
    predicted = lineage_of(a_plan(SOMEBODY, a_use("south", licence=b"3" * 32)), [tuned, trained])
    assert predicted == (*tuned, use("south", b"3" * 32))
    assert ResultManifest.model_fields["inherited"].default == ()
    many = tuple(use(f"o{number}") for number in range(256))
    with pytest.raises(LicenceError, match="at most 256"):
        lineage_of(a_plan(SOMEBODY, a_use("north")), [many])


# --- approvals ---------------------------------------------------------------------------------------------------------

STEWARD = RoleIs(principal="approver", role="steward")
TERMS = b"t" * 32


def approvals(count: int = 2, **changes: Any) -> Approvals:
    return Approvals(**{"count": count, "by": STEWARD, "valid_s": 3600, **changes})


def word(person: str, decision: str = "approve", *, at: int = NOW - 100, **changes: Any) -> VerifiedApproval:
    """``person@member``, a steward unless ``roles`` are given, about the licence of :func:`judged`."""
    name, _, member = person.partition("@")
    actor = Actor(member, changes.pop("roles", ("steward",)), name)
    fields = {"terms": TERMS, "licence": b"", "expires": NOW + 10_000_000}
    return VerifiedApproval(approver=actor, decision=decision, at=at, **{**fields, **changes})  # type: ignore[arg-type]


def judged(asked: Approvals, *words: VerifiedApproval, **question: Any) -> str | int:
    """How many are missing (0: allowed), or why it is refused."""
    own = licence(BY_UNIVERSITY, "train", asked, expires=NOW + 10_000_000)
    given = [item if item.licence else replace(item, licence=digest_of(own)) for item in words]
    match evaluate(own, asks(terms=TERMS, **question), given):
        case Refused(reason=reason):
            return reason
        case Awaiting(missing=(missing,)):
            assert (missing.subject, missing.action, missing.approvals) == ("cardio@north", "train", asked)
            return missing.count
    return 0


ANA, BEN, SAM, TIM = word("ana@north"), word("ben@north"), word("sam@south"), word("tim@south")


@pytest.mark.parametrize(
    ("words", "missing", "missing_of_four_eyes"),
    [
        ([], 2, 2),
        ([ANA], 1, 1),
        ([ANA, ANA], 1, 1),
        ([ANA, word("ana@north", at=NOW)], 1, 1),
        ([ANA, SAM], 0, 1),
        ([ANA, BEN], 0, 0),
        ([ANA, BEN, SAM], 0, 0),
        ([ANA, word("nora@north", roles=("admin", "scientist"))], 1, 1),
        ([ANA, word("ben@north", terms=b"u" * 32)], 1, 1),
        ([ANA, word("ben@north", licence=b"u" * 32)], 1, 1),
        ([ANA, word("ben@north", at=NOW + 1)], 1, 1),
        ([ANA, word("ben@north", expires=NOW)], 1, 1),
        ([ANA, word("ben@north", expires=NOW + 1)], 0, 0),
        ([ANA, word("ben@north", "deny", at=NOW - 200), BEN], 0, 0),
    ],
)
def test_approvals_add_up(words: list[VerifiedApproval], missing: int, missing_of_four_eyes: int) -> None:
    for order in (words, words[::-1]):
        assert judged(approvals(), *order) == missing
        assert judged(approvals(four_eyes=True), *order) == missing_of_four_eyes


def test_four_eyes_count_by_member() -> None:
    three = approvals(3, four_eyes=True)
    for words, missing in (([], 3), ([ANA], 2), ([ANA, BEN], 1), ([ANA, SAM], 2), ([ANA, BEN, SAM], 1)):
        assert judged(three, *words) == missing
    assert judged(three, ANA, BEN, SAM, TIM) == 0


def test_an_approval_lapses() -> None:
    asked, old = approvals(1, valid_s=60), word("ana@north", at=NOW)
    assert [judged(asked, old, now=NOW + 59_999), judged(asked, old, now=NOW + 60_000)] == [0, 1]


def test_nobody_approves_a_job_of_their_own() -> None:
    asked = approvals(1, by=RoleIs(principal="approver", role="scientist"))
    own, colleague = (word(f"{name}@university", roles=("scientist",)) for name in ("clara", "max"))
    assert [judged(asked, own), judged(asked, colleague)] == [1, 0]


def test_a_denial_ends_it_until_it_lapses_or_is_taken_back() -> None:
    no, asked = "sam@south denied this use of cardio@north", approvals()
    denied = word("sam@south", "deny")
    assert judged(asked, ANA, BEN, denied) == no
    assert judged(asked, ANA, BEN, denied, SAM) == no, "of two words of one moment the no counts"
    assert judged(asked, denied, word("sam@south", at=NOW - 50)) == 1
    assert judged(asked, SAM, word("sam@south", "deny", at=NOW - 50)) == no
    assert judged(asked, ANA, BEN, word("sam@south", "deny", roles=("scientist",))) == 0
    assert judged(asked, ANA, BEN, word("sam@south", "deny", expires=NOW)) == 0
    assert judged(asked, ANA, SAM, word("sam@south", "deny", at=NOW - 50, expires=NOW)) == 1, "the yes is not revived"


def test_what_is_refused_waits_for_nobody() -> None:
    asked = licence(BY_UNIVERSITY, "train", approvals())
    assert isinstance(evaluate(asked, asks(submitter=MAX, terms=TERMS)), Refused)
    south = licence(BY_UNIVERSITY, "train", approvals(1), dataset="cardio@south")
    both = evaluate_all(conjunction([asked, south]), asks(terms=TERMS))
    assert isinstance(both, Awaiting) and sorted(item.count for item in both.missing) == [1, 2]
    expired = licence(BY_UNIVERSITY, expires=NOW, dataset="cardio@east")
    assert isinstance(evaluate_all(conjunction([asked, expired]), asks(terms=TERMS)), Refused)
    with pytest.raises(ApprovalMissingError, match="cardio@north has 0 of 2 to train"):
        check_licence(asked, asks(terms=TERMS))


def test_a_signed_approval_is_a_persons_word_on_the_very_terms(parties: Parties) -> None:
    keys, delegation = parties.person("north", roles=("steward",))
    fields: dict[str, Any] = {
        "consortium": parties.consortium.id,
        "key_broker": "north",
        "job_id": "0" * 32,
        "terms": TERMS,
        "licence": bytes(32),
        "decision": "approve",
        "at": FOUNDED,
        "expires": FOUNDED + 1000,
    }

    def verified(signer: KeyRing = keys, now: int = FOUNDED, **changes: Any) -> VerifiedApproval:
        signed = sign(Approval(**{**fields, **changes}), signer.signing)
        about: dict[str, Any] = {"key_broker": "north", "job_id": "0" * 32, "terms": TERMS}
        return verify_approval(signed, delegation, parties.consortium, now=now, **about)

    found = verified()
    assert (found.approver, found.decision) == (Actor("north", ("steward",), "clara"), "approve")
    assert (found.terms, found.licence, found.at, found.expires) == (TERMS, bytes(32), FOUNDED, FOUNDED + 1000)
    wrong: list[tuple[type[CasemateError], dict[str, Any]]] = [
        (AuthenticationError, {"now": FOUNDED + 3_600_000}),
        (SignatureError, {"signer": KeyRing.generate()}),
        (AuthenticationError, {"consortium": bytes(32)}),
        (AuthenticationError, {"key_broker": "south"}),
        (ParameterError, {"job_id": "1" * 32}),
        (ParameterError, {"terms": bytes(32)}),
    ]
    for error, changes in wrong:
        with pytest.raises(error):
            verified(**changes)
    for expires in (FOUNDED, FOUNDED + 93 * 86_400_000):
        with pytest.raises(ValidationError):
            Approval(**{**fields, "expires": expires})


# --- forms -------------------------------------------------------------------------------------------------------------


def test_a_licence_keeps_its_value_in_every_form() -> None:
    everything = AllOf(rules=tuple(rule for rule, _ in KINDS.values()))
    asked = Approvals(count=2, by=STEWARD, four_eyes=True, valid_s=86_400)
    fields: dict[str, Any] = {"purposes": ("care", "research"), "legal_basis": "GDPR 9(2)(j)", "regions": ("DE", "FR")}
    full = licence(everything, "train", asked, **fields, retention_days=90, expires=1_800_000_000_001)
    model = ModelLicence(
        number=1, model="base@east", digest=b"\xff" * 32, permissions=full.permissions, expires=(1 << 48) - 1
    )
    for item in (full, model):
        assert decode(type(item), encode(item)) == item
        assert type(item).model_validate_json(item.model_dump_json()) == item
    text = full.model_dump_json()
    assert '"expires":"2027-01-15T08:00:00.001+00:00"' in text and f'"measurement":"{IMAGE.hex()}"' in text
    assert obligation_of(full).model_dump() == {"subject": "cardio@north", "retention_days": 90, **fields}
