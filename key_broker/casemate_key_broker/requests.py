"""What people ask of their own key broker, or of an owner's: sealed to it, answered under a seal to them."""

from __future__ import annotations

from typing import Final

from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import verify_delegation
from casemate_schemas.custody import (
    DatasetErased,
    DatasetPrepared,
    DatasetShown,
    LicenceAmended,
    SeedsRotated,
    ShowDataset,
    StateBackedUp,
)
from casemate_schemas.errors import (
    AuthenticationError,
    AuthorisationError,
    CasemateError,
    ConflictError,
    TooLargeError,
)
from casemate_schemas.identity import Delegation
from casemate_schemas.licence import Allowed, Question, actor_of, evaluate
from casemate_schemas.requests import (
    MAX_REQUEST_AGE_MS,
    MAX_REQUEST_BYTES,
    ApprovalListing,
    ApprovalShown,
    Budget,
    BudgetRenewed,
    DatasetListing,
    DatasetOffer,
    DatasetRegistered,
    EndorseState,
    ListApprovals,
    ListDatasets,
    PersonRequest,
    PersonResponse,
    Refusal,
    ShowApproval,
    ShowBudget,
    ShowState,
    ShowWorkers,
    StateShown,
    TellTime,
    TimeTold,
    WorkerList,
)
from casemate_schemas.sealing import open_envelope, seal_envelope

from . import budgets, licences, worker_verdicts
from .budgets import balance
from .database import Transaction
from .licences import Registered
from .party import Party

MAX_ANSWER_BYTES: Final = 960 << 10
"""What still fits, sealed, into one NATS message."""

MAX_REFUSAL_CHARS: Final = 1000

Answer = (
    DatasetListing
    | DatasetRegistered
    | Budget
    | WorkerList
    | BudgetRenewed
    | ApprovalListing
    | ApprovalShown
    | StateShown
    | TimeTold
    | DatasetPrepared
    | DatasetShown
    | LicenceAmended
    | DatasetErased
    | SeedsRotated
    | StateBackedUp
    | Refusal
)

READING: Final = (
    ListDatasets,
    ShowBudget,
    ShowDataset,
    ShowWorkers,
    ListApprovals,
    ShowApproval,
    ShowState,
    EndorseState,
    TellTime,
)
"""Requests that a key broker whose state was set back still answers: they give nothing away, or mend it."""


def open_request(payload: bytes, party: Party, now: int) -> tuple[PersonRequest, Delegation]:
    """A person's request and who they are.

    1. It is a ``request`` envelope of this consortium that opens here.
    2. The person's delegation is valid now, and its key signed the envelope.
    3. It is for this key broker, and neither old nor from the future: only whoever tells the time may be ahead of it, by
       as much as their delegation is valid for, and what they told once does no harm when it is told again.

    Raises :class:`MalformedError`, :class:`CryptographyError` or :class:`AuthenticationError`.
    """
    head, plaintext = open_envelope(  # 1
        payload, party.sealing, kind="request", consortium=party.consortium.id, max_bytes=MAX_REQUEST_BYTES
    )
    request = decode(PersonRequest, plaintext)
    tells_time = isinstance(request.body, TellTime)
    person = verify_delegation(  # 2
        request.delegation, party.consortium, at=max(now, request.created) if tells_time else now
    )
    if head.header.preamble.sender != person.signing_key:
        raise AuthenticationError("the request is not from the person it names")
    if (request.consortium, request.key_broker) != (party.consortium.id, party.id):  # 3
        raise AuthenticationError("the request is for another key broker")
    if abs(now - request.created) > MAX_REQUEST_AGE_MS and not tells_time:
        raise AuthenticationError("the request is too old, or a clock is wrong")
    return request, person


def use_once(tx: Transaction, request: PersonRequest, person: Delegation, now: int) -> None:
    """Raises :class:`ConflictError` if this very request was made before: whoever carries it may repeat it."""
    tx.execute("DELETE FROM requests WHERE at < ?", (now - 2 * MAX_REQUEST_AGE_MS - 1,))
    seen = tx.execute("SELECT 1 FROM requests WHERE sender = ? AND id = ?", (person.signing_key, request.id)).fetchone()
    if seen is not None:
        raise ConflictError("this request was made already; make a new one")
    tx.execute("INSERT INTO requests VALUES (?, ?, ?)", (person.signing_key, request.id, now))


def list_datasets(tx: Transaction, party: Party, person: Delegation, now: int) -> DatasetListing:
    """The datasets whose licence in force lets this person list them."""
    allowed = [dataset for dataset in licences.all_in_force(tx) if _may_list(dataset, person, now)]
    return DatasetListing(datasets=tuple(_offer(tx, party, dataset) for dataset in allowed))


def lineage_of(tx: Transaction, party: Party, person: Delegation, dataset: str) -> bytes:
    """The lineage a dataset is under, for a steward. Raises :class:`AuthorisationError` or :class:`NotFoundError`."""
    licences.check_steward(party, person, dataset.partition("@")[2])
    return licences.find(tx, dataset).lineage


def show_budget(tx: Transaction, party: Party, person: Delegation, request: ShowBudget, now: int) -> Budget:
    """The ledger of a dataset, for a steward of its owner: the newest 1024 charges of all periods.

    Raises :class:`AuthorisationError` or :class:`NotFoundError`.
    """
    licences.check_steward(party, person, request.dataset.partition("@")[2])
    return budgets.show(tx, licences.find(tx, request.dataset), now)


def show_workers(tx: Transaction, party: Party, person: Delegation) -> WorkerList:
    """What became of workers' evidence here, for a steward or admin of a member served. Raises :class:`AuthorisationError`."""
    if person.member not in party.serves or not {"steward", "admin"} & set(person.roles):
        raise AuthorisationError(
            f"only stewards and admins of the members that key broker {party.id} serves may see this"
        )
    return WorkerList(
        key_broker=party.id,
        manifest_number=party.consortium.manifest.number,
        workers=worker_verdicts.newest(tx, (person.member,)),
    )


def check_size(answer: Answer) -> Answer:
    """``answer`` itself. Raises :class:`TooLargeError` if it is too large to be sent."""
    if len(encode(answer)) > MAX_ANSWER_BYTES:
        raise TooLargeError("the answer is too large to be sent: the cards of all datasets together are too long")
    return answer


def refusal_of(error: CasemateError) -> Refusal:
    """The refusal that tells the person who asked what is wrong; with its seal it fits into a precheck's answer."""
    return Refusal(reason=error.reason, message=str(error)[:MAX_REFUSAL_CHARS])


def seal_response(party: Party, person: Delegation, body: PersonResponse | Refusal, now: int) -> bytes:
    """The ``response`` envelope, which only that person opens."""
    return seal_envelope(
        "response",
        encode(body),
        (person.sealing_key,),
        consortium=party.consortium.id,
        key=party.keys.signing,
        created=now,
    )


def _may_list(dataset: Registered, person: Delegation, now: int) -> bool:
    question = Question(action="list", now=now, submitter=actor_of(person))
    return isinstance(evaluate(dataset.licence, question), Allowed)


def _offer(tx: Transaction, party: Party, dataset: Registered) -> DatasetOffer:
    now = balance(tx, dataset)
    return DatasetOffer(
        card=dataset.card,
        card_digest=dataset.card_digest,
        licence=dataset.signed_licence,
        envelope=dataset.envelope,
        key_broker=party.id,
        epsilon_spent=now.spent,
        epsilon_remaining=now.remaining,
    )
