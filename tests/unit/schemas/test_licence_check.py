"""Which licences nobody should sign, against brute force; and how the others read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, combinations, product
from typing import Any

import numpy as np
import pytest
from casemate_schemas.errors import ParameterError
from casemate_schemas.keyring import KeyRing
from casemate_schemas.licence import (
    Action,
    AllOf,
    AnyOf,
    Approvals,
    AtLeast,
    Before,
    ForPurpose,
    Leaf,
    Licence,
    MemberIs,
    ModelLicence,
    Permission,
    RoleIs,
    Rule,
    WithMeasurement,
    WithModel,
    leaves,
)
from casemate_schemas.licence_check import check_sound, sign_licence
from casemate_schemas.licence_text import describe
from hypothesis import example, given, settings
from hypothesis import strategies as st

NOW, EXPIRES = 1_790_000_000_000, 1_798_761_600_000
NAMES = {"north": "North Hospital", "south": "South Hospital", "uni": "the University"}
A, B = (MemberIs(principal="submitter", member=name) for name in ("uni", "south"))
TO_A, TO_B = (MemberIs(principal="recipient", member=name) for name in ("uni", "south"))
SCIENTIST = RoleIs(principal="submitter", role="scientist")
STEWARD = RoleIs(principal="approver", role="steward")
BY_NORTH = MemberIs(principal="approver", member="north")
RESEARCH, CARE = ForPurpose(purpose="research"), ForPurpose(purpose="care")
MODELS = [WithModel(model=bytes([i]) * 32) for i in range(4)]
IMAGES = [WithMeasurement(measurement=bytes([i]) * 48) for i in range(4)]
MEMBERS = [MemberIs(principal="submitter", member=f"m{i}") for i in range(70)]


def all_of(*rules: Rule) -> AllOf:
    return AllOf(rules=rules)


def any_of(*rules: Rule) -> AnyOf:
    return AnyOf(rules=rules)


def at_least(count: int, *rules: Rule) -> AtLeast:
    return AtLeast(count=count, rules=rules)


def licence(*permissions: Permission, **changes: Any) -> Licence:
    fields: dict[str, Any] = {
        "number": 1,
        "dataset": "cardio@north",
        "permissions": permissions,
        "epsilon": 10.0,
        "epsilon_per_job": 3.0,
        "delta": 1e-5,
        "expires": EXPIRES,
    }
    return Licence(**{**fields, **changes})


def may(action: Action, rule: Rule, approvals: Approvals | None = None) -> Permission:
    return Permission(action=action, rule=rule, approvals=approvals)


def approvals(by: Rule = STEWARD, **changes: Any) -> Approvals:
    return Approvals(**{"count": 2, "by": by, "valid_s": 3600, **changes})


SOUND: dict[str, Licence] = {
    "everyone's scientists, said so": licence(
        may("list", SCIENTIST), may("train", SCIENTIST), may("read_result", TO_A)
    ),
    "rules about both": licence(may("evaluate", any_of(all_of(A, TO_A), all_of(B, TO_B)))),
    "two of three": licence(may("evaluate", at_least(2, A, SCIENTIST, TO_B))),
    "a purpose of the licence's": licence(may("predict", all_of(A, RESEARCH)), purposes=("care", "research")),
    "until a time, then less": licence(
        may("train", any_of(all_of(A, Before(time=NOW + 1)), B)), may("read_result", TO_A)
    ),
    "images to choose from": licence(may("statistics", all_of(A, any_of(*IMAGES)))),
    "one model": licence(may("deploy", all_of(A, MODELS[0]))),
    "approvals": licence(may("evaluate", A, approvals(all_of(BY_NORTH, STEWARD), four_eyes=True))),
    "readers by submitter": licence(may("read_metrics", any_of(all_of(A, TO_B), all_of(B, TO_A)))),
    "64 rules": licence(may("evaluate", any_of(any_of(*MEMBERS[:32]), any_of(*MEMBERS[32:64])))),
}

UNSOUND: dict[str, tuple[Licence, str]] = {
    "expired": (licence(may("list", A), expires=NOW), "has expired"),
    "of two members": (licence(may("list", all_of(A, B))), "contradicts itself"),
    "readers of two members": (licence(may("read_result", all_of(TO_A, TO_B))), "contradicts itself"),
    "for two purposes": (licence(may("predict", all_of(A, RESEARCH, CARE))), "contradicts itself"),
    "a purpose the licence is not for": (
        licence(may("predict", all_of(A, CARE)), purposes=("research",)),
        "contradicts",
    ),
    "images that do not intersect": (
        licence(may("evaluate", all_of(A, any_of(*IMAGES[:2]), any_of(*IMAGES[2:])))),
        "contradicts itself",
    ),
    "two models": (licence(may("predict", all_of(A, *MODELS[:2]))), "contradicts itself"),
    "too many at once": (licence(may("list", at_least(2, A, B, *MEMBERS[:3]))), "contradicts itself"),
    "a past date": (licence(may("list", all_of(A, Before(time=NOW)))), "contradicts itself"),
    "a past date on one side": (
        licence(may("list", any_of(A, all_of(B, Before(time=NOW))))),
        "'the submitter is of south'",
    ),
    "a date past the expiry": (
        licence(may("list", all_of(A, Before(time=EXPIRES)))),
        "before 2027-01-01 00:00 UTC' forbids",
    ),
    "the later of two dates": (
        licence(may("list", all_of(A, Before(time=NOW + 1), Before(time=NOW + 2)))),
        "forbids nothing",
    ),
    "the licence's only purpose again": (
        licence(may("predict", all_of(A, RESEARCH)), purposes=("research",)),
        "'the purpose is research' forbids nothing",
    ),
    "a branch that can never hold": (
        licence(may("evaluate", any_of(A, all_of(B, RESEARCH, CARE)))),
        "allows nothing here",
    ),
    "a branch within another": (licence(may("evaluate", any_of(A, all_of(A, RESEARCH)))), "allows nothing here"),
    "anyone for a purpose": (licence(may("evaluate", RESEARCH)), "can hold for any submitter"),
    "anyone on one side": (licence(may("evaluate", any_of(A, RESEARCH))), "can hold for any submitter"),
    "anyone for a while": (licence(may("list", any_of(A, Before(time=NOW + 1)))), "can hold for any submitter"),
    "anyone by two of three": (licence(may("evaluate", at_least(2, A, RESEARCH, TO_A))), "can hold for any submitter"),
    "every role": (
        licence(
            may("list", any_of(*(RoleIs(principal="submitter", role=r) for r in ("scientist", "steward", "admin"))))
        ),
        "can hold for any submitter",
    ),
    "any submitter, these readers": (
        licence(may("train", TO_A), may("read_result", TO_A)),
        "can hold for any submitter",
    ),
    "these submitters, any reader": (licence(may("read_result", A)), "can hold for any recipient"),
    "these submitters, any reader of metrics": (licence(may("read_metrics", A)), "can hold for any recipient"),
    "a wrapper": (licence(may("list", any_of(A))), "any_of needs two or more"),
    "the same twice": (licence(may("list", at_least(2, A, A, B))), "at_least needs two or more rules, each another"),
    "one of two": (licence(may("list", at_least(1, A, B))), "is any_of; say so"),
    "two of two": (licence(may("evaluate", at_least(2, A, TO_A))), "is all_of; say so"),
    "a deep wrapper": (licence(may("list", any_of(A, all_of(B)))), "all_of needs two or more"),
    "a reader of a list": (licence(may("list", any_of(A, TO_A))), "about the recipient has no place"),
    "a purpose of a list": (licence(may("list", all_of(A, RESEARCH))), "contradicts itself"),
    "an image of a list": (licence(may("list", all_of(A, IMAGES[0]))), "contradicts itself"),
    "an approver where none is asked": (
        licence(may("evaluate", all_of(A, BY_NORTH))),
        "about the approver has no place",
    ),
    "approvals of a list": (licence(may("list", A, approvals())), "no terms that anybody could approve"),
    "a submitter among approvers": (licence(may("evaluate", A, approvals(A))), "about the submitter has no place"),
    "a date among approvers": (
        licence(may("evaluate", A, approvals(all_of(STEWARD, Before(time=1))))),
        "member and role",
    ),
    "an approver of two members": (
        licence(may("evaluate", A, approvals(all_of(BY_NORTH, MemberIs(principal="approver", member="south"))))),
        "approvals to evaluate: its rule contradicts",
    ),
    "four eyes of one": (licence(may("evaluate", A, approvals(count=1, four_eyes=True))), "count must be 2 or more"),
    "training nobody may read": (licence(may("train", A)), "nobody may read_result"),
    "training and reading apart": (
        licence(may("train", all_of(A, IMAGES[0])), may("read_result", all_of(TO_A, IMAGES[1]))),
        "train and read_result contradict each other",
    ),
    "more rules than anyone reads": (
        licence(may("evaluate", any_of(any_of(*MEMBERS[:32]), any_of(*MEMBERS[32:64]), MEMBERS[64]))),
        "at most 64 rules",
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_licences_that_say_what_they_seem_to(case: str) -> None:
    keys = KeyRing.generate()
    signed = sign_licence(SOUND[case], keys.signing, now=NOW)
    assert signed.verify(Licence, keys.signing.public) == SOUND[case]


@pytest.mark.parametrize("case", UNSOUND)
def test_licences_that_nobody_should_sign(case: str) -> None:
    wrong, words = UNSOUND[case]
    with pytest.raises(ParameterError, match=words.replace("(", r"\(")):
        sign_licence(wrong, KeyRing.generate().signing, now=NOW)


def test_bounds_on_what_is_decided() -> None:
    """Fifteen each of five things is more cases than are tried; nesting is bounded before anything is evaluated."""
    purposes = [ForPurpose(purpose=f"p{i}") for i in range(12)]
    readers = [MemberIs(principal="recipient", member=f"m{i}") for i in range(12)]
    models = [WithModel(model=bytes([i]) * 32) for i in range(12)]
    images = [WithMeasurement(measurement=bytes([i]) * 48) for i in range(12)]
    wide = all_of(*(any_of(*rules) for rules in (MEMBERS[:12], purposes, readers, models, images)))
    deep: Rule = B
    for i in range(8):
        deep = any_of(deep, all_of(A, MODELS[0])) if i % 2 else all_of(deep, SCIENTIST)
    for rule, words in ((wide, "too many alternatives"), (deep, "nest at most 8 deep")):
        with pytest.raises(ParameterError, match=words):
            check_sound(licence(may("evaluate", rule)), now=NOW)


def test_a_model_has_no_statistics() -> None:
    def model(action: Action) -> ModelLicence:
        return ModelLicence(
            number=1, model="base@north", digest=bytes(32), permissions=(may(action, A),), expires=EXPIRES
        )

    check_sound(model("predict"), now=NOW)
    with pytest.raises(ParameterError, match="a model has none"):
        check_sound(model("statistics"), now=NOW)


# --- brute force -------------------------------------------------------------------------------------------------------

VOCABULARY: list[Leaf] = [
    *(MemberIs(principal="submitter", member=name) for name in "ab"),
    *(RoleIs(principal="submitter", role=role) for role in ("scientist", "steward", "admin")),  # type: ignore[arg-type]
    *(MemberIs(principal="recipient", member=name) for name in "ab"),
    RoleIs(principal="recipient", role="steward"),
    *(ForPurpose(purpose=name) for name in "pq"),
    *(Before(time=time) for time in (NOW, NOW + 10, NOW + 20, EXPIRES)),
    MODELS[0],
    *IMAGES[:2],
]


def _roles(*names: str) -> list[frozenset[str]]:
    return [frozenset(c) for c in chain.from_iterable(combinations(names, n) for n in range(1, len(names) + 1))]


PEOPLE = list(product("abz", _roles("scientist", "steward", "admin")))
WORLDS = [
    dict(zip(("submitter", "recipient", "purpose", "model", "image", "time"), values, strict=True))
    for values in product(
        PEOPLE,
        product("abz", _roles("scientist", "steward")),
        "pqz",
        (0, 9),
        (0, 1, 9),
        (NOW, NOW + 9, NOW + 10, EXPIRES - 1),
    )
]
FOR_SUBMITTERS = len(WORLDS) // len(PEOPLE)
"""The submitter changes slowest: worlds with the same rest are this far apart."""


def _predicate(leaf: Leaf) -> Callable[[dict[str, Any]], bool]:
    match leaf:
        case MemberIs():
            return lambda world: world[leaf.principal][0] == leaf.member
        case RoleIs():
            return lambda world: leaf.role in world[leaf.principal][1]
        case ForPurpose():
            return lambda world: world["purpose"] == leaf.purpose
        case Before():
            return lambda world: world["time"] < leaf.time
        case WithModel():
            return lambda world: world["model"] == leaf.model[0]
        case WithMeasurement():
            return lambda world: world["image"] == leaf.measurement[0]


TRUTH = {leaf: np.array([_predicate(leaf)(world) for world in WORLDS]) for leaf in VOCABULARY}


def _brute(rule: Rule, given: Iterator[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    if not isinstance(rule, AllOf | AnyOf | AtLeast):
        return next(given)
    votes = np.sum([_brute(inner, given) for inner in rule.rules], axis=0)
    threshold = {"all_of": len(rule.rules), "any_of": 1}.get(rule.rule) or rule.count  # type: ignore[union-attr]
    return np.asarray(votes >= threshold)


def _verdict(rule: Rule, purposes: tuple[str, ...]) -> str:
    """What should be said of the rule, from every world there is, one by one."""
    real = np.array([not purposes or world["purpose"] in purposes for world in WORLDS])
    truths = [TRUTH[leaf] for leaf in leaves(rule)]
    held = _brute(rule, iter(truths)) & real
    if not held.any():
        return "contradicts itself"
    if held.reshape(len(PEOPLE), FOR_SUBMITTERS).all(axis=0).any():
        return "can hold for any submitter"
    for i, truth in enumerate(truths):
        for said, words in (
            (np.zeros_like(truth), "allows nothing here"),
            (np.ones_like(truth), "forbids nothing here"),
        ):
            if (_brute(rule, iter([*truths[:i], said, *truths[i + 1 :]])) & real == held).all():
                return words
    return ""


def _combined(inner: st.SearchStrategy[Rule]) -> st.SearchStrategy[Rule]:
    rules = st.lists(inner, min_size=2, max_size=4, unique=True).map(tuple)
    three = st.lists(inner, min_size=3, max_size=4, unique=True).map(tuple)
    two = three.flatmap(lambda r: st.builds(AtLeast, count=st.integers(2, len(r) - 1), rules=st.just(r)))
    return st.one_of(st.builds(AllOf, rules=rules), st.builds(AnyOf, rules=rules), two)


RULES: st.SearchStrategy[Rule] = st.recursive(st.sampled_from(VOCABULARY), _combined, max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(rule=RULES, purposes=st.sampled_from([(), ("p",), ("p", "q")]))
@example(rule=any_of(*VOCABULARY[2:5]), purposes=())
@example(rule=all_of(VOCABULARY[0], any_of(*VOCABULARY[8:10])), purposes=("p", "q"))
@example(rule=any_of(all_of(VOCABULARY[0], VOCABULARY[5]), all_of(VOCABULARY[1], VOCABULARY[6])), purposes=())
def test_the_decision_is_the_one_of_brute_force(rule: Rule, purposes: tuple[str, ...]) -> None:
    expected = _verdict(rule, purposes)
    try:
        check_sound(licence(may("evaluate", rule), purposes=purposes), now=NOW)
        found = ""
    except ParameterError as error:
        found = str(error)
    assert expected in found if expected else found == "", (expected, found)


# --- words -------------------------------------------------------------------------------------------------------------

GOLDEN: list[tuple[Licence | ModelLicence, str]] = [
    (
        licence(
            may("list", SCIENTIST),
            may("train", all_of(A, SCIENTIST, RESEARCH, TO_A), approvals(all_of(BY_NORTH, STEWARD), four_eyes=True)),
            may("read_result", any_of(TO_A, TO_B)),
            legal_basis="GDPR Art. 6(1)(e)",
            regions=("DE", "FR"),
            retention_days=90,
        ),
        "North Hospital lets scientists list cardio@north; scientists of the University train on cardio@north for research"
        " if each recipient is of the University with the approval of any two of the stewards of North Hospital, each"
        " beside another of the same member; people of the University or people of South Hospital read the results; until"
        " 2027-01-01 00:00 UTC. Privacy: ε 10 in all and 3 a job, at δ 1e-05. Legal basis: GDPR Art. 6(1)(e). By contract,"
        " results stay in DE or FR. By contract, results are deleted within 90 days.",
    ),
    (
        licence(
            may("statistics", any_of(all_of(A, IMAGES[1]), B), approvals(count=1)),
            may(
                "evaluate", all_of(at_least(2, A, SCIENTIST, RoleIs(principal="submitter", role="steward")), MODELS[1])
            ),
            purposes=("care", "quality", "research"),
            expires=EXPIRES + 1500,
            retention_days=1,
        ),
        "North Hospital lets anyone compute statistics of cardio@north if ((the submitter is of the University and the"
        " worker measures 0101010101010101…) or the submitter is of South Hospital) with the approval of one of the"
        " stewards; those who are any two of (people of the University, scientists, stewards) evaluate models on"
        " cardio@north if the model is 0101010101010101…; all for care, quality or research, until 2027-01-01"
        " 00:00:01.500 UTC. Privacy: ε 10 in all and 3 a job, at δ 1e-05. By contract, results are deleted within 1 day.",
    ),
    (
        ModelLicence(
            number=1,
            model="base@east",
            digest=bytes(32),
            permissions=(may("predict", all_of(any_of(A, B), Before(time=NOW))), may("deploy", A)),
            expires=(1 << 48) - 1,
        ),
        "east lets people of the University or people of South Hospital predict with what was made from base@east before"
        " 2026-09-21 14:13:20 UTC; people of the University deploy what was made from base@east; for any purpose, until"
        " the end of time.",
    ),
]


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_a_licence_reads_as_one_plain_paragraph(number: int) -> None:
    made, text = GOLDEN[number]
    assert describe(made, NAMES) == text


@given(rule=RULES)
@settings(max_examples=100, deadline=None)
def test_every_leaf_of_a_rule_is_in_its_words(rule: Rule) -> None:
    text = describe(licence(may("evaluate", rule)), {"a": "Alpha", "b": "Beta"})
    words = {"a": "Alpha", "b": "Beta", "p": " p", "q": " q"}
    for leaf in leaves(rule):
        match leaf:
            case MemberIs(member=member):
                assert words[member] in text
            case RoleIs(role=role):
                assert role in text
            case ForPurpose(purpose=purpose):
                assert words[purpose] in text
            case Before():
                assert "before 20" in text
            case WithModel(model=model):
                assert model.hex()[:16] in text
            case WithMeasurement(measurement=measurement):
                assert measurement.hex()[:16] in text
