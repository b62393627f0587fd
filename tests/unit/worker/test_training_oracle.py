"""Random nets of every layer that has a rule: all modes agree with float64, one record at a time; nothing exceeds C."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Final, get_args

import torch
import torch.nn.functional as F
from casemate_worker.training.choosing import Mode
from casemate_worker.training.clipping import BookKeeping, clip_factors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

torch.set_num_threads(1)

MODES: Final[tuple[Mode, ...]] = get_args(Mode)
LENGTH, WIDTH, WORDS = 3, 4, 5


class _Block(nn.Module):
    """From ``[n, 3, 4]`` to the same, by a layer on another view of it."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...] = (LENGTH, WIDTH)) -> None:
        super().__init__()
        self.layer, self._shape = layer, shape

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.reshape(len(x), *self._shape))
        return out.reshape(x.shape)


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.layer = kind(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)[0]
        return out


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layer(x, x, x, need_weights=False)[0]
        return out


class _Scaled(nn.Module):
    """Positions, a scale, and a product with a matrix made of two."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.scale = nn.Parameter(torch.randn(1, LENGTH, WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.down, self.up = nn.Parameter(torch.randn(WIDTH, 2)), nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x + self.position) * self.scale + x @ (self.down @ self.up)
        return out


class _Turned(nn.Module):
    """The transposed weight of another block's layer, as in a tied decoder."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight.t())


BLOCKS: Final[dict[str, Callable[[nn.Linear], nn.Module]]] = {
    "linear": lambda _: _Block(nn.Linear(WIDTH, WIDTH)),
    "flat linear": lambda _: _Block(nn.Linear(LENGTH * WIDTH, LENGTH * WIDTH), (LENGTH * WIDTH,)),
    "conv1d": lambda _: _Block(nn.Conv1d(LENGTH, LENGTH, 3, padding=1)),
    "conv2d": lambda _: _Block(nn.Conv2d(2, 2, 3, padding=1, groups=2), (2, LENGTH, 2)),
    "conv3d": lambda _: _Block(nn.Conv3d(1, 1, 3, padding=1, bias=False), (1, LENGTH, 2, 2)),
    "transposed": lambda _: _Block(nn.ConvTranspose2d(1, 1, 3, padding=1), (1, LENGTH, WIDTH)),
    "group norm": lambda _: _Block(nn.GroupNorm(2, 4, eps=0.1), (4, LENGTH)),
    "layer norm": lambda _: nn.LayerNorm(WIDTH, eps=0.1),
    "rms norm": lambda _: nn.RMSNorm((LENGTH, WIDTH), eps=0.1),
    "attention": lambda _: _Attention(),
    "lstm": lambda _: _Recurrent(nn.LSTM),
    "gru": lambda _: _Recurrent(nn.GRU),
    "arithmetic": lambda _: _Scaled(),
    "shared": lambda shared: shared,
    "turned": lambda shared: _Turned(shared),
    "tanh": lambda _: nn.Tanh(),
}


def _net(blocks: list[str], words: bool) -> nn.Sequential:
    """Blocks after an embedding or none; its table is the last layer's weight as well where both are there."""
    shared = nn.Linear(WIDTH, WIDTH)
    first = [nn.Embedding(WORDS, WIDTH)] if words else []
    last = nn.Linear(WIDTH, WORDS)
    if words:
        last.weight = first[0].weight
    return nn.Sequential(*first, *[BLOCKS[name](shared) for name in blocks], nn.Tanh(), last)


NETS = st.builds(_net, st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4), st.booleans())
SCALES = st.sampled_from([1e-30, 1e-8, 1.0, 1e8, 1e30])


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.mean(dim=2) - targets[:, None]).square().sum(dim=1)


def _records(net: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    words = isinstance(next(iter(net.children())), nn.Embedding)
    x = torch.randint(WORDS, (count, LENGTH)) if words else torch.randn(count, LENGTH, WIDTH)
    return x, torch.randn(count)


def _alone(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each record's gradient by itself, in float64 throughout, by plain autograd: ``[n, d]``."""
    double, rows = copy.deepcopy(net).double(), []
    for i in range(len(x)):
        one = x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1]
        loss = _loss(double(one), y[i : i + 1].double()).sum()
        found = torch.autograd.grad(loss, list(double.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows)


def _clipping(net: nn.Module, mode: Mode, clipping_norm: float, x: Tensor, y: Tensor) -> BookKeeping:
    clipping = BookKeeping(net, _loss, clipping_norm=clipping_norm, max_physical_batch=3)
    clipping.choose(mode, lambda count: (x[:1].repeat(count, *[1] * (x.dim() - 1)), y[:1].repeat(count)))
    return clipping


@settings(max_examples=30, deadline=None)
@given(net=NETS, count=st.integers(1, 5), tightness=st.sampled_from([0.1, 1.0, 100.0]), seed=st.integers(0, 2**16))
def test_every_mode_agrees_with_float64_one_record_at_a_time(
    net: nn.Module, count: int, tightness: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x, y = _records(net, count)
    rows = _alone(net, x, y)
    norms = rows.norm(dim=1)
    clipping_norm = tightness * float(norms.median())
    factors = (clipping_norm / norms).clamp(max=1.0)
    for mode in MODES:
        clipping = _clipping(net, mode, clipping_norm, x, y)
        for (found, square, _), row, expected in zip(clipping.gradients(x, y), rows, norms, strict=True):
            assert (found - row).norm() <= 1e-5 * expected, mode
            assert abs(math.sqrt(square) - expected) <= 1e-5 * expected, mode
        error = (clipping.clipped_sum(x, y) - factors @ rows).norm()
        assert error <= 1e-5 * (factors * norms).sum(), mode


@settings(max_examples=20, deadline=None)
@given(net=NETS, scales=st.lists(SCALES, min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_no_record_adds_more_than_c_at_any_scale(net: nn.Module, scales: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    x, y = _records(net, len(scales))
    y = y * torch.tensor(scales)
    x = x * torch.tensor(scales)[:, None, None] if x.is_floating_point() else x
    for mode, clipping_norm in (("per_sample", 1.0), ("ghost", 1.0), ("book_keeping", 1e-3)):
        clipping = _clipping(net, mode, clipping_norm, *_records(net, 1))
        for one in range(len(x)):
            part = clipping.clipped_sum(x[one : one + 1], y[one : one + 1])
            square = sum((Fraction(value) ** 2 for value in part.tolist()), Fraction(0))
            assert square <= Fraction(clipping_norm) ** 2 * (1 + Fraction(1, 2**30))  # float64 sums of products
        if mode == "per_sample":
            _check_exactly(clipping, x, y)


def _check_exactly(clipping: BookKeeping, x: Tensor, y: Tensor) -> None:
    """Factor times vector in exact arithmetic, and the sum that they make."""
    for one in range(len(x)):
        [(row, square, loss)] = clipping.gradients(x[one : one + 1], y[one : one + 1])
        squares = torch.tensor([square], dtype=torch.float64)
        usable, slack = torch.tensor([loss]).isfinite(), torch.zeros_like(squares)
        norm, size = clipping.clipping_norm, len(row)
        factor = clip_factors(squares, slack, usable, elements=size, clipping_norm=norm)
        part = clipping.clipped_sum(x[one : one + 1], y[one : one + 1])
        if float(factor) == 0:
            assert not part.any()
            continue
        exact = sum((Fraction(value) ** 2 for value in row.tolist()), Fraction(0))
        assert Fraction(float(factor)) ** 2 * exact <= Fraction(norm) ** 2
        assert torch.allclose(part, factor * row, rtol=1e-15, atol=0)


@settings(max_examples=20, deadline=None)
@given(
    net=NETS,
    bad=st.sampled_from([math.nan, math.inf, -math.inf, 3e38]),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**16),
)
def test_a_record_that_is_not_finite_leaves_no_trace(net: nn.Module, bad: float, mode: Mode, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = _records(net, 3)
    clipping = _clipping(net, mode, 1.0, x, y)
    without = clipping.clipped_sum(x[:2], y[:2])
    y[2] = bad
    if x.is_floating_point():
        x[2, 1] = bad
    found = clipping.clipped_sum(x, y)
    assert found.isfinite().all()
    assert (found - without).norm() <= 1e-5 * without.norm()
    assert not clipping.clipped_sum(x[2:], y[2:]).any()
