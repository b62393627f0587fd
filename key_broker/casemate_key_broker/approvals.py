"""Jobs that wait for people, and what people said: kept durably, judged anew at each precheck and at each Grant.

A person is a name at a member, whatever keys they have: one person counts once, and so does one key. What is kept is what
was signed, so whether it still counts (delegation, revocation, licence, time) is never taken from the state. A denial
stands for ever, also when whoever denied is revoked later: the job can be submitted again, as another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from casemate_schemas.approval import Approval, verify_approval
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import (
    AuthorisationError,
    CasemateError,
    ConflictError,
    LicenceError,
    NotFoundError,
    ParameterError,
    TooLargeError,
    UnavailableError,
)
from casemate_schemas.grant import AuditEntry
from casemate_schemas.identity import Delegation
from casemate_schemas.job import Plan
from casemate_schemas.licence import (
    Approvals,
    Awaiting,
    Permission,
    VerifiedApproval,
    actor_of,
    may_approve,
)
from casemate_schemas.requests import (
    MAX_REQUEST_AGE_MS,
    ApprovalGiven,
    ApprovalListing,
    ApprovalShown,
    ApprovalUse,
    AwaitedApprovals,
    GiveApproval,
    PendingApproval,
)
from casemate_schemas.signatures import Signed
from casemate_schemas.terms import Terms, VerifiedTerms

from . import audit_log, ledger, prechecks
from .budgets import balance
from .database import Transaction
from .ledger import Charge
from .party import Party, full_name
from .prechecks import OwnedUse

MAX_PENDING_BY_PERSON: Final = 32
MAX_PENDING_BY_MEMBER: Final = 512
MAX_PENDING: Final = 4096
MAX_APPROVALS_OF_TERMS: Final = 512
"""Whoever spoke before may speak again, and one more may deny: no crowd of approvers takes that from anybody."""
MAX_LISTING_BYTES: Final = 768 << 10


# --- jobs that wait ---------------------------------------------------------------------------------------------------


def find_answer(tx: Transaction, terms: bytes, words: str) -> bytes | None:
    """The answer that was given last, if it said the same: as long as nothing changes, neither does the answer."""
    row = tx.execute("SELECT answer FROM pending WHERE terms = ? AND words = ?", (terms, words)).fetchone()
    return None if row is None else bytes(row[0])


def keep_waiting(
    tx: Transaction, signed: Signed, submitter: Delegation, *, words: str, answer: bytes, now: int
) -> None:
    """Keeps terms that lack approvals, until their deadline or the last answer.

    Raises :class:`UnavailableError` if this person, their member or all together have as many waiting as they may.
    """
    tx.execute("DELETE FROM pending WHERE deadline <= ?", (now,))
    tx.execute("DELETE FROM approvals WHERE deadline <= ? AND terms NOT IN (SELECT terms FROM terms)", (now,))
    changed = tx.execute("UPDATE pending SET words = ?, answer = ? WHERE terms = ?", (words, answer, signed.digest))
    if changed.rowcount:
        return
    _check_room(tx, submitter)
    terms = signed.peek(Terms)
    row = (signed.digest, terms.job_id, submitter.member, submitter.person, encode(signed), words, answer)
    tx.execute("INSERT INTO pending VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, terms.deadline))


def forget_waiting(tx: Transaction, terms: bytes, submitter: Delegation) -> None:
    """The submitter's terms have their last answer. What people said about them stays."""
    who = (terms, submitter.member, submitter.person)
    tx.execute("DELETE FROM pending WHERE terms = ? AND member = ? AND person = ?", who)


def _check_room(tx: Transaction, submitter: Delegation) -> None:
    who = (submitter.member, submitter.person)
    (by_person,) = tx.execute("SELECT count(*) FROM pending WHERE member = ? AND person = ?", who).fetchone()
    (by_member,) = tx.execute("SELECT count(*) FROM pending WHERE member = ?", who[:1]).fetchone()
    (by_all,) = tx.execute("SELECT count(*) FROM pending").fetchone()
    if by_person >= MAX_PENDING_BY_PERSON or by_member >= MAX_PENDING_BY_MEMBER or by_all >= MAX_PENDING:
        raise UnavailableError(
            f"{by_person} jobs of yours await approval here already; this one is taken up after them"
        )


# --- what counts ------------------------------------------------------------------------------------------------------


def in_force(tx: Transaction, verified: VerifiedTerms, party: Party, now: int) -> tuple[VerifiedApproval, ...]:
    """What people said about these terms, as far as it counts now: signed under a delegation that is valid, not revoked.

    Raises :class:`LicenceError` if anyone denied them.
    """
    given: list[VerifiedApproval] = []
    for row in _rows(tx, verified.digest):
        if row.decision == "deny":
            raise LicenceError(f"{row.name} denied this job")
        if (approval := row.verified(verified, party, now)) is not None:
            given.append(approval)
    return tuple(given)


@dataclass(frozen=True)
class _Row:
    """One person's word as it is kept. ``at`` is the earlier of when they said it and when it came."""

    name: str
    decision: str
    signed: Signed
    delegation: Signed
    at: int

    def verified(self, terms: VerifiedTerms, party: Party, now: int) -> VerifiedApproval | None:
        try:
            found = verify_approval(
                self.signed,
                self.delegation,
                party.consortium,
                key_broker=party.id,
                job_id=terms.terms.job_id,
                terms=terms.digest,
                now=now,
            )
        except CasemateError:
            return None
        fields = {**vars(found), "at": min(found.at, self.at)}
        return VerifiedApproval(**fields)


def _rows(tx: Transaction, terms: bytes) -> list[_Row]:
    query = "SELECT person || '@' || member, decision, signed, delegation, at FROM approvals WHERE terms = ? ORDER BY 1, licence"
    return [
        _Row(name, decision, decode(Signed, signed), decode(Signed, delegation), at)
        for name, decision, signed, delegation, at in tx.execute(query, (terms,)).fetchall()
    ]


# --- what people see --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A job before its approvers: its terms, and of its datasets here those whose approvals concern the person who asks."""

    signed: Signed
    terms: VerifiedTerms
    uses: tuple[OwnedUse, ...]


def find_all(tx: Transaction, party: Party, person: Delegation, now: int) -> ApprovalListing:
    """The jobs that wait for approvals and concern the person, as many as fit into one answer."""
    rows = tx.execute("SELECT signed FROM pending WHERE deadline > ? ORDER BY deadline, terms", (now,)).fetchall()
    cases = [case for (signed,) in rows if (case := _case(tx, decode(Signed, signed), party, person)) is not None]
    pending: list[PendingApproval] = []
    size = 0
    for item in map(_pending, cases):
        size += len(encode(item))
        if size > MAX_LISTING_BYTES or len(pending) == 1024:
            break
        pending.append(item)
    return ApprovalListing(pending=tuple(pending), n_pending=len(cases))


def find(tx: Transaction, terms: bytes, party: Party, person: Delegation) -> Case:
    """The job of these terms. One answer for what is not there and what is not for this person: :class:`NotFoundError`."""
    row = tx.execute("SELECT signed FROM pending WHERE terms = ?", (terms,)).fetchone()
    row = row or tx.execute("SELECT signed FROM terms WHERE terms = ?", (terms,)).fetchone()
    case = None if row is None else _case(tx, decode(Signed, row[0]), party, person)
    if case is None:
        raise NotFoundError("no job with these terms waits for approvals that concern you")
    return case


def show(tx: Transaction, case: Case, charges: Sequence[Charge], party: Party, now: int) -> ApprovalShown:
    """The job as an approver must know it. ``charges`` are those of the case's uses."""
    rows = _rows(tx, case.terms.digest)
    words = [(row, row.verified(case.terms, party, now)) for row in rows]
    valid = [found for _, found in words if found is not None]
    uses = tuple(_use(tx, case, use, charge, valid, now) for use, charge in zip(case.uses, charges, strict=True))
    denied = any(row.decision == "deny" for row in rows)
    missing = sum(item.missing for use in uses for item in use.awaited)
    return ApprovalShown(
        terms=case.signed,
        uses=uses,
        given=tuple(item for use in case.uses for item in _given(use, case.terms.terms.plan, words, now)),
        state="denied" if denied else "awaiting" if missing else "approved",
    )


def _case(tx: Transaction, signed: Signed, party: Party, person: Delegation) -> Case | None:
    """The terms were verified when they were kept; who submitted them is taken from them as it was then."""
    terms = signed.peek(Terms)
    submitter = terms.submitter.peek(Delegation)
    recipients = tuple(item.peek(Delegation) for item in terms.plan.recipients)
    verified = VerifiedTerms(signed.digest, terms, submitter, recipients)
    try:
        uses = prechecks.load_uses(tx, terms.plan, party)
        prechecks.check_named_licences(uses)
    except CasemateError:
        return None
    concerned = tuple(use for use in uses if _concerns(use, verified, party, person))
    return Case(signed, verified, concerned) if concerned else None


def _concerns(use: OwnedUse, terms: VerifiedTerms, party: Party, person: Delegation) -> bool:
    """Whether the use waits for approvals that this person can give, or has to look after for its owner."""
    asked = _asked(use, terms.terms.plan)
    looks_after = person.member == use.use.owner and bool({"steward", "admin"} & set(person.roles))
    counted = any(may_approve(approvals, actor_of(person), terms.submitter_actor) for _, approvals in asked)
    return bool(asked) and use.use.owner in party.serves and (looks_after or counted)


def _asked(use: OwnedUse, plan: Plan) -> list[tuple[Permission, Approvals]]:
    """What a job of this plan needs approvals for."""
    found = (use.dataset.licence.permission(action) for action in prechecks.actions_of(plan))
    return [(item, item.approvals) for item in found if item is not None and item.approvals is not None]


def _pending(case: Case) -> PendingApproval:
    terms = case.terms.terms
    return PendingApproval(
        job_id=terms.job_id,
        terms=case.terms.digest,
        submitter=full_name(case.terms.submitter),
        purpose=terms.plan.purpose,
        datasets=tuple(use.use.dataset for use in case.uses),
        created=terms.created,
        deadline=terms.deadline,
    )


def _use(
    tx: Transaction, case: Case, use: OwnedUse, charge: Charge, given: Sequence[VerifiedApproval], now: int
) -> ApprovalUse:
    """The licence may forbid the job since; then nothing is awaited, and the next precheck says so."""
    awaited = []
    for permission, approvals in _asked(use, case.terms.terms.plan):
        outcome = prechecks.check_action(permission.action, use, case.terms, now, None, given)
        missing = outcome.missing[0].count if isinstance(outcome, Awaiting) else 0
        awaited.append(AwaitedApprovals(action=permission.action, count=approvals.count, missing=missing))
    return ApprovalUse(
        dataset=use.use.dataset,
        licence=use.dataset.signed_licence,
        epsilon=charge.epsilon,
        epsilon_spent=balance(tx, use.dataset).spent,
        awaited=tuple(awaited),
    )


def _given(
    use: OwnedUse, plan: Plan, words: Sequence[tuple[_Row, VerifiedApproval | None]], now: int
) -> list[ApprovalGiven]:
    """What was said under the licence of one use."""
    valid_ms = 1000 * max(approvals.valid_s for _, approvals in _asked(use, plan))
    found = []
    for row, approval in words:
        said = row.signed.peek(Approval)
        if said.licence == use.use.licence:
            ends = min(said.expires, row.at + valid_ms)
            counts = approval is not None and now < ends
            found.append(
                ApprovalGiven(
                    dataset=use.use.dataset,
                    person=row.name,
                    decision=said.decision,
                    at=row.at,
                    expires=ends,
                    counts=counts or said.decision == "deny",
                )
            )
    return found


# --- what people say --------------------------------------------------------------------------------------------------


def give(
    tx: Transaction, request: GiveApproval, case: Case, party: Party, person: Delegation, delegation: Signed, now: int
) -> None:
    """Keeps what a person says about these terms, with an audit entry; it is judged at the next precheck or Grant.

    1. Nothing is reserved for these terms yet. 2. The person who asks signed each, just now, about these very terms.
    3. Each is under a licence in force that counts this person. 4. It is not older than what they said before.
    5. Their key has not spoken under another name.

    Raises :class:`ConflictError`, :class:`AuthenticationError`, :class:`ParameterError` or :class:`AuthorisationError`.
    """
    if ledger.find_reservation(tx, request.terms) is not None:  # 1
        raise ConflictError("a worker has been given the keys already: the job can no longer be approved or denied")
    for signed in request.approvals:
        verified = verify_approval(  # 2
            signed,
            delegation,
            party.consortium,
            key_broker=party.id,
            job_id=case.terms.terms.job_id,
            terms=request.terms,
            now=now,
        )
        if abs(now - verified.at) > MAX_REQUEST_AGE_MS or now >= verified.expires:
            raise ParameterError("the approval is not of now: check the clocks")
        _check_counted(case, verified)  # 3
        _keep(tx, case, verified, signed, delegation, now)  # 4, 5
        entry = AuditEntry(
            key_broker=party.id,
            event="denied" if verified.decision == "deny" else "approved",
            at=now,
            subject=case.terms.terms.job_id,
            terms=request.terms,
            person=full_name(person),
        )
        audit_log.append(tx, entry)


def _check_counted(case: Case, said: VerifiedApproval) -> None:
    terms = case.terms
    for use in case.uses:
        asked = _asked(use, terms.terms.plan)
        if use.use.licence == said.licence and any(
            may_approve(approvals, said.approver, terms.submitter_actor) for _, approvals in asked
        ):
            return
    raise AuthorisationError("no licence in force counts your word on this job")


def _keep(tx: Transaction, case: Case, said: VerifiedApproval, signed: Signed, delegation: Signed, now: int) -> None:
    who = (said.terms, said.licence, said.approver.member, said.approver.person)
    query = "SELECT signed FROM approvals WHERE terms = ? AND licence = ? AND member = ? AND person = ?"
    known = tx.execute(query, who).fetchone()
    if known is not None:  # 4
        before = decode(Signed, known[0]).peek(Approval)
        if before.decision == "deny" or said.at < before.at:
            raise ConflictError("you said otherwise about this job, and that stands")
    query = "SELECT member, person FROM approvals WHERE terms = ? AND signer = ?"
    if any(row != who[2:] for row in tx.execute(query, (said.terms, signed.signer))):  # 5
        raise ConflictError("this key has spoken under another name already")
    (count,) = tx.execute("SELECT count(*) FROM approvals WHERE terms = ?", who[:1]).fetchone()
    if known is None and count >= MAX_APPROVALS_OF_TERMS + (said.decision == "deny"):
        raise TooLargeError(f"{count} people have spoken about this job already, the most that can")
    row = (signed.signer, said.decision, encode(signed), encode(delegation), min(now, said.at))
    deadline = case.terms.terms.deadline
    tx.execute("INSERT OR REPLACE INTO approvals VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*who, *row, deadline))
