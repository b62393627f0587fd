"""DP-SGD (Abadi et al. 2016) on the joint records of several owners, each with a rate of its own.

One step: ``g = (Σ over owners, Σ over sampled records of clip(gradient) + N(0, σ²C²)) / expected batch``. The noise is
drawn once for the joint sum, the denominator is public, the number of steps is fixed. For one owner this is the Gaussian
mechanism with noise multiplier σ, Poisson-subsampled at that owner's rate, composed over the steps; neighbouring data
sets differ by adding or removing one record. Only weights leave, and they depend on records through noised sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, ClassVar, Final, Literal

import safetensors.torch
import torch
from casemate_models.losses import per_example_loss
from casemate_schemas.codec import WireModel, decode, encode
from casemate_schemas.errors import DatasetError, MalformedError, ParameterError, StateError
from casemate_schemas.job import MAX_STEPS, Training
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from .clipping import BookKeeping, Mode
from .noise import HardenedGaussian
from .optimizers import build_optimizer, optimizer_slots
from .probe import probe_model
from .sampling import PoissonSampler
from .uses import Strategy

_STATE_OVERHEAD_BYTES: Final = 1 << 20
_NO_CLASS: Final = -100
"""``cross_entropy`` of this target is zero, and so is its gradient (PyTorch's ``ignore_index``)."""


@dataclass(frozen=True, eq=False)
class OwnerData:
    """One owner's records: ``features`` float32 ``[n, ...]`` and ``targets`` ``[n]``, sampled at ``sample_rate``.

    Targets are int64 for ``cross_entropy`` and float32 else. ``owner`` is an id of its own in the job, which keys the
    sampling: a dataset's id where an owner lends several. :class:`DatasetError` if the tensors do not fit together.
    """

    owner: str
    features: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    sample_rate: Fraction

    def __post_init__(self) -> None:
        if self.features.dtype != torch.float32 or self.features.dim() < 2:
            raise DatasetError("expected float32 features with an axis for records and at least one more")
        if self.targets.dim() != 1 or len(self.targets) != len(self.features):
            raise DatasetError("expected one target for each record")


class TrainingState(WireModel):
    """All that a later attempt needs to go on: the step (which is every generator's position) and the tensors.

    ``clipping`` is how each parameter's gradients were clipped: another way would round differently.
    """

    KIND: ClassVar[str] = "training-state"

    version: Literal[1] = 1
    step: Annotated[int, Field(ge=0, le=MAX_STEPS)]
    clipping: dict[str, Strategy]
    tensors: bytes


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
    ) -> None:
        """Check that everything fits together, touching no record, and stand before the first step.

        Args:
            model: float32, with batch-independent layers only; see :mod:`~casemate_worker.training.watching`.
            owners: at least one, with distinct ids and records of one shape.
            plan: what the terms fix, the same for all owners.
            expected_batch: the public denominator in records: Σ of rate times declared row bound, never a count.
            seed: the attempt's 32 bytes, from :func:`casemate_worker.key_schedule.attempt_seed`.
            clipping: how the clipped sum is computed; ways agree up to rounding.

        Raises:
            ParameterError: a rate, the denominator, the seed or the set of owners is out of range.
            DatasetError: owners' records differ in shape or type.
            ModelError: the model cannot be trained here; see :func:`~casemate_worker.training.probe.probe_model`.
        """
        if expected_batch <= 0:
            raise ParameterError("expected a positive expected batch")
        self._owners = _sorted(owners)
        self._plan = plan
        self._expected_batch = float(expected_batch)
        self._samplers = [PoissonSampler(seed, data.owner, data.sample_rate) for data in self._owners]
        self._noise = HardenedGaussian(seed, noise_multiplier=plan.noise_multiplier, clipping_norm=plan.clipping_norm)
        self._model = model
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._size = sum(p.numel() for p in self._trainable.values())
        self._clipping = BookKeeping(
            model,
            partial(per_example_loss, plan.loss),
            clipping_norm=plan.clipping_norm,
            max_physical_batch=plan.max_physical_batch,
        )
        first = self._owners[0]
        outputs = probe_model(model, self._clipping, first.features, first.targets, clipping)
        if plan.loss == "cross_entropy":
            self._owners = [_known(data, outputs.shape[1]) for data in self._owners]
        self._optimizer = build_optimizer(plan.optimizer, self._trainable.values())
        self._slots = optimizer_slots(plan.optimizer)
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
            features, targets = self._sample()  # 1
            total = self._clipping.clipped_sum(features, targets)  # 2
            noisy = self._noise.add(total, self._step)  # 3
            self._descend(noisy / self._expected_batch)  # 4
        self._step += 1

    def run(self, until: int | None = None, on_step: Callable[[int], None] | None = None) -> None:
        """Step until ``until`` steps are done (default: all); after each, call ``on_step`` with the number done."""
        last = self._plan.steps if until is None else min(until, self._plan.steps)
        while self._step < last:
            self.step()
            if on_step is not None:
                on_step(self._step)

    def weights(self) -> dict[str, Tensor]:
        """Copies of the model's parameters and buffers, by name."""
        return {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}

    def state(self) -> bytes:
        """Everything that :meth:`restore` needs, as a canonical :class:`TrainingState`. Confidential until released."""
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in self._tensors().items()}
        return encode(
            TrainingState(step=self._step, clipping=self.clipping_strategies, tensors=safetensors.torch.save(tensors))
        )

    def restore(self, state: bytes) -> None:
        """Go on from ``state``, made by :meth:`state` under the same plan and model; nothing changes if it does not fit.

        Raises:
            MalformedError: not such a state: other bytes, tensors, shapes or types, or more steps than the plan has.
        """
        largest = 5 * sum(t.nbytes for t in self._model.state_dict().values()) + _STATE_OVERHEAD_BYTES
        message = decode(TrainingState, state, max_bytes=largest)
        try:
            tensors = safetensors.torch.load(message.tensors)
        except (SafetensorError, ValueError, KeyError) as error:
            raise MalformedError("training state holds no tensors") from error
        expected = self._expected_tensors(message.step)
        if message.step > self._plan.steps or {n: (t.shape, t.dtype) for n, t in tensors.items()} != expected:
            raise MalformedError("training state is not of this plan and model")
        if message.clipping.keys() != self.clipping_strategies.keys():
            raise MalformedError("training state is not clipped like this model")
        self._clipping.strategies = message.clipping
        self._load(tensors)
        self._step = message.step

    def _sample(self) -> tuple[Tensor, Tensor]:
        """The step's records of all owners, in the order of owner ids."""
        features, targets = [], []
        for data, sampler in zip(self._owners, self._samplers, strict=True):
            chosen = torch.from_numpy(sampler.indices(self._step, len(data.features)))
            features.append(data.features[chosen])
            targets.append(data.targets[chosen])
        return torch.cat(features), torch.cat(targets)

    def _descend(self, gradient: Tensor) -> None:
        """Hand each parameter its piece of ``gradient`` and let the optimiser move it."""
        pieces = torch.split(gradient.float(), [p.numel() for p in self._trainable.values()])
        for parameter, piece in zip(self._trainable.values(), pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"model/{name}": tensor for name, tensor in self._model.state_dict().items()}
        for name, parameter in self._trainable.items():
            for slot in self._slots if self._step else ():
                found[f"optimizer/{slot}/{name}"] = self._optimizer.state[parameter][slot]
        return found

    def _expected_tensors(self, step: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
        expected = {f"model/{name}": (t.shape, t.dtype) for name, t in self._model.state_dict().items()}
        for name, parameter in self._trainable.items():
            for slot in self._slots if step else ():
                shape = torch.Size() if slot == "step" else parameter.shape
                expected[f"optimizer/{slot}/{name}"] = (shape, torch.float32)
        return expected

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self._model.load_state_dict({name: tensors[f"model/{name}"] for name in self._model.state_dict()})
        slots: dict[int, dict[str, Tensor]] = {}
        if len(tensors) > len(self._model.state_dict()):
            for index, name in enumerate(self._trainable):
                slots[index] = {slot: tensors[f"optimizer/{slot}/{name}"] for slot in self._slots}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": slots, "param_groups": groups})


def _sorted(owners: Sequence[OwnerData]) -> list[OwnerData]:
    """The owners by id, after checking that they fit together."""
    if not len({data.owner for data in owners}) == len(owners) > 0:
        raise ParameterError("expected at least one owner, each with an id of its own")
    kinds = {(d.features.shape[1:], d.targets.dtype) for d in owners}
    if len(kinds) != 1:
        raise DatasetError("expected records of one shape and type from all owners")
    return sorted(owners, key=lambda data: data.owner)


def _known(data: OwnerData, classes: int) -> OwnerData:
    """``data`` with targets that the model has no output for replaced by the one that makes loss and gradient zero."""
    known = (data.targets >= 0) & (data.targets < classes)
    return replace(data, targets=torch.where(known, data.targets, _NO_CLASS))


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms, for as long as it lasts, without its filling of fresh memory."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        settings.fill_uninitialized_memory = filled
