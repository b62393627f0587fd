"""What an owner allows: a licence is data, and judging it is a pure function.

Nothing is allowed that no permission allows, and no rule forbids: rules only add up, so more roles, an earlier time or one
more approval never takes anything away. A rule is judged for each recipient by itself, and must hold for every one of them.
What a job makes inherits the licences of all that went into it (:class:`DerivedLicence`). Which licences are refused
before anybody signs them is decided in :mod:`casemate_schemas.licence_check`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, StringConstraints, ValidationInfo, model_validator

from .codec import Name, Text, UnixMs, WireModel, digest_of
from .dataset import DatasetId
from .errors import ApprovalMissingError, LicenceError
from .identity import MAX_DELEGATION_MS, Delegation, Role

Action = Literal["list", "train", "evaluate", "statistics", "predict", "deploy", "read_result", "read_metrics"]
"""All that can be allowed. Raw data is used inside a worker and read by nobody: no action stands for that."""

Principal = Literal["submitter", "recipient", "approver"]
"""Of whom a rule speaks: who submits (or lists), each who may read the result, each who approves."""

MAX_APPROVALS: Final = 16
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _bytes_of(value: object, info: ValidationInfo) -> object:
    """JSON has no bytes: there they are hexadecimal."""
    return bytes.fromhex(value) if info.mode == "json" and isinstance(value, str) else value


def _ms_of(value: object, info: ValidationInfo) -> object:
    """In JSON a time may be an ISO 8601 text with its offset; elsewhere it is Unix ms."""
    if info.mode != "json" or not isinstance(value, str):
        return value
    if (time := datetime.fromisoformat(value)).tzinfo is None:
        raise ValueError("expected a time with its offset, such as 2027-01-01T00:00:00Z")
    return (time - _EPOCH) // timedelta(milliseconds=1)


def _iso_of(ms: int) -> str | int:
    try:
        return (_EPOCH + timedelta(milliseconds=ms)).isoformat(timespec="milliseconds")
    except OverflowError:
        return ms


_HEX: Final = (BeforeValidator(_bytes_of), PlainSerializer(bytes.hex, when_used="json"))
Measurement = Annotated[bytes, *_HEX, Field(min_length=48, max_length=48)]
"""The launch measurement of a worker's image; hexadecimal in JSON."""

ModelDigest = Annotated[bytes, *_HEX, Field(min_length=32, max_length=32)]
"""What a model is known by, in hexadecimal in JSON: the digest of its :class:`~.model.ModelSpec` before it is trained."""

Time = Annotated[UnixMs, BeforeValidator(_ms_of), PlainSerializer(_iso_of, when_used="json")]
"""Unix ms; ISO 8601 in JSON."""

Region = Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}$")]
"""A country (ISO 3166-1 alpha-2), or EU."""


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
    time: Time


class WithModel(WireModel):
    """Holds if the job names that model in its terms."""

    rule: Literal["with_model"] = "with_model"
    model: ModelDigest


class WithMeasurement(WireModel):
    """Holds on a worker of that measurement; the manifest's policy decides beside it which workers are genuine."""

    rule: Literal["with_measurement"] = "with_measurement"
    measurement: Measurement


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


Leaf = MemberIs | RoleIs | ForPurpose | Before | WithModel | WithMeasurement
Combination = AllOf | AnyOf | AtLeast
Rule = Annotated[
    MemberIs | RoleIs | ForPurpose | Before | WithModel | WithMeasurement | AllOf | AnyOf | AtLeast,
    Field(discriminator="rule"),
]


class Approvals(WireModel):
    """``count`` different people whom ``by`` accepts must approve the very terms, and none of them may deny.

    Nobody approves a job of their own. With ``four_eyes`` an approval counts only beside one by another person of the
    same member. An approval is good for ``valid_s`` seconds after it was given, and no longer than it says itself.
    """

    count: Annotated[int, Field(ge=1, le=MAX_APPROVALS)]
    by: Rule
    four_eyes: bool = False
    valid_s: Annotated[int, Field(ge=60, le=MAX_DELEGATION_MS // 1000)]


class Permission(WireModel):
    """An action, the rule under which it is allowed, and the approvals that it needs besides."""

    action: Action
    rule: Rule
    approvals: Approvals | None = None


class LicenceTerms(WireModel):
    """What the parties owe each other: what results are for, on which legal basis, where and for how long they are kept."""

    purposes: Annotated[tuple[Name, ...], Field(max_length=16)] = ()
    legal_basis: Annotated[str, StringConstraints(max_length=200)] = ""
    regions: Annotated[tuple[Region, ...], Field(max_length=64)] = ()
    retention_days: Annotated[int, Field(ge=1, le=36_500)] | None = None

    @model_validator(mode="after")
    def _is_sorted(self) -> Self:
        if list(self.purposes) != sorted(set(self.purposes)) or list(self.regions) != sorted(set(self.regions)):
            raise ValueError("purposes and regions must be sorted, each once")
        return self


class LicenceBase(LicenceTerms):
    """What every licence says, whatever it is about.

    ``purposes`` limits all that is done in a job (empty: only rules limit it); a key broker enforces it. The other
    obligations it states in every Grant.
    """

    version: Literal[1] = 1
    number: Annotated[int, Field(ge=1, lt=1 << 32)]
    text: Text = ""
    permissions: Annotated[tuple[Permission, ...], Field(min_length=1, max_length=32)]
    expires: Time

    @model_validator(mode="after")
    def _names_each_once(self) -> Self:
        if len({permission.action for permission in self.permissions}) != len(self.permissions):
            raise ValueError("one permission for each action")
        return self

    @property
    def subject(self) -> str:
        """What the licence is about, as ``name@owner``."""
        raise NotImplementedError

    def permission(self, action: Action) -> Permission | None:
        """The permission for that action, if there is one."""
        return next((permission for permission in self.permissions if permission.action == action), None)


class Licence(LicenceBase):
    """An owner's terms for one dataset. ``epsilon`` and ``delta`` are for the dataset's whole life."""

    KIND: ClassVar[str] = "licence"

    dataset: DatasetId
    epsilon: Annotated[float, Field(ge=1e-3, le=100)]
    epsilon_per_job: Annotated[float, Field(ge=1e-3, le=100)]
    delta: Annotated[float, Field(ge=1e-10, le=0.5)]

    @model_validator(mode="after")
    def _fits_the_budget(self) -> Self:
        if self.epsilon_per_job > self.epsilon:
            raise ValueError("epsilon_per_job must not exceed epsilon")
        return self

    @property
    def subject(self) -> str:
        """``name@owner`` of the dataset."""
        return self.dataset


class ModelLicence(LicenceBase):
    """An owner's terms for one model (a base model, say), which its digest pins. A model has no privacy budget."""

    KIND: ClassVar[str] = "model-licence"

    model: DatasetId
    digest: ModelDigest

    @property
    def subject(self) -> str:
        """``name@owner`` of the model."""
        return self.model


AnyLicence = Licence | ModelLicence

MAX_INHERITED: Final = 256
"""Bound on the licences of one derived artefact."""


@dataclass(frozen=True)
class DerivedLicence:
    """What holds for a result: all of these licences, each once, by digest."""

    licences: tuple[AnyLicence, ...]


def conjunction(inputs: Iterable[AnyLicence | DerivedLicence]) -> DerivedLicence:
    """What a result of these inputs inherits. However long the chain, it is one flat set of licences.

    Raises :class:`LicenceError` for no input at all, or for more than 256 licences.
    """
    found: dict[bytes, AnyLicence] = {}
    for item in inputs:
        for licence in item.licences if isinstance(item, DerivedLicence) else (item,):
            found[digest_of(licence)] = licence
    if not 1 <= len(found) <= MAX_INHERITED:
        raise LicenceError(f"a result inherits 1 to {MAX_INHERITED} licences, not {len(found)}")
    return DerivedLicence(tuple(licence for _, licence in sorted(found.items())))


class Obligation(LicenceTerms):
    """What whoever holds a result of this subject owes its owner: stated in each Grant, hence in each provenance."""

    subject: DatasetId


def obligation_of(licence: AnyLicence) -> Obligation:
    """The obligations of a licence."""
    fields = {name: getattr(licence, name) for name in LicenceTerms.model_fields}
    return Obligation(subject=licence.subject, **fields)


@dataclass(frozen=True)
class Actor:
    """A principal as the rules see it. ``person`` tells approvers apart, and the submitter from them."""

    member: str
    roles: tuple[Role, ...]
    person: str = ""


def actor_of(person: Delegation) -> Actor:
    """The person as rules see them."""
    return Actor(person.member, person.roles, person.person)


@dataclass(frozen=True)
class VerifiedApproval:
    """What a person said about terms under a licence; the signatures hold already. Times are Unix ms."""

    approver: Actor
    terms: bytes
    licence: bytes
    decision: Literal["approve", "deny"]
    at: int
    expires: int


@dataclass(frozen=True)
class Question:
    """What is asked of a licence. ``purpose``, ``model``, ``measurement`` and ``terms`` are ``None`` where there is none.

    ``no_worker_yet`` asks for an opinion before a worker is chosen: rules about its measurement are then left open.
    """

    action: Action
    now: int
    submitter: Actor
    recipients: tuple[Actor, ...] = ()
    purpose: str | None = None
    model: bytes | None = None
    measurement: bytes | None = None
    terms: bytes | None = None
    no_worker_yet: bool = False


@dataclass(frozen=True)
class Allowed:
    """Nothing stands in the way."""


@dataclass(frozen=True)
class Refused:
    """It is forbidden: why, in words for who asked."""

    reason: str


@dataclass(frozen=True)
class MissingApprovals:
    """``count`` more people whom ``approvals.by`` accepts must approve this use of the subject."""

    subject: str
    action: Action
    count: int
    approvals: Approvals


@dataclass(frozen=True)
class Awaiting:
    """It is allowed once all of these approvals are there."""

    missing: tuple[MissingApprovals, ...]


Outcome = Allowed | Refused | Awaiting


def evaluate(licence: AnyLicence, question: Question, approvals: Sequence[VerifiedApproval] = ()) -> Outcome:
    """What the licence says.

    1. It has not expired. 2. The job's purpose is one of its purposes. 3. It has a permission for the action.
    4. The permission's rule holds, for every recipient. 5. The approvals that the permission asks for are there.
    """
    if question.now >= licence.expires:  # 1
        return Refused(f"the licence of {licence.subject} has expired")
    if licence.purposes and question.action != "list" and question.purpose not in licence.purposes:  # 2
        return Refused(f"the licence of {licence.subject} is for {' or '.join(licence.purposes)} only")
    if (permission := licence.permission(question.action)) is None:  # 3
        return Refused(f"the licence of {licence.subject} has no permission to {question.action}")
    recipients: tuple[Actor | None, ...] = question.recipients or (None,)
    if not all(_holds(permission.rule, question, recipient=person) for person in recipients):  # 4
        return Refused(f"the licence of {licence.subject} does not let this party {question.action}")
    if permission.approvals is None:
        return Allowed()
    given = [item for item in approvals if (item.terms, item.licence) == (question.terms, digest_of(licence))]
    return _approved(licence.subject, permission.action, permission.approvals, question, given)  # 5


def evaluate_all(licences: DerivedLicence, question: Question, approvals: Sequence[VerifiedApproval] = ()) -> Outcome:
    """What all licences of a derived artefact say together: the first refusal, or every approval that is missing."""
    return together(evaluate(licence, question, approvals) for licence in licences.licences)


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """Several outcomes as one: the first refusal, else all that is awaited, else allowed."""
    missing: list[MissingApprovals] = []
    for outcome in outcomes:
        match outcome:
            case Refused():
                return outcome
            case Awaiting(missing=more):
                missing += more
    return Awaiting(tuple(missing)) if missing else Allowed()


def check_licence(licence: AnyLicence, question: Question, approvals: Sequence[VerifiedApproval] = ()) -> None:
    """Raises :class:`LicenceError`, naming what forbids it, unless the licence allows what is asked.

    :class:`ApprovalMissingError` is raised where only approvals are missing.
    """
    check_outcome(evaluate(licence, question, approvals))


def check_outcome(outcome: Outcome) -> None:
    """Raises :class:`LicenceError` unless it is allowed; :class:`ApprovalMissingError` where only approvals are missing."""
    match outcome:
        case Refused(reason=reason):
            raise LicenceError(reason)
        case Awaiting(missing=missing):
            raise ApprovalMissingError(f"approvals are missing: {'; '.join(map(_so_far, missing))}")


def may_approve(asked: Approvals, person: Actor, submitter: Actor) -> bool:
    """Whether that person's word on a job of this submitter would count."""
    if (person.member, person.person) == (submitter.member, submitter.person):
        return False
    return _holds(asked.by, Question(action="list", now=0, submitter=submitter), approver=person)


def _so_far(item: MissingApprovals) -> str:
    """``cardio@north has 1 of 2 to train``."""
    return f"{item.subject} has {max(0, item.approvals.count - item.count)} of {item.approvals.count} to {item.action}"


def leaves(rule: Rule) -> Iterator[Leaf]:
    """The leaf rules, from left to right."""
    if isinstance(rule, Combination):
        for inner in rule.rules:
            yield from leaves(inner)
    else:
        yield rule


def names_model(licence: AnyLicence) -> bool:
    """Whether some permission depends on which model it is."""
    return any(isinstance(leaf, WithModel) for item in licence.permissions for leaf in leaves(item.rule))


def _holds(rule: Rule, question: Question, *, recipient: Actor | None = None, approver: Actor | None = None) -> bool:
    """Whether the rule holds for this one recipient, or this one approver."""
    actors: dict[Principal, Actor | None] = {
        "submitter": question.submitter,
        "recipient": recipient,
        "approver": approver,
    }
    match rule:
        case MemberIs(principal=principal, member=member):
            return (actor := actors[principal]) is not None and actor.member == member
        case RoleIs(principal=principal, role=role):
            return (actor := actors[principal]) is not None and role in actor.roles
        case ForPurpose(purpose=purpose):
            return question.purpose == purpose
        case Before(time=time):
            return question.now < time
        case WithModel(model=model):
            return question.model == model
        case WithMeasurement(measurement=measurement):
            return question.no_worker_yet or question.measurement == measurement
    held = sum(_holds(inner, question, recipient=recipient, approver=approver) for inner in rule.rules)
    match rule:
        case AllOf(rules=rules):
            return held == len(rules)
        case AnyOf():
            return held >= 1
        case AtLeast(count=count):
            return held >= count


def _approved(
    subject: str, action: Action, asked: Approvals, question: Question, given: Sequence[VerifiedApproval]
) -> Outcome:
    """Whether approvals of these terms under this licence suffice.

    1. Only people whom the rule accepts have a say, and the submitter has none.
    2. Each person's newest word counts, unless it is from the future; no is newer than a yes of the same time.
    3. A denial ends it. 4. What has lapsed no longer counts.
    5. Four eyes: an approval counts only beside one by another person of the same member.
    """
    own = (question.submitter.member, question.submitter.person)
    newest: dict[tuple[str, str], VerifiedApproval] = {}
    for item in sorted(given, key=lambda item: (item.at, item.decision == "deny")):
        person = (item.approver.member, item.approver.person)
        if item.at <= question.now and person != own and _holds(asked.by, question, approver=item.approver):  # 1
            newest[person] = item  # 2
    in_force = {
        person: item
        for person, item in newest.items()
        if question.now < min(item.expires, item.at + 1000 * asked.valid_s)  # 4
    }
    if denied := sorted(person for person, item in in_force.items() if item.decision == "deny"):  # 3
        return Refused(f"{denied[0][1]}@{denied[0][0]} denied this use of {subject}")
    if missing := _missing([member for member, _ in in_force], asked):  # 5
        return Awaiting((MissingApprovals(subject, action, missing, asked),))
    return Allowed()


def _missing(members: list[str], asked: Approvals) -> int:
    """How many more people must approve, at the least, beside one of each of these members."""
    if not asked.four_eyes:
        return max(0, asked.count - len(members))
    counted = sum(members.count(member) >= 2 for member in members)
    if (missing := max(0, asked.count - counted)) == 0:
        return 0
    if counted < len(members):  # one more beside a lone approver makes two that count
        return max(1, missing - 1)
    return missing
