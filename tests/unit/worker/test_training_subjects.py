"""Subjects as privacy units: whoever has many records moves a step no further than anyone else."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from casemate_schemas.errors import DatasetError
from casemate_schemas.job import SGD, Training
from casemate_worker.training.batches import OwnerData, batches_of, mean_over_present
from casemate_worker.training.engine import Trainer
from casemate_worker.training.subjects import ABSENT, subject_table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

torch.set_num_threads(1)

SEED = bytes(range(32))
CLIPPING_NORM = 0.5
GRID = 2.0**-16 * CLIPPING_NORM
"""More than what the noise's grid moves a sum by."""

IDS = st.lists(st.integers(0, 6), max_size=40)


def training(**changed: Any) -> Training:
    fields: dict[str, Any] = {
        "loss": "binary_cross_entropy",
        "optimizer": SGD(lr=0.1),
        "steps": 3,
        "clipping_norm": CLIPPING_NORM,
        "noise_multiplier": 1.0,
    }
    return Training(**(fields | changed))


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def owner(ids: np.ndarray[Any, np.dtype[Any]], max_records: int | None, rate: Fraction = Fraction(1)) -> OwnerData:
    """Record ``i`` is about subject ``ids[i]``; those of subject 99 are far from all others."""
    random = np.random.default_rng(5)
    features = random.uniform(-1, 1, (len(ids), 3)).astype(np.float32)
    features[ids == 99] = 40.0
    table = None if max_records is None else torch.from_numpy(subject_table(ids, max_records, 1000))
    targets = torch.from_numpy((ids % 2).astype(np.float32))
    return OwnerData("north", torch.from_numpy(features), targets, rate, subjects=table, bound=1200)


def first_sum(data: OwnerData, **changed: Any) -> Tensor:
    """The noised sum of the first step; its noise is that of the seed, whatever the data."""
    sums: list[Tensor] = []
    trainer = Trainer(
        model(),
        [data],
        training(**changed),
        expected_batch=Fraction(8),
        seed=SEED,
        clipping="per_sample",
        observe=lambda total: sums.append(total.clone()),
    )
    trainer.step()
    return sums[0]


@given(ids=IDS, max_records=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_the_table_holds_each_subjects_first_records(ids: list[int], max_records: int) -> None:
    table = subject_table(np.array(ids, dtype=np.int64), max_records, 1000)
    expected = [[i for i, name in enumerate(ids) if name == subject][:max_records] for subject in sorted(set(ids))]
    assert [[int(i) for i in row if i != ABSENT] for row in table] == expected


@given(ids=IDS.filter(bool), max_records=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_taking_a_subject_out_changes_no_other(ids: list[int], max_records: int) -> None:
    everyone, gone = np.array(ids), ids[0]
    left = np.flatnonzero(everyone != gone)
    with_all = subject_table(everyone, max_records, 1000)
    without = subject_table(everyone[left], max_records, 1000)
    kept = [row for row in with_all if everyone[row[0]] != gone]
    assert [[left[i] if i != ABSENT else ABSENT for i in row] for row in without] == [list(row) for row in kept]


def test_more_subjects_than_declared_are_left_out_and_none_is_fine() -> None:
    assert subject_table(np.array([7, 3, 7, 5]), 2, 2).tolist() == [[1, ABSENT], [3, ABSENT]]
    assert subject_table(np.array([], dtype=np.int64), 2, 9).shape == (0, 2)


@pytest.mark.parametrize("padded", [None, 1200])
def test_a_subject_with_many_records_moves_a_step_by_one_clipping_norm(padded: int | None) -> None:
    others = np.repeat(np.arange(10), 2)
    everyone = np.concatenate([others, np.full(12, 99)])
    difference = first_sum(owner(everyone, 16), padded_batch=padded) - first_sum(owner(others, 16), padded_batch=padded)
    assert 0.9 * CLIPPING_NORM < difference.norm() <= CLIPPING_NORM + GRID
    # A worker that does not know of subjects lets the same person move it twelve times as far.
    difference = first_sum(owner(everyone, None)) - first_sum(owner(others, None))
    assert difference.norm() > 11 * CLIPPING_NORM


def test_records_beyond_the_cap_change_nothing() -> None:
    few, many = np.array([1, 1, 2]), np.array([1, 1, 2, 1, 1])
    assert torch.equal(first_sum(owner(few, 2)), first_sum(owner(many, 2)))
    assert not torch.equal(first_sum(owner(few, 3)), first_sum(owner(many, 3)))


def test_a_subjects_share_is_the_gradient_of_its_mean_loss_clipped_once() -> None:
    data = owner(np.array([4, 4, 4]), 5)
    net = model()
    outputs = net(data.features)
    loss = nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], data.targets)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    expected *= min(1.0, CLIPPING_NORM / float(expected.norm()))
    nobody = owner(np.array([], dtype=np.int64), 5)
    assert torch.allclose(first_sum(data) - first_sum(nobody), expected.double(), atol=1e-3)


def test_subjects_are_drawn_whole_and_at_their_rate() -> None:
    ids = np.repeat(np.arange(400), 3)
    data = owner(ids, 3, Fraction(1, 4))
    where = {tuple(row.tolist()): subject for subject, row in zip(ids, data.features, strict=True)}
    batches = batches_of([data], SEED, None)
    sizes = []
    for step in range(30):
        features, targets = batches.drawn(step)
        assert targets.isfinite().all()
        drawn = [{where[tuple(record.tolist())] for record in subject} for subject in features]
        assert all(len(subject) == 1 for subject in drawn)
        sizes.append(len(drawn))
    assert abs(sum(sizes) - 3000) < 5 * np.sqrt(12000 * 3 / 16)


def test_dummies_add_nothing_whatever_they_hold() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs[:, 0], targets, reduction="none")

    outputs = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]], requires_grad=True)
    targets = torch.tensor([[0.0, torch.nan], [torch.nan, torch.nan]])
    found = mean_over_present(loss)(outputs, targets)
    found.sum().backward()
    assert found.tolist() == [1.0, 0.0]
    assert outputs.grad is not None
    assert outputs.grad.flatten().tolist() == [2.0, 0.0, 0.0, 0.0]


def test_owners_of_two_kinds_of_units_do_not_train_together() -> None:
    ids = np.array([1, 2])
    with pytest.raises(DatasetError, match="privacy unit"):
        batches_of([owner(ids, 2), owner(ids, None)], SEED, None)
