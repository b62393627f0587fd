"""Ways to break DP-SGD, each planted in the real engine; and an audit's two games, played with the engine sound or broken.

A bug is a function that takes a :class:`~casemate_worker.training.engine.Trainer` before its first step and spoils a piece of it.
Accounting knows nothing of that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from casemate_privacy.auditing import Array
from casemate_schemas.audit import AuditCounts
from casemate_schemas.job import SGD, Audit, DatasetUse, Mechanism, Plan, Privacy, Rational, Training
from casemate_schemas.pipeline import PipelineSpec
from casemate_schemas.signatures import Signed
from casemate_worker.privacy_audit import AuditedModel, AuditedTraining, with_canaries
from casemate_worker.training import clipping
from casemate_worker.training.engine import OwnerData, Trainer
from torch import Tensor, nn

Bug = Callable[[Any], None]

RATE: Final = Fraction(1, 8)
CLIPPING_NORM: Final = 4.0
"""Not 1, or noise could go without it unseen."""

_NOBODY: Final = Signed(kind="delegation", payload=b"", signer=bytes(32), signature=bytes(64))


def audit_plan(
    *, canaries: int = 1000, steps: int = 20, noise: float = 2.4913, mechanism: Mechanism = "hardened"
) -> Plan:
    """By default epsilon 1 at delta 1e-5: noise 2.4913 for 20 steps of an eighth of the records."""
    use = DatasetUse(
        dataset="points@north",
        envelope=bytes(32),
        card=bytes(32),
        licence=bytes(32),
        key_broker="north",
        row_bound=200,
        sample_rate=Rational.of(RATE),
    )
    training = Training(
        loss="binary_cross_entropy",
        optimizer=SGD(lr=0.5),
        steps=steps,
        clipping_norm=CLIPPING_NORM,
        noise_multiplier=noise,
        mechanism=mechanism,
    )
    return Plan(
        kind="privacy_audit",
        purpose="research",
        datasets=(use,),
        pipeline=PipelineSpec(features=("a", "b", "c"), target="outcome", target_kind="binary"),
        training=training,
        privacy=Privacy(epsilon=1.0, delta=1e-5),
        recipients=(_NOBODY,),
        release=("audit",),
        audit=Audit(canaries=canaries, confidence=0.95),
    )


def play(plan: Plan, number: int, bug: Bug | None = None) -> AuditCounts:
    """One audited training of 40 records, its seed made from ``number``: the one-run game."""
    generator = torch.Generator().manual_seed(number)
    features = torch.rand(40, 3, generator=generator) * 2 - 1
    owner = OwnerData("points@north", features, (features[:, 0] > 0).float(), RATE)
    audited = AuditedTraining(_linear(), [owner], plan, seed_of(number))
    if bug is not None:
        bug(audited.trainer)
    audited.trainer.run()
    return audited.counts()


def play_often(
    games: int, *, present: bool, others: int, rate: Fraction, noise: float, bug: Bug | None = None
) -> Array:
    """The noised sums of ``games`` steps, ``[games, d]``, with or without one canary beside ``others`` that are in every batch.

    A canary's gradient is always the same, and the records' is zero or clipped whatever the weights are, so each step is a
    game by itself.
    """
    plan = audit_plan(canaries=16, steps=games, noise=noise)
    included = np.zeros(16, dtype=np.bool_)
    included[0] = present
    released: list[Tensor] = []
    owner = OwnerData("points@north", torch.zeros(others, 3), torch.zeros(others), Fraction(1))
    trainer = Trainer(
        AuditedModel(_linear(), (3,), 16, CLIPPING_NORM),
        with_canaries([owner], included, rate),
        plan.training.model_copy(update={"optimizer": SGD(lr=1e-6)}),
        expected_batch=Fraction(1),
        seed=seed_of(int(present)),
        observe=lambda noisy: released.append(noisy),
    )
    if bug is not None:
        bug(trainer)
    trainer.run()
    return np.asarray(torch.stack(released).numpy(), dtype=np.float64)


def seed_of(number: int) -> bytes:
    """A seed for each number."""
    return hashlib.sha256(number.to_bytes(8, "big")).digest()


def _linear() -> nn.Module:
    model = nn.Linear(3, 1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def _noise(change: Callable[[Any, Tensor, int], Tensor]) -> Bug:
    """The noise's :meth:`add` is another one; ``change`` is given the real noise, the sum and the step."""

    def plant(trainer: Any) -> None:
        real = trainer._noise
        trainer._noise = SimpleNamespace(
            add=lambda total, step: change(real, total, step), draw_ahead=lambda step, count: None
        )

    return plant


def _drawn(real: Any, total: Tensor, step: int) -> Tensor:
    noise: Tensor = real.add(torch.zeros_like(total), step)
    return noise


def _on_half_the_coordinates(real: Any, total: Tensor, step: int) -> Tensor:
    noise = _drawn(real, total, step)
    noise[len(noise) // 2 :] = 0
    return total + noise


def _skips_empty_batches(real: Any, total: Tensor, step: int) -> Tensor:
    return real.add(total, step) if bool(total.any()) else total  # type: ignore[no-any-return]


def _clipping(trainer: Any, change: Callable[..., Any], name: str) -> None:
    """While the trainer clips, the clipping module's function of that name is ``change`` of the real one."""
    engine, real = trainer._clipping, getattr(clipping, name)
    clipped_sum = engine.clipped_sum

    def spoilt(*args: Any) -> Tensor:
        setattr(clipping, name, lambda *a, **k: change(real, *a, **k))
        try:
            return clipped_sum(*args)  # type: ignore[no-any-return]
        finally:
            setattr(clipping, name, real)

    engine.clipped_sum = spoilt


def _without_clipping(trainer: Any) -> None:
    _clipping(trainer, lambda _, squares, *__, **___: torch.ones_like(squares), "clip_factors")


def _layer_by_layer(trainer: Any) -> None:
    """Each layer is clipped to C by itself: a canary's are all alike, so one factor does it."""

    def largest(_: Any, terms: Any, count: int) -> tuple[Tensor, Tensor]:
        squares = torch.stack([term.squared_norms()[0] for term in terms.values()]).amax(dim=0)
        return squares, torch.zeros(count, dtype=torch.float64)

    _clipping(trainer, largest, "_squared_norms")


def _mean_loss(trainer: Any) -> None:
    """Gradients of the batch's mean loss are clipped, and the sum is scaled back up afterwards."""
    engine = trainer._clipping
    loss, clipped_sum = engine._loss, engine.clipped_sum
    engine._loss = lambda outputs, targets: loss(outputs, targets) / max(1, len(targets))
    engine.clipped_sum = lambda features, targets, *rest: clipped_sum(features, targets, *rest) * len(features)


def _sampling(change: Callable[[int, int], int]) -> Bug:
    """Thresholds of 2^64 times the rate are other ones."""

    def plant(trainer: Any) -> None:
        for sampler in trainer._batches._samplers:
            sampler._threshold = change(sampler._threshold, 1 << 64)

    return plant


def mean_over_the_batch(trainer: Any) -> None:
    """What is released is the noised sum over the records that were drawn, times the public denominator."""
    real, drawn, size = trainer._noise, trainer._batches.drawn, [0]

    def counted(step: int) -> tuple[Tensor, Tensor]:
        features, targets = drawn(step)
        size[0] = max(1, len(features))
        return features, targets

    trainer._batches.drawn = counted
    trainer._noise = SimpleNamespace(
        add=lambda total, step: real.add(total, step) * trainer._expected_batch / size[0],
        draw_ahead=lambda step, count: None,
    )


no_step_for_an_empty_batch: Final[Bug] = _noise(_skips_empty_batches)

ONE_RUN_BUGS: Final[dict[str, Bug]] = {
    "a tenth of the noise": _noise(lambda real, total, step: total + _drawn(real, total, step) / 10),
    "noise without the clipping norm": _noise(
        lambda real, total, step: total + _drawn(real, total, step) / CLIPPING_NORM
    ),
    "the same noise in every step": _noise(lambda real, total, step: real.add(total, 0)),
    "noise taken back": _noise(lambda real, total, step: real.add(total, step) - _drawn(real, total, step)),
    "one draw for all coordinates": _noise(lambda real, total, step: total + _drawn(real, total, step)[0]),
    "no noise on half the coordinates": _noise(_on_half_the_coordinates),
    "no clipping": _without_clipping,
    "clipping layer by layer": _layer_by_layer,
    "clipping gradients of the mean loss": _mean_loss,
    "eight times the sample rate": _sampling(lambda threshold, whole: min(whole, 8 * threshold)),
    "half of the records in every step": _sampling(lambda threshold, whole: whole // 2),
}
"""Those that a single run shows."""
