"""How a job gets in: the routing header that the gateway may read, and what key brokers answer to the signed terms."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from .codec import Digest, Name, UnixMs, WireModel
from .job import MAX_DATASETS, JobId
from .job_state import ReasonCode
from .keys import PublicSigningKey
from .signatures import Signed

MAX_TERMS_ENVELOPE_BYTES: Final = 384 << 10
MAX_DETAIL_BYTES: Final = 6 << 10

Priority = Literal["low", "normal", "high"]
"""How soon a member wants one of its jobs, beside its own others. Between members it counts nothing."""

URGENCY: Final[dict[Priority, int]] = {"low": 0, "normal": 1, "high": 2}


class Routing(WireModel):
    """All that the untrusted side needs to know of a job. Signed by the submitter."""

    KIND: ClassVar[str] = "routing"

    version: Literal[1] = 1
    consortium: Digest
    job_id: JobId
    terms: Digest
    job_envelope: Digest
    job_key_broker: Name
    key_brokers: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MAX_DATASETS + 1)]
    recipients: Annotated[tuple[PublicSigningKey, ...], Field(min_length=1, max_length=64)]
    """Signing keys of those who may fetch the result."""
    resource_class: Literal["cpu"] = "cpu"
    created: UnixMs
    deadline: UnixMs
    priority: Priority = "normal"
    not_before: UnixMs | None = None
    """When a worker may begin it at the earliest; at once if not given."""

    @model_validator(mode="after")
    def _key_brokers_are_sorted(self) -> Self:
        if list(self.key_brokers) != sorted(set(self.key_brokers)) or self.job_key_broker not in self.key_brokers:
            raise ValueError("key brokers must be sorted, each once, the job's own among them")
        if self.deadline <= self.created:
            raise ValueError("the deadline must be after the creation")
        if self.not_before is not None and self.not_before >= self.deadline:
            raise ValueError("a job cannot begin after its deadline")
        return self


class Submission(WireModel):
    """What the SDK posts once the job envelope is uploaded. ``terms_envelope`` is sealed to every key broker concerned."""

    KIND: ClassVar[str] = "submission"

    routing: Signed
    delegation: Signed
    terms_envelope: Annotated[bytes, Field(max_length=MAX_TERMS_ENVELOPE_BYTES)]


class PrecheckRequest(WireModel):
    """What the gateway relays to each key broker. ``job_head`` is the job envelope's signed head."""

    KIND: ClassVar[str] = "precheck-request"

    submission: Submission
    job_head: Annotated[bytes, Field(max_length=256 << 10)]


class PrecheckAnswer(WireModel):
    """A key broker's word on terms, before any worker is held. Signed by the key broker.

    ``awaiting`` is no answer yet: all is well but for approvals that are missing, and it is asked again later.
    ``detail`` is an envelope to the submitter with the refusal, or what is awaited, in words; the gateway sees the reason
    code only.
    """

    KIND: ClassVar[str] = "precheck-answer"

    version: Literal[1] = 1
    consortium: Digest
    key_broker: Name
    job_id: JobId
    terms: Digest
    decision: Literal["yes", "awaiting", "refused"]
    reason: ReasonCode | None
    detail: Annotated[bytes, Field(max_length=MAX_DETAIL_BYTES)] | None
    at: UnixMs
