"""Whether another licence allows less or more than the one before it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from casemate_schemas.licence import (
    Action,
    Actor,
    AllOf,
    Allowed,
    AnyOf,
    Approvals,
    Before,
    ForPurpose,
    Licence,
    MemberIs,
    Permission,
    Question,
    RoleIs,
    Rule,
    WithMeasurement,
    evaluate,
)
from casemate_schemas.licence_check import Change, compare
from hypothesis import given, settings
from hypothesis import strategies as st

NOW, LATER, END = 1_000, 2_000, 3_000
LAB = MemberIs(principal="submitter", member="lab")
SOUTH = MemberIs(principal="submitter", member="south")
SCIENTIST = RoleIs(principal="submitter", role="scientist")
READ = MemberIs(principal="recipient", member="lab")
STEWARDS = RoleIs(principal="approver", role="steward")


def _licence(rule: Rule = LAB, *, approvals: Approvals | None = None, **changed: Any) -> Licence:
    fields: dict[str, Any] = {
        "number": 1,
        "dataset": "cardio@north",
        "permissions": (
            Permission(action="train", rule=rule, approvals=approvals),
            Permission(action="read_result", rule=READ),
        ),
        "epsilon": 3.0,
        "epsilon_per_job": 1.0,
        "delta": 1e-4,
        "expires": END,
    }
    return Licence(**(fields | changed))


def _approvals(**changed: Any) -> Approvals:
    return Approvals(**({"count": 1, "by": STEWARDS, "valid_s": 600} | changed))


STRICTER: dict[str, tuple[Licence, Licence]] = {
    "less budget": (_licence(), _licence(epsilon=2.0)),
    "less a job": (_licence(), _licence(epsilon_per_job=0.5)),
    "smaller delta": (_licence(), _licence(delta=1e-5)),
    "ends earlier": (_licence(), _licence(expires=LATER)),
    "one more condition": (_licence(), _licence(AllOf(rules=(LAB, SCIENTIST)))),
    "one member fewer": (_licence(AnyOf(rules=(LAB, SOUTH))), _licence()),
    "for a while": (_licence(), _licence(AllOf(rules=(LAB, Before(time=LATER))))),
    "an action fewer": (_licence(), _licence(permissions=(Permission(action="read_result", rule=READ),))),
    "one measurement": (_licence(), _licence(AllOf(rules=(LAB, WithMeasurement(measurement=bytes(48)))))),
    "purposes": (_licence(), _licence(purposes=("research",))),
    "fewer purposes": (_licence(purposes=("care", "research")), _licence(purposes=("research",))),
    "the purpose as a rule": (
        _licence(AllOf(rules=(LAB, AnyOf(rules=(ForPurpose(purpose="care"), ForPurpose(purpose="research")))))),
        _licence(AllOf(rules=(LAB, ForPurpose(purpose="research")))),
    ),
    "approvals": (_licence(), _licence(approvals=_approvals())),
    "more approvals": (_licence(approvals=_approvals()), _licence(approvals=_approvals(count=2))),
    "four eyes": (_licence(approvals=_approvals(count=2)), _licence(approvals=_approvals(count=2, four_eyes=True))),
    "approvals that lapse earlier": (_licence(approvals=_approvals()), _licence(approvals=_approvals(valid_s=60))),
    "regions": (_licence(), _licence(regions=("DE",))),
    "fewer regions": (_licence(regions=("DE", "FR")), _licence(regions=("DE",))),
    "kept for less long": (_licence(), _licence(retention_days=30)),
}


@pytest.mark.parametrize("case", STRICTER)
def test_stricter_and_the_other_way_round_looser(case: str) -> None:
    before, after = STRICTER[case]
    assert compare(before, after, now=NOW) == "stricter"
    assert compare(after, before, now=NOW) == "looser"
    assert compare(before, before, now=NOW) == compare(after, after, now=NOW) == "same"


@pytest.mark.parametrize(
    "after",
    [
        _licence(SOUTH),
        _licence(epsilon=2.0, expires=END + 1),
        _licence(AnyOf(rules=(LAB, SOUTH)), epsilon=2.0),
        _licence(legal_basis="another"),
        _licence(regions=("DE",), retention_days=None, epsilon=4.0),
    ],
)
def test_more_here_and_less_there_is_neither(after: Licence) -> None:
    assert compare(_licence(), after, now=NOW) == "changed"


def test_other_approvers_are_neither_and_words_are_not_judged() -> None:
    one, other = _approvals(), _approvals(by=RoleIs(principal="approver", role="admin"))
    assert compare(_licence(approvals=one), _licence(approvals=other), now=NOW) == "changed"
    assert compare(_licence(), _licence(text="please"), now=NOW) == "changed"


def test_what_has_passed_already_makes_no_difference() -> None:
    assert (
        compare(_licence(SOUTH), _licence(AnyOf(rules=(SOUTH, AllOf(rules=(LAB, Before(time=NOW)))))), now=NOW)
        == "same"
    )


def test_too_much_to_decide_is_said_to_be_changed() -> None:
    def many(prefix: str) -> Rule:
        members = [MemberIs(principal="submitter", member=f"{prefix}{i}") for i in range(32)]
        purposes = [ForPurpose(purpose=f"{prefix}{i}") for i in range(31)]
        workers = [WithMeasurement(measurement=prefix.encode() * 48)]
        readers = [MemberIs(principal="recipient", member=f"{prefix}{i}") for i in range(30)]
        return AllOf(
            rules=(AnyOf(rules=tuple(members)), AnyOf(rules=tuple(purposes)), *workers, AnyOf(rules=tuple(readers)))
        )

    assert compare(_licence(many("a")), _licence(many("b")), now=NOW) == "changed"


_LEAVES = st.sampled_from([LAB, SOUTH, SCIENTIST, ForPurpose(purpose="research"), Before(time=LATER)])
_RULES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, min_size=1, max_size=3).flatmap(
        lambda rules: st.sampled_from([AllOf(rules=tuple(rules)), AnyOf(rules=tuple(rules))])
    ),
    max_leaves=5,
)
_PURPOSES = st.sampled_from([(), ("care",), ("care", "research")])


def _questions() -> list[Question]:
    people = [Actor(member, roles) for member in ("lab", "south", "west") for roles in (("scientist",), ("admin",))]
    actions: tuple[Action, ...] = ("train", "read_result")
    times, purposes = (NOW, LATER - 1, LATER, END - 1, END), ("care", "research", "other")
    return [
        Question(action=action, now=at, submitter=who, recipients=(Actor("lab", ("scientist",)),), purpose=purpose)
        for action, who, at, purpose in itertools.product(actions, people, times, purposes)
    ]


QUESTIONS = _questions()


@settings(max_examples=60, deadline=None)
@given(rules=st.tuples(_RULES, _RULES), purposes=st.tuples(_PURPOSES, _PURPOSES), ends=st.sampled_from([LATER, END]))
def test_the_verdict_is_that_of_asking_every_question(
    rules: tuple[Rule, Rule], purposes: tuple[tuple[str, ...], tuple[str, ...]], ends: int
) -> None:
    before = _licence(rules[0], purposes=purposes[0])
    after = _licence(rules[1], purposes=purposes[1], expires=ends)
    was, now = (
        [isinstance(evaluate(licence, question), Allowed) for question in QUESTIONS] for licence in (before, after)
    )
    no_more = all(earlier or not later for earlier, later in zip(was, now, strict=True))
    found: Change = compare(before, after, now=NOW)
    if found in ("same", "stricter"):
        assert no_more
    if found == "changed":
        assert not no_more
