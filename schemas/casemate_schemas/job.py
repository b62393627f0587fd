"""What a scientist asks for: the plan, which owners see in the terms, and the job, which only a worker opens."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, prod
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from .codec import Digest, Name, WireModel
from .dataset import MAX_RECORDS_PER_SUBJECT, MAX_ROWS, DatasetId
from .errors import ModelError
from .model import ModelSpec
from .pipeline import Loss, PipelineSpec
from .signatures import Signed

MAX_STEPS: Final = 1_000_000
MAX_DATASETS: Final = 64
MAX_CANARIES: Final = 10_000
"""Bound on the canaries of one audit: each is some numbers more in every step's noise."""
MIN_NOISE_MULTIPLIER: Final = 0.3
MAX_NOISE_MULTIPLIER: Final = 1e4
MAX_NOISE_PHASES: Final = 8
"""Each phase is a second of accounting more, for every key broker and dataset."""
MAX_PLACED_BYTES: Final = 16 << 30
"""Where units have places (subjects, padded batches) a worker holds all records twice: at their declared bounds, so many
bytes at most."""

MAX_STEP_BYTES: Final = 4 << 30
"""What the records of one padded step may take, dummies among them."""

MAX_PADDED_UNITS: Final = 1 << 24
"""With padded batches each step looks at every privacy unit that may be there: so many at most."""

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
    """Stochastic gradient descent, with heavy-ball momentum if it is not zero, and decoupled weight decay."""

    optimizer: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1000)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0


class Adam(WireModel):
    """Adam (Kingma and Ba 2015) on the noised gradient, with decoupled weight decay (Loshchilov and Hutter 2019).

    With ``bias_correction`` ``dp`` the noise's own variance is taken out of the second moment, which is kept above
    ``variance_floor``, and ``eps`` is not used (DP-AdamBC: Tang, Shpilevskiy, Lécuyer 2024).
    """

    optimizer: Literal["adam"] = "adam"
    lr: Annotated[float, Field(gt=0, le=1000)]
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    bias_correction: Literal["standard", "dp"] = "standard"
    variance_floor: Annotated[float, Field(ge=1e-12, le=1)] = 1e-8


Optimizer = Annotated[SGD | Adam, Field(discriminator="optimizer")]

Mechanism = Literal["hardened", "exact"]


class LrSchedule(WireModel):
    """Multiples of the learning rate, by step: up in a line over ``warmup_steps``, then down to ``final`` over the rest.

    Of ``s`` steps with ``w`` of warm-up, step ``t`` (from 0) has ``(t+1)/w`` as long as ``t < w``. After that, with
    ``u = (t-w)/(s-w)``: 1 where ``decay`` is ``constant``, ``final + (1-final)(1-u)`` where it is ``linear``, and
    ``final + (1-final)(1+cos πu)/2`` where it is ``cosine``.
    """

    warmup_steps: Annotated[int, Field(ge=0, le=MAX_STEPS)] = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    final: Annotated[float, Field(ge=0, le=1)] = 0.0


class NoisePhase(WireModel):
    """From ``first_step`` on (counted from 0) the noise is ``factor`` times the plan's noise multiplier."""

    first_step: Annotated[int, Field(ge=1, lt=MAX_STEPS)]
    factor: Annotated[float, Field(ge=0.01, le=100)]


class Averaging(WireModel):
    """The released weights are an average of those after each step, in which a step's share falls by ``decay`` each step.

    After ``t`` steps the decay is ``min(decay, t/(t+9))``, so that the start is soon forgotten (De et al. 2022).
    """

    decay: Annotated[float, Field(gt=0, lt=1)]


class Augmentation(WireModel):
    """Each record's gradient is the mean over ``multiplicity`` views of it, before it is clipped (De et al. 2022).

    For images ``[channels, height, width]``. The first view is the record; each other one is moved by up to ``shift``
    pixels each way, its border repeated, and mirrored left to right or not if ``flip``.
    """

    multiplicity: Annotated[int, Field(ge=2, le=64)]
    shift: Annotated[int, Field(ge=0, le=32)] = 0
    flip: bool = False

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not (self.shift or self.flip):
            raise ValueError("expected a shift or flips: otherwise all views are the same")
        return self

    def check_input(self, shape: Sequence[int]) -> None:
        """Raises :class:`ModelError` unless a model's input of that shape is an image larger than the shift."""
        if len(shape) != 3 or min(shape[1:]) <= self.shift:
            raise ModelError(
                f"augmentation: expected images [channels, height, width] larger than the shift of {self.shift}, got "
                f"inputs of shape {list(shape)}"
            )


class SubjectUse(WireModel):
    """How a plan uses a dataset whose card protects subjects.

    Of each subject the first ``max_records`` records are used. ``bound`` is the card's public bound on its subjects.
    """

    max_records: Annotated[int, Field(ge=1, le=MAX_RECORDS_PER_SUBJECT)]
    bound: Annotated[int, Field(ge=1, le=MAX_ROWS)]


class DatasetUse(WireModel):
    """One dataset in a plan: which version under which licence, and how often its privacy units are drawn."""

    dataset: DatasetId
    envelope: Digest
    card: Digest
    licence: Digest
    key_broker: Name
    row_bound: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    sample_rate: Rational
    """Of records; of subjects, each with all its records at once, where the unit is the subject."""
    subjects: SubjectUse | None = None

    @property
    def units(self) -> int:
        """The public bound on the privacy units that are drawn from."""
        return self.row_bound if self.subjects is None else self.subjects.bound

    @property
    def unit_records(self) -> int:
        """The most records of one privacy unit."""
        return 1 if self.subjects is None else self.subjects.max_records

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
    noise_multiplier: Annotated[float, Field(ge=MIN_NOISE_MULTIPLIER, le=MAX_NOISE_MULTIPLIER)]
    mechanism: Mechanism = "hardened"
    """How noise is drawn and rounded: ``hardened`` float64 normals, or ``exact`` integers."""
    max_physical_batch: Annotated[int, Field(ge=1, le=1 << 20)] = 1024
    padded_batch: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """Every step computes on so many privacy units, dummies among them; a step that draws more uses none. ``None``: as drawn."""
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 100
    lr_schedule: LrSchedule = LrSchedule()
    noise_schedule: Annotated[tuple[NoisePhase, ...], Field(max_length=MAX_NOISE_PHASES - 1)] = ()
    """How the noise changes; what each owner is charged follows from :attr:`noise_phases`."""
    averaging: Averaging | None = None
    augmentation: Augmentation | None = None

    @model_validator(mode="after")
    def _schedules_fit_the_steps(self) -> Self:
        if self.lr_schedule.warmup_steps > self.steps:
            raise ValueError(f"lr_schedule warms up for more than all {self.steps} steps")
        firsts = [phase.first_step for phase in self.noise_schedule]
        if firsts != sorted(set(firsts)) or any(first >= self.steps for first in firsts):
            raise ValueError(f"noise_schedule: expected ascending first steps, each below {self.steps}")
        if not all(MIN_NOISE_MULTIPLIER <= sigma <= MAX_NOISE_MULTIPLIER for _, sigma in self.noise_phases):
            raise ValueError(
                f"noise_schedule: expected noise multipliers of {MIN_NOISE_MULTIPLIER:g} to {MAX_NOISE_MULTIPLIER:g}"
            )
        return self

    @property
    def noise_phases(self) -> tuple[tuple[int, float], ...]:
        """All steps, in order, as (number of steps, noise multiplier): what is added, and what is accounted."""
        return noise_phases(self.noise_multiplier, self.steps, self.noise_schedule)


def noise_phases(noise_multiplier: float, steps: int, schedule: Sequence[NoisePhase]) -> tuple[tuple[int, float], ...]:
    """``steps`` steps, in order, as (number of steps, noise multiplier). ``schedule`` ascends and ends before ``steps``."""
    starts = [0, *(phase.first_step for phase in schedule), steps]
    factors = [1.0, *(phase.factor for phase in schedule)]
    return tuple(
        (end - start, noise_multiplier * factor)
        for start, end, factor in zip(starts, starts[1:], factors, strict=False)
    )


class Privacy(WireModel):
    """The guarantee the submitter asks for, for each owner's data, under add/remove of one privacy unit.

    The unit is that of every dataset's card: one record, or all records of one subject.
    """

    epsilon: Annotated[float, Field(ge=1e-3, le=100)]
    delta: Annotated[float, Field(ge=1e-10, le=0.5)]
    unit: Literal["record", "subject"] = "record"


class Metrics(WireModel):
    """Noisy sums over all training records of what the final model makes of them; see ``casemate_schemas.metrics``.

    Losses are clamped to ``loss_bound``. The noise's standard deviation is ``noise_multiplier`` times the sensitivity.
    """

    noise_multiplier: Annotated[float, Field(ge=MIN_NOISE_MULTIPLIER, le=MAX_NOISE_MULTIPLIER)]
    loss_bound: Annotated[float, Field(ge=1e-6, le=1e6)]


Released = Literal["weights", "metrics", "audit"]
"""What a recipient may be given."""


class Audit(WireModel):
    """How a training is audited: with how many canaries beside the owners' records, and with which confidence.

    Canaries are sampled as often as the most often sampled owner's records; see ``casemate_privacy.auditing``.
    """

    canaries: Annotated[int, Field(ge=16, le=MAX_CANARIES)]
    confidence: Annotated[float, Field(ge=0.5, le=0.9999)] = 0.95


class Plan(WireModel):
    """All that owners judge and a worker computes, except the model itself."""

    KIND: ClassVar[str] = "plan"

    kind: Literal["train", "privacy_audit"] = "train"
    """What the job is for: weights, or a report on how much the training gives away. Either is the same training."""
    purpose: Name
    datasets: Annotated[tuple[DatasetUse, ...], Field(min_length=1, max_length=MAX_DATASETS)]
    pipeline: PipelineSpec
    training: Training
    privacy: Privacy
    recipients: Annotated[tuple[Signed, ...], Field(min_length=1, max_length=64)]
    """Signed delegations of those who may open the result."""
    release: Annotated[tuple[Released, ...], Field(min_length=1, max_length=2)] = ("weights",)
    metrics: Metrics | None = None
    audit: Audit | None = None
    """How to audit, if that is what the job is for."""
    model: Digest | None = None
    """Digest of the job's :class:`ModelSpec`, told to the owners where a licence asks which model it is."""

    @model_validator(mode="after")
    def _datasets_are_sorted(self) -> Self:
        ids = [use.dataset for use in self.datasets]
        if ids != sorted(set(ids)):
            raise ValueError("datasets must be sorted by id, each once")
        return self

    @model_validator(mode="after")
    def _has_one_unit(self) -> Self:
        if {use.subjects is not None for use in self.datasets} != {self.privacy.unit == "subject"}:
            raise ValueError(
                "a plan says how subjects are used for each dataset if its unit is the subject, else for none"
            )
        return self

    @model_validator(mode="after")
    def _releases_what_it_describes(self) -> Self:
        weights = ("weights",) if self.metrics is None else ("weights", "metrics")
        if self.release != (weights if self.kind == "train" else ("audit",)):
            raise ValueError("release lists 'weights', then 'metrics' if the plan has some; 'audit' alone for an audit")
        return self

    @model_validator(mode="after")
    def _audits_what_can_be_audited(self) -> Self:
        """Canaries are records, in batches of any size, and a report takes the place of everything else."""
        if (self.kind == "privacy_audit") != (self.audit is not None):
            raise ValueError("a plan of kind privacy_audit says how to audit, and no other does")
        changed = (self.metrics, self.training.augmentation, self.training.padded_batch)
        if self.audit is not None and (self.privacy.unit != "record" or changed != (None, None, None)):
            raise ValueError("an audit is of single records, without metrics, augmentation or padded batches")
        return self

    @model_validator(mode="after")
    def _pads_what_fits_in_memory(self) -> Self:
        if self.training.augmentation is not None and (
            self.training.padded_batch is not None or self.privacy.unit == "subject"
        ):
            raise ValueError("augmentation goes neither with padded batches nor with subjects")
        if self.training.padded_batch is not None and sum(use.units for use in self.datasets) > MAX_PADDED_UNITS:
            raise ValueError(f"padded batches are for datasets of at most {MAX_PADDED_UNITS} units together")
        return self

    @property
    def expected_batch(self) -> Fraction:
        """The public denominator of each step: sum of rate times declared bound on the privacy units."""
        return sum((use.sample_rate.fraction * use.units for use in self.datasets), Fraction(0))


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

    @model_validator(mode="after")
    def _has_places_in_memory(self) -> Self:
        uses, padded = self.plan.datasets, self.plan.training.padded_batch
        if padded is None and self.plan.privacy.unit == "record":
            return self
        record_bytes, width = 4 * prod(self.model.input_shape) + 8, max(use.unit_records for use in uses)
        placed = 2 * record_bytes * sum(use.row_bound for use in uses) + 8 * width * sum(use.units for use in uses)
        if placed > MAX_PLACED_BYTES:
            raise ValueError(
                f"subjects or padded batches take {placed} bytes at the declared bounds, at most {MAX_PLACED_BYTES} are: "
                "fewer or smaller datasets, or no padding"
            )
        if (step := (padded or 0) * width * record_bytes) > MAX_STEP_BYTES:
            raise ValueError(
                f"padded_batch: a step of {padded} units takes {step} bytes, at most {MAX_STEP_BYTES} are: a smaller one"
            )
        return self


JOB_SECTIONS: Final = ("spec", "terms", "weights")
DATASET_SECTIONS: Final = ("card", "columns")
