"""What a scientist asks for: the plan, which owners see in the terms, and the job, which only a worker opens."""

from __future__ import annotations

from fractions import Fraction
from math import gcd
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from .codec import Digest, Name, WireModel
from .dataset import MAX_ROWS, DatasetId
from .model import ModelSpec
from .pipeline import Loss, PipelineSpec
from .signatures import Signed

MAX_STEPS: Final = 1_000_000
MAX_DATASETS: Final = 64

JobId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""128 random bits in hexadecimal, chosen by the submitter."""


class Rational(WireModel):
    """An exact fraction in lowest terms, in (0, 1]."""

    numerator: Annotated[int, Field(ge=1, lt=1 << 53)]
    denominator: Annotated[int, Field(ge=1, lt=1 << 53)]

    @model_validator(mode="after")
    def _is_a_proportion_in_lowest_terms(self) -> Self:
        if self.numerator > self.denominator or gcd(self.numerator, self.denominator) != 1:
            raise ValueError("expected a fraction in (0, 1], in lowest terms")
        return self

    @classmethod
    def of(cls, fraction: Fraction) -> Self:
        """The wire form of a :class:`~fractions.Fraction`."""
        return cls(numerator=fraction.numerator, denominator=fraction.denominator)

    @property
    def fraction(self) -> Fraction:
        """As a :class:`~fractions.Fraction`."""
        return Fraction(self.numerator, self.denominator)


class SGD(WireModel):
    """Stochastic gradient descent, with heavy-ball momentum if it is not zero."""

    optimizer: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1000)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Adam(WireModel):
    """Adam (Kingma and Ba 2015) on the noised gradient."""

    optimizer: Literal["adam"] = "adam"
    lr: Annotated[float, Field(gt=0, le=1000)]
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8


Optimizer = Annotated[SGD | Adam, Field(discriminator="optimizer")]


class DatasetUse(WireModel):
    """One dataset in a plan: which version under which licence, and how often its records are drawn."""

    dataset: DatasetId
    envelope: Digest
    card: Digest
    licence: Digest
    key_broker: Name
    row_bound: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    sample_rate: Rational

    @property
    def owner(self) -> str:
        """The owner's member id."""
        return self.dataset.partition("@")[2]


class Training(WireModel):
    """Everything that DP-SGD computes with, besides data, model and randomness."""

    loss: Loss
    optimizer: Optimizer
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    clipping_norm: Annotated[float, Field(ge=1e-6, le=1e6)]
    noise_multiplier: Annotated[float, Field(ge=0.3, le=1e4)]
    mechanism: Literal["hardened"] = "hardened"
    max_physical_batch: Annotated[int, Field(ge=1, le=1 << 20)] = 1024
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 100


class Privacy(WireModel):
    """The guarantee the submitter asks for, for each owner's data, under add/remove of one privacy unit."""

    epsilon: Annotated[float, Field(ge=1e-3, le=100)]
    delta: Annotated[float, Field(ge=1e-10, le=0.5)]
    unit: Literal["record"] = "record"


class Plan(WireModel):
    """All that owners judge and a worker computes, except the model itself."""

    KIND: ClassVar[str] = "plan"

    kind: Literal["train"] = "train"
    purpose: Name
    datasets: Annotated[tuple[DatasetUse, ...], Field(min_length=1, max_length=MAX_DATASETS)]
    pipeline: PipelineSpec
    training: Training
    privacy: Privacy
    recipients: Annotated[tuple[Signed, ...], Field(min_length=1, max_length=64)]
    """Signed delegations of those who may open the result."""
    release: Annotated[tuple[Literal["weights"], ...], Field(min_length=1, max_length=1)] = ("weights",)
    model: Digest | None = None
    """Digest of the job's :class:`ModelSpec`, told to the owners where a licence asks which model it is."""

    @model_validator(mode="after")
    def _datasets_are_sorted(self) -> Self:
        ids = [use.dataset for use in self.datasets]
        if ids != sorted(set(ids)):
            raise ValueError("datasets must be sorted by id, each once")
        return self

    @property
    def expected_batch(self) -> Fraction:
        """The public denominator of each step: sum of rate times declared row bound."""
        return sum((use.sample_rate.fraction * use.row_bound for use in self.datasets), Fraction(0))


class JobSpec(WireModel):
    """Model and plan. ``salt`` (32 random bytes) makes its digest a hiding commitment.

    A job envelope holds the sections ``spec``, ``terms`` (the signed terms) and ``weights`` (safetensors).
    """

    KIND: ClassVar[str] = "job-spec"

    version: Literal[1] = 1
    job_id: JobId
    salt: Digest
    model: ModelSpec
    plan: Plan


JOB_SECTIONS: Final = ("spec", "terms", "weights")
DATASET_SECTIONS: Final = ("card", "columns")
