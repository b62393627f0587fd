"""One record moves the sum by at most C, whatever it holds."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from casemate_schemas.errors import BatchDependenceError, ModelError, UnsupportedOperationError
from casemate_worker.training.clipping import PerSampleClipping, clip_rows
from casemate_worker.training.probe import probe_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

torch.set_num_threads(1)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
HOSTILE = st.one_of(
    FLOATS,
    st.builds(lambda m, e: m * 10.0**e, st.floats(-1, 1), st.integers(-30, 30)),
    st.sampled_from([0.0, 1e-45, -1e-38, 3.4e38]),
)


def _squares_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1) - targets[:, None]).square().sum(1)


def _clipping(model: nn.Module, clipping_norm: float = 1.0, max_physical_batch: int = 8) -> PerSampleClipping:
    return PerSampleClipping(model, _squares_loss, clipping_norm=clipping_norm, max_physical_batch=max_physical_batch)


def _exact_square(row: Tensor) -> Fraction:
    return sum((Fraction(value) ** 2 for value in row.tolist()), Fraction(0))


@given(
    rows=st.integers(1, 40).flatmap(
        lambda d: st.lists(st.lists(HOSTILE, min_size=d, max_size=d), min_size=1, max_size=4)
    ),
    clipping_norm=st.one_of(st.sampled_from([1e-6, 0.1, 1.0, 3.0, 1e6]), st.floats(1e-6, 1e6)),
)
def test_clipped_norms_never_exceed_c(rows: list[list[float]], clipping_norm: float) -> None:
    gradients = torch.tensor(rows, dtype=torch.float32)
    usable = gradients.isfinite().all(dim=1)
    clipped = clip_rows(gradients, usable, clipping_norm)
    for before, after in zip(gradients, clipped, strict=True):
        assert _exact_square(after) <= Fraction(clipping_norm) ** 2
        if before.isfinite().all():
            norm = math.sqrt(float(_exact_square(before)))
            scale = min(1.0, clipping_norm / norm) if norm else 1.0
            assert torch.allclose(after, before.double() * scale, rtol=1e-12, atol=0)


def test_clipping_at_the_edge_is_exact_where_naive_rounding_is_not() -> None:
    # Rows just longer than C: dividing by the computed norm alone lands above C for about half of them.
    gradients = torch.randn(2000, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    naive = gradients.double() * (1.0 / gradients.double().norm(dim=1))[:, None]
    assert any(_exact_square(row) > 1 for row in naive)
    clipped = clip_rows(gradients * 3, torch.ones(2000, dtype=torch.bool), 1.0)
    assert all(_exact_square(row) <= 1 for row in clipped)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_or_not_usable_become_zero(bad: float) -> None:
    gradients = torch.tensor([[1.0, 0.0], [bad, 1.0], [0.0, 1.0], [bad, bad]])
    clipped = clip_rows(gradients, torch.tensor([True, True, False, True]), 5.0)
    assert clipped.tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]


def _networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(3)
    return {
        "linear": (nn.Linear(5, 2), (5,)),
        "mlp": (nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 1)), (5,)),
        "convolutions": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1, stride=2),
                nn.GroupNorm(2, 4),
                nn.Tanh(),
                nn.Conv2d(4, 4, 2, groups=2, bias=False),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(4, 2),
            ),
            (2, 8, 8),
        ),
        "reused": (nn.Sequential(*[nn.Linear(5, 5), nn.Tanh()] * 2), (5,)),
    }


def _records(shape: tuple[int, ...], count: int = 21) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, *shape, generator=generator), torch.randn(count, generator=generator)


@pytest.mark.parametrize("name", _networks())
@pytest.mark.parametrize("max_physical_batch", [1, 8, 64])
def test_clipped_sum_agrees_with_a_loop_over_single_records(name: str, max_physical_batch: int) -> None:
    model, shape = _networks()[name]
    x, y = _records(shape)
    expected = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for i in range(len(x)):
        loss = _squares_loss(model(x[i : i + 1]), y[i : i + 1]).sum()
        row = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()
        expected += row * min(1.0, 0.8 / float(row.norm()))
    found = _clipping(model, 0.8, max_physical_batch).clipped_sum(x, y)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", _networks())
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_a_hostile_record_contributes_nothing_and_touches_no_other(name: str, bad: float) -> None:
    model, shape = _networks()[name]
    x, y = _records(shape)
    clipping = _clipping(model)
    without = clipping.clipped_sum(torch.cat([x[:5], x[6:]]), torch.cat([y[:5], y[6:]]))
    x[5], y[5] = bad, bad
    found = clipping.clipped_sum(x, y)
    assert found.isfinite().all()
    assert float((found - without).norm()) < 1e-4


def test_an_empty_batch_sums_to_zero() -> None:
    found = _clipping(nn.Linear(5, 2)).clipped_sum(torch.zeros(0, 5), torch.zeros(0))
    assert found.dtype == torch.float64
    assert found.tolist() == [0.0] * 12


def test_a_parameter_that_the_model_does_not_use_has_a_zero_gradient() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    x, y = _records((3,))
    found = _clipping(Partial()).clipped_sum(x, y)
    assert found[:4].abs().min() > 0
    assert found[4:].tolist() == [0.0] * 3


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
        (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1)), UnsupportedOperationError),
        (nn.Linear(4, 1), ModelError),
        (nn.Linear(3, 1).double(), ModelError),
        (nn.Linear(3, 1).requires_grad_(False), ModelError),
        (nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"), nn.Flatten()), BatchDependenceError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_models_that_would_break_sensitivity_are_refused_on_synthetic_records(
    model: nn.Module, error: type[ModelError]
) -> None:
    conv = isinstance(next(iter(model.children()), None), nn.Conv1d)
    x, y = _records((1, 3) if conv else (3,))
    with pytest.raises(error):
        probe_model(model, _clipping(model), x, y)


def test_layers_that_opacus_cannot_follow_are_refused() -> None:
    with pytest.raises(ModelError):
        _clipping(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
