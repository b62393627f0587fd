"""``casemate jobs submit --plan``: a file says what the Python call says, and options go before it."""

from __future__ import annotations

import asyncio
import inspect
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import casemate as cm
import pytest
from casemate.cli.plan_file import TrainingPlan, read_plan
from casemate_schemas.admission import Routing
from casemate_schemas.errors import ParameterError, SetupError
from click import UsageError
from support.command_line import casemate, network_in, signed_in
from support.fake_gateway import FakeGateway
from support.results import World

from .test_jobs import opened_job

CHECKOUT = Path(__file__).parents[3]
WHOLE = """
datasets = ["cardio@south", "cardio@north"]
target = "outcome"
features = ["age"]
input_shape = [1]
batch_size = 64
epochs = 3
loss = "binary_cross_entropy"
scaling = "unit"
purpose = "care"
deadline_s = 3600
max_physical_batch = 128
checkpoint_every_steps = 7
mechanism = "exact"
padded_batch = "auto"
priority = "high"
not_before = 2026-12-01T22:00:00+01:00

[privacy]
epsilon = 3
delta = 1e-5
clipping_norm = 0.5
unit = "subject"

[optimizer]
optimizer = "adam"
lr = 0.01
bias_correction = "dp"

[lr_schedule]
warmup_steps = 20
decay = "cosine"

[[noise_schedule]]
first_step = 200
factor = 0.8

[averaging]
decay = 0.95

[augmentation]
multiplicity = 8
shift = 2

[metrics]
epsilon_share = 0.1
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_a_file_says_all_that_the_python_call_takes(tmp_path: Path) -> None:
    found = read_plan(written(tmp_path, WHOLE), {}).arguments
    assert found == {
        "datasets": ("cardio@south", "cardio@north"),
        "target": "outcome",
        "features": ("age",),
        "input_shape": (1,),
        "batch_size": 64,
        "epochs": 3.0,
        "steps": None,
        "loss": "binary_cross_entropy",
        "scaling": "unit",
        "purpose": "care",
        "deadline_s": 3600.0,
        "max_physical_batch": 128,
        "checkpoint_every_steps": 7,
        "mechanism": "exact",
        "padded_batch": "auto",
        "priority": "high",
        "not_before": datetime(2026, 12, 1, 22, tzinfo=timezone(timedelta(hours=1))),
        "privacy": cm.Privacy(epsilon=3.0, delta=1e-5, clipping_norm=0.5, unit="subject"),
        "optimizer": cm.Adam(lr=0.01, bias_correction="dp"),
        "lr_schedule": cm.LrSchedule(warmup_steps=20, decay="cosine"),
        "noise_schedule": (cm.NoisePhase(first_step=200, factor=0.8),),
        "averaging": cm.Averaging(decay=0.95),
        "augmentation": cm.Augmentation(multiplicity=8, shift=2),
        "metrics": cm.Metrics(epsilon_share=0.1),
        "audit": None,
    }


def test_the_file_in_the_documentation_is_one(tmp_path: Path) -> None:
    guide = (CHECKOUT / "docs" / "sdk.md").read_text(encoding="utf-8")
    text = guide.split("```toml\n")[1].partition("```")[0]
    assert read_plan(written(tmp_path, text), {}).noise_schedule == (cm.NoisePhase(first_step=200, factor=0.8),)


def test_every_argument_of_the_python_call_has_its_name_and_default_here() -> None:
    parameters = dict(inspect.signature(cm.Consortium.train).parameters)
    for name in ("self", "model", "recipients", "job_id"):
        del parameters[name]
    assert set(parameters) == set(TrainingPlan.model_fields)
    for name, field in TrainingPlan.model_fields.items():
        if not field.is_required():
            assert field.default == parameters[name].default, name


def test_options_go_before_the_file(tmp_path: Path) -> None:
    options = {"datasets": ("a@b",), "steps": 10, "lr": 0.5, "epsilon": 1.0, "audit": None, "features": ()}
    found = read_plan(written(tmp_path, WHOLE), options)
    assert (found.datasets, found.steps, found.epochs, found.features) == (("a@b",), 10, None, ("age",))
    assert found.privacy == cm.Privacy(epsilon=1.0, delta=1e-5, clipping_norm=0.5, unit="subject")
    assert found.optimizer == cm.Adam(lr=0.5, bias_correction="dp")


def test_without_a_file_what_is_missing_is_named() -> None:
    options: dict[str, Any] = {"datasets": ("a@b",), "target": "y", "epsilon": 1.0, "delta": 1e-3, "batch_size": 8}
    with pytest.raises(UsageError, match=r"--lr, or optimizer\.lr"):
        read_plan(None, options)
    assert read_plan(None, options | {"lr": 0.1}).optimizer == cm.SGD(lr=0.1)


def test_a_confidence_alone_makes_no_audit_of_a_training(tmp_path: Path) -> None:
    options: dict[str, Any] = {"confidence": 0.9, "datasets": ("a@b",), "target": "y"}
    options |= {"epsilon": 1.0, "delta": 1e-3, "batch_size": 8, "lr": 0.1}
    with pytest.raises(UsageError, match=r"--audit, or a table \[audit\]"):
        read_plan(None, options)
    assert read_plan(None, options | {"audit": 50}).audit == cm.Audit(canaries=50, confidence=0.9)
    file = written(tmp_path, "[audit]\ncanaries = 60\n")
    assert read_plan(file, options).audit == cm.Audit(canaries=60, confidence=0.9)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (WHOLE.replace("decay = 0.95", "decay = 2"), "Averaging: decay"),
        (WHOLE.replace("warmup_steps", "warm_steps"), "LrSchedule: warm_steps"),
        (WHOLE.replace("clipping_norm", "clip"), "Privacy: clip: no such parameter"),
        (WHOLE.replace("clipping_norm = 0.5", 'clipping_norm = "0.5"'), "Privacy: expected numbers"),
        (WHOLE.replace("epsilon = 3", "epsilon = nan"), "Privacy: epsilon"),
        (WHOLE.replace("epsilon_share = 0.1", "share = 0.1"), "Metrics: share: no such parameter"),
        (WHOLE.replace('optimizer = "adam"', 'optimizer = "lion"'), "optimizer"),
        ("optimizer = 3\n" + WHOLE.replace("[optimizer]", "[other]"), r"expected a table, \[optimizer\]"),
        ("surprise = 1\n" + WHOLE, "surprise"),
        (WHOLE.replace('"high"', '"urgent"'), "priority"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        read_plan(written(tmp_path, text), {})


def test_a_file_that_is_none_is_a_setup_error(tmp_path: Path) -> None:
    for text in ("lr == 3", "a = " + "[" * 5000, "#" * (65 << 10)):
        with pytest.raises(SetupError, match="plan"):
            read_plan(written(tmp_path, text), {})


async def test_a_job_from_a_file_on_the_command_line(
    gateway: FakeGateway, w: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed_in(monkeypatch, gateway.url, w.clara.keys, tmp_path)
    plan = written(
        tmp_path,
        """
        datasets = ["cardio@south"]
        target = "outcome"
        batch_size = 50
        privacy = { epsilon = 3.0, delta = 1e-3 }
        optimizer = { lr = 0.5, momentum = 0.9 }
        mechanism = "exact"
        averaging = { decay = 0.9 }
        """,
    )
    begins = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")
    words = ["jobs", "submit", "--plan", str(plan), "--model", network_in(tmp_path)]
    more = ["--steps", "20", "--not-before", begins, "--priority", "low"]
    assert await asyncio.to_thread(casemate, *words, *more) == 0
    training = opened_job(gateway, w)[0].plan.training
    assert (training.mechanism, training.steps, training.optimizer.momentum) == ("exact", 20, 0.9)  # type: ignore[union-attr]
    routing = gateway.submissions[-1].routing.peek(Routing)
    assert routing.not_before == datetime.fromisoformat(begins).timestamp() * 1000
    assert routing.priority == "low"
    assert await asyncio.to_thread(casemate, *words) == 1
    assert await asyncio.to_thread(casemate, *words, "--not-before", "tomorrow") == 2
