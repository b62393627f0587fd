"""The engine as a whole: reproducible from its seed, untouched by hostile records, exact to resume, and truly private."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from casemate_models.building import build
from casemate_models.tracing import trace
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import DatasetError, MalformedError, ModelError, ParameterError, StateError
from casemate_schemas.job import SGD, Adam, Training
from casemate_worker.key_schedule import attempt_seed
from casemate_worker.training.choosing import Mode
from casemate_worker.training.engine import OwnerData, Trainer
from casemate_worker.training.noise import HardenedGaussian
from casemate_worker.training.state import TrainingState
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

torch.set_num_threads(1)

SEED = bytes(range(32))
OPTIMIZERS = {"sgd": SGD(lr=0.5), "momentum": SGD(lr=0.2, momentum=0.9), "adam": Adam(lr=0.05)}


def _plan(**changes: object) -> Training:
    fields = {
        "loss": "cross_entropy",
        "optimizer": OPTIMIZERS["momentum"],
        "steps": 12,
        "clipping_norm": 1.0,
        "noise_multiplier": 1.0,
        "max_physical_batch": 16,
    }
    return Training.model_validate(fields | changes)


def _owner(name: str, rows: int = 40, rate: Fraction = Fraction(1, 3)) -> OwnerData:
    generator = torch.Generator().manual_seed(rows)
    features = torch.rand(rows, 6, generator=generator) * 2 - 1
    return OwnerData(name, features, (features[:, 0] > 0).long(), rate)


def _owners() -> list[OwnerData]:
    return [_owner("south", 41), _owner("east", 53), _owner("north", 37, Fraction(1, 8))]


def _model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.4, 0.4, generator=generator)
    return model


def _trainer(owners: list[OwnerData] | None = None, seed: bytes = SEED, **changes: object) -> Trainer:
    return Trainer(_model(), owners or _owners(), _plan(**changes), expected_batch=Fraction(36), seed=seed)


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture
def reference_weights() -> dict[str, Tensor]:
    trainer = _trainer()
    trainer.run()
    return trainer.weights()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(optimizer: str, stop: int) -> None:
    whole = _trainer(optimizer=OPTIMIZERS[optimizer])
    whole.run()
    first = _trainer(optimizer=OPTIMIZERS[optimizer])
    first.run(until=stop)
    state = first.state()

    second = _trainer(optimizer=OPTIMIZERS[optimizer])
    second.run(until=3)  # whatever was there before is replaced, optimiser included
    second.restore(state)
    assert second.steps_done == stop
    assert second.state() == state
    second.run()

    assert _same(second.weights(), whole.weights())
    assert second.state() == whole.state()


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    trainer = _trainer()
    trainer.run(until=2)
    before = trainer.state()
    other_model = Trainer(nn.Linear(6, 2), _owners(), _plan(), expected_batch=Fraction(36), seed=SEED)
    other_model.run(until=2)
    other_optimizer = _trainer(optimizer=OPTIMIZERS["adam"])
    other_optimizer.run(until=2)
    message = decode(TrainingState, before)
    bad = [
        b"",
        before[:-1],
        before + b"\x00",
        other_model.state(),
        other_optimizer.state(),
        encode(message.model_copy(update={"step": 13})),
        encode(message.model_copy(update={"step": 0})),
        encode(message.model_copy(update={"tensors": b"\xff" * 64})),
        encode(message.model_copy(update={"clipping": {}})),
        encode(message.model_copy(update={"clipping": message.clipping | {"nobody.weight": "ghost"}})),
        encode(message.model_copy(update={"tensors": bytes(1 << 21)})),
    ]
    for state in bad:
        with pytest.raises(MalformedError):
            trainer.restore(state)
        assert trainer.state() == before


@pytest.mark.parametrize("mode", get_args(Mode))
def test_each_way_of_clipping_gives_the_same_weights_and_a_state_carries_it(
    mode: Mode, reference_weights: dict[str, Tensor]
) -> None:
    trainer = Trainer(_model(), _owners(), _plan(), expected_batch=Fraction(36), seed=SEED, clipping=mode)
    trainer.run(until=5)
    resumed = Trainer(_model(), _owners(), _plan(), expected_batch=Fraction(36), seed=SEED, clipping="per_sample")
    resumed.restore(trainer.state())
    assert resumed.clipping_strategies == trainer.clipping_strategies
    for each in (trainer, resumed):
        each.run()
    assert _same(trainer.weights(), resumed.weights())
    assert _distance(trainer.weights(), reference_weights) < 1e-5


def test_noise_drawn_ahead_is_the_noise_of_its_step() -> None:
    total = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    ahead, plain = (HardenedGaussian(SEED, noise_multiplier=1.5, clipping_norm=0.7) for _ in range(2))
    for step in (0, 1, 2, 31, 32, 33, 7, 7, 1000, 64):  # in order, across blocks, back, and far away
        ahead.draw_ahead(step, len(total))
        assert torch.equal(ahead.add(total, step), plain.add(total, step))
    ahead.draw_ahead(5, len(total))
    assert torch.equal(ahead.add(total[:7], 5), plain.add(total[:7], 5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_record_with_nan_or_infinity_contributes_exactly_zero(
    reference_weights: dict[str, Tensor], bad: float
) -> None:
    owners = _owners()
    features, targets = owners[0].features.clone(), owners[0].targets.clone()
    # Appended records leave the sampling of all others as it was.
    features = torch.cat([features, torch.full((5, 6), bad)])
    targets = torch.cat([targets, torch.tensor([0, 1, 0, 1, 0])])
    trainer = _trainer([OwnerData("south", features, targets, owners[0].sample_rate), *owners[1:]])
    trainer.run()
    assert all(w.isfinite().all() for w in trainer.weights().values())
    assert _distance(trainer.weights(), reference_weights) < 1e-5


@pytest.mark.parametrize("target", [-1, 2, -100, 2**40])
def test_a_record_of_an_unknown_class_contributes_exactly_zero(
    reference_weights: dict[str, Tensor], target: int
) -> None:
    owners = _owners()
    features = torch.cat([owners[0].features, torch.ones(5, 6)])
    targets = torch.cat([owners[0].targets, torch.full((5,), target)])
    trainer = _trainer([OwnerData("south", features, targets, owners[0].sample_rate), *owners[1:]])
    trainer.run()
    assert _distance(trainer.weights(), reference_weights) < 1e-5


def test_one_record_moves_one_step_by_at_most_c_over_the_expected_batch() -> None:
    changes = {"steps": 1, "optimizer": SGD(lr=1.0), "clipping_norm": 0.5}
    owners = [_owner("north", 40, Fraction(1))]
    hostile = torch.cat([owners[0].features, torch.full((1, 6), 1e6)])
    trainers = [
        _trainer(owners, **changes),
        _trainer(
            [OwnerData("north", hostile, torch.cat([owners[0].targets, torch.tensor([1])]), Fraction(1))], **changes
        ),
    ]
    for trainer in trainers:
        trainer.run()
    first, second = (torch.cat([w.flatten() for w in trainer.weights().values()]) for trainer in trainers)
    assert float((first - second).norm()) == pytest.approx(0.5 / 36, rel=1e-3)


def test_empty_batches_take_a_noisy_step() -> None:
    owners = [_owner("north", 3, Fraction(1, 2**60)), _owner("south", 0, Fraction(1, 2))]
    trainer = _trainer(owners)
    before = trainer.weights()
    trainer.run()
    assert trainer.steps_done == 12
    assert all(int((w == before[name]).sum()) == 0 for name, w in trainer.weights().items())


def test_noise_is_drawn_once_for_all_owners_with_deviation_sigma_c_over_the_expected_batch() -> None:
    owners = [_owner(name, 3, Fraction(1, 2**60)) for name in ("north", "south", "east")]
    model = nn.Linear(200, 100)
    owners = [OwnerData(o.owner, torch.zeros(3, 200), o.targets, o.sample_rate) for o in owners]
    plan = _plan(optimizer=SGD(lr=1.0), steps=1, clipping_norm=0.5, noise_multiplier=3.0)
    before = model.weight.detach().clone()
    Trainer(model, owners, plan, expected_batch=Fraction(36), seed=SEED).run()
    # 20,000 coordinates: 0.5 % standard error; noise for each owner would be larger by sqrt(3), a mean by other factors.
    assert float((model.weight.detach() - before).std()) == pytest.approx(0.5 * 3.0 / 36, rel=0.02)


def test_records_come_in_the_order_of_owner_ids(reference_weights: dict[str, Tensor]) -> None:
    owners = [_owner("south", 5, Fraction(1)), _owner("east", 4, Fraction(1))]
    trainer = _trainer(owners, steps=1)
    seen: list[Tensor] = []
    with trainer._model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach().clone())):
        trainer.step()
    assert torch.equal(seen[0][:9], torch.cat([owners[1].features, owners[0].features]))

    trainer = _trainer(_owners()[::-1])
    trainer.run()
    assert _same(trainer.weights(), reference_weights)


@pytest.mark.parametrize("max_physical_batch", [1, 7, 1024])
def test_microbatches_change_rounding_only(reference_weights: dict[str, Tensor], max_physical_batch: int) -> None:
    trainer = _trainer(max_physical_batch=max_physical_batch)
    trainer.run()
    assert _distance(trainer.weights(), reference_weights) < 1e-5


def test_two_attempts_at_the_same_terms_draw_different_noise() -> None:
    shares, terms = [bytes([n]) * 32 for n in (1, 2, 3)], bytes(32)
    seeds = [
        attempt_seed(shares, terms, 1, b"a" * 32),
        attempt_seed(shares, terms, 2, b"a" * 32),
        attempt_seed(shares, terms, 1, b"b" * 32),
    ]
    weights = []
    for seed in seeds:
        trainer = _trainer(seed=seed)
        trainer.run()
        weights.append(trainer.weights())
    for i, first in enumerate(weights):
        for second in weights[:i]:
            assert all(int((first[name] == second[name]).sum()) == 0 for name in first)


def test_progress_is_reported_and_steps_end_with_the_plan() -> None:
    trainer, seen = _trainer(steps=5), []
    trainer.run(until=2, on_step=seen.append)
    assert trainer.steps_done == 2
    trainer.run(until=100, on_step=seen.append)
    assert seen == [1, 2, 3, 4, 5]
    with pytest.raises(StateError):
        trainer.step()


def test_weights_are_copies_and_nothing_shows_records() -> None:
    trainer = _trainer()
    trainer.weights()["0.weight"].zero_()
    assert float(trainer.weights()["0.weight"].abs().min()) > 0
    assert "tensor" not in repr(_owner("north"))


def test_determinism_is_asked_of_torch_only_while_a_step_runs() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    seen = []
    trainer = _trainer()
    hook = trainer._model.register_forward_pre_hook(
        lambda *_: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    trainer.step()
    hook.remove()
    assert seen and all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


def test_owners_and_records_that_do_not_fit_are_refused() -> None:
    north = _owner("north")
    with pytest.raises(DatasetError):
        OwnerData("north", north.features.double(), north.targets, Fraction(1, 2))
    with pytest.raises(DatasetError):
        OwnerData("north", north.features, north.targets[:-1], Fraction(1, 2))
    with pytest.raises(DatasetError):
        _trainer([north, OwnerData("south", north.features[:, :5], north.targets, Fraction(1, 2))])
    with pytest.raises(ParameterError):
        _trainer([north, _owner("north")])
    with pytest.raises(ParameterError):
        Trainer(_model(), [], _plan(), expected_batch=Fraction(36), seed=SEED)
    with pytest.raises(ParameterError):
        Trainer(_model(), [north], _plan(), expected_batch=Fraction(0), seed=SEED)
    with pytest.raises(ParameterError):
        _trainer(seed=SEED[1:])
    with pytest.raises(ModelError):
        _trainer(loss="binary_cross_entropy")


def _breast_cancer() -> tuple[list[OwnerData], Tensor, Tensor]:
    """Real records, scaled to [-1, 1] by round bounds that were not taken from them; a fifth held out."""
    low = [5, 5, 40, 0, 0.05, 0, 0, 0, 0.1, 0.04] + [0] * 10 + [5, 5, 40, 0, 0.05, 0, 0, 0, 0.1, 0.04]
    high = [30, 40, 200, 2500, 0.2, 0.4, 0.5, 0.25, 0.4, 0.1]
    high += [3, 5, 25, 500, 0.04, 0.15, 0.4, 0.06, 0.08, 0.03]
    high += [40, 50, 250, 4000, 0.25, 1.2, 1.5, 0.3, 0.7, 0.2]
    data = load_breast_cancer()
    scaled = 2 * (np.clip(data.data, low, high) - low) / (np.array(high) - low) - 1
    order = np.random.default_rng(0).permutation(len(scaled))
    features = torch.from_numpy(scaled[order]).float()
    targets = torch.from_numpy(data.target[order]).float()
    thirds = zip(("north", "south", "east"), features[114:].split(152), targets[114:].split(152), strict=True)
    return [OwnerData(name, x, y, Fraction(1, 5)) for name, x, y in thirds], features[:114], targets[:114]


@pytest.mark.parametrize(("noise_multiplier", "low", "high"), [(3.7, 0.92, 1.0), (1000.0, 0.0, 0.7)])
def test_a_model_learns_from_patients_at_a_fair_sigma_and_nothing_at_1000(
    noise_multiplier: float, low: float, high: float
) -> None:
    owners, test_features, test_targets = _breast_cancer()
    accuracies = []
    for seed in range(5):
        model = nn.Linear(30, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        plan = _plan(
            loss="binary_cross_entropy",
            optimizer=SGD(lr=2.0),
            steps=150,
            clipping_norm=0.5,
            noise_multiplier=noise_multiplier,
            max_physical_batch=256,
        )
        Trainer(model, owners, plan, expected_batch=Fraction(456, 5), seed=bytes([seed]) * 32).run()
        with torch.no_grad():
            predicted = model(test_features)[:, 0] > 0
        accuracies.append(float((predicted == (test_targets > 0.5)).float().mean()))
    assert low <= sum(accuracies) / len(accuracies) <= high


def test_a_model_rebuilt_from_its_spec_trains_like_the_original() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )
    rebuilt = build(*trace(original, (1, 4, 4)))
    features = torch.rand(60, 1, 4, 4) * 2 - 1
    owner = OwnerData("north", features, (features.mean(dim=(1, 2, 3)) > 0).long(), Fraction(1, 2))
    trainers = [Trainer(m, [owner], _plan(), expected_batch=Fraction(30), seed=SEED) for m in (original, rebuilt)]
    for trainer in trainers:
        trainer.run()
    assert _distance(trainers[0].weights(), trainers[1].weights()) < 1e-6
