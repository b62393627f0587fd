"""How noised gradients move the weights: PyTorch's own optimisers, one of ours, and which of their tensors a state holds.

All of it is post-processing: nothing here sees a record, and nothing here can spend privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from casemate_schemas.job import SGD, Training
from torch import Tensor, nn

from .schedules import lr_factor, mean_noise_variance

_ADAM_SLOTS: Final = ("step", "exp_avg", "exp_avg_sq")


def build_optimizer(plan: Training, parameters: Iterable[nn.Parameter], expected_batch: float) -> torch.optim.Optimizer:
    """The optimiser that ``plan`` names, over ``parameters``, for gradients that were divided by ``expected_batch``.

    SGD: ``m ← momentum·m + g``, ``w ← w - lr·m``, from ``m = 0``. Adam: Kingma and Ba 2015, algorithm 1, or
    :class:`CorrectedAdam`. Weights decay in :func:`move_weights`.
    """
    wanted = plan.optimizer
    if isinstance(wanted, SGD):
        return MomentumSGD(parameters, lr=wanted.lr, momentum=wanted.momentum)
    betas = (wanted.beta1, wanted.beta2)
    if wanted.bias_correction == "standard":
        return torch.optim.Adam(parameters, lr=wanted.lr, betas=betas, eps=wanted.eps)
    unit, phases = (plan.clipping_norm / expected_batch) ** 2, plan.noise_phases
    return CorrectedAdam(
        parameters,
        lr=wanted.lr,
        betas=betas,
        variance_floor=wanted.variance_floor,
        noise_variance=lambda count: unit * mean_noise_variance(phases, wanted.beta2, count),
    )


def move_weights(optimizer: torch.optim.Optimizer, plan: Training, step: int) -> None:
    """Step ``step`` (from 0) along the gradients that the parameters hold, at that step's learning rate.

    Before that ``w ← w - lr·weight_decay·w``: decoupled decay (Loshchilov and Hutter 2019, algorithms 1 and 2).
    """
    lr, decay = plan.optimizer.lr * lr_factor(plan.lr_schedule, step, plan.steps), plan.optimizer.weight_decay
    for group in optimizer.param_groups:
        group["lr"] = lr
        if decay:
            with torch.no_grad():
                torch._foreach_mul_(group["params"], 1 - lr * decay)
    if isinstance(optimizer, MomentumSGD):
        optimizer.move()
    else:
        optimizer.step()


def optimizer_slots(plan: Training) -> tuple[str, ...]:
    """Names of the tensors that the optimiser keeps for each parameter once it has made a step."""
    if isinstance(plan.optimizer, SGD):
        return ("momentum_buffer",) if plan.optimizer.momentum else ()
    return _ADAM_SLOTS


class MomentumSGD(torch.optim.Optimizer):
    """``torch.optim.SGD``, bit for bit, without what surrounds each of its steps: for small models that is most of one."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float) -> None:
        """See :func:`build_optimizer`."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def move(self) -> None:
        """Along the gradients that the parameters hold."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, momentum = parameter.grad, group["momentum"]
                if momentum:
                    state = self.state[parameter]
                    kept = state.get("momentum_buffer")
                    gradient = gradient.clone() if kept is None else kept.mul_(momentum).add_(gradient)
                    state["momentum_buffer"] = gradient
                parameter.add_(gradient, alpha=-group["lr"])


class CorrectedAdam(torch.optim.Optimizer):
    """Adam without the noise's part in the second moment, which else makes it SGD with a small step.

    ``w ← w - lr·m̂ / sqrt(max(v̂ - Φ, variance_floor))``, where Φ is the noise's share of ``v̂``: for constant noise
    ``(σC/B)²``, the variance of a coordinate's noise; for a schedule, that average of variances which ``v̂`` is of squares.

    Source: Tang, Shpilevskiy, Lécuyer, "DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias Correction)"
    (2024), algorithm 1.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        variance_floor: float,
        noise_variance: Callable[[int], float],
    ) -> None:
        """``noise_variance`` tells Φ after a number of steps."""
        super().__init__(parameters, {"lr": lr, "betas": betas, "variance_floor": variance_floor})
        self._noise_variance = noise_variance

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Along the gradients that the parameters hold; ``closure`` is PyTorch's, and not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0)} | {slot: torch.zeros_like(parameter) for slot in _ADAM_SLOTS[1:]}
        beta1, beta2 = group["betas"]
        state["step"] += 1
        count = int(state["step"])
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1**count)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2) / (1 - beta2**count)
        scale = (square - self._noise_variance(count)).clamp_(min=group["variance_floor"]).sqrt_()
        parameter.addcdiv_(mean, scale, value=-group["lr"])
