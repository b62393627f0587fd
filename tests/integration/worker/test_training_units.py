"""The training process with subjects, padded batches and metrics: what leaves it says nothing about records but noise."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from casemate_models.building import read_weights
from casemate_models.pipeline import write_columns
from casemate_models.tracing import trace
from casemate_schemas.codec import digest_of, encode
from casemate_schemas.dataset import Column, DatasetCard
from casemate_schemas.job import SGD, DatasetUse, JobSpec, Metrics, Plan, Privacy, Rational, SubjectUse, Training
from casemate_schemas.pipeline import PipelineSpec
from casemate_schemas.sections import pack_sections
from casemate_schemas.signatures import Signed
from casemate_worker.executor import CheckpointReady, StepDone, Trained, TrainingProcess
from support.reports import in_pieces, whole
from torch import nn

SEED = bytes(range(32))
NOBODY = Signed(kind="delegation", payload=b"", signer=bytes(32), signature=bytes(64))
CARD = DatasetCard(
    name="visits",
    owner="north",
    columns=(
        Column(name="a", dtype="float64", lower=-1.0, upper=1.0),
        Column(name="b", dtype="float64", lower=-1.0, upper=1.0),
        Column(name="outcome", dtype="float64", lower=0.0, upper=1.0),
        Column(name="patient", dtype="int64", lower=0.0, upper=1e6),
    ),
    row_bound=200,
    privacy_unit="subject",
    subject_column="patient",
    max_records_per_subject=3,
    subject_bound=50,
)


def visits(patients: int, each: int, *, hostile: bool = False) -> dict[str, np.ndarray]:
    """``each`` visits of each patient: the first ones are the same however many there are."""
    number = np.tile(np.arange(patients), each)
    random = np.random.default_rng(3)
    a, b = random.uniform(-1, 1, (len(number), 2)).T.copy()
    if hostile:
        a[::3], b[1::3] = np.nan, np.inf
    return {"a": a, "b": b, "outcome": (a > 0).astype(np.float64), "patient": 1000 + number}


def job() -> tuple[JobSpec, bytes]:
    torch.manual_seed(0)
    model, weights = trace(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), (2,))
    use = DatasetUse(
        dataset=CARD.id,
        envelope=bytes(32),
        card=digest_of(CARD),
        licence=bytes(32),
        key_broker="north",
        row_bound=CARD.row_bound,
        sample_rate=Rational.of(Fraction(1, 2)),
        subjects=SubjectUse(max_records=3, bound=50),
    )
    plan = Plan(
        purpose="test",
        datasets=(use,),
        pipeline=PipelineSpec(features=("a", "b"), target="outcome", target_kind="binary"),
        training=Training(
            loss="binary_cross_entropy",
            optimizer=SGD(lr=0.5),
            steps=6,
            clipping_norm=1.0,
            noise_multiplier=1.0,
            checkpoint_every_steps=2,
            padded_batch=45,
        ),
        privacy=Privacy(epsilon=3.0, delta=1e-3, unit="subject"),
        recipients=(NOBODY,),
        release=("weights", "metrics"),
        metrics=Metrics(noise_multiplier=1.0, loss_bound=3.0),
    )
    return JobSpec(job_id="0" * 32, salt=bytes(32), model=model, plan=plan), weights


async def reports(columns: dict[str, np.ndarray]) -> list[StepDone | CheckpointReady | Trained]:
    spec, weights = job()
    data = pack_sections({"card": encode(CARD), "columns": write_columns(columns, CARD)})
    async with await TrainingProcess.start(1) as process:
        await process.prepare(spec, in_pieces(weights))
        await process.feed(in_pieces(data))
        return [await whole(report) async for report in process.train(SEED, None)]


def weights_of(trained: Trained) -> np.ndarray:
    """All weights in a row, by name."""
    found = read_weights(job()[0].model, trained.weights)
    return np.concatenate([found[name].numpy().ravel() for name in sorted(found)])


def shape_of(report: StepDone | CheckpointReady | Trained) -> tuple[object, ...]:
    """All of a report that anyone can see who does not hold its keys."""
    match report:
        case StepDone(step):
            return "step", step
        case CheckpointReady(step, state):
            return "checkpoint", step, len(state)
        case Trained():
            return "trained", len(report.weights), report.metrics and len(encode(report.metrics))


async def test_events_and_sizes_do_not_depend_on_records_and_those_beyond_the_cap_change_nothing() -> None:
    three, four = await reports(visits(40, 3)), await reports(visits(40, 4))
    others = await reports(visits(7, 2, hostile=True))
    shapes = [shape_of(report) for report in three]
    assert shapes == [shape_of(report) for report in others]
    assert [shape[0] for shape in shapes] == ["step", "step", "checkpoint"] * 2 + ["step", "step", "trained"]
    first, more, last = three[-1], four[-1], others[-1]
    assert isinstance(first, Trained)
    assert isinstance(more, Trained)
    assert isinstance(last, Trained)
    # Processes of their own may choose other strategies, which round differently.
    assert np.allclose(weights_of(first), weights_of(more), atol=1e-3)
    assert not np.allclose(weights_of(first), weights_of(last), atol=1e-2)
    assert first.metrics is not None
    assert last.metrics is not None
    assert more.metrics is not None
    assert (more.metrics.count, more.metrics.right) == (first.metrics.count, first.metrics.right)
    assert abs(first.metrics.count - 40) < 5 * first.metrics.noise_std < 40
    assert first.metrics.count - last.metrics.count == 33, "one seed, one noise: subjects are counted, not records"
