"""One record moves the sum by at most C, whatever it holds; and every way to compute the sum computes the same one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from casemate_models.building import build
from casemate_models.tracing import trace
from casemate_schemas.errors import BatchDependenceError, ModelError, UnsupportedOperationError
from casemate_worker.training import clipping as clipping_module
from casemate_worker.training import uses as uses_module
from casemate_worker.training.choosing import Mode
from casemate_worker.training.clipping import BookKeeping, clip_factors
from casemate_worker.training.probe import probe_model
from casemate_worker.training.terms import Instantiated, Outer, RankOne, Term
from casemate_worker.training.uses import ConvUse, LinearUse, Strategy, Use
from casemate_worker.training.watched import Book
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

torch.set_num_threads(1)

MODES: tuple[Mode, ...] = get_args(Mode)
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
HOSTILE = st.one_of(
    FLOATS,
    st.builds(lambda m, e: m * 10.0**e, st.floats(-1, 1), st.integers(-30, 30)),
    st.sampled_from([0.0, 1e-45, -1e-38, 3.4e38]),
)


def _squares_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1) - targets[:, None]).square().sum(1)


def _clipping(model: nn.Module, clipping_norm: float = 1.0, max_physical_batch: int = 8) -> BookKeeping:
    return BookKeeping(model, _squares_loss, clipping_norm=clipping_norm, max_physical_batch=max_physical_batch)


def _of_mode(clipping: BookKeeping, mode: Mode, x: Tensor, y: Tensor) -> BookKeeping:
    clipping.choose(mode, lambda count: (x[:1].repeat(count, *[1] * (x.dim() - 1)), y[:1].repeat(count)))
    return clipping


def _oracle(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each record's gradient by itself, in float64 throughout: ``[n, d]``."""
    double = copy.deepcopy(model).double()
    parameters, rows = [p for p in double.parameters() if p.requires_grad], []
    for i in range(len(x)):
        feature = x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1]
        loss = _squares_loss(double(feature), y[i : i + 1].double()).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows)


def _clipped(rows: Tensor, clipping_norm: float) -> Tensor:
    return (rows * (clipping_norm / rows.norm(dim=1)).clamp(max=1.0)[:, None]).sum(dim=0)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _exact(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.flatten().tolist()]


def _factor(term: Term, clipping_norm: float) -> Tensor:
    squares, slack = term.squared_norms()
    usable = torch.ones(len(squares), dtype=torch.bool)
    slack = torch.zeros_like(squares) if slack is None else slack
    return clip_factors(squares, slack, usable, elements=term.elements, clipping_norm=clipping_norm)


# The certificate, in exact arithmetic


@given(
    rows=st.integers(1, 40).flatmap(
        lambda d: st.lists(st.lists(HOSTILE, min_size=d, max_size=d), min_size=1, max_size=4)
    ),
    clipping_norm=st.one_of(st.sampled_from([1e-6, 0.1, 1.0, 3.0, 1e6]), st.floats(1e-6, 1e6)),
)
def test_clipped_norms_never_exceed_c(rows: list[list[float]], clipping_norm: float) -> None:
    gradients = torch.tensor(rows, dtype=torch.float32)
    factors = _factor(Instantiated(gradients), clipping_norm)
    for row, factor in zip(gradients, factors, strict=True):
        if not row.isfinite().all():
            assert factor == 0
            continue
        square = sum(value**2 for value in _exact(row))
        assert Fraction(float(factor)) ** 2 * square <= Fraction(clipping_norm) ** 2
        norm = math.sqrt(float(square))
        assert float(factor) == pytest.approx(min(1.0, clipping_norm / norm) if norm else 1.0, rel=1e-12)


@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    scale=st.sampled_from([1.0, 1e-3, 1e4, 1e15]),
    cancelling=st.booleans(),
    seed=st.integers(0, 2**16),
    clipping_norm=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_norms_of_products_that_are_never_formed_are_certified_also_where_they_cancel(
    sizes: tuple[int, int, int], scale: float, cancelling: bool, seed: int, clipping_norm: float
) -> None:
    t, p, d = sizes
    generator = torch.Generator().manual_seed(seed)
    a, g = (scale * torch.randn(3, t, width, generator=generator) for width in (p, d))
    if cancelling:  # the second half undoes the first, all but a little
        a = torch.cat([a, a + 1e-7 * scale * torch.randn(a.shape, generator=generator)], dim=1)
        g = torch.cat([g, -g], dim=1)
    use = LinearUse(a, g)
    for term in [Outer([use])] + ([RankOne(use)] if a.shape[1] == 1 else []):
        factors = _factor(term, clipping_norm)
        for i, factor in enumerate(factors.tolist()):
            square = Fraction(0)
            for row, column in product(range(d), range(p)):
                pairs = zip(_exact(g[i, :, row]), _exact(a[i, :, column]), strict=True)
                square += sum((x * y for x, y in pairs), Fraction(0)) ** 2
            assert Fraction(factor) ** 2 * square <= Fraction(clipping_norm) ** 2
            if not cancelling:
                assert factor == pytest.approx(min(1.0, clipping_norm / math.sqrt(square)), rel=1e-6)


def test_clipping_at_the_edge_is_exact_where_naive_rounding_is_not() -> None:
    # Rows just longer than C: dividing by the computed norm alone lands above C for about half of them.
    gradients = torch.randn(2000, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    squares = [sum(value**2 for value in _exact(row)) for row in gradients]
    naive = 1.0 / gradients.double().norm(dim=1)
    assert any(Fraction(f) ** 2 * square > 1 for f, square in zip(naive.tolist(), squares, strict=True))
    factors = _factor(Instantiated(gradients), 1.0).tolist()
    assert all(Fraction(f) ** 2 * square <= 1 for f, square in zip(factors, squares, strict=True))


# Every layer, every way, against float64


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.out = nn.Linear(4, 12), nn.LayerNorm(4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(self.norm(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return out


class _Tied(nn.Module):
    """One table to look words up in and to score them with, one layer twice, one scale in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.norm = nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.inner(torch.tanh(self.inner(self.words(x)))))
        return F.linear(self.norm(h), self.words.weight)


def _networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(3)
    return {
        "linear": (nn.Linear(5, 2), (5,)),
        "mlp": (nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 1, bias=False)), (5,)),
        "linear on positions": (nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2)), (6, 3)),
        "conv1d": (nn.Sequential(nn.Conv1d(2, 4, 3, 2, 1), nn.Tanh(), nn.Conv1d(4, 6, 2, groups=2)), (2, 9)),
        "conv2d": (
            nn.Sequential(
                nn.Conv2d(2, 4, (3, 2), padding=(1, 0), stride=(2, 1)),
                nn.GroupNorm(2, 4),
                nn.Tanh(),
                nn.Conv2d(4, 4, 2, groups=2, bias=False, dilation=2),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(4, 2),
            ),
            (2, 8, 8),
        ),
        "conv2d by rows": (
            nn.Sequential(nn.Conv2d(2, 3, (3, 2), (1, 2), (1, 2), (2, 1)), nn.Tanh(), nn.Conv2d(3, 16, (2, 1))),
            (2, 7, 6),
        ),
        "conv2d same": (nn.Sequential(nn.Conv2d(2, 2, 3, padding="same", dilation=2), nn.Flatten()), (2, 4, 5)),
        "conv2d circular": (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")), (1, 4, 4)),
        "conv3d": (nn.Sequential(nn.Conv3d(2, 2, 2, padding=1), nn.GroupNorm(1, 2), nn.Conv3d(2, 1, 2)), (2, 3, 4, 3)),
        "group norm": (nn.Sequential(nn.GroupNorm(2, 4), nn.Flatten(), nn.GroupNorm(1, 12)), (4, 3)),
        "attention": (_Attention(), (5, 4)),
        "reused": (nn.Sequential(*[nn.Linear(5, 5), nn.Tanh()] * 3), (5,)),
        "reused convolution": (nn.Sequential(*[nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()] * 2), (2, 4, 4)),
        "embedding": (nn.Sequential(nn.Embedding(7, 3, padding_idx=2), nn.Linear(3, 2)), (6,)),
        "tied": (_Tied(), (6,)),
    }


def _records(shape: tuple[int, ...], name: str = "", count: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(count, *shape, generator=generator)
    if name in ("embedding", "tied"):
        features = torch.randint(0, 7, features.shape, generator=generator)
    return features, torch.randn(count, generator=generator)


@pytest.mark.parametrize("name", _networks())
def test_every_layer_agrees_with_a_float64_loop_over_single_records(name: str) -> None:
    model, shape = _networks()[name]
    x, y = _records(shape, name)
    rows = _oracle(model, x, y)
    middle = float(rows.norm(dim=1).median())
    for clipping_norm in (middle, 1e6):
        expected = _clipped(rows, clipping_norm)
        for mode in MODES:
            clipping = _of_mode(_clipping(model, clipping_norm), mode, x, y)
            assert _error(clipping.clipped_sum(x, y), expected) < 1e-5, mode
        for strategy in STRATEGIES:
            clipping.strategies = dict.fromkeys(clipping.strategies, strategy)
            assert _error(clipping.clipped_sum(x, y), expected) < 1e-5, strategy
    for strategy in STRATEGIES:  # in float32; nothing is clipped
        blocks = BookKeeping(model, _squares_loss, clipping_norm=1e6, max_physical_batch=8, expected_batch=len(x))
        blocks.strategies = dict.fromkeys(clipping.strategies, strategy)
        assert _error(blocks.clipped_sum(x, y), expected) < 1e-5, strategy


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_norms_of_a_layer_used_twice_are_those_of_the_sum_of_its_uses(strategy: Strategy) -> None:
    # The second use takes back what the first gives: a norm without cross terms would be far from zero.
    class Undone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x) - 0.5 * self.inner(x * 1.5)
            return out

    model = Undone()
    x, y = _records((3,))
    rows = _oracle(model, x, y)
    clipping = _clipping(model, clipping_norm=1.01 * float(rows.norm(dim=1).max()))
    clipping.strategies = {"inner.weight": strategy}
    assert _error(clipping.clipped_sum(x, y), rows.sum(dim=0)) < 1e-5


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda width: nn.Linear(4, 4, bias=bool(width % 2)),
    "layer norm": lambda _width: nn.LayerNorm(4),
    "convolution": lambda width: nn.Conv2d(width, width, 3, padding=1, groups=width if width % 2 else 1),
    "group norm": lambda width: nn.GroupNorm(1, width),
    "tanh": lambda _width: nn.Tanh(),
    "silu": lambda _width: nn.SiLU(),
}


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 3),
    layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4),
    count=st.integers(1, 6),
    clipping_norm=st.sampled_from([0.01, 1.0, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_random_nets_rebuilt_from_their_spec_agree_in_every_mode(
    width: int, layers: list[str], count: int, clipping_norm: float, seed: int
) -> None:
    torch.manual_seed(seed)
    original = nn.Sequential(*[LAYERS[name](width) for name in layers], nn.Flatten(), nn.Linear(16 * width, 1))
    model = build(*trace(original, (width, 4, 4)))
    x, y = torch.randn(count, width, 4, 4), torch.randn(count) + 5  # a loss near zero would cancel in float32
    rows = _oracle(model, x, y)
    expected = _clipped(rows, clipping_norm)
    for mode in MODES:
        clipping = _of_mode(_clipping(model, clipping_norm, max_physical_batch=4), mode, x, y)
        assert _error(clipping.clipped_sum(x, y), expected) < 1e-5
        for i in range(count):  # each contribution by itself; a float64 sum of one rounds by less than 2^-40
            assert float(clipping.clipped_sum(x[i : i + 1], y[i : i + 1]).norm()) <= clipping_norm * (1 + 2.0**-40)


# Hostile records, batches of any size


@pytest.mark.parametrize("mode", ["ghost", "per_sample", "book_keeping"])
@pytest.mark.parametrize("name", ["mlp", "linear on positions", "conv2d", "reused", "attention"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_a_hostile_record_contributes_nothing_and_touches_no_other(name: str, bad: float, mode: Mode) -> None:
    model, shape = _networks()[name]
    x, y = _records(shape)
    clipping = _of_mode(_clipping(model), mode, x, y)
    without = clipping.clipped_sum(torch.cat([x[:5], x[6:]]), torch.cat([y[:5], y[6:]]))
    x[5], y[5] = bad, bad
    found = clipping.clipped_sum(x, y)
    assert found.isfinite().all()
    assert _error(found, without) < 1e-5
    assert clipping.clipped_sum(x[5:6], y[5:6]).tolist() == [0.0] * len(found)


@pytest.mark.parametrize("mode", ["ghost", "per_sample"])
def test_a_finite_loss_with_an_infinite_gradient_contributes_nothing(mode: Mode) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x).abs().sqrt()
            return out

    clipping = _of_mode(_clipping(Root()), mode, torch.ones(1, 2), torch.ones(1))
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [2.0, 1.0]])
    assert _error(clipping.clipped_sum(x, torch.ones(3)), clipping.clipped_sum(x[::2], torch.ones(2))) < 1e-6


def test_an_embedding_row_of_a_record_with_an_infinite_gradient_is_left_out() -> None:
    model, shape = _networks()["embedding"]
    x, y = _records(shape, "embedding")
    clipping = _clipping(model)
    without = clipping.clipped_sum(x[1:], y[1:])
    y[0] = math.inf
    assert _error(clipping.clipped_sum(x, y), without) < 1e-6


def test_an_empty_batch_sums_to_zero() -> None:
    found = _clipping(nn.Linear(5, 2)).clipped_sum(torch.zeros(0, 5), torch.zeros(0))
    assert found.dtype == torch.float64
    assert found.tolist() == [0.0] * 12


@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied"])
@pytest.mark.parametrize("mode", ["ghost", "per_sample"])
def test_physical_batches_change_rounding_only(name: str, mode: Mode) -> None:
    model, shape = _networks()[name]
    x, y = _records(shape, name)
    sums = [_of_mode(_clipping(model, 0.5, size), mode, x, y).clipped_sum(x, y) for size in (1, 3, 64)]
    assert all(_error(found, sums[0]) < 1e-6 for found in sums[1:])


def test_formed_gradients_bound_the_physical_batch() -> None:
    model = nn.Linear(2048, 512, bias=False)  # 4 MiB a record
    clipping, seen = _clipping(model, max_physical_batch=1024), []
    clipping.strategies = {"weight": "per_sample"}
    with model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0]))):
        clipping.clipped_sum(torch.zeros(40, 2048), torch.zeros(40))
    assert seen == [32, 32]  # no fewer rows go together (rows.py)


# What the model sees of it


def test_parameters_that_are_frozen_or_not_used() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(3, 2), nn.Linear(2, 1), nn.Linear(2, 1)
            self.frozen.requires_grad_(False)
            self.used.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.frozen(torch.tanh(self.used(x)))
            return out

    x, y = _records((3,))
    model = Partial()
    clipping = _clipping(model, 1e6)
    found = clipping.clipped_sum(x, y)
    assert _error(found[:6], _oracle(model, x, y)[:, :6].sum(0)) < 1e-5
    assert found[6:].tolist() == [0.0] * 3
    assert _of_mode(clipping, "auto", x, y).strategies.keys() == {"used.weight"}


def test_the_model_is_as_before_afterwards_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = list(model.parameters())
    clipping, (x, y) = _clipping(model), _records((3,))
    clipping.clipped_sum(x, y)
    with pytest.raises(RuntimeError):
        clipping.clipped_sum(x[:, :2], y)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_weights_are_read_anew_each_time() -> None:
    model = nn.Linear(3, 1)
    clipping, (x, y) = _clipping(model, 1e6), _records((3,))
    clipping.clipped_sum(x, y)
    model.weight.data = torch.zeros(1, 3)  # other memory
    model.bias.data.fill_(2.0)  # the same memory
    assert _error(clipping.clipped_sum(x, y), _oracle(model, x, y).sum(0)) < 1e-6
    model.weight = nn.Parameter(torch.zeros(1, 3))
    with pytest.raises(ModelError, match="replaced"):
        clipping.clipped_sum(x, y)


def test_the_same_strategies_give_the_same_bits_and_auto_asks_once() -> None:
    model, shape = _networks()["conv2d"]
    x, y = _records(shape)
    first = _of_mode(_clipping(model), "auto", x, y)
    again = _of_mode(_clipping(model), "auto", x, y)
    other = _clipping(model)
    other.strategies = first.strategies
    assert first.strategies == again.strategies == other.strategies
    assert torch.equal(first.clipped_sum(x, y), other.clipped_sum(x, y))
    with pytest.raises(ModelError):
        other.strategies = {"nobody.weight": "ghost"}


class _Uses(nn.Module):
    """A layer whose parameters are used in some way that has no rule."""

    def __init__(self, forward: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.linear, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda linear, x: torch.einsum("nk,dk->nd", x, linear.weight),
        lambda linear, x: linear(x) + linear.weight.data.sum(),
        lambda linear, x: F.linear(x, linear.weight.detach()),
        lambda linear, x: linear(x.repeat(2, 1))[: len(x)],
        lambda linear, x: linear(x[0]).expand(len(x), 3),
        lambda linear, x: torch.vmap(linear)(x),
        lambda linear, x: linear(x) + linear(x.relu_()),
    ],
)
def test_uses_that_have_no_rule_are_refused(forward: Callable[[nn.Linear, Tensor], Tensor]) -> None:
    x, y = _records((3,))
    with pytest.raises(ModelError):
        _clipping(_Uses(forward)).clipped_sum(x, y)


class _Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x + x[:1])
        return out


class _Counting(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        out: Tensor = self.linear(x)
        return out


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (_Mixing(), BatchDependenceError),
        (_Counting(), BatchDependenceError),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1)), ModelError),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), ModelError),
        (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1)), UnsupportedOperationError),
        (nn.Linear(4, 1), ModelError),
        (nn.Linear(3, 1).double(), ModelError),
        (nn.Linear(3, 1).requires_grad_(False), ModelError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_models_that_would_break_sensitivity_are_refused_on_synthetic_records(
    model: nn.Module, error: type[ModelError]
) -> None:
    x, y = _records((3,))
    with pytest.raises(error):
        probe_model(model, _clipping(model), x, y)


def test_a_wrong_norm_is_found_on_synthetic_records(monkeypatch: pytest.MonkeyPatch) -> None:
    right = clipping_module.upper_products
    monkeypatch.setattr(clipping_module, "upper_products", lambda pairs: 0.9 * right(pairs))
    x, y = _records((3,))
    with pytest.raises(BatchDependenceError, match="norm"):
        probe_model(model := nn.Linear(3, 1), _clipping(model), x, y)


def test_no_record_of_a_batch_is_multiplied_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    for holder, name in ((torch, "bmm"), (Tensor, "__matmul__")):
        function = getattr(holder, name)

        def noted(left: Tensor, right: Tensor, function: Any = function, **kwargs: Any) -> Any:
            sizes.append(len(left))
            return function(left, right, **kwargs)

        monkeypatch.setattr(holder, name, noted)
    for rank, elements in ((2, 600), (1, 660)):  # of which seven and three records are no more, and 64 no multiple
        monkeypatch.setattr(uses_module, "CHUNK_ELEMENTS", elements)
        x, g = torch.randn(64, 1, *[[9, 8], [74]][rank == 1]), torch.randn(64, 2, *[[7, 6], [72]][rank == 1])
        ConvUse(x, g, torch.Size((2, 1, *[3] * rank)), [1] * rank, [0] * rank, [1] * rank, 1).form("patches")
        assert len(set(sizes)) == 1
        assert 1 < sizes[0] < 64
        sizes.clear()


def test_a_stride_longer_than_the_image_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = torch.randn(2, 3, 5, 4), torch.randn(2, 4, 1, 3)
    made: list[int] = []
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a: made.append((out := new_empty(*a)).numel()) or out)
    use = ConvUse(x, g, torch.Size((4, 3, 3, 2)), [1 << 16, 1], [1, 0], [2, 1], 1)
    formed = use.form("patches").joined()
    expected = torch.nn.grad.conv2d_weight(x[:1], (4, 3, 3, 2), g[:1], (1 << 16, 1), (1, 0), (2, 1))
    assert torch.allclose(formed[0], expected.flatten(), atol=1e-5)
    assert max(made) < 1000


class _Noting(nn.Module):
    """A sine that notes where its outputs lie."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sin(x)
        self.made.append(StorageWeakRef(y.untyped_storage()))
        return y


def test_a_backward_pass_gives_back_activations_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    noting = _Noting()
    model = nn.Sequential(nn.Linear(3, 4), noting, nn.Linear(4, 4), noting, nn.Linear(4, 4), noting, nn.Linear(4, 2))
    x, y = torch.randn(4, 5, 3), torch.randn(4)
    clipping = _of_mode(_clipping(model), "per_sample", x, y)
    held: list[int] = []
    add = Book.add

    def noted(book: Book, index: int, use: Use) -> None:
        add(book, index, use)
        if isinstance(use, LinearUse):
            held.append(sum(not made.expired() for made in noting.made))

    monkeypatch.setattr(Book, "add", noted)
    noting.made.clear()
    clipping.clipped_sum(x, y)
    assert held == [3, 2, 1, 0]
    assert all(made.expired() for made in noting.made)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("expected", [None, 32.0])
def test_gradients_formed_in_pieces_make_the_same_sum(
    strategy: Strategy, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    layers = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, (2, 3), 2, 1), nn.Flatten(2), nn.Linear(12, 5)
    model, x, y = nn.Sequential(*layers), torch.randn(37, 2, 8, 8), torch.randn(37)
    sums = []
    for elements in (1 << 21, 200):
        monkeypatch.setattr(uses_module, "_PIECE_ELEMENTS", elements)
        clipping = BookKeeping(model, _squares_loss, clipping_norm=1.0, max_physical_batch=64, expected_batch=expected)
        clipping.choose("per_sample", lambda count: (x[:count], y[:count]))
        clipping.strategies = dict.fromkeys(clipping.strategies, strategy)
        bad = x.clone()
        bad[5] = math.nan
        sums.append((clipping.clipped_sum(x, y), clipping.clipped_sum(bad, y)))
    for whole, pieces in zip(*sums, strict=True):
        assert whole.norm() > 1
        assert (whole - pieces).norm() <= 1e-5 * whole.norm()
    assert not torch.equal(*sums[0])
