"""Licence rules, in the words in which one thinks of them::

    train = rules.all_of(rules.member("lab"), rules.role("scientist"), rules.for_purpose("research"))
    read = rules.any_of(rules.member("lab", of="recipient"), rules.member("south", of="recipient"))
    two_stewards = rules.approvals(2, by=rules.role("steward", of="approver"), four_eyes=True)

Each returns a wire model of :mod:`casemate_schemas.licence`, and raises :class:`~casemate_schemas.errors.ParameterError`
for a value out of its range. What each rule means, and which licences are refused, is in ``docs/licences.md``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from casemate_schemas.errors import ParameterError
from casemate_schemas.identity import Role
from casemate_schemas.licence import (
    AllOf,
    AnyOf,
    Approvals,
    AtLeast,
    Before,
    ForPurpose,
    MemberIs,
    Principal,
    RoleIs,
    Rule,
    WithMeasurement,
    WithModel,
)

from .parameters import parameter_errors

DAY_S: Final = 24 * 3600


def member(name: str, *, of: Principal = "submitter") -> MemberIs:
    """The principal acts for the member of that id."""
    with parameter_errors("member"):
        return MemberIs(principal=of, member=name)


def role(name: Role, *, of: Principal = "submitter") -> RoleIs:
    """The principal has that role: ``scientist``, ``steward`` or ``admin``."""
    with parameter_errors("role"):
        return RoleIs(principal=of, role=name)


def for_purpose(purpose: str) -> ForPurpose:
    """The job declares that purpose."""
    with parameter_errors("for_purpose"):
        return ForPurpose(purpose=purpose)


def before(time: datetime | str) -> Before:
    """Until that time: an aware datetime, or ISO 8601 with its offset (``2027-01-01T00:00:00Z``)."""
    with parameter_errors("before"):
        return Before(time=milliseconds(time))


def with_model(digest: bytes | str) -> WithModel:
    """The job's model is the one with that digest: bytes, or hexadecimal."""
    with parameter_errors("with_model"):
        return WithModel(model=_bytes("with_model", digest))


def with_measurement(measurement: bytes | str) -> WithMeasurement:
    """The worker runs the image of that launch measurement: bytes, or hexadecimal."""
    with parameter_errors("with_measurement"):
        return WithMeasurement(measurement=_bytes("with_measurement", measurement))


def all_of(*rules: Rule) -> AllOf:
    """Every rule holds."""
    with parameter_errors("all_of"):
        return AllOf(rules=rules)


def any_of(*rules: Rule) -> AnyOf:
    """Some rule holds."""
    with parameter_errors("any_of"):
        return AnyOf(rules=rules)


def at_least(count: int, *rules: Rule) -> AtLeast:
    """``count`` of the rules hold."""
    with parameter_errors("at_least"):
        return AtLeast(count=count, rules=rules)


def approvals(count: int, *, by: Rule, four_eyes: bool = False, valid_s: int = 30 * DAY_S) -> Approvals:
    """``count`` different people whom ``by`` accepts must approve the very terms.

    Args:
        count: 1 to 16.
        by: rules about the ``approver`` alone.
        four_eyes: an approval counts only beside one by another person of the same member.
        valid_s: how long an approval is good, in seconds, a minute to 92 days.
    """
    with parameter_errors("approvals"):
        return Approvals(count=count, by=by, four_eyes=four_eyes, valid_s=valid_s)


def milliseconds(time: datetime | str) -> int:
    """Unix ms of an aware datetime, or of ISO 8601 text with an offset; for a licence's ``expires``."""
    try:
        moment = datetime.fromisoformat(time) if isinstance(time, str) else time
    except ValueError as error:
        raise ParameterError(f"expected a time such as 2027-01-01T00:00:00Z, got {time!r}") from error
    if moment.tzinfo is None:
        raise ParameterError(f"expected a time with its offset from UTC, got {time}")
    return int(moment.timestamp() * 1000)


def _bytes(what: str, value: bytes | str) -> bytes:
    try:
        return bytes.fromhex(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ParameterError(f"{what}: expected hexadecimal digits") from error
