"""From what was asked to a plan: which columns and loss, how often each owner is sampled, how much noise.

Only public declarations enter: cards, licences, what remains of budgets. Nothing is spent by planning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final

from casemate_privacy.accounting import epsilon
from casemate_privacy.calibration import noise_multiplier
from casemate_privacy.hardened import check_hardened
from casemate_privacy.owners import Choice, OwnersPlan, OwnerTarget, plan_job, weigh_choices
from casemate_privacy.rounding import exact_clipping_norm, hardened_clipping_norm
from casemate_privacy.shapes import JobShape
from casemate_privacy.statement import check_accountable
from casemate_schemas import job as wire
from casemate_schemas.codec import digest_of
from casemate_schemas.dataset import Column, DatasetCard
from casemate_schemas.errors import BudgetError, DatasetError, ModelError, ParameterError
from casemate_schemas.job import DatasetUse, Plan, Rational, Training
from casemate_schemas.licence import names_model
from casemate_schemas.model import ModelSpec
from casemate_schemas.pipeline import Loss, PipelineSpec
from casemate_schemas.signatures import Signed

from .datasets import Dataset
from .parameters import SGD, LrSchedule, Metrics, Privacy, parameter_errors, to_wire
from .training_request import TrainingRequest

_INTEGERS: Final = ("int64", "int32", "uint8")
_LEAST_EPSILON: Final = 1e-3


def plan_training(
    request: TrainingRequest, datasets: Sequence[Dataset], recipients: tuple[Signed, ...]
) -> tuple[Plan, ModelSpec, bytes]:
    """The plan, the traced model and its initial weights (safetensors).

    1. Features, target and their declarations, which must agree between the datasets.
    2. The model, traced for one example's shape, and the loss that its output and the target's kind call for.
    3. Rates and noise for each owner's epsilon.

    Raises :class:`ParameterError`, :class:`ModelError`, :class:`DatasetError` or :class:`BudgetError`.
    """
    from casemate_models.batch_axis import check
    from casemate_models.losses import check_loss
    from casemate_models.pipeline import check_pipeline
    from casemate_models.tracing import trace

    check_units(datasets, request.privacy)
    features = feature_columns([dataset.card for dataset in datasets], request.features, request.target)  # 1
    target = _column(datasets[0].card, request.target)
    input_shape = request.input_shape or _input_shape(features)
    model, weights = trace(request.model, input_shape)  # 2
    loss = request.loss or infer_loss(target, check(model).output_shape)
    with parameter_errors("pipeline"):
        pipeline = _pipeline(request, features, target, loss)
    check_loss(model, loss, pipeline)
    if request.augmentation is not None:
        request.augmentation.check_input(model.input_shape)
    for dataset in datasets:
        check_pipeline(pipeline, dataset.card, model.input_shape)
    owners = plan_rates(request, datasets)  # 3
    with parameter_errors("plan"):
        plan = _plan(request, datasets, pipeline, loss, owners, recipients, model)
    check_accountable(plan)
    _check_mechanism(plan, model, datasets)
    return plan, model, weights


def check_units(datasets: Sequence[Dataset], privacy: Privacy) -> None:
    """Raises :class:`DatasetError` for a dataset whose privacy unit is not the one asked for: one job protects one unit."""
    for dataset in datasets:
        if (unit := dataset.card.privacy_unit) != privacy.unit:
            raise DatasetError(
                f"{dataset.id} protects one {unit}, and the job was to protect one {privacy.unit}: "
                f"ask for Privacy(..., unit={unit!r}), with datasets that all protect one {unit}"
            )


def units_of(card: DatasetCard) -> int:
    """The public bound on the privacy units that a card protects."""
    return card.row_bound if card.privacy_unit == "record" else card.subject_bound or card.row_bound


def feature_columns(cards: Sequence[DatasetCard], names: Sequence[str] | None, target: str) -> tuple[Column, ...]:
    """The columns that go in: those named, or all but the target and those that name subjects, in the first card's order.

    Each must be declared alike (shape and bounds) by every owner: scaling by other bounds would mean other features.
    Raises :class:`DatasetError` that names the column.
    """
    first = cards[0]
    kept_out = {target, *(card.subject_column for card in cards)}
    chosen = tuple(names or (column.name for column in first.columns if column.name not in kept_out))
    for name in (*chosen, target):
        ours = _column(first, name)
        for card in cards[1:]:
            theirs = _column(card, name)
            if (ours.shape, ours.lower, ours.upper) != (theirs.shape, theirs.lower, theirs.upper):
                raise DatasetError(
                    f"column '{name}' is declared {_declared(ours)} by {first.id} and {_declared(theirs)} by {card.id}"
                )
    return tuple(_column(first, name) for name in chosen)


def infer_loss(target: Column, output_shape: tuple[int, ...]) -> Loss:
    """The loss that the target's declaration and the model's output call for. Raises :class:`ModelError`."""
    whole = target.dtype in _INTEGERS or (target.lower, target.upper) == (0.0, 1.0)
    if whole and len(output_shape) == 1 and output_shape[0] == _n_classes(target) >= 2:
        return "cross_entropy"
    if output_shape in ((), (1,)):
        return "binary_cross_entropy" if whole and _n_classes(target) == 2 else "mean_squared_error"
    raise ModelError(
        f"no loss fits {_n_classes(target)} classes of '{target.name}' and a model whose output has shape "
        f"{list(output_shape)}: give one output a class, one output, or name the loss"
    )


def plan_rates(request: TrainingRequest, datasets: Sequence[Dataset]) -> OwnersPlan:
    """One noise for all, a rate for each owner: every epsilon at most the target, and at most that owner's own cap on a job.

    An owner whose licence allows less for one job than the target is sampled less often; nobody else pays for it.
    Raises :class:`ParameterError` for a batch larger than the declared rows, and :class:`BudgetError` where an owner's
    remaining budget certainly does not cover the plan.
    """
    steps = count_steps(datasets, request.batch_size, request.epochs, request.steps)
    once = () if request.metrics is None else (metrics_noise(request.metrics, request.privacy, datasets),)
    shape = JobShape.of(steps, request.noise_schedule, once)
    plan, costs, _ = _planned(request.privacy, datasets, shape, request.batch_size)
    _check_budgets(datasets, costs)
    return plan


def weigh_budgets(
    privacy: Privacy, datasets: Sequence[Dataset], batch_size: int, epochs: float | None, steps: int | None
) -> tuple[Choice, ...]:
    """What each owner's own budget is worth to the job, and what other choices would cost it. Raises as :func:`plan_rates`."""
    steps = count_steps(datasets, batch_size, epochs, steps)
    _, _, targets = _planned(privacy, datasets, steps, batch_size)
    named = {dataset.id: target for dataset, target in zip(datasets, targets, strict=True)}
    return weigh_choices(named, steps, batch_size)


def count_steps(datasets: Sequence[Dataset], batch_size: int, epochs: float | None, steps: int | None) -> int:
    """The job's steps. Raises :class:`ParameterError` for a batch larger than the declared units, or too many steps."""
    rows = sum(units_of(dataset.card) for dataset in datasets)
    if batch_size > rows:
        what = "rows" if datasets[0].card.privacy_unit == "record" else "subjects"
        raise ParameterError(f"batch_size: expected at most the {rows} declared {what}, got {batch_size}")
    counted = steps or math.ceil((epochs or 1) * rows / batch_size)
    if counted > wire.MAX_STEPS:
        raise ParameterError(f"{counted} steps: expected at most {wire.MAX_STEPS}; fewer epochs or larger batches")
    return counted


def _planned(
    privacy: Privacy, datasets: Sequence[Dataset], steps: int | JobShape, batch_size: int
) -> tuple[OwnersPlan, list[float], list[OwnerTarget]]:
    """The plan, what it costs each owner at its licence's delta, and the targets that it meets."""
    capped: set[str] = set()
    while True:
        targets = [_target(privacy, dataset, dataset.id in capped) for dataset in datasets]
        plan = plan_job(targets, steps, batch_size)
        costs = [epsilon(plan.event(i), d.licence.delta) for i, d in enumerate(datasets)]
        over = {d.id for d, cost in zip(datasets, costs, strict=True) if cost > d.licence.epsilon_per_job} - capped
        if not over:
            return plan, costs, targets
        capped |= over


def _target(privacy: Privacy, dataset: Dataset, capped: bool) -> OwnerTarget:
    """The target asked for; for an owner over its cap, the stricter epsilon at the stricter delta."""
    licence, rows = dataset.licence, units_of(dataset.card)
    if not capped:
        return OwnerTarget(rows, privacy.epsilon, privacy.delta)
    return OwnerTarget(rows, min(privacy.epsilon, licence.epsilon_per_job), min(privacy.delta, licence.delta))


def _check_budgets(datasets: Sequence[Dataset], costs: Sequence[float]) -> None:
    for dataset, cost in zip(datasets, costs, strict=True):
        if cost > dataset.epsilon_remaining:
            raise BudgetError(
                f"{dataset.id}: this job costs epsilon {cost:.4g} at delta {dataset.licence.delta:g}, and "
                f"{dataset.epsilon_remaining:.4g} is left: ask for less, or train fewer steps"
            )


def _plan(
    request: TrainingRequest,
    datasets: Sequence[Dataset],
    pipeline: PipelineSpec,
    loss: Loss,
    owners: OwnersPlan,
    recipients: tuple[Signed, ...],
    model: ModelSpec,
) -> Plan:
    optimizer = request.optimizer
    return Plan(
        purpose=request.purpose,
        datasets=tuple(
            DatasetUse(
                dataset=dataset.id,
                envelope=dataset.offer.envelope,
                card=dataset.offer.card_digest,
                licence=dataset.offer.licence.digest,
                key_broker=dataset.offer.key_broker,
                row_bound=dataset.card.row_bound,
                sample_rate=Rational.of(rate),
                subjects=_subject_use(dataset.card),
            )
            for dataset, rate in zip(datasets, owners.rates, strict=True)
        ),
        pipeline=pipeline,
        training=Training(
            loss=loss,
            optimizer=to_wire(wire.SGD, optimizer) if isinstance(optimizer, SGD) else to_wire(wire.Adam, optimizer),
            steps=owners.steps,
            clipping_norm=request.privacy.clipping_norm,
            noise_multiplier=owners.noise_multiplier,
            max_physical_batch=request.max_physical_batch,
            padded_batch=_padded_batch(request, datasets, owners),
            checkpoint_every_steps=request.checkpoint_every_steps,
            mechanism=request.mechanism,
            lr_schedule=to_wire(wire.LrSchedule, request.lr_schedule or LrSchedule()),
            noise_schedule=tuple(to_wire(wire.NoisePhase, phase) for phase in request.noise_schedule),
            averaging=request.averaging and to_wire(wire.Averaging, request.averaging),
            augmentation=request.augmentation and to_wire(wire.Augmentation, request.augmentation),
        ),
        privacy=wire.Privacy(epsilon=request.privacy.epsilon, delta=request.privacy.delta, unit=request.privacy.unit),
        kind="train" if request.audit is None else "privacy_audit",
        audit=request.audit and to_wire(wire.Audit, request.audit),
        release=_release(request),
        metrics=None
        if request.metrics is None
        else wire.Metrics(noise_multiplier=owners.shape.once[0], loss_bound=request.metrics.loss_bound),
        recipients=recipients,
        model=digest_of(model) if any(names_model(dataset.licence) for dataset in datasets) else None,
    )


def _release(request: TrainingRequest) -> tuple[wire.Released, ...]:
    if request.audit is not None:
        return ("audit",)
    return ("weights",) if request.metrics is None else ("weights", "metrics")


def metrics_noise(metrics: Metrics, privacy: Privacy, datasets: Sequence[Dataset]) -> float:
    """The noise multiplier with which metrics alone cost their share of the strictest owner's epsilon.

    Raises :class:`ParameterError` for a share that no noise multiplier meets.
    """
    strictest = min([privacy.epsilon, *(dataset.licence.epsilon_per_job for dataset in datasets)])
    delta = min([privacy.delta, *(dataset.licence.delta for dataset in datasets)])
    return noise_multiplier(max(strictest * metrics.epsilon_share, _LEAST_EPSILON), delta, Fraction(1), 1)


def padded_size(expected: float, units: int) -> int:
    """Places for all that a step draws, but for one step in 10^9, and at most all ``units`` (Bernstein's inequality)."""
    log = math.log(1e9)
    return min(units, math.ceil(expected + log / 3 + math.sqrt(log * log / 9 + 2 * log * expected)))


def _padded_batch(request: TrainingRequest, datasets: Sequence[Dataset], owners: OwnersPlan) -> int | None:
    if request.padded_batch != "auto":
        return request.padded_batch
    units = [units_of(dataset.card) for dataset in datasets]
    expected = sum(rate * count for rate, count in zip(owners.rates, units, strict=True))
    return padded_size(float(expected), sum(units))


def _subject_use(card: DatasetCard) -> wire.SubjectUse | None:
    if card.max_records_per_subject is None:
        return None
    return wire.SubjectUse(max_records=card.max_records_per_subject, bound=units_of(card))


def _check_mechanism(plan: Plan, model: ModelSpec, datasets: Sequence[Dataset]) -> None:
    """Raises :class:`ParameterError` where a worker would, or noise would be worth less than an owner's licence is told.

    ``exact`` noise may take too much of the clipping norm; ``hardened`` noise may add too much to epsilon or delta.
    """
    training, batch = plan.training, float(plan.expected_batch)
    coordinates = sum(math.prod(parameter.shape) for parameter in model.parameters)
    if training.mechanism == "exact":
        sigma = max(sigma for _, sigma in training.noise_phases)
        exact_clipping_norm(training.clipping_norm, sigma, coordinates, batch)
        return
    hardened_clipping_norm(training.clipping_norm, batch)
    epsilon = min(plan.privacy.epsilon, *(dataset.licence.epsilon_per_job for dataset in datasets))
    delta = min(plan.privacy.delta, *(dataset.licence.delta for dataset in datasets))
    check_hardened(coordinates, training.steps, epsilon, delta)


def _pipeline(request: TrainingRequest, features: Sequence[Column], target: Column, loss: Loss) -> PipelineSpec:
    kinds: dict[Loss, Any] = {
        "cross_entropy": "class",
        "binary_cross_entropy": "binary",
        "mean_squared_error": "value",
    }
    return PipelineSpec(
        features=tuple(column.name for column in features),
        scaling=request.scaling,
        target=target.name,
        target_kind=kinds[loss],
        n_classes=_n_classes(target) if loss == "cross_entropy" else None,
    )


def _column(card: DatasetCard, name: str) -> Column:
    column = card.column(name)
    if column is None:
        raise DatasetError(f"dataset '{card.id}' has no column '{name}'")
    return column


def _input_shape(features: Sequence[Column]) -> tuple[int, ...]:
    """One feature keeps its shape; several are flattened and joined."""
    if len(features) == 1 and features[0].shape:
        return features[0].shape
    return (sum(math.prod(column.shape) for column in features),)


def _n_classes(target: Column) -> int:
    return int(target.upper - target.lower) + 1 if target.upper - target.lower < 1 << 20 else 0


def _declared(column: Column) -> str:
    return f"{list(column.shape)} in [{column.lower:g}, {column.upper:g}]"
