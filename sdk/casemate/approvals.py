"""Jobs that wait for people: what is asked of them, in their own member's words and verified here, and their signed word.

What an approver signs is the digest of the terms that were shown: signed by the submitter, verified on the approver's own
machine. The figures (spent budget, who approved so far) are the key broker's word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from casemate_schemas.approval import Approval
from casemate_schemas.consortium import KeyBroker
from casemate_schemas.errors import (
    AuthorisationError,
    NotFoundError,
    ParameterError,
    SealError,
    UnavailableError,
)
from casemate_schemas.identity import MAX_DELEGATION_MS, Delegation
from casemate_schemas.licence import Approvals, Licence, actor_of, may_approve
from casemate_schemas.licence_text import describe
from casemate_schemas.requests import (
    ApprovalGiven,
    ApprovalListing,
    ApprovalShown,
    ApprovalUse,
    GiveApproval,
    ListApprovals,
    PendingApproval,
    ShowApproval,
)
from casemate_schemas.signatures import Signed, sign
from casemate_schemas.terms import VerifiedTerms, verify_terms

from ._http import printable
from ._session import Session
from .plan_text import describe_plan, describe_use

Decision = Literal["approve", "deny"]
_DIGEST_DIGITS: Final = 64
_MAX_LINE_CHARS: Final = 16_000


@dataclass(frozen=True)
class PendingApprovals:
    """The jobs that wait, each with the key broker that asks; and the key brokers that do not answer, with why."""

    pending: tuple[tuple[str, PendingApproval], ...]
    unavailable: Mapping[str, str]

    def __iter__(self) -> Iterator[tuple[str, PendingApproval]]:
        return iter(self.pending)

    def __len__(self) -> int:
        return len(self.pending)


@dataclass(frozen=True)
class ApprovalRequest:
    """One job before its approvers, at one key broker. ``str()`` of it is what to read before approving."""

    key_broker: str
    terms: VerifiedTerms
    shown: ApprovalShown
    licences: tuple[Signed, ...]
    """Those under which the word of the person who asked counts."""
    names: Mapping[str, str]
    """Of members, by id."""

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.terms.terms.job_id

    @property
    def state(self) -> Literal["awaiting", "approved", "denied"]:
        """Where it stands, as far as the data that concerns this person goes."""
        return self.shown.state

    def __str__(self) -> str:
        return "\n".join(printable(line, _MAX_LINE_CHARS) for line in self._lines())

    def _lines(self) -> Iterator[str]:
        terms = self.terms.terms
        asked = "train" if terms.plan.audit is None else f"audit training, with {terms.plan.audit.canaries} canaries"
        yield f"{self.key_broker}: job {terms.job_id} is {self.state}"
        yield f"  {_name(self.terms.submitter)} asks to {asked}, for {terms.plan.purpose}, until {_when(terms.deadline)}"
        yield f"  on {', '.join(use.dataset for use in terms.plan.datasets)}, to predict {terms.plan.pipeline.target}"
        yield from (f"  {line}" for line in describe_plan(terms.plan))
        yield "  the model itself stays sealed"
        readers = ", ".join(map(_name, self.terms.recipients))
        yield f"  released: {', '.join(terms.plan.release)}, to {readers}"
        for use in self.shown.uses:
            yield from self._about(use)

    def _about(self, use: ApprovalUse) -> Iterator[str]:
        licence = use.licence.peek(Licence)
        yield f"  {use.dataset}: ε {use.epsilon:.3g} for this job alone, at δ {licence.delta:g};"
        yield f"    ε {use.epsilon_spent:.3g} of {licence.epsilon:g} were spent before it"
        (plan_use,) = (item for item in self.terms.terms.plan.datasets if item.dataset == use.dataset)
        yield from (f"    {line}" for line in describe_use(self.terms.terms.plan, plan_use, licence.delta))
        yield f"    {describe(licence, self.names)}"
        for item in use.awaited:
            yield f"    to {item.action}: {max(0, item.count - item.missing)} of {item.count} approvals"
        for given in self.shown.given:
            if given.dataset == use.dataset:
                yield f"    {_words(given)}"


async def list_approvals(session: Session) -> PendingApprovals:
    """What waits for this person, or for their member's data, at any key broker. Raises the error of one that answers wrongly."""
    brokers = session.consortium.manifest.key_brokers
    answers, unavailable = await session.ask_all(brokers, ListApprovals(), ApprovalListing)
    pending = [(broker.id, item) for broker, listing in answers for item in listing.pending]
    return PendingApprovals(tuple(sorted(pending, key=lambda item: item[1].deadline)), unavailable)


async def find_approvals(session: Session, job: str) -> tuple[ApprovalRequest, ...]:
    """The requests about one job, one for each key broker that asks.

    ``job`` is the id of a job that waits; or its terms' digest, also of one that waits no more. Raises
    :class:`NotFoundError`, and :class:`UnavailableError` if none is found while a key broker does not answer.
    """
    if len(job) == _DIGEST_DIGITS:
        return await _at_all(session, _digest(job))
    listed = await list_approvals(session)
    asking = [(name, item.terms) for name, item in listed if item.job_id == job]
    if len({terms for _, terms in asking}) > 1:
        raise ParameterError("several jobs claim this id: name the one you mean by its terms' digest")
    if not asking and listed.unavailable:
        raise UnavailableError(f"no answer from key broker {', '.join(listed.unavailable)}")
    if not asking:
        raise NotFoundError(f"no job {printable(job)} waits for approvals that concern you")
    manifest = session.consortium.manifest
    return tuple([await show(session, manifest.key_broker(name), terms) for name, terms in asking])


async def show(session: Session, broker: KeyBroker, terms: bytes) -> ApprovalRequest:
    """What one key broker asks about one job, its terms verified."""
    return _verified(session, broker, terms, await session.ask(broker, ShowApproval(terms=terms), ApprovalShown))


async def decide(session: Session, request: ApprovalRequest, decision: Decision) -> ApprovalRequest:
    """Sign this person's word on the terms that were shown, and hand it in; the request as it is then.

    It is good for as long as the licences want approvals to be, and no longer than this person's delegation. Raises
    :class:`AuthorisationError` if no licence counts them, or the key broker's refusal.
    """
    broker = session.consortium.manifest.key_broker(request.key_broker)
    if not request.licences:
        raise AuthorisationError("no licence counts your word on this job")
    words = tuple(_word(session, request, licence, decision) for licence in request.licences)
    body = GiveApproval(terms=request.terms.digest, approvals=words)
    shown = await session.ask(broker, body, ApprovalShown, about=request.job_id)
    return _verified(session, broker, request.terms.digest, shown)


def _word(session: Session, request: ApprovalRequest, licence: Signed, decision: Decision) -> Signed:
    at, delegation = session.clock(), session.identity.delegation
    valid_s = max(approvals.valid_s for approvals in _asked(licence))
    approval = Approval(
        consortium=session.consortium.id,
        key_broker=request.key_broker,
        job_id=request.job_id,
        terms=request.terms.digest,
        licence=licence.digest,
        decision=decision,
        at=at,
        expires=min(at + min(1000 * valid_s, MAX_DELEGATION_MS), max(at + 1, delegation.expires)),
    )
    return sign(approval, session.identity.keys.signing)


async def _at_all(session: Session, terms: bytes) -> tuple[ApprovalRequest, ...]:
    brokers = session.consortium.manifest.key_brokers
    answers = await asyncio.gather(*(show(session, broker, terms) for broker in brokers), return_exceptions=True)
    found = [answer for answer in answers if isinstance(answer, ApprovalRequest)]
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    if not found and failed:
        raise next((error for error in failed if not isinstance(error, NotFoundError)), failed[0])
    return tuple(found)


def _verified(session: Session, broker: KeyBroker, terms: bytes, shown: ApprovalShown) -> ApprovalRequest:
    """That the terms are those asked about, and whole; and that each licence shown is the one that they name."""
    if shown.terms.digest != terms:
        raise SealError(f"key broker {broker.id} shows other terms than asked about")
    verified = verify_terms(shown.terms, session.consortium)
    named = {(use.dataset, use.licence) for use in verified.terms.plan.datasets}
    if not {(use.dataset, use.licence.digest) for use in shown.uses} <= named:
        raise SealError(f"key broker {broker.id} shows other licences than the terms name")
    names = {member.id: member.name for member in session.consortium.manifest.members}
    me, submitter = actor_of(session.identity.delegation), verified.submitter_actor
    counted = [use.licence for use in shown.uses if any(may_approve(a, me, submitter) for a in _asked(use.licence))]
    return ApprovalRequest(broker.id, verified, shown, tuple(counted), names)


def _asked(licence: Signed) -> list[Approvals]:
    """What the licence wants approvals for."""
    return [item.approvals for item in licence.peek(Licence).permissions if item.approvals is not None]


def _digest(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise ParameterError("expected a job id of 32 hexadecimal digits, or a terms' digest of 64") from error


def _name(person: Delegation) -> str:
    return f"{person.person}@{person.member}"


def _words(given: ApprovalGiven) -> str:
    if given.decision == "deny":
        return f"{given.person} denied it at {_when(given.at)}"
    end = f"good until {_when(given.expires)}" if given.counts else "which counts no longer"
    return f"{given.person} approved it at {_when(given.at)}, {end}"


def _when(ms: int) -> str:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(" ", "minutes").replace("+00:00", " UTC")
    except (OverflowError, ValueError, OSError):
        return "the end of time"
