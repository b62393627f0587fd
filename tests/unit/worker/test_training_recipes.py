"""Optimisers, schedules, averages and views: against arithmetic by hand, exact to resume, and nothing for free."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from casemate_models.losses import per_example_loss
from casemate_schemas.errors import MalformedError, ModelError
from casemate_schemas.job import SGD, Adam, Augmentation, Averaging, LrSchedule, NoisePhase, Training
from casemate_worker.training.augmentation import Augmenter
from casemate_worker.training.engine import OwnerData, Trainer
from casemate_worker.training.optimizers import build_optimizer, move_weights
from casemate_worker.training.schedules import ScheduledNoise, lr_factor
from numpy.typing import NDArray
from pydantic import ValidationError
from support.training_reference import words
from torch import Tensor, nn

torch.set_num_threads(1)

SEED = bytes(range(32))
STEPS = 12
VIEWS = Augmentation(multiplicity=4, shift=2, flip=True)
RECIPES: dict[str, dict[str, Any]] = {
    "views": {"augmentation": VIEWS, "averaging": Averaging(decay=0.9)},
    "corrected-adam": {
        "optimizer": Adam(lr=0.02, bias_correction="dp", weight_decay=0.1),
        "lr_schedule": LrSchedule(warmup_steps=3, decay="cosine"),
        "noise_schedule": (NoisePhase(first_step=4, factor=0.5), NoisePhase(first_step=8, factor=2.0)),
    },
    "momentum": {
        "optimizer": SGD(lr=0.1, momentum=0.9, weight_decay=0.1),
        "lr_schedule": LrSchedule(decay="linear", final=0.1),
        "averaging": Averaging(decay=0.5),
    },
}


def _plan(**changes: Any) -> Training:
    fields = {
        "loss": "cross_entropy",
        "optimizer": SGD(lr=0.1),
        "steps": STEPS,
        "clipping_norm": 1.0,
        "noise_multiplier": 1.0,
        "max_physical_batch": 16,
    }
    return Training.model_validate(fields | changes)


def _images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 2, 6, 5, generator=generator)
    return images, (images[:, 0].mean((1, 2)) > 0.5).long()


def _model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3, generator=generator)
    return model


def _trainer(model: nn.Module | None = None, rate: Fraction = Fraction(1, 4), **changes: Any) -> Trainer:
    owners = [OwnerData(name, *_images(count), rate) for name, count in (("north", 30), ("south", 20))]
    return Trainer(
        model or _model(),
        owners,
        _plan(**changes),
        expected_batch=Fraction(12),
        seed=SEED,
        clipping="book_keeping",
    )


def _moved(trainer: Trainer) -> Tensor:
    """How far the next step moves the weights."""
    before = trainer.weights()
    trainer.step()
    return torch.cat([(after - before[name]).double().flatten() for name, after in trainer.weights().items()])


def _gradients(count: int) -> list[NDArray[np.float64]]:
    return list(np.random.default_rng(1).normal(0.0, 0.1, (count, 7)).astype(np.float32).astype(np.float64))


def _descend(plan: Training, gradients: list[NDArray[np.float64]], expected_batch: float = 4.0) -> NDArray[np.float64]:
    """The engine's optimiser from ones along given gradients."""
    parameter = nn.Parameter(torch.ones(7))
    optimizer = build_optimizer(plan, [parameter], expected_batch)
    for step, gradient in enumerate(gradients):
        parameter.grad = torch.from_numpy(gradient).float()
        move_weights(optimizer, plan, step)
    return parameter.detach().double().numpy()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stop", [0, 5])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(recipe: str, stop: int) -> None:
    torch.manual_seed(11)
    whole = _trainer(**RECIPES[recipe])
    whole.run()
    torch.manual_seed(12)
    first = _trainer(**RECIPES[recipe])
    first.run(stop)
    second = _trainer(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)), **RECIPES[recipe])
    second.restore(first.state())
    second.run()
    assert all(torch.equal(tensor, second.weights()[name]) for name, tensor in whole.weights().items())


def test_a_state_with_averages_belongs_to_a_plan_with_them() -> None:
    averaged = _trainer(averaging=Averaging(decay=0.5))
    averaged.run(2)
    with pytest.raises(MalformedError):
        _trainer().restore(averaged.state())
    plain = _trainer()
    plain.run(2)
    with pytest.raises(MalformedError):
        _trainer(averaging=Averaging(decay=0.5)).restore(plain.state())


def test_sgd_decays_weights_beside_the_gradient_and_at_the_scheduled_rate() -> None:
    schedule = LrSchedule(warmup_steps=2, decay="linear", final=0.5)
    plan = _plan(optimizer=SGD(lr=0.5, momentum=0.9, weight_decay=0.2), lr_schedule=schedule)
    gradients = _gradients(STEPS)
    weights, momentum = np.ones(7), np.zeros(7)
    for step, gradient in enumerate(gradients):
        lr = 0.5 * lr_factor(schedule, step, STEPS)
        momentum = 0.9 * momentum + gradient
        weights = weights - lr * 0.2 * weights - lr * momentum
    assert np.abs(_descend(plan, gradients) - weights).max() < 1e-6


@pytest.mark.parametrize("correction", ["standard", "dp"])
def test_adam_is_adamw_and_subtracts_the_variance_of_scheduled_noise(correction: str) -> None:
    wanted = Adam(lr=0.01, beta2=0.9, weight_decay=0.3, bias_correction=correction, variance_floor=1e-3)  # type: ignore[arg-type]
    plan = _plan(optimizer=wanted, noise_multiplier=0.3, noise_schedule=(NoisePhase(first_step=4, factor=2.0),))
    gradients = _gradients(STEPS)
    weights, mean, square, noise, floored = np.ones(7), np.zeros(7), np.zeros(7), 0.0, 0
    for step, gradient in enumerate(gradients):
        deviation = (0.3 if step < 4 else 0.6) / 4.0
        mean = 0.9 * mean + 0.1 * gradient
        square, noise = 0.9 * square + 0.1 * gradient**2, 0.9 * noise + 0.1 * deviation**2
        mean_hat, square_hat, noise_hat = (
            mean / (1 - 0.9 ** (step + 1)),
            *(moment / (1 - 0.9 ** (step + 1)) for moment in (square, noise)),
        )
        if correction == "dp":
            floored += int((square_hat - noise_hat < 1e-3).sum())
            scale = np.sqrt(np.maximum(square_hat - noise_hat, 1e-3))
        else:
            scale = np.sqrt(square_hat) + 1e-8
        weights = weights - 0.01 * 0.3 * weights - 0.01 * mean_hat / scale
    assert np.abs(_descend(plan, gradients) - weights).max() < 1e-5
    assert correction == "standard" or 0 < floored < 7 * STEPS  # both branches of the floor were met


def test_learning_rates_follow_the_schedule() -> None:
    cosine = LrSchedule(warmup_steps=4, decay="cosine", final=0.1)
    assert [lr_factor(cosine, step, 10) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(cosine, 4, 10) == 1.0
    assert lr_factor(cosine, 7, 10) == pytest.approx(0.55)
    assert lr_factor(LrSchedule(decay="linear", final=0.2), 99, 100) == pytest.approx(0.2 + 0.8 * 0.01)
    assert lr_factor(LrSchedule(warmup_steps=100), 99, 100) == 1.0
    plain, warming = _moved(_trainer()), _moved(_trainer(lr_schedule=LrSchedule(warmup_steps=2)))
    assert torch.allclose(warming, plain / 2, atol=1e-7)


def test_noise_follows_its_schedule_and_no_two_steps_share_it() -> None:
    never = Fraction(1, 1 << 20)  # so a step is its noise alone
    constant = _trainer(rate=never)
    phased = _trainer(
        rate=never, noise_schedule=(NoisePhase(first_step=2, factor=3.0), NoisePhase(first_step=5, factor=0.5))
    )
    seen = []
    for step in range(7):
        one, other = _moved(constant), _moved(phased)
        factor = 1.0 if step < 2 else 3.0 if step < 5 else 0.5
        assert torch.allclose(other, factor * one, atol=2e-5)
        seen.append(one)
    assert all(abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.5 for a in seen[:1] for b in seen[1:])


def test_released_weights_are_the_average_and_training_goes_on_from_the_others() -> None:
    model, plain = _model(), _model()
    averaged, other = _trainer(model, averaging=Averaging(decay=0.6)), _trainer(plain)
    expected = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    for step in range(1, STEPS + 1):
        averaged.step()
        other.step()
        decay = min(0.6, step / (step + 9))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    for name, tensor in averaged.weights().items():
        assert torch.allclose(tensor.double(), expected[name], atol=1e-6)
        assert not torch.allclose(tensor, other.weights()[name], atol=1e-3)


def _view(record: NDArray[np.float32], word: int, shift: int, flip: bool) -> NDArray[np.float32]:
    """One view, pixel by pixel, from the document."""
    dy = (word >> 1) % 2**31 % (2 * shift + 1) - shift
    dx = (word >> 32) % (2 * shift + 1) - shift
    _, height, width = record.shape
    found = np.empty_like(record)
    for y in range(height):
        for x in range(width):
            column = min(max(x + dx, 0), width - 1)
            if flip and word & 1:
                column = width - 1 - column
            found[:, y, x] = record[:, min(max(y + dy, 0), height - 1), column]
    return found


@pytest.mark.parametrize(
    "plan", [VIEWS, Augmentation(multiplicity=3, shift=1), Augmentation(multiplicity=2, flip=True)]
)
def test_views_are_those_of_the_document(plan: Augmentation) -> None:
    records, targets = _images(5)
    batches = list(Augmenter(SEED, plan, records).batches(records, targets, 9, 2))
    views, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert [len(batch) for batch, _ in batches] == [2, 2, 1] and torch.equal(labels, targets)
    drawn = words(SEED, "augmentation", 9, 5 * (plan.multiplicity - 1))
    for i, record in enumerate(records.numpy()):
        assert np.array_equal(views[i, 0].numpy(), record)
        for k in range(1, plan.multiplicity):
            word = drawn[i * (plan.multiplicity - 1) + k - 1]
            assert np.array_equal(views[i, k].numpy(), _view(record, word, plan.shift, plan.flip))


def _clipped_by_hand(model: nn.Module, views: Tensor, target: Tensor, norm: float) -> Tensor:
    """One record's part: the gradient of the mean over its views, then clipped; float64."""
    model = model.double()
    loss = per_example_loss("cross_entropy", model(views.double()), target.expand(len(views))).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    return gradient * min(1.0, norm / float(gradient.norm()))


@pytest.mark.parametrize("norm", [0.05, 100.0])
def test_a_record_adds_the_clipped_mean_over_its_views(norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[Tensor] = []
    monkeypatch.setattr(ScheduledNoise, "add", lambda _self, total, _step: sums.append(total) or total)
    _trainer(rate=Fraction(1), augmentation=VIEWS, clipping_norm=norm).step()
    records, targets = (torch.cat(part) for part in zip(_images(30), _images(20), strict=True))
    views = torch.cat([v for v, _ in Augmenter(SEED, VIEWS, records).batches(records, targets, 0, 7)])
    parts = [_clipped_by_hand(_model(), v, t, norm) for v, t in zip(views, targets, strict=True)]
    expected = torch.stack(parts).sum(dim=0)
    # Clipped records fall short of C by what certified norms and sums set aside.
    assert float((sums[0] - expected).norm() / expected.norm()) < (2e-6 if norm == 100.0 else 2e-3)


def test_a_record_with_many_views_moves_a_step_by_at_most_c_over_the_expected_batch() -> None:
    records, targets = _images(3)
    records[2] *= 1e4

    def moved(count: int) -> Tensor:
        owner = OwnerData("north", records[:count], targets[:count], Fraction(1))
        plan = _plan(augmentation=VIEWS, clipping_norm=0.5, optimizer=SGD(lr=1.0))
        return _moved(Trainer(_model(), [owner], plan, expected_batch=Fraction(12), seed=SEED))

    distance = float((moved(3) - moved(2)).norm()) * 12
    assert 0.49 < distance < 0.5 * (1 + 1e-4)


def test_a_view_that_is_not_finite_drops_the_record_with_all_its_views() -> None:
    records, targets = _images(6)
    broken = torch.cat([records, records[:1]])
    broken[6, 0, 0, 0] = math.nan  # some views shift it out, and the record is dropped all the same
    weights = []
    for features, labels in ((records, targets), (broken, torch.cat([targets, targets[:1]]))):
        owner = OwnerData("north", features, labels, Fraction(1))
        plan = _plan(augmentation=VIEWS, steps=1)
        trainer = Trainer(_model(), [owner], plan, expected_batch=Fraction(6), seed=SEED, clipping="book_keeping")
        trainer.run()
        weights.append(trainer.weights())
    assert all(torch.allclose(tensor, weights[1][name], atol=1e-6) for name, tensor in weights[0].items())


def test_a_step_with_views_and_no_record_is_its_noise() -> None:
    never = Fraction(1, 1 << 20)
    assert torch.equal(_moved(_trainer(rate=never, augmentation=VIEWS)), _moved(_trainer(rate=never)))


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 2, 9)])
def test_views_are_of_images_larger_than_the_shift(shape: tuple[int, ...]) -> None:
    owner = OwnerData("north", torch.zeros(2, *shape), torch.zeros(2, dtype=torch.int64), Fraction(1))
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2))
    with pytest.raises(ModelError, match="augmentation"):
        Trainer(model, [owner], _plan(augmentation=VIEWS), expected_batch=Fraction(1), seed=SEED)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_schedule": {"warmup_steps": STEPS + 1}},
        {"noise_schedule": ({"first_step": STEPS, "factor": 0.5},)},
        {"noise_schedule": ({"first_step": 4, "factor": 0.5}, {"first_step": 4, "factor": 0.6})},
        {"noise_schedule": ({"first_step": 4, "factor": 0.2},)},
        {"noise_multiplier": 200.0, "noise_schedule": ({"first_step": 4, "factor": 60.0},)},
        {"augmentation": {"multiplicity": 4}},
        {"averaging": {"decay": 1.0}},
    ],
)
def test_schedules_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    _plan()
    with pytest.raises(ValidationError):
        _plan(**changes)


def test_a_plan_tells_its_noise_step_by_step() -> None:
    phases = _plan(noise_multiplier=2.0, noise_schedule=RECIPES["corrected-adam"]["noise_schedule"]).noise_phases
    assert phases == ((4, 2.0), (4, 1.0), (4, 4.0))
    assert _plan().noise_phases == ((STEPS, 1.0),)
