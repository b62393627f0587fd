"""Judging a job before any worker is held, and again when a worker asks for keys. Nothing here writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from casemate_privacy.statement import check_accountable
from casemate_schemas.admission import MAX_TERMS_ENVELOPE_BYTES, Routing, Submission
from casemate_schemas.codec import decode
from casemate_schemas.consortium import MAX_CLOCK_SKEW_MS, verify_delegation
from casemate_schemas.dataset import Column, DatasetCard
from casemate_schemas.envelope import open_head
from casemate_schemas.errors import (
    AuthorisationError,
    DatasetError,
    DeadlineError,
    LicenceError,
    ManifestError,
    ParameterError,
    SealError,
)
from casemate_schemas.identity import Delegation
from casemate_schemas.job import DatasetUse, Plan
from casemate_schemas.licence import (
    Action,
    Outcome,
    Question,
    Refused,
    VerifiedApproval,
    check_outcome,
    evaluate,
    together,
)
from casemate_schemas.pipeline import Loss
from casemate_schemas.sealing import check_consortium, open_envelope, unseal_content_key
from casemate_schemas.signatures import Signed
from casemate_schemas.terms import Terms, VerifiedTerms, verify_terms

from . import licences
from .budgets import charge_of, check_cap
from .database import Transaction
from .ledger import Charge
from .licences import Registered
from .party import Party

TARGET_KINDS: Final[dict[Loss, str]] = {
    "cross_entropy": "class",
    "binary_cross_entropy": "binary",
    "mean_squared_error": "value",
}


@dataclass(frozen=True)
class OwnedUse:
    """One dataset of a plan that this key broker answers for, and the dataset as it is in force now."""

    use: DatasetUse
    dataset: Registered


def authenticate(submission: Submission, party: Party, now: int) -> tuple[Delegation, Routing]:
    """Who submits, and the routing they signed, if it concerns this key broker.

    Raises :class:`AuthenticationError`, :class:`SignatureError` or :class:`ManifestError`.
    """
    submitter = verify_delegation(submission.delegation, party.consortium, at=now)
    routing = submission.routing.verify(Routing, submitter.signing_key)
    if routing.consortium != party.consortium.id:
        raise ManifestError("the routing is for another consortium")
    if party.id not in routing.key_brokers:
        raise ManifestError(f"the routing does not name key broker {party.id}")
    return submitter, routing


def open_terms(submission: Submission, routing: Routing, submitter: Delegation, party: Party) -> Signed:
    """The signed terms in the submission's envelope, which must be from the submitter and open here."""
    _, plaintext = open_envelope(
        submission.terms_envelope,
        party.sealing,
        kind="terms",
        consortium=party.consortium.id,
        sender=submitter.signing_key,
        max_bytes=MAX_TERMS_ENVELOPE_BYTES,
    )
    signed = decode(Signed, plaintext)
    if signed.digest != routing.terms:
        raise ParameterError("the routing names other terms than those in the envelope")
    return signed


def check_routing(verified: VerifiedTerms, routing: Routing, submitter: Delegation) -> None:
    """Raises :class:`ParameterError`, naming the field, unless the routing repeats what the terms say.

    The terms must name the very delegation that holds now: terms state their own time, so their signer could date them
    back to an older delegation, with roles or a member that the person has no longer.
    """
    terms = verified.terms
    pairs = {
        "submitter": (verified.submitter, submitter),
        "job_id": (terms.job_id, routing.job_id),
        "job_key_broker": (terms.job_key_broker, routing.job_key_broker),
        "key_brokers": (terms.key_brokers, routing.key_brokers),
        "recipients": ({person.signing_key for person in verified.recipients}, set(routing.recipients)),
        "deadline": (terms.deadline, routing.deadline),
    }
    if different := [name for name, (ours, theirs) in pairs.items() if ours != theirs]:
        raise ParameterError(f"routing and terms differ in {', '.join(different)}")


def check_times(verified: VerifiedTerms, now: int) -> None:
    """Raises :class:`ParameterError` for terms from the future or past their deadline."""
    if verified.terms.created > now + MAX_CLOCK_SKEW_MS:
        raise ParameterError("the terms were created in the future: check the submitter's clock")
    check_deadline(verified.terms, now)


def check_deadline(terms: Terms, now: int) -> None:
    """Raises :class:`DeadlineError` for terms past their deadline."""
    if terms.deadline <= now:
        raise DeadlineError("the deadline has passed")


def check_recipients(verified: VerifiedTerms, party: Party, now: int) -> None:
    """Raises :class:`AuthenticationError` unless every recipient's delegation is valid now, whatever time the terms state."""
    for signed in verified.terms.plan.recipients:
        verify_delegation(signed, party.consortium, at=now)


def check_job_head(job_head: bytes, routing: Routing, submitter: Delegation, party: Party) -> None:
    """That the job envelope is the submitter's, is the one the routing names, and that its key opens here."""
    head = open_head(job_head, kind="job", sender=submitter.signing_key)
    check_consortium(head, party.consortium.id)
    if head.header.digest != routing.job_envelope:
        raise SealError("the job envelope is another one than the routing names")
    unseal_content_key(head, party.sealing)


def load_uses(tx: Transaction, plan: Plan, party: Party) -> tuple[OwnedUse, ...]:
    """The datasets of the plan that this key broker answers for. Raises :class:`NotFoundError`."""
    return tuple(OwnedUse(use, licences.find(tx, use.dataset)) for use in plan.datasets if use.key_broker == party.id)


def check_kept(uses: tuple[OwnedUse, ...]) -> None:
    """Raises :class:`DatasetError` for a dataset that its owner erased."""
    for owned in uses:
        if owned.dataset.erased:
            raise DatasetError(f"{owned.use.dataset} was erased by its owner")


def check_named_licences(uses: tuple[OwnedUse, ...]) -> None:
    """Raises :class:`LicenceError` unless the plan names the licences in force."""
    for owned in uses:
        if owned.use.licence != owned.dataset.licence_digest:
            raise LicenceError(f"{owned.use.dataset} has another licence now: list the datasets again")


def check_datasets(uses: tuple[OwnedUse, ...], plan: Plan) -> None:
    """That the plan is about the versions in force, and that its pipeline fits their cards.

    Raises :class:`DatasetError` or :class:`ParameterError`.
    """
    if plan.pipeline.target_kind != (wanted := TARGET_KINDS[plan.training.loss]):
        raise ParameterError(f"loss {plan.training.loss} needs a target of kind {wanted}")
    for use, dataset in ((owned.use, owned.dataset) for owned in uses):
        if (use.envelope, use.card) != (dataset.envelope, dataset.card_digest):
            raise DatasetError(f"{use.dataset} has another version now: list the datasets again")
        _check_unit(use, dataset.card)
        if use.row_bound != dataset.card.row_bound:
            raise DatasetError(f"{use.dataset} declares at most {dataset.card.row_bound} rows, not {use.row_bound}")
        _check_pipeline(plan, dataset.card)


def check_licences(
    uses: tuple[OwnedUse, ...],
    verified: VerifiedTerms,
    now: int,
    measurement: bytes | None,
    approvals: Sequence[VerifiedApproval] = (),
) -> Outcome:
    """That the licences in force let the submitter train this model for this purpose, on such a worker, and every
    recipient read the result. ``measurement`` is ``None`` as long as no worker is chosen.

    Returns whether approvals are still missing, for :func:`check_outcome`; raises :class:`LicenceError` for the rest.
    """
    actions = actions_of(verified.terms.plan)
    outcome = together(
        check_action(action, owned, verified, now, measurement, approvals) for owned in uses for action in actions
    )
    if isinstance(outcome, Refused):
        check_outcome(outcome)
    return outcome


def check_action(
    action: Action,
    owned: OwnedUse,
    verified: VerifiedTerms,
    now: int,
    measurement: bytes | None,
    approvals: Sequence[VerifiedApproval],
) -> Outcome:
    """What the licence of one dataset says to one action of the job."""
    plan = verified.terms.plan
    question = Question(
        action=action,
        now=now,
        submitter=verified.submitter_actor,
        recipients=verified.recipient_actors,
        purpose=plan.purpose,
        model=plan.model,
        measurement=measurement,
        terms=verified.digest,
        no_worker_yet=measurement is None,
    )
    return evaluate(owned.dataset.licence, question, approvals)


def price(uses: tuple[OwnedUse, ...], plan: Plan) -> tuple[Charge, ...]:
    """What the plan costs each dataset, within each licence's cap on one job. Ten seconds of work in all, at worst.

    Raises :class:`BudgetError`, or :class:`ParameterError` for a plan that would take longer.
    """
    check_accountable(plan)
    charges = tuple(charge_of(owned.use, plan, owned.dataset) for owned in uses)
    for owned, charge in zip(uses, charges, strict=True):
        check_cap(charge, owned.dataset.licence)
    return charges


def verified_terms(signed: Signed, party: Party, *, is_committed: bool = False) -> VerifiedTerms:
    """Terms of this consortium that concern this key broker. Raises as :func:`verify_terms`, or :class:`AuthorisationError`.

    What is committed stays so, whichever person was revoked since.
    """
    verified = verify_terms(signed, replace(party.consortium, revoked={}) if is_committed else party.consortium)
    if party.id not in verified.terms.key_brokers:
        raise AuthorisationError("the terms do not concern this key broker")
    return verified


def actions_of(plan: Plan) -> tuple[Action, ...]:
    """What a job does with each of its datasets: metrics, where it releases some, are read by leave of their own."""
    return ("train", "read_result") if plan.metrics is None else ("train", "read_result", "read_metrics")


def _check_unit(use: DatasetUse, card: DatasetCard) -> None:
    """That the plan protects what the card does: records, or subjects within their declared bounds."""
    if (use.subjects is not None) != (card.privacy_unit == "subject"):
        raise DatasetError(f"{use.dataset} protects one {card.privacy_unit}: the plan is for another privacy unit")
    if use.subjects is None:
        return
    if use.subjects.max_records > (card.max_records_per_subject or 1):
        raise DatasetError(f"{use.dataset} lends at most {card.max_records_per_subject} records of a subject")
    if use.subjects.bound != (card.subject_bound or card.row_bound):
        raise DatasetError(f"{use.dataset} declares at most {card.subject_bound or card.row_bound} subjects")


def _check_pipeline(plan: Plan, card: DatasetCard) -> None:
    """Columns and kinds as the worker will want them; it checks again, with the model's input shape."""
    pipeline = plan.pipeline
    if card.subject_column in (*pipeline.features, pipeline.target):
        raise DatasetError(f"column '{card.subject_column}' of {card.id} names subjects: no model may see it")
    missing = [name for name in (*pipeline.features, pipeline.target) if card.column(name) is None]
    if missing:
        raise DatasetError(f"{card.id} has no column '{missing[0]}'")
    target = card.column(pipeline.target)
    if target is None or math.prod(target.shape) != 1:
        raise DatasetError(f"target '{pipeline.target}' of {card.id} must have one value a row")
    if not _holds_kind(plan, target):
        raise DatasetError(
            f"target '{pipeline.target}' of {card.id} declares {target.lower:g} to {target.upper:g}, which does not fit "
            f"a target of kind {pipeline.target_kind}"
        )


def _holds_kind(plan: Plan, target: Column) -> bool:
    match plan.pipeline.target_kind:
        case "binary":
            return (target.lower, target.upper) == (0.0, 1.0)
        case "class":
            return target.lower.is_integer() and target.upper - target.lower + 1 == plan.pipeline.n_classes
        case "value":
            return True
