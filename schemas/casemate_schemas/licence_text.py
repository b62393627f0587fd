"""A licence as people read it: one plain paragraph, and each rule in words. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from .licence import (
    Action,
    AllOf,
    AnyLicence,
    AnyOf,
    Approvals,
    AtLeast,
    Before,
    Combination,
    ForPurpose,
    Leaf,
    Licence,
    LicenceBase,
    MemberIs,
    Permission,
    Principal,
    RoleIs,
    Rule,
    WithMeasurement,
    WithModel,
    leaves,
)

_VERBS: Final[dict[Action, str]] = {
    "list": "list {subject}",
    "train": "train on {subject}",
    "evaluate": "evaluate models on {subject}",
    "statistics": "compute statistics of {subject}",
    "predict": "predict with what was made from {subject}",
    "deploy": "deploy what was made from {subject}",
    "read_result": "read the results",
    "read_metrics": "read the metrics",
}
_NUMBERS: Final = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def describe(licence: AnyLicence, names: Mapping[str, str]) -> str:
    """The licence as one paragraph; ``names`` are the members' names by id (an id without a name stands for itself).

    Names and texts are shown as they are: whoever prints them to a terminal removes control characters.
    """
    owner = names.get(licence.subject.partition("@")[2], licence.subject.partition("@")[2])
    allows = [_permission(permission, licence.subject, names) for permission in licence.permissions]
    sentences = [
        f"{owner} lets {'; '.join(allows)}; {_all_for(licence)}until {_when(licence.expires)}",
        *_budget(licence),
        *_obligations(licence),
    ]
    return " ".join(f"{sentence}." for sentence in sentences)


def describe_approvals(approvals: Approvals, names: Mapping[str, str]) -> str:
    """Whose approval is asked for, such as ``any two of the stewards of North Hospital``."""
    who = _who(approvals.by, names)
    people = who if who.startswith("those") else f"the {who}"
    eyes = ", each beside another of the same member" if approvals.four_eyes else ""
    count = f"any {_number(approvals.count)}" if approvals.count > 1 else "one"
    return f"{count} of {people}{eyes}"


def describe_leaf(leaf: Leaf, names: Mapping[str, str] | None = None) -> str:
    """One leaf rule as a clause, such as ``the submitter is of north``."""
    names = names or {}
    match leaf:
        case MemberIs(principal=principal, member=member):
            return f"the {principal} is of {names.get(member, member)}"
        case RoleIs(principal=principal, role=role):
            return f"the {principal} is {'an' if role == 'admin' else 'a'} {role}"
        case ForPurpose(purpose=purpose):
            return f"the purpose is {purpose}"
        case Before(time=time):
            return f"it is before {_when(time)}"
        case WithModel(model=model):
            return f"the model is {model.hex()[:16]}…"
        case WithMeasurement(measurement=measurement):
            return f"the worker measures {measurement.hex()[:16]}…"


def _permission(permission: Permission, subject: str, names: Mapping[str, str]) -> str:
    """``people of X train on Y, for Z, if …``: what is about one thing alone is said in its own words, the rest as it is."""
    reads = permission.action.startswith("read")
    first: Principal = "recipient" if reads else "submitter"
    parts = permission.rule.rules if isinstance(permission.rule, AllOf) else (permission.rule,)
    who = [part for part in parts if _is_about(part, first)]
    rest = [part for part in parts if part not in who]
    subject_words = _who(AllOf(rules=tuple(who)) if len(who) > 1 else who[0], names) if who else "anyone"
    words = f"{subject_words} {_VERBS[permission.action].format(subject=subject)}"
    words += "".join(f" {phrase}" for phrase in _phrases(rest, names))
    if permission.approvals is not None:
        words += f" with the approval of {describe_approvals(permission.approvals, names)}"
    return words


def _phrases(rules: Sequence[Rule], names: Mapping[str, str]) -> list[str]:
    """What else is asked: ``for research``, ``before …``, ``if …``."""
    purposes = [rule.purpose for rule in rules if isinstance(rule, ForPurpose)]
    times = [_when(rule.time) for rule in rules if isinstance(rule, Before)]
    others = [_clause(rule, names) for rule in rules if not isinstance(rule, ForPurpose | Before)]
    phrases = [f"for {' and '.join(purposes)}"] if purposes else []
    phrases += [f"before {' and '.join(times)}"] if times else []
    return [*phrases, f"if {' and '.join(others)}"] if others else phrases


def _who(rule: Rule, names: Mapping[str, str]) -> str:
    """People, by a rule about one principal alone."""
    match rule:
        case MemberIs(member=member):
            return f"people of {names.get(member, member)}"
        case RoleIs(role=role):
            return f"{role}s"
        case AllOf(rules=rules):
            return _who_all(rules, names)
        case AnyOf(rules=rules):
            return _or([_who(inner, names) for inner in rules])
        case AtLeast(count=count, rules=rules):
            each = ", ".join(_who(inner, names) for inner in rules)
            return f"those who are any {_number(count)} of ({each})"
    raise ValueError(f"expected a rule about people, got {rule.rule}")


def _who_all(rules: Sequence[Rule], names: Mapping[str, str]) -> str:
    """``scientists of X`` where that says it, else one condition after the other."""
    flat = [leaf for rule in rules for leaf in (rule.rules if isinstance(rule, AllOf) else (rule,))]
    members = [rule.member for rule in flat if isinstance(rule, MemberIs)]
    roles = [rule.role for rule in flat if isinstance(rule, RoleIs)]
    if len(members) == 1 and len(roles) == 1 and len(flat) == 2:
        return f"{roles[0]}s of {names.get(members[0], members[0])}"
    return f"those who are all of ({', '.join(_who(rule, names) for rule in flat)})"


def _clause(rule: Rule, names: Mapping[str, str]) -> str:
    """Any rule as a condition; combinations inside others stand in parentheses."""
    if not isinstance(rule, Combination):
        return describe_leaf(rule, names).replace("the recipient is", "each recipient is", 1)
    each = [_clause(inner, names) for inner in rule.rules]
    match rule:
        case AllOf():
            return f"({' and '.join(each)})"
        case AnyOf():
            return f"({' or '.join(each)})"
        case AtLeast(count=count):
            return f"at least {_number(count)} of ({', '.join(each)}) hold"


def _is_about(rule: Rule, principal: Principal) -> bool:
    return all(isinstance(leaf, MemberIs | RoleIs) and leaf.principal == principal for leaf in leaves(rule))


def _all_for(licence: LicenceBase) -> str:
    if licence.purposes:
        return f"all for {_or(licence.purposes)}, "
    rules = [leaf for permission in licence.permissions for leaf in leaves(permission.rule)]
    return "" if any(isinstance(leaf, ForPurpose) for leaf in rules) else "for any purpose, "


def _budget(licence: LicenceBase) -> list[str]:
    if not isinstance(licence, Licence):
        return []
    return [f"Privacy: ε {licence.epsilon:g} in all and {licence.epsilon_per_job:g} a job, at δ {licence.delta:g}"]


def _obligations(licence: LicenceBase) -> list[str]:
    found = [f"Legal basis: {licence.legal_basis}"] if licence.legal_basis else []
    found += [f"By contract, results stay in {_or(licence.regions)}"] if licence.regions else []
    kept = licence.retention_days
    return [*found, f"By contract, results are deleted within {kept} day{'s' if kept > 1 else ''}"] if kept else found


def _number(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def _or(words: Iterable[str]) -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    *before, last = list(words) or [""]
    return f"{', '.join(before)} or {last}" if before else last


def _when(ms: int) -> str:
    """``2027-01-01 00:00 UTC``, with seconds where there are any."""
    try:
        time = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
    except OverflowError:
        return "the end of time"
    shown = time.isoformat(" ", "minutes" if ms % 60_000 == 0 else "milliseconds" if ms % 1000 else "seconds")
    return shown.replace("+00:00", " UTC")
