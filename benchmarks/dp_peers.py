"""Other ways to take a step of DP-SGD, as a user would take them; noise by PyTorch's ordinary generator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from dp_cases import CLIPPING_NORM, LEARNING_RATE, NOISE_MULTIPLIER, Case
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Step = Callable[[], None]


def opacus_per_sample(case: Case, *, mode: str) -> Step:
    """Opacus' per-sample gradients: ``hooks`` by its own rules, or ``functorch`` for every layer."""
    model, (x, y) = case.model(), case.records()
    sampled = GradSampleModule(model, loss_reduction="mean", force_functorch=mode == "functorch")
    optimizer = _opacus_optimizer(DPOptimizer, sampled, case)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(sampled(x), y).backward()
        optimizer.step()

    return step


def opacus_ghost(case: Case) -> Step:
    """Opacus' ghost clipping: norms without gradients, then a second backward pass."""
    model, (x, y) = case.model(), case.records()
    sampled = GradSampleModuleFastGradientClipping(
        model, loss_reduction="mean", max_grad_norm=CLIPPING_NORM, use_ghost_clipping=True
    )
    optimizer = _opacus_optimizer(DPOptimizerFastGradientClipping, sampled, case)
    criterion = DPLossFastGradientClipping(sampled, optimizer, nn.CrossEntropyLoss(), "mean")

    def step() -> None:
        optimizer.zero_grad()
        criterion(sampled(x), y).backward()
        optimizer.step()

    return step


def _opacus_optimizer(kind: type, sampled: nn.Module, case: Case) -> DPOptimizer:
    return kind(
        torch.optim.SGD(sampled.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIPPING_NORM,
        expected_batch_size=case.batch,
        loss_reduction="mean",
    )


def vmap_of_grad(case: Case) -> Step:
    """``torch.func``: the gradient function of one record, vectorised."""
    model, (x, y) = case.model(), case.records()
    parameters = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], feature: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (feature[None],)), target[None])

    gradients = vmap(grad(loss), (None, 0, 0), randomness="different")

    def step() -> None:
        found = gradients({name: p.detach() for name, p in parameters.items()}, x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
        factors = (CLIPPING_NORM / (norms + 1e-6)).clamp(max=1.0)
        _descend(case, [(p, torch.tensordot(factors, found[name], 1)) for name, p in parameters.items()])

    return step


def fastdp_style(case: Case) -> Step:
    """Book-keeping with the mixed ghost norm (Bu et al. 2023) in float32, by module hooks: ghost where 2t² < p·d."""
    model, (x, y) = case.model(), case.records()
    layers = [layer for layer in model.modules() if next(layer.parameters(recurse=False), None) is not None]
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    for layer in layers:
        layer.requires_grad_(False)
        layer.register_forward_hook(partial(_remember, inputs, outputs))

    def step() -> None:
        losses = F.cross_entropy(model(x), y, reduction="none")
        gradients = torch.autograd.grad(losses.sum(), [outputs[layer] for layer in layers])
        squares = torch.zeros(len(x))
        sums: list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]] = []
        for layer, gradient in zip(layers, gradients, strict=True):
            for parameter, square, weighted in _book(layer, inputs[layer], gradient):
                squares += square
                sums.append((parameter, weighted))
        factors = CLIPPING_NORM / (squares.sqrt() + 0.01)
        _descend(case, [(parameter, weighted(factors)) for parameter, weighted in sums])

    return step


def _remember(
    inputs: dict[nn.Module, Tensor],
    outputs: dict[nn.Module, Tensor],
    layer: nn.Module,
    args: tuple[Tensor],
    out: Tensor,
) -> Tensor:
    inputs[layer] = args[0].detach()
    outputs[layer] = out if out.requires_grad else out.requires_grad_()
    return outputs[layer]


Entry = tuple[nn.Parameter, Tensor, Callable[[Tensor], Tensor]]


def _book(layer: nn.Module, x: Tensor, g: Tensor) -> list[Entry]:
    """Each parameter of ``layer`` with its squared norms and its weighted sum."""
    if isinstance(layer, nn.Conv2d):
        a = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
        g = g.flatten(2).transpose(1, 2)
        found = [_matrix(layer.weight, a, g)]
    elif isinstance(layer, nn.Linear):
        a, g = x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
        found = [_matrix(layer.weight, a, g)]
    elif isinstance(layer, nn.Embedding):
        return [_lookup(layer.weight, x, g)]
    elif isinstance(layer, nn.GroupNorm):
        scaled = F.group_norm(x, layer.num_groups, eps=layer.eps)
        return [_rows(layer.weight, (g * scaled).flatten(2).sum(2)), _rows(layer.bias, g.flatten(2).sum(2))]
    elif isinstance(layer, nn.LayerNorm):
        scaled = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        return [_rows(layer.weight, (g * scaled).sum(1)), _rows(layer.bias, g.sum(1))]
    else:
        raise TypeError(type(layer))
    return found + ([_rows(layer.bias, g.sum(1))] if layer.bias is not None else [])


def _matrix(weight: nn.Parameter, a: Tensor, g: Tensor) -> Entry:
    def weighted(factors: Tensor) -> Tensor:
        return (g * factors[:, None, None]).flatten(0, 1).t() @ a.flatten(0, 1)

    if 2 * a.shape[1] ** 2 < weight.numel():
        return weight, ((a @ a.transpose(1, 2)) * (g @ g.transpose(1, 2))).sum((1, 2)), weighted
    return weight, (g.transpose(1, 2) @ a).flatten(1).square().sum(1), weighted


def _lookup(table: nn.Parameter, rows: Tensor, g: Tensor) -> Entry:
    same = rows[:, :, None] == rows[:, None, :]

    def weighted(factors: Tensor) -> Tensor:
        values = (g * factors[:, None, None]).flatten(0, 1)
        return torch.zeros_like(table).index_add_(0, rows.flatten(), values)

    return table, (same * (g @ g.transpose(1, 2))).sum((1, 2)), weighted


def _rows(parameter: nn.Parameter, rows: Tensor) -> Entry:
    return parameter, rows.square().sum(1), lambda factors: factors @ rows


def _descend(case: Case, sums: list[tuple[nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for parameter, total in sums:
            noisy = total.view_as(parameter) + NOISE_MULTIPLIER * CLIPPING_NORM * torch.randn_like(parameter)
            parameter -= LEARNING_RATE / case.batch * noisy
