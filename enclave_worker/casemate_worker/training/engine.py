"""DP-SGD (Abadi et al. 2016) on the joint records of several owners, each with a rate of its own.

One step: ``g = (Σ over owners, Σ over sampled records of clip(gradient) + N(0, σ²C²)) / expected batch``. The noise is
drawn once for the joint sum, the denominator is public, the number of steps is fixed. For one owner this is the Gaussian
mechanism with noise multiplier σ, Poisson-subsampled at that owner's rate, composed over the steps; neighbouring data
sets differ by adding or removing one record. Where the unit is the subject, read "subject" for "record": each is drawn with
all its records, and the gradient of their mean loss is clipped once (:mod:`.batches`). Only weights, and metrics with noise
of their own, leave, and they depend on records through noised sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial

import torch
from casemate_models.losses import ExampleLoss
from casemate_schemas.errors import DatasetError, MalformedError, ModelError, ParameterError, StateError
from casemate_schemas.job import Metrics, Training
from casemate_schemas.metrics import MetricSums
from torch import Tensor, nn

from .augmentation import Augmenter, Views, mean_over_views
from .averaging import WeightAverage
from .batches import OwnerData, batches_of, known_classes, mean_over_present
from .choosing import Mode
from .clipping import BookKeeping, Loss
from .distributed import Alone, Group, inputs
from .flat import FlatParameters
from .kernels import check_kernels
from .memory import give_back
from .metrics import noisy_metrics
from .noise import noise_mechanism
from .optimizers import build_optimizer, move_weights, optimizer_slots
from .probe import probe_model
from .rounding import clip_for_rounding
from .rows import most_rows
from .schedules import ScheduledNoise
from .state import KeptTensors
from .uses import Strategy

__all__ = ["OwnerData", "Trainer"]


class Trainer:
    """Trains ``model`` in place, one noised step after another.

    Sampling and noise come from ``seed`` alone, and PyTorch's deterministic algorithms are used, so on one machine with
    one number of threads the same arguments give the same weights, bit for bit, also across :meth:`restore`. How
    gradients are clipped is among the arguments: with ``auto`` it is measured once in a process, and restored.
    """

    def __init__(
        self,
        model: nn.Module,
        owners: Sequence[OwnerData],
        plan: Training,
        *,
        expected_batch: Fraction,
        seed: bytes,
        clipping: Mode = "auto",
        observe: Callable[[Tensor], None] | None = None,
        group: Group | None = None,
    ) -> None:
        """Check that everything fits together, touching no record, and stand before the first step.

        Args:
            model: float32, with batch-independent layers only; see :mod:`~casemate_worker.training.watching`.
            owners: at least one, with distinct ids and records of one shape.
            plan: what the terms fix, the same for all owners.
            expected_batch: the public denominator in records: Σ of rate times declared row bound, never a count.
            seed: the attempt's 32 bytes, from :func:`casemate_worker.key_schedule.attempt_seed`.
            clipping: how the clipped sum is computed; ways agree up to rounding. With padded batches nothing is measured.
            observe: shown each step's noised sum, float64 ``[d]``, which is all that a step releases; for audits alone.
            group: the processes that train this model together, each with the same arguments; see :mod:`.distributed`.

        Raises:
            ParameterError: a rate, the denominator, the seed or the set of owners is out of range, or rounding would take
                too much of the clipping norm.
            DatasetError: owners' records differ in shape or type.
            ModelError: the model cannot be trained here; see :func:`~casemate_worker.training.probe.probe_model` and
                :func:`~casemate_worker.training.kernels.check_kernels`.
        """
        if expected_batch <= 0:
            raise ParameterError("expected a positive expected batch")
        owners = _sorted(owners)
        self._plan = plan
        self._observe = observe
        self._group = group or Alone()
        self._seed = seed
        self._expected_batch = float(expected_batch)
        self._noise = ScheduledNoise(plan.noise_phases, noise_mechanism(plan.mechanism, seed, plan.clipping_norm))
        self._model = model
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._flat = FlatParameters(self._trainable)
        self._size = self._flat.vector.numel()
        self._views = None if plan.augmentation is None else Augmenter(seed, plan.augmentation, owners[0].features)
        self._group.agree(inputs(plan, self._expected_batch, seed, owners, model))
        self._clipping, outputs = self._checked_clipping(owners, clipping)
        self._clipping.strategies = self._group.leader_strategies(self._clipping.strategies)
        self._check_kernels()
        if plan.loss == "cross_entropy":
            owners = [replace(data, targets=known_classes(data.targets, outputs.shape[-1])) for data in owners]
        self._batches = batches_of(owners, seed, plan.padded_batch)
        self._optimizer = build_optimizer(plan, [self._flat.vector], self._expected_batch)
        self._average = None if plan.averaging is None else WeightAverage(plan.averaging.decay, self._trainable)
        self._kept = KeptTensors(model, self._flat, self._optimizer, optimizer_slots(plan), self._average)
        self._step = 0

    @property
    def steps_done(self) -> int:
        """How many steps the weights have behind them."""
        return self._step

    @property
    def clipping_strategies(self) -> dict[str, Strategy]:
        """How each parameter's gradients are clipped, by name: independent of records, so it may be published."""
        return self._clipping.strategies

    def step(self) -> None:
        """Do one step of DP-SGD; :class:`StateError` once all steps of the plan are done.

        1. Sample each owner's records, in the order of owner ids.
        2. Sum their clipped gradients; nothing at all is as good a batch as any.
        3. Add the step's noise, once.
        4. Divide by the public denominator and move the weights.
        """
        if self._step >= self._plan.steps:
            raise StateError(f"all {self._plan.steps} steps are done")
        with _deterministic():
            self._noise.draw_ahead(self._step, self._size)
            features, targets = self._batches.drawn(self._step)  # 1
            total = self._clipped_sum(features, targets)  # 2
            noisy = self._noise.add(total, self._step)  # 3
            if self._observe is not None:
                self._observe(noisy)
            self._descend(noisy * (1.0 / self._expected_batch))  # 4
        self._step += 1
        if self._average is not None:
            self._average.update(self._step)

    def run(self, until: int | None = None, on_step: Callable[[int], None] | None = None) -> None:
        """Step until ``until`` steps are done (default: all); after each, call ``on_step`` with the number done."""
        last = self._plan.steps if until is None else min(until, self._plan.steps)
        while self._step < last:
            self.step()
            if on_step is not None:
                on_step(self._step)

    def weights(self) -> dict[str, Tensor]:
        """What is released: copies of the model's parameters and buffers, by name, or of their averages where there are any."""
        averages = {} if self._average is None else self._average.tensors
        return {name: averages.get(name, tensor).detach().clone() for name, tensor in self._model.state_dict().items()}

    def metrics(self, plan: Metrics) -> MetricSums:
        """What the weights to be released make of everyone's records, noised: see :mod:`.metrics`."""
        model = partial(torch.func.functional_call, self._model, self.weights())
        with _deterministic():
            return noisy_metrics(model, self._batches, self._plan, plan, self._seed)

    def state(self) -> bytes:
        """Everything that :meth:`restore` needs: see :meth:`.state.KeptTensors.encode`."""
        return self._kept.encode(self._step, self.clipping_strategies)

    def restore(self, state: bytes) -> None:
        """Go on from ``state``, made by :meth:`state` under the same plan and model; nothing changes if it does not fit.

        Raises:
            MalformedError: not such a state: other bytes, tensors, shapes or types, or more steps than the plan has.
        """
        message, tensors = self._kept.decode(state)
        if message.step > self._plan.steps:
            raise MalformedError("training state is of more steps than this plan has")
        if message.clipping.keys() != self.clipping_strategies.keys():
            raise MalformedError("training state is not clipped like this model")
        self._group.agree([state])
        before, self._clipping.strategies = self._clipping.strategies, message.clipping
        try:
            self._check_kernels()
        except ModelError:
            self._clipping.strategies = before
            raise
        self._kept.load(tensors)
        self._step = message.step

    def _checked_clipping(self, owners: Sequence[OwnerData], mode: Mode) -> tuple[BookKeeping, Tensor]:
        """How this plan's gradients are clipped, proven on synthetic records, and the model's outputs for some."""
        loss: Loss = ExampleLoss(self._plan.loss)
        model, physical = self._model, self._plan.max_physical_batch
        features, targets = owners[0].features[:0], owners[0].targets[:0]
        if self._plan.padded_batch is not None or owners[0].subjects is not None:
            width = max(data.unit_records or 1 for data in owners)
            model, loss, physical = Views(model), mean_over_present(loss), max(1, physical // width)
            features = features.new_empty(0, width, *features.shape[1:])
        if self._views is not None:
            model, loss, physical = Views(model), mean_over_views(loss), self._views.records_in(physical)
            features, targets = next(self._views.batches(features, targets, 0, physical))
        clipping = BookKeeping(
            model,
            loss,
            clipping_norm=self._plan.clipping_norm,
            max_physical_batch=physical,
            uniform=self._plan.padded_batch is not None,
            expected_batch=None if self._plan.mechanism == "exact" else self._expected_batch,
        )
        if mode == "auto" and self._plan.padded_batch is not None:
            mode = "book_keeping"  # states name strategies: what is measured would show in their sizes
        outputs = probe_model(model, clipping, features, targets, mode)
        give_back()
        self._shaped = features, targets, owners[0].features[:0]
        clip_for_rounding(clipping, self._plan, self._size, self._expected_batch)
        return clipping, outputs

    def _check_kernels(self) -> None:
        """Of training, with strategies as they are, and of a forward pass by itself, which metrics are made of."""
        features, targets, plain = self._shaped
        strategies = tuple(sorted(self._clipping.strategies.items()))

        def forward(
            x: Tensor, _: Tensor, inside: AbstractContextManager[object], take: Callable[[Tensor], None]
        ) -> None:
            with torch.no_grad(), inside:
                outputs = self._model(x)
            take(outputs)

        with _deterministic():
            clipping = self._clipping
            check_kernels(self._model, clipping.examine, features, targets, clipping.physical_batch, strategies)
            check_kernels(self._model, forward, plain, targets[:, None], self._plan.max_physical_batch, None)

    def _clipped_sum(self, features: Tensor, targets: Tensor) -> Tensor:
        """Over the step's records, or over their views."""
        share = self._group.share
        if self._views is None:
            return self._group.summed(self._clipping.clipped_sum(share(features), share(targets), len(features)))
        size = most_rows(self._views.records_in(self._plan.max_physical_batch))
        total = torch.zeros(self._size, dtype=torch.float64)
        for views, labels in self._views.batches(features, targets, self._step, size):
            total += self._clipping.clipped_sum(share(views), share(labels), len(features))
        return self._group.summed(total)

    def _descend(self, gradient: Tensor) -> None:
        """Let the optimiser move the parameters along ``gradient``."""
        self._flat.vector.grad = gradient.float()
        move_weights(self._optimizer, self._plan, self._step)
        self._flat.vector.grad = None


def _sorted(owners: Sequence[OwnerData]) -> list[OwnerData]:
    """The owners by id, after checking that they fit together."""
    if not len({data.owner for data in owners}) == len(owners) > 0:
        raise ParameterError("expected at least one owner, each with an id of its own")
    kinds = {(d.features.shape[1:], d.targets.dtype) for d in owners}
    if len(kinds) != 1:
        raise DatasetError("expected records of one shape and type from all owners")
    return sorted(owners, key=lambda data: data.owner)


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms, for as long as it lasts, without its filling of fresh memory.

    The flags themselves: the public functions also tell the compiler each time, which a small network's step would feel.
    """
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before, warn_only=warn_only)
        torch._C._set_deterministic_fill_uninitialized_memory(filled)
