"""Recurrent layers, attention, parameters outside layers: computed as PyTorch computes them, gradients as float64's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from casemate_schemas.errors import BatchDependenceError, ModelError
from casemate_schemas.job import SGD, Training
from casemate_worker.training.choosing import Mode
from casemate_worker.training.clipping import BookKeeping
from casemate_worker.training.engine import OwnerData, Trainer
from casemate_worker.training.probe import probe_model
from casemate_worker.training.uses import Strategy
from casemate_worker.training.watched import Book
from casemate_worker.training.watching import Watch
from torch import Tensor, nn

torch.set_num_threads(1)

MODES: tuple[Mode, ...] = get_args(Mode)
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def _squares_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1) - targets[:, None]).square().sum(1)


def _oracle(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each record's gradient by itself, in float64 throughout: ``[n, d]``."""
    double, rows = copy.deepcopy(model).double(), []
    for i in range(len(x)):
        loss = _squares_loss(double(x[i : i + 1].double()), y[i : i + 1].double()).sum()
        found = torch.autograd.grad(loss, list(double.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class _Net(nn.Module):
    """Modules and free parameters by name, and what to do with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(0.5 * torch.randn(part)))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def _outputs(layer: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """All that a recurrent layer gives, so that gradients come by every way: ``[n, ...]``."""

    def forward(net: Any, x: Tensor) -> Tensor:
        output, last = net.layer(x)
        states = last if isinstance(last, tuple) else (last,)
        return torch.cat([output.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], dim=1)

    return forward


def _cells(net: Any, x: Tensor) -> Tensor:
    h = c = x.new_zeros(len(x), 3)
    for step in x.unbind(1):
        h, c = net.lstm(step, (h, c))
        h = net.gru(step, h)
        h = net.relu(step, net.tanh(step, h))
    return torch.cat([h, c], dim=1)


def _cross(net: Any, x: Tensor) -> Tensor:
    memory = net.other(x)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    one, scores = net.attention(x, memory, memory, attn_mask=mask)
    two, _ = net.attention(
        x, memory, x, need_weights=False, key_padding_mask=torch.arange(5)[None].ge(4).expand(len(x), 5)
    )
    return torch.cat([one.flatten(1), two.flatten(1), scores.flatten(1)], dim=1)


def _vision(net: Any, x: Tensor) -> Tensor:
    """A class token, learned positions and scales, and a mask token where a value is large."""
    x = torch.where(x > 1.5, net.masked, x) + F.tanh(net.inner(net.token.expand(len(x), 5, 4)))
    x = x + net.scale.expand_as(x)
    x = torch.cat([net.token.expand(len(x), -1, -1), x], dim=1) + net.positions[:, : x.shape[1] + 1]
    return x + net.scale * net.inner(x)


def _uncommon(net: Any, x: Tensor) -> Tensor:
    """Low-rank updates, a normalised weight, a product from the left, heads of their own, a number learned."""
    h = x @ (net.down @ net.up) + F.linear(x, F.normalize(net.inner.weight, dim=1), net.inner.bias)
    h = h / (1 + net.temperature.exp()) - x @ net.inner.weight.t() ** 2
    return net.mixing.softmax(1) @ h + torch.matmul(h[:, None], net.heads).mean(1)


def _again(net: Any, x: Tensor) -> Tensor:
    """Layers twice, and their weights elsewhere as well: by arithmetic, as a layer, as a bias, as positions."""
    h, _ = net.attention(*[net.lstm(net.lstm(x)[0])[0]] * 3)
    h = h + net.attention.out_proj.bias + F.linear(h, net.attention.out_proj.weight, net.attention.in_proj_bias[:4])
    return F.linear(h, net.lstm.weight_hh_l0) + net.lstm.bias_ih_l0 * net.lstm.weight_ih_l0[:3].flatten()[:1]


def _networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(3)
    attention = nn.MultiheadAttention
    layer = _outputs(lambda x: x)
    return {
        "lstm": (_Net(layer, layer=nn.LSTM(3, 4, batch_first=True)), (5, 3)),
        "lstm, two layers, both ways": (
            _Net(layer, layer=nn.LSTM(3, 2, num_layers=2, bidirectional=True, batch_first=True)),
            (4, 3),
        ),
        "lstm, projected": (_Net(layer, layer=nn.LSTM(3, 4, 2, proj_size=2, bias=False, batch_first=True)), (4, 3)),
        "gru": (_Net(layer, layer=nn.GRU(3, 4, batch_first=True)), (5, 3)),
        "gru, two layers, both ways": (
            _Net(layer, layer=nn.GRU(3, 2, num_layers=2, bidirectional=True, batch_first=True)),
            (4, 3),
        ),
        "recurrent": (_Net(layer, layer=nn.RNN(3, 4, 2, nonlinearity="relu", batch_first=True)), (4, 3)),
        "time first": (
            _Net(lambda net, x: net.layer(x.transpose(0, 1))[0].transpose(0, 1), layer=nn.GRU(3, 4)),
            (4, 3),
        ),
        "cells": (
            _Net(
                _cells,
                lstm=nn.LSTMCell(2, 3),
                gru=nn.GRUCell(2, 3, bias=False),
                tanh=nn.RNNCell(2, 3),
                relu=nn.RNNCell(2, 3, nonlinearity="relu"),
            ),
            (4, 2),
        ),
        "attention": (
            _Net(lambda net, x: net.attention(x, x, x)[0], attention=attention(4, 2, batch_first=True)),
            (5, 4),
        ),
        "attention, crossed": (
            _Net(
                _cross,
                other=nn.Linear(4, 4),
                attention=attention(4, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True),
            ),
            (5, 4),
        ),
        "attention, other widths": (
            _Net(
                lambda net, x: net.attention(x, x[..., :2], x[..., 1:])[0],
                attention=attention(4, 2, kdim=2, vdim=3, bias=False, batch_first=True),
            ),
            (5, 4),
        ),
        "transformer": (nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation=F.gelu), (5, 4)),
        "vision": (
            _Net(_vision, inner=nn.Linear(4, 4), token=(1, 1, 4), positions=(1, 6, 4), scale=(4,), masked=(4,)),
            (5, 4),
        ),
        "uncommon": (
            _Net(
                _uncommon, inner=nn.Linear(4, 4), down=(4, 2), up=(2, 4), temperature=(), mixing=(5, 5), heads=(3, 4, 4)
            ),
            (5, 4),
        ),
        "used again": (
            _Net(_again, lstm=nn.LSTM(4, 4, batch_first=True), attention=attention(4, 1, batch_first=True)),
            (3, 4),
        ),
        "transposed convolutions": (
            nn.Sequential(
                nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
                nn.PReLU(4),
                nn.InstanceNorm2d(4, affine=True),
                nn.ConvTranspose2d(4, 1, 2, dilation=2, bias=False),
                nn.PReLU(),
            ),
            (2, 3, 4),
        ),
        "transposed, one axis": (nn.Sequential(nn.ConvTranspose1d(3, 2, 3, padding=1)), (3, 5)),
        "bilinear": (
            _Net(
                lambda net, x: net.pair(x, torch.tanh(net.inner(x))), pair=nn.Bilinear(3, 2, 4), inner=nn.Linear(3, 2)
            ),
            (4, 3),
        ),
    }


def _records(shape: tuple[int, ...], count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, *shape, generator=generator), torch.randn(count, generator=generator)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", _networks())
def test_layers_are_computed_as_pytorch_does_and_clipped_as_float64_says(name: str) -> None:
    model, shape = _networks()[name]
    model.train()
    x, y = _records(shape)
    rows = _oracle(model, x, y)
    middle = float(rows.norm(dim=1).median())
    expected = (rows * (middle / rows.norm(dim=1)).clamp(max=1.0)[:, None]).sum(dim=0)
    clipping = BookKeeping(model, _squares_loss, clipping_norm=middle, max_physical_batch=4)
    plain = model(x).detach()
    with Watch(model, list(model.parameters())).into(Book(len(x), lambda _index, _use: "ghost")):
        assert torch.allclose(model(x), plain, rtol=1e-5, atol=1e-6)
    for mode in MODES:
        clipping.choose(mode, lambda count: (x[:1].repeat(count, *[1] * len(shape)), y[:1].repeat(count)))
        assert _error(clipping.clipped_sum(x, y), expected) < 1e-5, mode
    for strategy in STRATEGIES:
        clipping.strategies = dict.fromkeys(clipping.strategies, strategy)
        assert _error(clipping.clipped_sum(x, y), expected) < 1e-5, strategy
    probe_model(model, clipping, x, y)


class _Half(nn.Module):
    """Forward and backward in bfloat16 wherever PyTorch's autocast finds that good."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = self.model(x)
        return out.float()


@pytest.mark.parametrize("name", ["lstm", "attention", "transformer", "vision", "transposed convolutions"])
def test_what_a_record_adds_is_bounded_in_half_precision_as_well(name: str) -> None:
    model, shape = _networks()[name]
    x, y = _records(shape)
    rows = _oracle(model, x, y)
    clipping_norm = 0.5 * float(rows.norm(dim=1).median())
    for strategy in STRATEGIES:
        clipping = BookKeeping(_Half(model), _squares_loss, clipping_norm=clipping_norm, max_physical_batch=8)
        clipping.choose("book_keeping", lambda count: (x[:count], y[:count]))
        clipping.strategies = dict.fromkeys(clipping.strategies, strategy)
        found = torch.stack([row for row, *_ in clipping.gradients(x, y)])
        assert 1e-5 < _error(found, rows) < 0.05
        for one in range(len(x)):
            part = clipping.clipped_sum(x[one : one + 1], y[one : one + 1])
            square = sum((Fraction(value) ** 2 for value in part.tolist()), Fraction(0))
            assert square <= Fraction(clipping_norm) ** 2 * (1 + Fraction(1, 2**40))


def _packed(net: Any, x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, [2] * len(x), batch_first=True)
    return net.layer(packed)[1][0][0]


def _in_place(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.p.mul_(0.5)
    return x + net.p


@pytest.mark.parametrize(
    "model",
    [
        _Net(_packed, layer=nn.LSTM(3, 2, batch_first=True)),
        _Net(lambda net, x: net.layer(x)[0], layer=nn.LSTM(3, 2, num_layers=2, dropout=0.5, batch_first=True)),
        _Net(lambda net, x: net.layer(x)[0], layer=nn.GRU(3, 2)),
        _Net(lambda net, x: net.layer(x, net.p.expand(1, len(x), 2))[0], layer=nn.GRU(3, 2, batch_first=True), p=(2,)),
        _Net(lambda net, x: net.layer(x, x, x)[0], layer=nn.MultiheadAttention(3, 1, dropout=0.5, batch_first=True)),
        _Net(lambda net, x: net.layer(x, x, x)[0], layer=nn.MultiheadAttention(3, 1)),
        _Net(lambda net, x: x * net.p, p=(7, 2, 3)),
        _Net(
            lambda net, x: net.layer(net.p.expand(len(x), 2, 3), x, x)[0],
            layer=nn.MultiheadAttention(3, 1, batch_first=True),
            p=(3,),
        ),
        _Net(lambda net, x: net.layer(net.p), layer=nn.Linear(3, 2), p=(1, 2, 3)),
        _Net(lambda net, x: torch.cat([x, net.p], dim=1), p=(1, 2, 3)),
        _Net(lambda net, x: x @ net.p, p=(3,)),
        _Net(lambda net, x: x + net.p.expand(14, 2, 3)[::2], p=(3,)),
        _Net(lambda net, x: x.transpose(0, 1) * net.p, p=(3,)),
        _Net(lambda net, x: net.p * net.p.detach() + x, p=(3,)),
        _Net(lambda net, x: x * net.p.data, p=(3,)),
        _Net(lambda net, x: x + net.p[x[0, :, 0].long().abs() % 3], p=(3, 3)),
        _Net(lambda net, x: torch.cat([x, net.p]), p=(7, 2, 3)),
        _Net(lambda net, x: net.p @ x.flatten(1), p=(1, 7)),
        _Net(lambda net, x: x + torch.tanh(net.p.expand(len(x), 2, 3)), p=(3,)),
        _Net(_in_place, p=(3,)),
    ],
)
def test_uses_that_would_mix_records_or_go_unseen_are_refused(model: nn.Module) -> None:
    x, y = _records((2, 3))
    with pytest.raises(ModelError):
        BookKeeping(model, _squares_loss, clipping_norm=1.0, max_physical_batch=8).clipped_sum(x, y)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: x + net.p * x.mean(),
        lambda net, x: x + net.p + net.p * torch.ones(4, 1, 1) + net.p * x.sum(0, keepdim=True).expand_as(x),
        lambda net, x: torch.ones(4, 2, 3) * net.p + x.detach().sum(0),
    ],
)
def test_what_looks_like_a_batch_and_is_none_is_found_on_synthetic_records(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    model = _Net(forward, p=(3,))
    x, y = _records((2, 3), count=4)
    with pytest.raises(ModelError) as caught:
        probe_model(model, BookKeeping(model, _squares_loss, clipping_norm=1.0, max_physical_batch=8), x, y)
    assert isinstance(caught.value, ModelError | BatchDependenceError)


def test_recurrent_layers_have_their_own_weights_again_afterwards() -> None:
    model = nn.Sequential(nn.LSTM(3, 2, batch_first=True))
    clipping = BookKeeping(model, lambda o, y: _squares_loss(o[0], y), clipping_norm=1.0, max_physical_batch=8)
    clipping.clipped_sum(*_records((2, 3)))
    assert all(type(weight) is nn.Parameter for weight in model[0]._flat_weights)
    assert copy.deepcopy(model)(_records((2, 3))[0])[0].shape == (7, 2, 2)


def test_the_engine_trains_and_resumes_a_net_of_them_bit_for_bit() -> None:
    def net() -> nn.Module:
        torch.manual_seed(5)
        return _Net(
            lambda net, x: net.out(net.gru(net.attention(*[x + net.position] * 3)[0])[0][:, -1]),
            position=(1, 3, 4),
            attention=nn.MultiheadAttention(4, 2, batch_first=True),
            gru=nn.GRU(4, 3, batch_first=True),
            out=nn.Linear(3, 2),
        )

    def trainer() -> Trainer:
        x, _ = _records((3, 4), count=30)
        owner = OwnerData("north", x, (x[:, 0, 0] > 0).long(), Fraction(1, 3))
        plan = Training(
            loss="cross_entropy",
            optimizer=SGD(lr=0.1),
            steps=4,
            clipping_norm=1.0,
            noise_multiplier=0.5,
            max_physical_batch=8,
        )
        return Trainer(net(), [owner], plan, expected_batch=Fraction(10), seed=bytes(32))

    first, second = trainer(), trainer()
    first.run(until=2)
    second.restore(first.state())
    first.run()
    second.run()
    before = net().state_dict()
    for name, weight in first.weights().items():
        assert torch.equal(weight, second.weights()[name])
        assert not torch.equal(weight, before[name])
