"""Plans of audits: what they may say, and that a kind of job nobody knows is no plan at all."""

from __future__ import annotations

from typing import Any

import pytest
from casemate_schemas.audit import Guesses
from casemate_schemas.codec import decode, encode, pack, unpack
from casemate_schemas.errors import MalformedError
from casemate_schemas.job import Audit, Augmentation, Metrics, Plan
from casemate_schemas.signatures import Signed
from pydantic import ValidationError

from .test_terms import a_plan

NOBODY = Signed(kind="delegation", payload=b"", signer=bytes(32), signature=bytes(64))
AUDIT: dict[str, Any] = {"kind": "privacy_audit", "release": ("audit",), "audit": Audit(canaries=100)}


def a_plan_with(**changes: Any) -> Plan:
    return Plan.model_validate(a_plan((NOBODY,)).model_dump() | changes)


def test_an_audits_plan_survives_its_encoding() -> None:
    plan = a_plan_with(**AUDIT)
    assert decode(Plan, encode(plan)) == plan


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "train"},
        {"release": ("weights",)},
        {"release": ("weights", "audit")},
        {"audit": None},
        {"metrics": Metrics(noise_multiplier=5.0, loss_bound=1.0)},
        {"training": {"padded_batch": 50}},
        {"training": {"augmentation": Augmentation(multiplicity=2, flip=True)}},
        {"audit": {"canaries": 15}},
        {"audit": {"canaries": 10_001}},
        {"audit": {"canaries": 100, "confidence": 1.0}},
    ],
    ids=str,
)
def test_an_audit_is_for_a_report_alone_and_of_what_can_be_audited(changes: dict[str, Any]) -> None:
    training = a_plan((NOBODY,)).training.model_dump() | changes.get("training", {})
    with pytest.raises(ValidationError):
        a_plan_with(**(AUDIT | changes | {"training": training}))


@pytest.mark.parametrize("changes", [{"audit": Audit(canaries=100)}, {"release": ("audit",)}])
def test_a_training_is_for_weights(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        a_plan_with(**changes)


@pytest.mark.parametrize("kind", ["audit", "evaluate", "", "TRAIN"])
def test_kinds_that_nobody_knows_are_refused(kind: str) -> None:
    fields = dict(unpack(encode(a_plan_with(**AUDIT))))
    with pytest.raises(MalformedError):
        decode(Plan, pack(fields | {"kind": kind}))


@pytest.mark.parametrize(("top", "bottom", "correct"), [(3, 2, 6), (0, 0, 0), (-1, 5, 2), (10_000, 1, 5)])
def test_counts_that_cannot_be_are_refused(top: int, bottom: int, correct: int) -> None:
    with pytest.raises(ValidationError):
        Guesses(score="likelihood", top=top, bottom=bottom, correct=correct)
