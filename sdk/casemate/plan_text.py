"""A plan in plain words: all that changes what it costs in privacy, or what leaves, for people who have to say yes or no."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from casemate_privacy.accounting import epsilon
from casemate_privacy.events import TrainingEvent
from casemate_schemas.job import DatasetUse, Metrics, Plan
from casemate_schemas.metrics import has_accuracy


def describe_plan(plan: Plan) -> Iterator[str]:
    """What is protected, how noise is added, what padding hides, and what leaves; a line each."""
    privacy, training = plan.privacy, plan.training
    claimed = f"ε {privacy.epsilon:g} at δ {privacy.delta:g} or less"  # nobody holds it against what key brokers charge
    yield f"protects {_unit(plan)}, whether it is there or not; who asks claims {claimed}"
    yield f"{training.steps} steps, each clipped to norm {training.clipping_norm:g}; {training.mechanism} noise of {_noise(plan)}"
    if training.padded_batch is not None:
        units = f"{privacy.unit}s"
        yield f"every step is padded to {training.padded_batch} {units}: how long it takes does not tell how many were drawn"
    if plan.audit is not None:
        confidence = f"{plan.audit.confidence:.2%}".replace(".00", "")
        yield f"released is what {plan.audit.canaries} canaries prove about ε, with {confidence} confidence, and no weights"
        return
    if training.averaging is not None:
        yield f"the weights released are an average over the steps (decay {training.averaging.decay:g}), noised as each step is"
    if plan.metrics is not None:
        yield f"the metrics released are {_metrics(plan, plan.metrics)}"


def describe_use(plan: Plan, use: DatasetUse, delta: float) -> Iterator[str]:
    """How one dataset enters, and what its metrics cost alone at ``delta``; a line each."""
    rate = use.sample_rate.fraction
    of = "" if use.subjects is None else f", with at most {use.subjects.max_records} records each"
    yield f"every step draws each {plan.privacy.unit} with probability {float(rate):.4g}{of}"
    if plan.metrics is not None:
        alone = epsilon(TrainingEvent(Fraction(1), plan.metrics.noise_multiplier, 1), delta)
        yield f"metrics look at all {plan.privacy.unit}s once: ε {alone:.3g} if they were all"


def _unit(plan: Plan) -> str:
    return "one record" if plan.privacy.unit == "record" else "all records of one subject"


def _noise(plan: Plan) -> str:
    """The standard deviation in clipping norms, phase by phase, with the steps of each."""
    phases, done, told = plan.training.noise_phases, 0, []
    for count, sigma in phases:
        steps = "" if len(phases) == 1 else f" in steps {done + 1} to {done + count}"
        told.append(f"{sigma:.4g}{steps}")
        done += count
    return f"{', then '.join(told)} times that norm"


def _metrics(plan: Plan, metrics: Metrics) -> str:
    what = "accuracy and mean loss" if has_accuracy(plan.training.loss) else "the mean loss"
    return (
        f"{what} on all training records, losses counted up to {metrics.loss_bound:g}; "
        f"noise of {metrics.noise_multiplier:.4g} times what one {plan.privacy.unit} can change"
    )
