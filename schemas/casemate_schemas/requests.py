"""What a person asks of a key broker, end to end encrypted through the gateway.

A request is a ``request`` envelope from the person's signing key to the key broker's sealing key; the answer is a
``response`` envelope from the key broker's signing key to the sealing key in the person's delegation. The envelopes'
signatures authenticate both; ``id`` ties the answer to its question.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from .attestation_policy import Measurement, Product, TcbVersion
from .codec import Digest, Name, UnixMs, WireModel
from .custody import (
    AmendLicence,
    BackUpState,
    DatasetErased,
    DatasetPrepared,
    DatasetShown,
    EraseDataset,
    LicenceAmended,
    PrepareDataset,
    RotateSeeds,
    SeedsRotated,
    ShowDataset,
    StateBackedUp,
)
from .dataset import DatasetCard, DatasetId
from .job import MAX_DATASETS, MAX_STEPS, JobId, Rational
from .job_state import ReasonCode
from .licence import Action
from .signatures import Signed

MAX_REQUEST_BYTES: Final = 512 << 10
MAX_REQUEST_AGE_MS: Final = 5 * 60 * 1000
MAX_FAILED_CHECKS: Final = 12
MAX_UNNAMED: Final = 16
MAX_RENEWALS: Final = 256
"""Of one dataset's budget."""

RequestId = Annotated[bytes, Field(min_length=16, max_length=16)]


class ListDatasets(WireModel):
    """Which datasets may I list, and how much budget is left?"""

    op: Literal["list_datasets"] = "list_datasets"


class RegisterDataset(WireModel):
    """Take this dataset version under this licence. Signed licence; ``head`` is the uploaded envelope's signed head, whose
    content key is sealed to the key that :class:`~.custody.PrepareDataset` gave, and to none besides.

    A dataset's name keeps its lineage: registering again spends from the same budget. Licence numbers only go up.
    """

    op: Literal["register_dataset"] = "register_dataset"
    card: DatasetCard
    licence: Signed
    head: Annotated[bytes, Field(max_length=256 << 10)]


class ShowBudget(WireModel):
    """The owner's view of a dataset's privacy ledger."""

    op: Literal["show_budget"] = "show_budget"
    dataset: DatasetId


class ShowWorkers(WireModel):
    """Which workers asked for keys, and what became of their evidence. For stewards and admins of the members served."""

    op: Literal["show_workers"] = "show_workers"


class RenewBudget(WireModel):
    """Give the dataset a fresh budget: a new lineage, of which nothing is spent. What was promised before adds to what is
    promised from now on. ``lineage`` is the one to be ended, so that two stewards do not renew twice.
    """

    op: Literal["renew_budget"] = "renew_budget"
    dataset: DatasetId
    lineage: Digest


class ShowState(WireModel):
    """Has this key broker's state been rolled back? For stewards and admins of the members served."""

    op: Literal["show_state"] = "show_state"


class EndorseState(WireModel):
    """Go on from the state that there is, though a newer one was seen: what that one knew is forgotten.

    For stewards and admins; it takes one of each member served. ``ahead`` is the digest of the newer head, as
    :class:`StateShown` told it.
    """

    op: Literal["endorse_state"] = "endorse_state"
    ahead: Digest


class TellTime(WireModel):
    """What time it is: the request's ``created``. For stewards and admins of the members served.

    An enclave-hosted key broker's clock is its host's; from then on it is never earlier than what it was told.
    """

    op: Literal["tell_time"] = "tell_time"


class ListApprovals(WireModel):
    """Which jobs wait for approvals here that I could give, or that my member's data needs?"""

    op: Literal["list_approvals"] = "list_approvals"


class ShowApproval(WireModel):
    """All about one of them, to be read before it is approved."""

    op: Literal["show_approval"] = "show_approval"
    terms: Digest


class GiveApproval(WireModel):
    """Yes or no: a signed :class:`~.approval.Approval` for each licence, by the person who asks. One no ends the job."""

    op: Literal["give_approval"] = "give_approval"
    terms: Digest
    approvals: Annotated[tuple[Signed, ...], Field(min_length=1, max_length=MAX_DATASETS)]


class LedgerHead(WireModel):
    """Where a key broker's state stands after a decision. Signed by the key broker.

    Of one ``branch``, a later head's ledger and audit log begin with those of every earlier one. Whoever holds a head can
    so tell that the key broker was set back, or copied, since.
    """

    KIND: ClassVar[str] = "ledger-head"

    version: Literal[1] = 1
    consortium: Digest
    key_broker: Name
    branch: Annotated[int, Field(ge=0, lt=1 << 32)]
    """How often its owners endorsed an older state."""
    entries: Annotated[int, Field(ge=0, lt=1 << 48)]
    """Of the ledger."""
    ledger: Digest
    """Hash of the newest of them."""
    audit_size: Annotated[int, Field(ge=0, lt=1 << 48)]
    audit_root: Digest
    """Merkle tree hash of the audit log (RFC 6962)."""
    at: UnixMs


class PersonRequest(WireModel):
    """One request of one person to one key broker.

    ``seen`` is the newest :class:`LedgerHead` of this key broker that the person knows of.
    """

    KIND: ClassVar[str] = "person-request"

    version: Literal[1] = 1
    consortium: Digest
    key_broker: Name
    id: RequestId
    created: UnixMs
    delegation: Signed
    seen: Signed | None = None
    body: Annotated[
        ListDatasets
        | RegisterDataset
        | ShowBudget
        | ShowWorkers
        | RenewBudget
        | ListApprovals
        | ShowApproval
        | GiveApproval
        | ShowState
        | EndorseState
        | TellTime
        | PrepareDataset
        | ShowDataset
        | AmendLicence
        | EraseDataset
        | RotateSeeds
        | BackUpState,
        Field(discriminator="op"),
    ]


class DatasetOffer(WireModel):
    """A dataset as one who may list it sees it."""

    card: DatasetCard
    card_digest: Digest
    licence: Signed
    envelope: Digest
    key_broker: Name
    epsilon_spent: Annotated[float, Field(ge=0)]
    epsilon_remaining: Annotated[float, Field(ge=0)]


class DatasetListing(WireModel):
    """Answer to :class:`ListDatasets`."""

    answer: Literal["dataset_listing"] = "dataset_listing"
    datasets: Annotated[tuple[DatasetOffer, ...], Field(max_length=1024)]


class DatasetRegistered(WireModel):
    """Answer to :class:`RegisterDataset`."""

    answer: Literal["dataset_registered"] = "dataset_registered"
    dataset: DatasetId
    lineage: Digest
    envelope: Digest
    licence: Digest


MAX_RELEASE_PHASES: Final = 64

ChargeKind = Literal["train", "evaluate", "statistics", "metrics"]
"""What was released."""


class ReleasePhase(WireModel):
    """Some of a job's releases: every privacy unit drawn at ``sample_rate``, noise over sensitivity, and their number."""

    sample_rate: Rational
    noise_multiplier: float
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]


class LedgerLine(WireModel):
    """One charge: what was released, what it cost alone, and what all charges of its period cost after it.

    All epsilons are at ``delta``, of the licence that was in force, which allowed ``limit_epsilon`` in all. ``failed`` means
    that no result was committed by the job's deadline; it was charged all the same.
    """

    job_id: JobId
    terms: Digest
    submitter: Annotated[str, StringConstraints(max_length=140)]
    purpose: Name
    at: UnixMs
    kind: ChargeKind
    sample_rate: Rational
    noise_multiplier: float
    steps: int
    further: Annotated[tuple[ReleasePhase, ...], Field(max_length=MAX_RELEASE_PHASES)] = ()
    """What the same job released besides: under other noise, as its schedule says, or metrics."""
    limit_epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    epsilon: Annotated[float, Field(ge=0)]
    """The job alone."""
    epsilon_after: Annotated[float, Field(ge=0)] | None
    """The whole, as the filter proves it; ``None`` while it is being computed."""
    estimate_after: Annotated[float, Field(ge=0)] | None
    """The whole, had its jobs been fixed in advance (PLD); ``None`` while it is being computed, or if it has no bound."""
    state: Literal["reserved", "committed", "failed"]
    committed: Digest | None
    period: Annotated[int, Field(ge=0)]
    """How often the budget had been renewed before."""


class BudgetRenewal(WireModel):
    """An owner's fresh budget: who gave it, and what had been spent, as the filter proves it, under the one it ended."""

    at: UnixMs
    person: Annotated[str, StringConstraints(max_length=140)]
    epsilon_spent: Annotated[float, Field(ge=0)]


class Budget(WireModel):
    """Answer to :class:`ShowBudget`: what the licence allows, what the filter counts as spent, and the newest charges."""

    answer: Literal["budget"] = "budget"
    dataset: DatasetId
    lineage: Digest
    privacy_unit: Literal["record", "subject"]
    epsilon: float
    delta: float
    epsilon_spent: Annotated[float, Field(ge=0)]
    epsilon_remaining: Annotated[float, Field(ge=0)]
    epsilon_estimate: Annotated[float, Field(ge=0)] | None
    renewals: Annotated[tuple[BudgetRenewal, ...], Field(max_length=MAX_RENEWALS)]
    n_charges: Annotated[int, Field(ge=0)]
    """Of all periods; ``lines`` are the newest of them, oldest first."""
    lines: Annotated[tuple[LedgerLine, ...], Field(max_length=4096)]


class BudgetRenewed(WireModel):
    """Answer to :class:`RenewBudget`."""

    answer: Literal["budget_renewed"] = "budget_renewed"
    dataset: DatasetId
    lineage: Digest


class StateShown(WireModel):
    """Answer to :class:`ShowState` and :class:`EndorseState`: where the state stands, and the newer head seen, if any.

    ``awaited``: the members served that have not endorsed the state instead of that head.
    """

    answer: Literal["state"] = "state"
    head: LedgerHead
    ahead: Signed | None
    awaited: Annotated[tuple[Name, ...], Field(max_length=256)] = ()


class TimeTold(WireModel):
    """Answer to :class:`TellTime`: the key broker's time now, not earlier than what it was told."""

    answer: Literal["time_told"] = "time_told"
    at: UnixMs


class PendingApproval(WireModel):
    """A job that waits for approvals, and for the use of which datasets."""

    job_id: JobId
    terms: Digest
    submitter: Annotated[str, StringConstraints(max_length=140)]
    purpose: Name
    datasets: Annotated[tuple[DatasetId, ...], Field(max_length=MAX_DATASETS)]
    created: UnixMs
    deadline: UnixMs


class ApprovalListing(WireModel):
    """Answer to :class:`ListApprovals`: those whose deadline comes first, of ``n_pending`` in all."""

    answer: Literal["approval_listing"] = "approval_listing"
    pending: Annotated[tuple[PendingApproval, ...], Field(max_length=1024)]
    n_pending: Annotated[int, Field(ge=0)]


class AwaitedApprovals(WireModel):
    """How many people must approve an action, and how many more it takes at the least."""

    action: Action
    count: Annotated[int, Field(ge=1)]
    missing: Annotated[int, Field(ge=0)]


class ApprovalUse(WireModel):
    """One dataset that waits for approvals: its licence, and what the job costs of its budget."""

    dataset: DatasetId
    licence: Signed
    epsilon: Annotated[float, Field(ge=0)]
    """The job alone."""
    epsilon_spent: Annotated[float, Field(ge=0)]
    """The dataset's whole life before it, of the licence's epsilon."""
    awaited: Annotated[tuple[AwaitedApprovals, ...], Field(min_length=1, max_length=8)]


class ApprovalGiven(WireModel):
    """One person's word on the use of one dataset. ``counts``: it is in force; otherwise it has lapsed, or was revoked."""

    dataset: DatasetId
    person: Annotated[str, StringConstraints(max_length=140)]
    decision: Literal["approve", "deny"]
    at: UnixMs
    expires: UnixMs
    counts: bool


class ApprovalShown(WireModel):
    """Answer to :class:`ShowApproval` and :class:`GiveApproval`: the submitter's signed terms, and where they stand."""

    answer: Literal["approval"] = "approval"
    terms: Signed
    uses: Annotated[tuple[ApprovalUse, ...], Field(min_length=1, max_length=MAX_DATASETS)]
    given: Annotated[tuple[ApprovalGiven, ...], Field(max_length=1024)]
    state: Literal["awaiting", "approved", "denied"]


class FailedCheck(WireModel):
    """A check of evidence that failed: its name, what was expected and what came."""

    name: Annotated[str, StringConstraints(max_length=64)]
    expected: Annotated[str, StringConstraints(max_length=200)]
    got: Annotated[str, StringConstraints(max_length=200)]


class WorkerVerdict(WireModel):
    """The newest verdict on one worker's evidence. Unless it is ``genuine``, what it says of the worker is anyone's word."""

    KIND: ClassVar[str] = "worker-verdict"

    worker: Digest
    """REPORT_ID of the worker's guest, drawn by the chip at its launch; the evidence's digest if no report can be read."""
    genuine: bool
    accepted: bool
    failed: Annotated[tuple[FailedCheck, ...], Field(max_length=MAX_FAILED_CHECKS)]
    """The first ones, if there are more."""
    product: Product | None
    chip: Annotated[bytes, Field(max_length=64)]
    measurement: Measurement | None
    tcb: TcbVersion | None
    """The current one."""
    manifest_number: int
    """The manifest whose policy judged."""
    evidence: Digest
    job_id: JobId
    at: UnixMs
    unnamed_by: Annotated[tuple[DatasetId, ...], Field(max_length=MAX_UNNAMED)] = ()
    """Datasets of those who ask, whose licences name measurements and not this one."""


class WorkerList(WireModel):
    """Answer to :class:`ShowWorkers`, newest first."""

    answer: Literal["workers"] = "workers"
    key_broker: Name
    manifest_number: int
    workers: Annotated[tuple[WorkerVerdict, ...], Field(max_length=256)]


class Refusal(WireModel):
    """The key broker will not: a reason code and a sentence for the person who asked."""

    answer: Literal["refusal"] = "refusal"
    reason: ReasonCode
    message: Annotated[str, StringConstraints(max_length=2000)]


class PersonResponse(WireModel):
    """The key broker's answer to one request."""

    KIND: ClassVar[str] = "person-response"

    version: Literal[1] = 1
    id: RequestId
    head: Signed | None = None
    """The key broker's signed :class:`LedgerHead` after this request."""
    body: Annotated[
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
        | Refusal,
        Field(discriminator="answer"),
    ]
