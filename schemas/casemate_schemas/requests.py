"""What a person asks of a key broker, end to end encrypted through the gateway.

A request is a ``request`` envelope from the person's signing key to the key broker's sealing key; the answer is a
``response`` envelope from the key broker's signing key to the sealing key in the person's delegation. The envelopes'
signatures authenticate both; ``id`` ties the answer to its question.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from .codec import Digest, Name, UnixMs, WireModel
from .dataset import DatasetCard, DatasetId
from .job_state import ReasonCode
from .signatures import Signed

MAX_REQUEST_BYTES: Final = 512 << 10
MAX_REQUEST_AGE_MS: Final = 5 * 60 * 1000

RequestId = Annotated[bytes, Field(min_length=16, max_length=16)]


class ListDatasets(WireModel):
    """Which datasets may I list, and how much budget is left?"""

    op: Literal["list_datasets"] = "list_datasets"


class RegisterDataset(WireModel):
    """Take this dataset version under this licence. Signed licence; ``head`` is the uploaded envelope's signed head.

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


class PersonRequest(WireModel):
    """One request of one person to one key broker."""

    KIND: ClassVar[str] = "person-request"

    version: Literal[1] = 1
    consortium: Digest
    key_broker: Name
    id: RequestId
    created: UnixMs
    delegation: Signed
    body: Annotated[ListDatasets | RegisterDataset | ShowBudget, Field(discriminator="op")]


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


class LedgerLine(WireModel):
    """One charge: the job's own ``epsilon`` at the licence's delta, and its state."""

    job_id: Annotated[str, StringConstraints(max_length=64)]
    terms: Digest
    submitter: Annotated[str, StringConstraints(max_length=140)]
    epsilon: Annotated[float, Field(ge=0)]
    committed: Digest | None
    at: UnixMs


class Budget(WireModel):
    """Answer to :class:`ShowBudget`: what the licence allows, what the filter counts as spent, and every charge."""

    answer: Literal["budget"] = "budget"
    dataset: DatasetId
    epsilon: float
    delta: float
    epsilon_spent: Annotated[float, Field(ge=0)]
    epsilon_remaining: Annotated[float, Field(ge=0)]
    lines: Annotated[tuple[LedgerLine, ...], Field(max_length=4096)]


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
    body: Annotated[DatasetListing | DatasetRegistered | Budget | Refusal, Field(discriminator="answer")]
