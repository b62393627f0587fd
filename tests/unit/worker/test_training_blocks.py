"""Float32 sums over records: whatever the records hold, one of them moves the released sum by at most C."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from casemate_models.building import build
from casemate_models.tracing import trace
from casemate_schemas.errors import ModelError, ParameterError
from casemate_worker.training.blocks import LEAST_FACTOR, Blocks, blocks_for, upper_products, upper_squares
from casemate_worker.training.chain import chain_of
from casemate_worker.training.clipping import BookKeeping, clip_factors
from casemate_worker.training.flat import FlatParameters
from casemate_worker.training.terms import Instantiated, RankOne
from casemate_worker.training.uses import LinearUse, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

torch.set_num_threads(1)

TERMS = ("outer", "outer and shift", "formed", "pieces")


def _exact(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.flatten().tolist()]


def _square(values: list[Fraction]) -> Fraction:
    return sum((value * value for value in values), Fraction(0))


def _term(kind: str, a: Tensor, g: Tensor) -> Instantiated | RankOne:
    if kind == "pieces":
        return Instantiated(*(g[:, :, None] * a[:, None, :]).flatten(1).split(5))
    if kind == "formed":
        return Instantiated((g[:, :, None] * a[:, None, :]).flatten(1))
    return RankOne(LinearUse(a, g), shift=kind == "outer and shift")


def _parts(kind: str, a: Tensor, g: Tensor, factors: Tensor) -> list[list[Fraction]]:
    """Each record's part, exactly."""
    found = []
    for row, gradient, factor in zip(a, g, _exact(factors), strict=True):
        if kind in ("formed", "pieces"):
            vector = _exact(gradient[:, None] * row[None, :])
        else:
            vector = [y * x for y in _exact(gradient) for x in _exact(row)]
            vector += _exact(gradient) if kind == "outer and shift" else []
        found.append([factor * value for value in vector])
    return found


def _factors(term: Instantiated | RankOne, blocks: Blocks, clipping_norm: float) -> Tensor:
    squares, slack = term.squared_norms()
    usable = torch.ones(len(squares), dtype=torch.bool)
    zeros = torch.zeros_like(squares)
    left = clipping_norm * (1 - blocks.room)
    factors = clip_factors(squares, zeros if slack is None else slack, usable, elements=9, clipping_norm=left)
    return torch.where(factors < LEAST_FACTOR, 0.0, factors)


def _hostile(n: int, p: int, d: int, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Records that round badly together: alike, cancelling, of all sizes, or mostly too small for a float."""
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(n, width, generator=generator) for width in (p, d))
    if kind == "alike":
        a, g = a[:1].expand(n, p) + 0.0, g[:1].expand(n, d) + 0.0
    if kind == "cancelling":
        g[n // 2 :] = -g[: n - n // 2]
        a[n // 2 :] = a[: n - n // 2] * (1 + 2.0**-20)
    if kind == "scales":
        a *= 10.0 ** torch.randint(-18, 18, (n, 1), generator=generator)
        g *= 10.0 ** torch.randint(-18, 18, (n, 1), generator=generator)
    if kind == "tiny":
        a, g = a * 2.0**60, g * 2.0**-140
    return a, g


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kind=st.sampled_from(TERMS),
    hostile=st.sampled_from(["alike", "cancelling", "scales", "tiny"]),
    block=st.sampled_from([1, 3, 8]),
    clipping_norm=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 2**16),
)
def test_a_float32_sum_errs_by_no_more_than_is_set_aside_for_it(
    n: int, sizes: tuple[int, int], kind: str, hostile: str, block: int, clipping_norm: float, seed: int
) -> None:
    a, g = _hostile(n, *sizes, hostile, seed)
    blocks, term = Blocks(n, block), _term(kind, a, g)
    factors = _factors(term, blocks, clipping_norm)
    parts = _parts(kind, a, g, factors)
    left = Fraction(clipping_norm) * (1 - Fraction(blocks.room))
    assert all(_square(part) <= left**2 for part in parts)
    total = torch.zeros(term.elements, dtype=torch.float64)
    blocks.add(total, {0: term}, factors.float())
    error = [found - sum(column) for found, column in zip(_exact(total), zip(*parts, strict=True), strict=True)]
    assert _square(error) <= (Fraction(blocks.room) / 2 * Fraction(clipping_norm)) ** 2


def test_the_error_is_real_and_blocks_are_what_keeps_it_small() -> None:
    # 3,000 records alike: one float32 sum over all loses more than blocks of 8 are allowed to.
    a, g = _hostile(3000, 1, 1, "alike", 1)
    rows = g * a
    exact = 3000 * Fraction(float(rows[0]))
    naive = torch.zeros(1)
    for row in rows:
        naive += row
    blocks = Blocks(3000, 8)
    total = torch.zeros(1, dtype=torch.float64)
    blocks.add(total, {0: Instantiated(rows)}, torch.ones(3000))
    allowed = Fraction(blocks.room) / 2 * abs(Fraction(float(rows[0])))
    assert abs(Fraction(float(naive)) - exact) > abs(Fraction(float(total)) - exact) * 10
    assert abs(Fraction(float(total)) - exact) <= allowed


def _losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * targets[:, None]).sum(1)  # gradients are the targets, whatever the weights


@pytest.mark.parametrize("hostile", ["alike", "cancelling", "scales", "tiny"])
@pytest.mark.parametrize("strategy", ["ghost", "per_sample"])
def test_neighbouring_batches_differ_by_at_most_c_at_and_above_the_number_provided_for(
    hostile: str, strategy: Strategy
) -> None:
    clipping_norm = 0.7
    clipping = BookKeeping(
        nn.Linear(3, 2), _losses, clipping_norm=clipping_norm, max_physical_batch=8, expected_batch=1.0
    )
    clipping.strategies = {"weight": strategy, "bias": "per_sample"}
    most = Blocks(23, 64).records
    assert blocks_for(1.0) == Blocks(most, 64)
    a, g = _hostile(most + 2, 3, 1, hostile, 5)
    sums = [clipping.clipped_sum(a[:n], g[:n, 0]) for n in range(most - 2, most + 3)]
    for fewer, more in pairwise(sums):
        moved = [x - y for x, y in zip(_exact(more), _exact(fewer), strict=True)]
        assert _square(moved) <= Fraction(clipping_norm) ** 2


def test_batches_above_the_number_provided_for_are_summed_in_float64() -> None:
    clipping = BookKeeping(nn.Linear(3, 2), _losses, clipping_norm=1.0, max_physical_batch=64, expected_batch=1.0)
    plain = BookKeeping(nn.Linear(3, 2), _losses, clipping_norm=1.0 - Blocks(23, 64).room, max_physical_batch=64)
    a, g = _hostile(24, 3, 1, "cancelling", 2)
    assert torch.equal(clipping.clipped_sum(a, g[:, 0]), plain.clipped_sum(a, g[:, 0]))
    assert not torch.equal(clipping.clipped_sum(a[:23], g[:23, 0]), plain.clipped_sum(a[:23], g[:23, 0]))
    in_part = clipping.clipped_sum(a[:23], g[:23, 0], 24)
    assert torch.equal(in_part, plain.clipped_sum(a[:23], g[:23, 0]))


def test_a_record_far_beyond_c_adds_nothing_whatever_the_batch() -> None:
    clipping = BookKeeping(nn.Linear(3, 2), _losses, clipping_norm=1.0, max_physical_batch=64, expected_batch=1.0)
    for n in (1, 24):
        found = clipping.clipped_sum(torch.full((n, 3), 2.0**41), torch.ones(n))
        assert found.tolist() == [0.0] * 8


@pytest.mark.parametrize(
    ("expected", "size"), [(1.0, 64), (256.0, 64), (320.0, 32), (700.0, 16), (1024.0, 8), (1e4, None)]
)
def test_blocks_get_smaller_with_batches_so_that_little_is_set_aside(expected: float, size: int | None) -> None:
    blocks = blocks_for(expected)
    assert (None if blocks is None else blocks.size) == size
    assert blocks is None or (blocks.room <= 2.0**-8 and blocks.records >= expected + 6 * expected**0.5)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6).flatmap(
        lambda width: st.lists(
            st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=width, max_size=width),
            min_size=1,
            max_size=3,
        )
    ),
    repeat=st.sampled_from([1, 1000]),
)
def test_upper_squares_are_upper_bounds_and_close(rows: list[list[float]], repeat: int) -> None:
    values = torch.tensor(rows).repeat(1, repeat)
    for row, bound in zip(values, upper_squares(values).tolist(), strict=True):
        true = _square(_exact(row))
        if bound == float("inf"):
            assert true > 10**38
        else:
            assert true <= Fraction(bound) <= true * (1 + Fraction(1, 2**11)) + Fraction(1, 2**79)
    pieces = upper_squares(torch.stack([values, 2 * values])) if float(values.abs().max()) < 2**60 else None
    if pieces is not None:
        assert torch.allclose(pieces, 5 * values.double().square().sum(dim=1), rtol=2**-11, atol=2**-78)


def test_products_of_wide_and_narrow_layers_agree() -> None:
    a, g = torch.randn(5, 3000), torch.randn(5, 4)
    exact = (a.double().square().sum(1) + 1) * g.double().square().sum(1) + g.double().square().sum(1) ** 2
    for pairs in ([(a, g, True), (g, g, False)], [(g, g, False), (a, g, True)]):
        assert torch.allclose(upper_products(pairs), exact, rtol=1e-3)
        assert bool((upper_products(pairs) >= exact).all())
    narrow = upper_products([(a[:, :9], g, True)])
    assert torch.allclose(narrow, (a[:, :9].double().square().sum(1) + 1) * g.double().square().sum(1), rtol=1e-5)


_rows = st.integers(1, 5).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=width, max_size=width),
        min_size=2,
        max_size=2,
    )
)


@settings(max_examples=60, deadline=None)
@given(first=_rows, second=_rows, third=_rows, shift=st.booleans())
def test_products_of_any_rows_are_upper_bounds_and_close(
    first: list[list[float]], second: list[list[float]], third: list[list[float]], shift: bool
) -> None:
    pairs = [(torch.tensor(first), torch.tensor(second), shift), (torch.tensor(third), torch.tensor(second), False)]
    for row, bound in enumerate(upper_products(pairs).tolist()):
        squares = [_square(_exact(torch.tensor(rows[row]))) for rows in (first, second, third)]
        true = (squares[0] + shift) * squares[1] + squares[2] * squares[1]
        if bound == float("inf"):
            assert max(squares) > 10**38
        else:
            floors = Fraction(1, 2**78) * (sum(squares) + 2)
            assert true <= Fraction(bound) <= true * (1 + Fraction(1, 2**18)) + floors


def test_shortened_products_are_refused() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ParameterError, match="float32"):
            BookKeeping(nn.Linear(3, 2), _losses, clipping_norm=1.0, max_physical_batch=8)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", ["matmul", "conv", "rnn", "", "all"])
def test_newer_settings_that_shorten_products_are_refused(kind: str) -> None:
    onednn = torch.backends.mkldnn
    place = torch.backends if kind == "all" else getattr(onednn, kind) if kind else onednn
    before = place.fp32_precision
    place.fp32_precision = "bf16"
    try:
        with pytest.raises(ParameterError, match="float32"):
            BookKeeping(nn.Linear(3, 2), _losses, clipping_norm=1.0, max_physical_batch=8)
    finally:
        place.fp32_precision = before
    BookKeeping(nn.Linear(3, 2), _losses, clipping_norm=1.0, max_physical_batch=8)


def test_room_counts_every_rounding_on_the_longest_way() -> None:
    # 64 products and 7 left over, one after another; 8 blocks; 2 for weighting; float64; underflow
    assert Blocks(368, 64).room == 2 * (64 + 7 + 7 + 2 + 1 + 1) / 2**24 * 368 * (1 + 2**-10)
    assert (blocks_for(256.0), blocks_for(1040.0), blocks_for(1050.0)) == (Blocks(368, 64), Blocks(1250, 8), None)


# Chains by hand


def _chain() -> nn.Sequential:
    torch.manual_seed(2)
    layers = [nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, 4), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(4, 4), nn.SiLU(), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Sigmoid()))


def _image_chain() -> nn.Sequential:
    torch.manual_seed(2)
    first = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, (2, 3), (2, 1), bias=False)]
    return nn.Sequential(*first, nn.MaxPool2d(3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Sigmoid(), nn.Linear(4, 3))


def _both(model: nn.Module, images: Strategy = "patches") -> tuple[BookKeeping, BookKeeping]:
    """One as it comes, and one that is kept from going by hand; ``images`` is the strategy of convolutions."""
    found = []
    for by_hand in (True, False):
        clipping = BookKeeping(model, _losses, clipping_norm=0.5, max_physical_batch=16)
        clipping.strategies = {
            name: "per_sample" if parameter.dim() == 1 else "ghost" if parameter.dim() == 2 else images
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        assert clipping._by_hand is not None
        clipping._by_hand = clipping._by_hand if by_hand else None
        found.append(clipping)
    return found[0], found[1]


@pytest.mark.parametrize("frozen", [[], ["2.weight"], ["0.weight"], ["0.bias", "6.bias"]])
@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_chain_by_hand_is_the_same_bit_for_bit(frozen: list[str], rebuilt: bool) -> None:
    model: nn.Module = build(*trace(_chain(), (5,))) if rebuilt else _chain()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    x, y = torch.randn(21, 5), torch.randn(21)
    x[3], y[7] = torch.nan, torch.inf
    first, second = _both(model)
    assert torch.equal(first.clipped_sum(x, y), second.clipped_sum(x, y))
    assert float(first.clipped_sum(x, y).norm()) > 0


@pytest.mark.parametrize("strategy", ["patches", "ghost", "per_sample"])
@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_chain_on_images_by_hand_is_the_same_bit_for_bit(strategy: Strategy, rebuilt: bool) -> None:
    model: nn.Module = build(*trace(_image_chain(), (1, 9, 9))) if rebuilt else _image_chain()
    x, y = torch.randint(0, 2, (21, 1, 9, 9)).float(), torch.randn(21)  # so that windows have several largest numbers
    x[3], x[4], y[7] = torch.nan, 0.0, torch.inf
    first, second = _both(model, strategy)
    assert torch.equal(first.clipped_sum(x, y), second.clipped_sum(x, y))
    assert float(first.clipped_sum(x, y).norm()) > 0


def test_pooling_by_hand_gives_the_first_of_equal_numbers_the_gradient() -> None:
    x = torch.randint(-1, 2, (3, 2, 7, 5)).float()
    pool = chain_of(nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(2)), {})
    assert pool is not None
    forward = pool._links[1][1]
    assert forward is not None
    output, kept = forward(x)
    gradient = torch.randn_like(output)
    leaf = x.clone().requires_grad_()
    expected = nn.functional.max_pool2d(leaf, 2)
    expected.backward(gradient)
    assert torch.equal(output, expected)
    assert leaf.grad is not None
    assert torch.equal(pool._links[1][0].backward(gradient, kept), leaf.grad)


def test_what_is_not_a_chain_or_is_watched_goes_the_other_way() -> None:
    shared = nn.Linear(4, 4)
    others = [nn.Sequential(shared, nn.ReLU(), shared), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), nn.LayerNorm(4)]
    others += [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), nn.Sequential(nn.Linear(4, 4), nn.Softmax(1))]
    others += [nn.Sequential(nn.Conv2d(1, 2, 1), after) for after in (nn.Linear(4, 2), nn.MaxPool2d(2, ceil_mode=True))]
    others += [nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 2, 1)), nn.Sequential(nn.Flatten(), nn.Linear(4, 2))]
    for other in others:
        assert chain_of(other, {id(p): i for i, p in enumerate(other.parameters())}) is None
    model, seen = _chain(), []
    first, second = _both(model)
    x, y = torch.randn(4, 5), torch.randn(4)
    with model[4].register_forward_hook(lambda *_: seen.append(1)):
        first.clipped_sum(x, y)
    assert seen == [1]
    positions = torch.randn(4, 3, 5)
    assert not first._by_hand or not first._by_hand.takes(positions)
    model[0].weight = nn.Parameter(torch.zeros(6, 5))
    for clipping in (first, second):
        with pytest.raises(ModelError, match="replaced"):
            clipping.clipped_sum(x, y)


def test_flat_parameters_are_views_of_one_vector_and_stay_themselves() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Conv2d(1, 2, 3))
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    flat = FlatParameters(parameters)
    assert all(p is parameters[name] and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(flat.joined(flat.pieces(flat.vector)), flat.vector)
    with torch.no_grad():
        flat.vector.add_(1)
    assert all(torch.equal(p, before[name] + 1) for name, p in model.named_parameters())
