"""Which licences nobody should sign: those that can never be used, and those that allow more than their words seem to.

What is decided, and decided exactly: a rule is a monotone formula over finitely many *cases*. A case fixes which member
and which roles submitter and recipient have (each member that the rule names, or another; each role that it names, or
not), the purpose, the model and the worker's measurement (each one named, or another; of the licence's purposes, if it
lists some), and the time (now, or any later moment at which the rule changes, before the licence expires). A rule's truth
table over all cases is one integer with a bit for each; so every question below is a few bitwise operations.

Not decided: whether the people, models and workers that a rule names exist, and what several licences together allow.
The same tables, over the cases of two licences together, tell whether one allows less than the other (:func:`compare`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from .errors import ParameterError
from .identity import Role
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
    ModelLicence,
    Permission,
    Principal,
    RoleIs,
    Rule,
    WithMeasurement,
    WithModel,
    leaves,
)
from .licence_text import describe_leaf
from .signatures import Signed, SigningKey, sign

MAX_LEAVES: Final = 64
MAX_NESTING: Final = 8
MAX_CASES: Final = 1 << 16

_READING: Final = frozenset[Action]({"read_result", "read_metrics"})
_ROLES: Final = frozenset[Role]({"scientist", "steward", "admin"})


def sign_licence(licence: AnyLicence, key: SigningKey, *, now: int) -> Signed:
    """The licence, signed. Raises :class:`ParameterError` as :func:`check_sound`."""
    check_sound(licence, now=now)
    return sign(licence, key)


def check_sound(licence: AnyLicence, *, now: int) -> None:
    """Raises :class:`ParameterError`, in words for the owner, for a licence that nobody should sign.

    1. It has not expired.
    2. Each permission's rule, and each rule about approvers, is sound by itself: see :func:`_check_rule`.
    3. Approvals can be given: the action has terms to approve, and four eyes are two at least.
    4. Training is of use: some case in which the training is allowed lets somebody read its result.
    5. A model has no statistics.
    """
    if now >= licence.expires:  # 1
        raise ParameterError("the licence has expired already")
    for permission in licence.permissions:
        axes = _axes(licence, (permission,), now)
        binds: Principal = "recipient" if permission.action in _READING else "submitter"
        speaks_of: tuple[Principal, ...] = ("submitter",) if permission.action == "list" else ("submitter", "recipient")
        _check_rule(permission.action, permission.rule, axes, speaks_of, binds)  # 2
        if permission.approvals is not None:
            _check_approvals(permission.action, permission.approvals)  # 3
    _check_training(licence, now)  # 4
    if isinstance(licence, ModelLicence) and licence.permission("statistics") is not None:  # 5
        raise ParameterError("statistics: a model has none; license them with the datasets")


@dataclass(frozen=True)
class _Axis:
    """One thing that differs between cases, and the values it takes; ``None`` is any that the rules do not name."""

    name: str
    values: tuple[Any, ...]


class _Cases:
    """All combinations of the axes' values, numbered; a set of cases is an integer with a bit for each."""

    def __init__(self, axes: Sequence[_Axis], what: str) -> None:
        self.axes = tuple(axes)
        self._strides: dict[str, int] = {}
        count = 1
        for axis in axes:
            self._strides[axis.name] = count
            count *= len(axis.values)
            if count > MAX_CASES:
                raise ParameterError(f"{what}: names too many alternatives at once; split the licence")
        self.count = count
        self.full = (1 << count) - 1

    def where(self, name: str, holds: Callable[[Any], bool]) -> int:
        """The cases in which the axis of that name has a value that ``holds``; none if there is no such axis."""
        axis = next((axis for axis in self.axes if axis.name == name), None)
        if axis is None:
            return 0
        stride = self._strides[name]
        block = sum(((1 << stride) - 1) << (stride * i) for i, value in enumerate(axis.values) if holds(value))
        width = stride * len(axis.values)
        while width < self.count:  # doubling, then cut to size
            block |= block << width
            width *= 2
        return block & self.full

    def whatever(self, name: str, cases: int) -> int:
        """Of the cases with the first value of that axis, those that are in ``cases`` with each of its values."""
        axis = next(axis for axis in self.axes if axis.name == name)
        first = self.where(name, lambda value: value == axis.values[0])
        for i in range(len(axis.values)):
            first &= cases >> (self._strides[name] * i)
        return first


def _axes(licence: LicenceBase, permissions: Sequence[Permission], now: int) -> list[_Axis]:
    """The axes that these permissions' rules depend on, within what the licence allows and the actions have."""
    found = [leaf for permission in permissions for leaf in leaves(permission.rule)]
    is_job = all(permission.action != "list" for permission in permissions)
    principals: tuple[Principal, ...] = ("submitter", "recipient") if is_job else ("submitter",)
    axes = [axis for principal in principals for axis in _people_axes(principal, found)]
    times = sorted({now} | {leaf.time for leaf in found if isinstance(leaf, Before) and now < leaf.time})
    axes.append(_Axis("time", tuple(time for time in times if time < licence.expires)))
    if is_job:
        purposes = licence.purposes or _others(leaf.purpose for leaf in found if isinstance(leaf, ForPurpose))
        axes.append(_Axis("purpose", purposes))
        axes.append(_Axis("model", _others(leaf.model for leaf in found if isinstance(leaf, WithModel))))
        measurements = _others(leaf.measurement for leaf in found if isinstance(leaf, WithMeasurement))
        axes.append(_Axis("measurement", measurements))
    return axes


def _people_axes(principal: Principal, found: Iterable[Leaf]) -> Iterator[_Axis]:
    """Member and roles of one principal: a person has one member, and one or more of the three roles."""
    own = [leaf for leaf in found if isinstance(leaf, MemberIs | RoleIs) and leaf.principal == principal]
    yield _Axis(f"{principal} member", _others(leaf.member for leaf in own if isinstance(leaf, MemberIs)))
    named = sorted({leaf.role for leaf in own if isinstance(leaf, RoleIs)})
    subsets = [frozenset(r for i, r in enumerate(named) if bits >> i & 1) for bits in range(1 << len(named))]
    yield _Axis(f"{principal} roles", tuple(s for s in subsets if s or set(named) != _ROLES))


def _others(values: Iterable[Any]) -> tuple[Any, ...]:
    return (*sorted(set(values)), None)


def _check_rule(what: str, rule: Rule, axes: Sequence[_Axis], speaks_of: Sequence[Principal], binds: Principal) -> None:
    """Raises :class:`ParameterError` unless the rule says what it seems to.

    1. It has at most 64 leaves, nested at most 8 deep. 2. It speaks only of principals that the action has.
    3. Each combination combines: two or more different rules, and ``at_least`` is neither ``any_of`` nor ``all_of``.
    4. It holds in some case. 5. It depends on whom it must bind: in no case does it hold whoever that person is.
    6. Every leaf matters: none can be left out of its combination, and none taken for granted, with the same effect.
    """
    _check_shape(what, rule, depth=1)  # 3
    found = list(leaves(rule))
    if len(found) > MAX_LEAVES:  # 1
        raise ParameterError(f"{what}: at most {MAX_LEAVES} rules in one permission, not {len(found)}")
    for leaf in found:  # 2
        if isinstance(leaf, MemberIs | RoleIs) and leaf.principal not in speaks_of:
            raise ParameterError(f"{what}: a rule about the {leaf.principal} has no place here")
    cases = _Cases(axes, what)
    masks = [_mask(leaf, cases) for leaf in found]
    table = _table(rule, iter(masks), cases.full)
    if table == 0:  # 4
        raise ParameterError(f"{what}: its rule contradicts itself, or the licence; it can never hold")
    if _holds_for_anyone(table, cases, binds):  # 5
        raise ParameterError(f"{what}: its rule can hold for any {binds}; say which {binds} it is for")
    for i, leaf in enumerate(found):  # 6
        without, granted = ([*masks[:i], value, *masks[i + 1 :]] for value in (0, cases.full))
        if _table(rule, iter(without), cases.full) == table:
            raise ParameterError(f"{what}: '{describe_leaf(leaf)}' allows nothing here that the rest does not")
        if _table(rule, iter(granted), cases.full) == table:
            raise ParameterError(f"{what}: '{describe_leaf(leaf)}' forbids nothing here that the rest does not")


def _check_shape(what: str, rule: Rule, depth: int) -> None:
    if depth > MAX_NESTING:
        raise ParameterError(f"{what}: rules nest at most {MAX_NESTING} deep")
    if not isinstance(rule, Combination):
        return
    if len(rule.rules) < 2 or len(set(rule.rules)) != len(rule.rules):
        raise ParameterError(f"{what}: {rule.rule} needs two or more rules, each another")
    if isinstance(rule, AtLeast) and not 1 < rule.count < len(rule.rules):
        other = "any_of" if rule.count == 1 else "all_of"
        raise ParameterError(f"{what}: at_least {rule.count} of {len(rule.rules)} is {other}; say so")
    for inner in rule.rules:
        _check_shape(what, inner, depth + 1)


def _check_approvals(action: Action, approvals: Approvals) -> None:
    """Approvers are the only thing that their rule speaks of, and it is as sound as any other."""
    what = f"approvals to {action}"
    if action == "list":
        raise ParameterError(f"{what}: listing has no terms that anybody could approve")
    if approvals.four_eyes and approvals.count < 2:
        raise ParameterError(f"{what}: four eyes are two people at least; count must be 2 or more")
    if not all(isinstance(leaf, MemberIs | RoleIs) for leaf in leaves(approvals.by)):
        raise ParameterError(f"{what}: who may approve is said by member and role alone")
    axes = list(_people_axes("approver", list(leaves(approvals.by))))
    _check_rule(what, approvals.by, axes, ("approver",), "approver")


def _check_training(licence: LicenceBase, now: int) -> None:
    """A training job is judged as ``train`` and as ``read_result`` at once: both must be able to hold together."""
    train, read = licence.permission("train"), licence.permission("read_result")
    if train is None:
        return
    if read is None:
        raise ParameterError("train: nobody may read_result, so no training could ever be allowed")
    cases = _Cases(_axes(licence, (train, read), now), "train and read_result together")
    tables = [
        _table(item.rule, (_mask(leaf, cases) for leaf in leaves(item.rule)), cases.full) for item in (train, read)
    ]
    if tables[0] & tables[1] == 0:
        raise ParameterError("train and read_result contradict each other: no training could ever be allowed")


def _mask(leaf: Leaf, cases: _Cases) -> int:
    """The cases in which a leaf holds."""
    match leaf:
        case MemberIs(principal=principal, member=member):
            return cases.where(f"{principal} member", lambda value: value == member)
        case RoleIs(principal=principal, role=role):
            return cases.where(f"{principal} roles", lambda value: role in value)
        case ForPurpose(purpose=purpose):
            return cases.where("purpose", lambda value: value == purpose)
        case Before(time=time):
            return cases.where("time", lambda value: value < time)
        case WithModel(model=model):
            return cases.where("model", lambda value: value == model)
        case WithMeasurement(measurement=measurement):
            return cases.where("measurement", lambda value: value == measurement)


def _table(rule: Rule, masks: Iterator[int], full: int) -> int:
    """The cases in which a rule holds, its leaves' cases being taken from ``masks`` from left to right."""
    if not isinstance(rule, Combination):
        return next(masks)
    match rule:
        case AllOf(rules=rules):
            needed = len(rules)
        case AnyOf():
            needed = 1
        case AtLeast(count=count):
            needed = count
    at_least = [full, *[0] * needed]  # [j]: the cases in which j or more of the rules so far hold
    for inner in rule.rules:
        holds = _table(inner, masks, full)
        for j in range(needed, 0, -1):
            at_least[j] |= at_least[j - 1] & holds
    return at_least[needed]


def _holds_for_anyone(table: int, cases: _Cases, principal: Principal) -> bool:
    """Whether the rule holds, in some case, whatever member and roles the principal has there."""
    for name in (f"{principal} member", f"{principal} roles"):
        table = cases.whatever(name, table)
    return table != 0


Change = Literal["same", "stricter", "looser", "changed"]
"""What another licence does to the one before it; ``changed`` is both, or neither, or too much to decide."""


def compare(before: Licence, after: Licence, *, now: int) -> Change:
    """Whether ``after`` allows no more than ``before`` (stricter), no less (looser), the same, or neither.

    Exact for who may do what in which case from ``now`` on, and for budget, expiry, region and retention. Approvals compare
    only if the same people give them; words (text, legal basis) only if they are equal.
    """
    actions: list[Action] = sorted({item.action for licence in (before, after) for item in licence.permissions})
    try:
        found = [_compare_action(action, before, after, now) for action in actions]
    except ParameterError:
        return "changed"
    found += [
        _order(after.epsilon, before.epsilon),
        _order(after.epsilon_per_job, before.epsilon_per_job),
        _order(after.delta, before.delta),
        _order(after.expires, before.expires),
        _order(after.retention_days or float("inf"), before.retention_days or float("inf")),
        (_within(after.regions, before.regions), _within(before.regions, after.regions)),
        ((before.text, before.legal_basis) == (after.text, after.legal_basis),) * 2,
    ]
    no_more, no_less = (all(column) for column in zip(*found, strict=True))
    if no_more and no_less:
        return "same"
    return "stricter" if no_more else "looser" if no_less else "changed"


_Order = tuple[bool, bool]
"""Whether the licence after allows no more, and no less, than the one before."""


def _order(after: float, before: float) -> _Order:
    return after <= before, after >= before


def _within(regions: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether ``regions`` are no more than ``others``; none are named where any will do."""
    return not others or (bool(regions) and {*regions} <= {*others})


def _compare_action(action: Action, before: Licence, after: Licence, now: int) -> _Order:
    pair = [(licence, licence.permission(action)) for licence in (before, after)]
    cases = _Cases(_joint_axes(action, before, after, now), action)
    tables = [0 if item is None else _allowed(licence, item, cases) for licence, item in pair]
    no_more, no_less = tables[1] & ~tables[0] == 0, tables[0] & ~tables[1] == 0
    if 0 in tables:
        return no_more, no_less
    fewer, more = _compare_approvals(*(None if item is None else item.approvals for _, item in pair))
    return no_more and fewer, no_less and more


def _joint_axes(action: Action, before: Licence, after: Licence, now: int) -> list[_Axis]:
    """The axes of an action in either licence; unlike those of one licence, with values that neither of them names."""
    pair = [(licence, item) for licence in (before, after) if (item := licence.permission(action)) is not None]
    found = [leaf for _, item in pair for leaf in leaves(item.rule)]
    axes = [axis for principal in ("submitter", "recipient") for axis in _people_axes(principal, found)]
    changes = {leaf.time for leaf in found if isinstance(leaf, Before)} | {before.expires, after.expires}
    axes.append(_Axis("time", (now, *sorted(time for time in changes if time > now))))
    purposes = {*before.purposes, *after.purposes} | {leaf.purpose for leaf in found if isinstance(leaf, ForPurpose)}
    axes.append(_Axis("purpose", _others(purposes)))
    axes.append(_Axis("model", _others(leaf.model for leaf in found if isinstance(leaf, WithModel))))
    measurements = _others(leaf.measurement for leaf in found if isinstance(leaf, WithMeasurement))
    return [*axes, _Axis("measurement", measurements)]


def _allowed(licence: Licence, permission: Permission, cases: _Cases) -> int:
    """The cases in which the permission's rule holds and the licence's own limits do."""
    table = _table(permission.rule, (_mask(leaf, cases) for leaf in leaves(permission.rule)), cases.full)
    table &= cases.where("time", lambda value: value < licence.expires)
    if licence.purposes and permission.action != "list":
        table &= cases.where("purpose", lambda value: value in licence.purposes)
    return table


def _compare_approvals(before: Approvals | None, after: Approvals | None) -> _Order:
    if before is None or after is None:
        return before is None, after is None
    if before.by != after.by:
        return False, False
    orders = (
        _order(before.count, after.count),
        _order(before.four_eyes, after.four_eyes),
        _order(after.valid_s, before.valid_s),
    )
    return all(no_more for no_more, _ in orders), all(no_less for _, no_less in orders)
