"""What a recipient opens, and the release that lets them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from .audit import AuditReport
from .codec import Digest, UnixMs, WireModel
from .dataset import DatasetId
from .envelope import SealedKey
from .evidence import Evidence
from .job import MAX_DATASETS, MAX_NOISE_PHASES, MAX_STEPS, JobId, Mechanism, Rational
from .lineage import Lineage
from .metrics import MetricSums
from .model import MAX_NODES
from .signatures import Signed

RESULT_SECTIONS: Final = ("manifest", "weights")


ClippingStrategy = Literal["ghost", "per_sample", "grouped", "patches"]
"""How one parameter's gradients are handled: never formed, or formed, in one of three ways for a convolution."""

Clipping = Annotated[
    dict[Annotated[str, StringConstraints(min_length=1, max_length=220)], ClippingStrategy],
    Field(max_length=2 * MAX_NODES),
]
"""Names of parameters to names of strategies (docs/dp-engine.md)."""


class NoisedSteps(WireModel):
    """So many steps, one after another, and the noise in each, over the clipping norm."""

    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    noise_multiplier: Annotated[float, Field(gt=0)]


class OwnerPrivacy(WireModel):
    """What one dataset's privacy units are guaranteed: ``(epsilon, delta)`` and what it follows from."""

    dataset: DatasetId
    epsilon: Annotated[float, Field(ge=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    sample_rate: Rational


class PrivacyStatement(WireModel):
    """The guarantee of a result, per owner and for a person present in several owners' data."""

    KIND: ClassVar[str] = "privacy-statement"

    accountant: Literal["pld"] = "pld"
    neighbouring_relation: Literal["add-or-remove-one"] = "add-or-remove-one"
    unit: Literal["record", "subject"] = "record"
    mechanism: Mechanism = "hardened"
    """How the noise was drawn: with ``exact`` the figures hold for the bits released, not for ideal numbers."""
    noise: Annotated[tuple[NoisedSteps, ...], Field(min_length=1, max_length=MAX_NOISE_PHASES)]
    """Of all the steps, in order: the same for all owners."""
    owners: Annotated[tuple[OwnerPrivacy, ...], Field(min_length=1, max_length=MAX_DATASETS)]
    person_epsilon: Annotated[float, Field(ge=0)] | None
    """For a person with a privacy unit in each owner's data; None where no bound is known (more than 16 datasets)."""
    metrics_noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Of the metrics that were released with the weights, if any: their cost is in every epsilon."""
    person_delta: Annotated[float, Field(gt=0)]


class ResultManifest(WireModel):
    """Privacy statement and provenance of the weights beside it."""

    KIND: ClassVar[str] = "result-manifest"

    version: Literal[1] = 1
    consortium: Digest
    job_id: JobId
    simulation: bool
    terms: Signed
    evidence: Evidence
    grants: Annotated[tuple[Signed, ...], Field(min_length=1, max_length=MAX_DATASETS + 1)]
    privacy: PrivacyStatement
    metrics: MetricSums | None = None
    """Of the final weights on all the records that they were trained on, if the plan asks for them."""
    audit: AuditReport | None = None
    """What the audit proves, if that is what the job was for: there are no weights then."""
    clipping: Clipping = Field(default_factory=dict)
    """How each parameter's gradients were clipped, by name: chosen by speed on the worker's machine, with public records."""
    software: dict[Annotated[str, StringConstraints(max_length=40)], Annotated[str, StringConstraints(max_length=80)]]
    isolation: Annotated[str, StringConstraints(max_length=80)]
    """How the training process was cut off from the network."""
    finished: UnixMs
    inherited: Lineage = ()
    """The lineage of the results that were inputs of this job; the terms name its datasets."""


class Release(WireModel):
    """Receipts of all key brokers and the content key for each recipient. Signed by the releasing worker's attested key.

    The releasing worker is the one that trained, or a successor; ``evidence`` is that worker's own.
    """

    KIND: ClassVar[str] = "release"

    version: Literal[1] = 1
    consortium: Digest
    job_id: JobId
    terms: Digest
    result: Digest
    evidence: Evidence
    grants: Annotated[tuple[Signed, ...], Field(min_length=1, max_length=MAX_DATASETS + 1)]
    receipts: Annotated[tuple[Signed, ...], Field(min_length=1, max_length=MAX_DATASETS + 1)]
    sealed_keys: Annotated[tuple[SealedKey, ...], Field(min_length=1, max_length=64)]
    at: UnixMs
