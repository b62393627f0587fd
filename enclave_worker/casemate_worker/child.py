"""The training process: no network, no secrets but its own inputs, one reason for every failure once it saw data.

Run by :mod:`.executor` as ``python -I -m casemate_worker.child``; it cuts itself off before it imports anything large.
"""

from __future__ import annotations

import gc
import math
import os
import sys
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO

from casemate_schemas.codec import decode, digest_of, encode
from casemate_schemas.dataset import DatasetCard
from casemate_schemas.errors import CasemateError, MalformedError, TrainingError
from casemate_schemas.job import DATASET_SECTIONS, DatasetUse, JobSpec, Plan
from casemate_schemas.sections import unpack_sections

from .accelerators import refuse_accelerators
from .environment import MOST_THREADS
from .frames import Coming, Done, Failure, Progress, Start, Train, frame, pieces, read_frame
from .isolation import die_before_parent, die_with_parent, forbid_files, isolate

if TYPE_CHECKING:
    from torch import nn

    from .training.engine import OwnerData


class Child:
    """The conversation from the child's side, top to bottom in :meth:`run`."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink

    def run(self) -> None:
        """
        1. Cut off from everything; say how.
        2. Take spec and weights, build the model, check it against loss and pipeline: errors so far are about the model.
        3. Write to no file any more; take the datasets, then the checkpoint if there is one, and the seed.
        4. Train; tell steps; hand over a checkpoint every so often.
        5. Hand over the weights, or of an audit the counts. From 3 on every failure is the same to the outside.
        """
        isolation = isolate()  # 1
        try:
            self._start()
            self._send(b"R", isolation.encode())
            spec, weights = self._take_model()  # 2
            trainable = self._build(spec, weights)
        except CasemateError as error:
            self._send(b"E", encode(Failure(reason=error.reason, message=str(error)[:2000])))
            return
        self._send(b"R", b"")
        try:
            forbid_files()
            datasets, checkpoint, seed = self._take_data(spec)  # 3
            self._train(spec, trainable, datasets, checkpoint, seed)  # 4, 5
        except Exception:
            self._send(b"E", encode(Failure(reason=TrainingError.reason, message="")))

    def _start(self) -> None:
        start = decode(Start, self._take(b"S"))
        threads = min(start.threads, MOST_THREADS)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        # The slow imports happen here, while the parent is still earning its keys.
        from .training import engine  # noqa: F401
        from .training.memory import keep_freed
        from .training.rows import check_libraries

        refuse_accelerators(simulation=start.simulation)
        check_libraries()
        keep_freed()
        torch.set_num_threads(threads)

    def _take_model(self) -> tuple[JobSpec, bytes]:
        spec = decode(JobSpec, self._take(b"S"))
        return spec, self._take_pieces(b"W", b"p")

    def _build(self, spec: JobSpec, weights: bytes) -> nn.Module:
        """The model; a throw-away copy of it has been through the very code that real records will meet."""
        import torch
        from casemate_models.building import build
        from casemate_models.losses import check_loss
        from casemate_privacy.hardened import check_hardened

        from .privacy_audit import AuditedTraining
        from .training.engine import OwnerData, Trainer

        plan, training = spec.plan, spec.plan.training
        if training.mechanism == "hardened":
            coordinates = sum(math.prod(parameter.shape) for parameter in spec.model.parameters)
            check_hardened(coordinates, training.steps, plan.privacy.epsilon, plan.privacy.delta)
        check_loss(spec.model, training.loss, plan.pipeline)
        kind = torch.int64 if training.loss == "cross_entropy" else torch.float32
        record = torch.zeros(1, *spec.model.input_shape), torch.zeros(1, dtype=kind)
        width = max(use.unit_records for use in plan.datasets)
        subjects = None if plan.privacy.unit == "record" else torch.zeros(1, width, dtype=torch.int64)
        nobody = OwnerData("nobody", *record, Fraction(1), subjects=subjects, bound=1)
        Trainer(build(spec.model, weights), [nobody], training, expected_batch=plan.expected_batch, seed=bytes(32))
        if plan.audit is not None:
            AuditedTraining(build(spec.model, weights), [nobody], plan, bytes(32))
        return build(spec.model, weights)

    def _take_data(self, spec: JobSpec) -> tuple[list[bytes], bytes, bytes]:
        datasets = [self._take_pieces(b"D", b"d") for _ in spec.plan.datasets]
        checkpoint = self._take_pieces(b"C", b"c")
        return datasets, checkpoint, decode(Train, self._take(b"T")).seed

    def _train(self, spec: JobSpec, model: nn.Module, datasets: list[bytes], checkpoint: bytes, seed: bytes) -> None:
        from casemate_models.building import weights_of

        from .training.engine import Trainer

        plan = spec.plan
        owners = [owner_data(spec, use, data) for use, data in zip(plan.datasets, datasets, strict=True)]
        datasets.clear()
        gc.collect()
        if plan.audit is not None:
            self._audit(plan, model, owners, seed)
            return
        trainer = Trainer(model, owners, plan.training, expected_batch=plan.expected_batch, seed=seed)
        if checkpoint:
            trainer.restore(checkpoint)
        every, steps = plan.training.checkpoint_every_steps, plan.training.steps

        def on_step(step: int) -> None:
            self._send(b"P", encode(Progress(step=step)))
            if step % every == 0 and step < steps:
                state = trainer.state()
                self._send(b"C", encode(Coming(bytes=len(state))))
                self._send_pieces(b"c", state)

        trainer.run(on_step=on_step)
        if plan.metrics is not None:
            self._send(b"M", encode(trainer.metrics(plan.metrics)))
        model.load_state_dict(trainer.weights())
        weights = weights_of(model)
        self._send(b"W", encode(Done(clipping=dict(trainer.clipping_strategies), weights_bytes=len(weights))))
        self._send_pieces(b"w", weights)

    def _audit(self, plan: Plan, model: nn.Module, owners: list[OwnerData], seed: bytes) -> None:
        """Train with canaries and say what was guessed about them. Nothing else leaves; an attempt starts from the beginning."""
        from .privacy_audit import AuditedTraining

        audited = AuditedTraining(model, owners, plan, seed)
        audited.trainer.run(on_step=lambda step: self._send(b"P", encode(Progress(step=step))))
        self._send(b"A", encode(audited.counts()))
        self._send(b"W", encode(Done(clipping=audited.clipping_strategies, weights_bytes=0)))

    def _take(self, expected: bytes) -> bytes:
        tag, payload = read_frame(self._source)
        if tag != expected:
            raise MalformedError("frames are out of order")
        return payload

    def _take_pieces(self, piece: bytes, end: bytes) -> bytes:
        data = bytearray()
        while True:
            tag, payload = read_frame(self._source)
            if tag == end:
                return bytes(data)
            if tag != piece:
                raise MalformedError("frames are out of order")
            data += payload

    def _send(self, tag: bytes, payload: bytes | memoryview) -> None:
        self._sink.write(frame(tag, payload))
        self._sink.flush()

    def _send_pieces(self, tag: bytes, data: bytes) -> None:
        for piece in pieces(data):
            self._send(tag, piece)


def owner_data(spec: JobSpec, use: DatasetUse, plaintext: bytes) -> OwnerData:
    """One owner's tensors: the card must be the one in the terms; values are clamped to its bounds.

    Raises :class:`DatasetError` or :class:`MalformedError`.
    """
    import torch
    from casemate_models.pipeline import check_pipeline, examples, read_columns

    from .training.engine import OwnerData
    from .training.subjects import subject_table

    sections = unpack_sections(plaintext, DATASET_SECTIONS)
    card = decode(DatasetCard, bytes(sections["card"]))
    if digest_of(card) != use.card:
        raise MalformedError("the dataset's card is not the one in the terms")
    if (card.privacy_unit == "subject") != (use.subjects is not None):
        raise MalformedError("the dataset's privacy unit is not the one in the terms")
    check_pipeline(spec.plan.pipeline, card, spec.model.input_shape)
    columns = read_columns(bytes(sections["columns"]), card, use.row_bound)
    subjects = None
    if use.subjects is not None and card.subject_column is not None:
        table = subject_table(columns[card.subject_column], use.subjects.max_records, use.subjects.bound)
        subjects = torch.from_numpy(table)
    features, targets = examples(columns, card, spec.plan.pipeline, spec.model.input_shape)
    return OwnerData(
        use.dataset,
        torch.as_tensor(features),
        torch.as_tensor(targets),
        use.sample_rate.fraction,
        subjects=subjects,
        bound=use.units,
    )


def main() -> None:
    """Talk over standard input and output; nothing else may reach either, or standard error."""
    die_with_parent()
    die_before_parent()
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(null, descriptor)
    Child(sys.stdin.buffer, sink).run()


if __name__ == "__main__":
    main()
