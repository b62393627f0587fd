from __future__ import annotations

import pytest
from casemate_schemas.errors import LicenceError
from casemate_schemas.licence import (
    Actor,
    AllOf,
    AnyOf,
    AtLeast,
    Before,
    ForPurpose,
    Licence,
    MemberIs,
    Permission,
    Question,
    RoleIs,
    Rule,
    check_licence,
)
from pydantic import ValidationError

NOW = 1000
CLARA = Actor("university", ("scientist",))
MAX = Actor("mallory-inc", ("scientist",))
BY_UNIVERSITY = MemberIs(principal="submitter", member="university")


def licence(rule: Rule, **changes: object) -> Licence:
    fields: dict[str, object] = {
        "number": 1,
        "dataset": "cardio@north",
        "permissions": (Permission(action="train", rule=rule),),
        "epsilon": 10.0,
        "epsilon_per_job": 3.0,
        "delta": 1e-3,
        "expires": 2000,
    }
    return Licence.model_validate({**fields, **changes})


def allowed(rule: Rule, **question: object) -> bool:
    fields: dict[str, object] = {"action": "train", "now": NOW, "submitter": CLARA, **question}
    try:
        check_licence(licence(rule), Question(**fields))  # type: ignore[arg-type]
    except LicenceError:
        return False
    return True


@pytest.mark.parametrize(
    ("rule", "question", "expected"),
    [
        (BY_UNIVERSITY, {}, True),
        (BY_UNIVERSITY, {"submitter": MAX}, False),
        (RoleIs(principal="submitter", role="scientist"), {}, True),
        (RoleIs(principal="submitter", role="admin"), {}, False),
        (MemberIs(principal="recipient", member="university"), {"recipients": (CLARA,)}, True),
        (MemberIs(principal="recipient", member="university"), {"recipients": (CLARA, MAX)}, False),
        (MemberIs(principal="recipient", member="university"), {"recipients": ()}, False),
        (ForPurpose(purpose="cardiology"), {"purpose": "cardiology"}, True),
        (ForPurpose(purpose="cardiology"), {"purpose": "marketing"}, False),
        (ForPurpose(purpose="cardiology"), {}, False),
        (Before(time=NOW + 1), {}, True),
        (Before(time=NOW), {}, False),
        (AllOf(rules=(BY_UNIVERSITY, Before(time=NOW))), {}, False),
        (AnyOf(rules=(BY_UNIVERSITY, Before(time=NOW))), {}, True),
        (AtLeast(count=2, rules=(BY_UNIVERSITY, Before(time=NOW), Before(time=NOW + 1))), {}, True),
        (AtLeast(count=3, rules=(BY_UNIVERSITY, Before(time=NOW), Before(time=NOW + 1))), {}, False),
    ],
)
def test_each_rule_decides_as_it_says(rule: Rule, question: dict[str, object], expected: bool) -> None:
    assert allowed(rule, **question) is expected


def test_what_no_permission_allows_is_forbidden() -> None:
    with pytest.raises(LicenceError, match="no permission to list"):
        check_licence(licence(BY_UNIVERSITY), Question(action="list", now=NOW, submitter=CLARA))


def test_nothing_is_allowed_once_it_expired() -> None:
    with pytest.raises(LicenceError, match="expired"):
        check_licence(licence(BY_UNIVERSITY), Question(action="train", now=2000, submitter=CLARA))


def test_only_listed_measurements_are_accepted() -> None:
    only = licence(BY_UNIVERSITY, measurements=(b"m" * 48,))
    for measurement, ok in ((b"m" * 48, True), (b"x" * 48, False), (None, True)):
        question = Question(action="train", now=NOW, submitter=CLARA, measurement=measurement)
        if ok:
            check_licence(only, question)
        else:
            with pytest.raises(LicenceError, match="measurement"):
                check_licence(only, question)


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
        {"measurements": ()},
        {"permissions": ()},
        {"dataset": "no-owner"},
    ],
)
def test_senseless_licences_cannot_be_made(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        licence(BY_UNIVERSITY, **changes)


def test_an_empty_combination_cannot_be_made() -> None:
    for make in (lambda: AllOf(rules=()), lambda: AnyOf(rules=()), lambda: AtLeast(count=2, rules=(BY_UNIVERSITY,))):
        with pytest.raises(ValidationError):
            make()
