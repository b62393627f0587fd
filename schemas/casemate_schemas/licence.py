"""What an owner allows: a licence is data, and judging it is a pure function.

Nothing is allowed that no permission allows. A rule names the principal it speaks of; a rule about recipients must hold
for every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .codec import Name, Text, UnixMs, WireModel
from .dataset import DatasetId
from .errors import LicenceError
from .identity import Role

Action = Literal["list", "train", "read_result"]
Principal = Literal["submitter", "recipient"]

Measurement = Annotated[bytes, Field(min_length=48, max_length=48)]


class MemberIs(WireModel):
    """Holds if the principal acts for that member."""

    rule: Literal["member"] = "member"
    principal: Principal
    member: Name


class RoleIs(WireModel):
    """Holds if the principal has that role."""

    rule: Literal["role"] = "role"
    principal: Principal
    role: Role


class ForPurpose(WireModel):
    """Holds if the job declares that purpose."""

    rule: Literal["for_purpose"] = "for_purpose"
    purpose: Name


class Before(WireModel):
    """Holds until that time."""

    rule: Literal["before"] = "before"
    time: UnixMs


class AllOf(WireModel):
    """Holds if every rule does; at least one is needed."""

    rule: Literal["all_of"] = "all_of"
    rules: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=32)]


class AnyOf(WireModel):
    """Holds if some rule does."""

    rule: Literal["any_of"] = "any_of"
    rules: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=32)]


class AtLeast(WireModel):
    """Holds if ``count`` of the rules do."""

    rule: Literal["at_least"] = "at_least"
    count: Annotated[int, Field(ge=1, le=32)]
    rules: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=32)]

    @model_validator(mode="after")
    def _is_satisfiable(self) -> Self:
        if self.count > len(self.rules):
            raise ValueError("count must not exceed the number of rules")
        return self


Rule = Annotated[MemberIs | RoleIs | ForPurpose | Before | AllOf | AnyOf | AtLeast, Field(discriminator="rule")]


class Permission(WireModel):
    """An action, and the rule under which it is allowed."""

    action: Action
    rule: Rule


class Licence(WireModel):
    """An owner's terms for one dataset. ``epsilon`` and ``delta`` are for the dataset's whole life."""

    KIND: ClassVar[str] = "licence"

    version: Literal[1] = 1
    number: Annotated[int, Field(ge=1, lt=1 << 32)]
    dataset: DatasetId
    text: Text = ""
    permissions: Annotated[tuple[Permission, ...], Field(min_length=1, max_length=32)]
    measurements: Annotated[tuple[Measurement, ...], Field(min_length=1, max_length=64)] | None = None
    epsilon: Annotated[float, Field(ge=1e-3, le=100)]
    epsilon_per_job: Annotated[float, Field(ge=1e-3, le=100)]
    delta: Annotated[float, Field(ge=1e-10, le=0.5)]
    expires: UnixMs

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.epsilon_per_job > self.epsilon:
            raise ValueError("epsilon_per_job must not exceed epsilon")
        if len({permission.action for permission in self.permissions}) != len(self.permissions):
            raise ValueError("one permission for each action")
        return self


@dataclass(frozen=True)
class Actor:
    """A principal as the rules see it."""

    member: str
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class Question:
    """What is asked of a licence. ``purpose`` and ``measurement`` are ``None`` where none is at stake yet."""

    action: Action
    now: int
    submitter: Actor
    recipients: tuple[Actor, ...] = ()
    purpose: str | None = None
    measurement: bytes | None = None


def check_licence(licence: Licence, question: Question) -> None:
    """Raises :class:`LicenceError`, naming what forbids it, unless the licence allows what is asked."""
    if question.now >= licence.expires:
        raise LicenceError(f"the licence of {licence.dataset} has expired")
    rule = next((p.rule for p in licence.permissions if p.action == question.action), None)
    if rule is None:
        raise LicenceError(f"the licence of {licence.dataset} has no permission to {question.action}")
    if not _holds(rule, question):
        raise LicenceError(f"the licence of {licence.dataset} does not let this party {question.action}")
    accepted = licence.measurements
    if question.measurement is not None and accepted is not None and question.measurement not in accepted:
        raise LicenceError(f"the licence of {licence.dataset} does not accept this worker's measurement")


def _holds(rule: Rule, question: Question) -> bool:
    match rule:
        case MemberIs(principal=principal, member=member):
            return _of_all(question, principal, lambda actor: actor.member == member)
        case RoleIs(principal=principal, role=role):
            return _of_all(question, principal, lambda actor: role in actor.roles)
        case ForPurpose(purpose=purpose):
            return question.purpose == purpose
        case Before(time=time):
            return question.now < time
        case AllOf(rules=rules):
            return all(_holds(inner, question) for inner in rules)
        case AnyOf(rules=rules):
            return any(_holds(inner, question) for inner in rules)
        case AtLeast(count=count, rules=rules):
            return sum(_holds(inner, question) for inner in rules) >= count


def _of_all(question: Question, principal: Principal, test: Callable[[Actor], bool]) -> bool:
    actors = (question.submitter,) if principal == "submitter" else question.recipients
    return bool(actors) and all(test(actor) for actor in actors)
