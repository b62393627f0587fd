"""How noised gradients move the weights: PyTorch's own optimisers, and which of their tensors a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from casemate_schemas.job import SGD, Adam
from torch import nn


def build_optimizer(plan: SGD | Adam, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that ``plan`` names, over ``parameters``.

    SGD: ``m ← momentum·m + g``, ``w ← w - lr·m``, from ``m = 0``. Adam: Kingma and Ba 2015, algorithm 1.
    """
    if isinstance(plan, SGD):
        return torch.optim.SGD(parameters, lr=plan.lr, momentum=plan.momentum)
    return torch.optim.Adam(parameters, lr=plan.lr, betas=(plan.beta1, plan.beta2), eps=plan.eps)


def optimizer_slots(plan: SGD | Adam) -> tuple[str, ...]:
    """Names of the tensors that the optimiser keeps for each parameter once it has made a step."""
    if isinstance(plan, SGD):
        return ("momentum_buffer",) if plan.momentum else ()
    return ("step", "exp_avg", "exp_avg_sq")
