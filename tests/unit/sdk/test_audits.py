"""Privacy audits from the SDK's side: asked for, refused before anything is sent, verified, shown."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import casemate as cm
import numpy as np
import pytest
import torch
from casemate.results import load, open_result
from casemate.verification import verify_result
from casemate_privacy.accounting import epsilon
from casemate_privacy.auditing import _factors, audit_report, guess, scaled
from casemate_privacy.statement import job_event
from casemate_schemas.audit import AuditCounts
from casemate_schemas.errors import ParameterError, ReleaseError
from casemate_schemas.job import Audit, Plan
from casemate_schemas.result import ResultManifest
from support.command_line import casemate, network_in, signed_in
from support.fake_gateway import FakeGateway
from support.results import Edits, World

from .test_jobs import opened_job, request_of

CANARIES = 64
COINS = np.arange(CANARIES) % 2 == 0


def counts(accuracy: float) -> AuditCounts:
    """An auditor that ranks so many of the canaries that are in before the others."""
    scores = 1.0 * COINS
    scores[round(CANARIES * accuracy) :] = 0.0
    return guess({"likelihood": scores, "spread": np.zeros(CANARIES)}, COINS)


def audited(plan: Plan) -> Plan:
    changes = {"kind": "privacy_audit", "release": ("audit",), "audit": Audit(canaries=CANARIES)}
    return Plan.model_validate(plan.model_dump() | changes)


def edits(w: World, found: AuditCounts, manifest: Callable[[ResultManifest], ResultManifest], **other: Any) -> Edits:
    """Edits that make the world's result one of an audit."""
    report = audit_report(audited(w.plan()), found)
    fields: dict[str, Any] = {
        "terms": lambda terms: terms.model_copy(update={"plan": audited(terms.plan)}),
        "manifest": lambda message: manifest(message.model_copy(update={"audit": report})),
        "weights": lambda _: b"",
    }
    return Edits(**(fields | other))


def unchanged(manifest: ResultManifest) -> ResultManifest:
    return manifest


def test_an_audit_verifies_opens_without_weights_and_says_what_it_found(w: World, tmp_path: Path) -> None:
    result = open_result(w.result(edits(w, counts(1.0), unchanged)), w.clara, w.expected())
    assert result.audit is not None and result.audit.refutes and result.audit.canaries == CANARIES
    assert result.arrays == {}
    assert "REFUTES the guarantee" in str(result)
    assert result.provenance()["audit"]["one_run_epsilon"] == result.audit.one_run_epsilon
    result.save(tmp_path / "kept")
    assert load(tmp_path / "kept", w.clara).audit == result.audit
    modest = open_result(w.result(edits(w, counts(0.0), unchanged)), w.clara, w.expected())
    assert "does not refute the guarantee" in str(modest)


def changed(**fields: Any) -> Callable[[ResultManifest], ResultManifest]:
    def change(manifest: ResultManifest) -> ResultManifest:
        assert manifest.audit is not None
        return manifest.model_copy(update={"audit": manifest.audit.model_copy(update=fields)})

    return change


WRONG: dict[str, tuple[Callable[[ResultManifest], ResultManifest], dict[str, Any]]] = {
    "another lower bound": (changed(one_run_epsilon=0.5), {}),
    "another bound by the profile": (changed(profile_epsilon=9.0), {}),
    "another guarantee": (changed(epsilon=9.0), {}),
    "other counts": (changed(guesses=counts(0.0).guesses), {}),
    "fewer counts": (changed(guesses=counts(1.0).guesses[:3]), {}),
    "more confidence": (changed(confidence=0.99), {}),
    "another delta": (changed(delta=0.1), {}),
    "more canaries": (changed(canaries=128), {}),
    "no report": (lambda manifest: manifest.model_copy(update={"audit": None}), {}),
    "weights too": (unchanged, {"weights": lambda data: data}),
    "terms of a training": (unchanged, {"terms": lambda terms: terms}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_report_that_does_not_follow_from_its_counts_and_the_terms_is_refused(w: World, name: str) -> None:
    manifest, other = WRONG[name]
    with pytest.raises(ReleaseError, match=r"step 12 \(privacy\)"):
        verify_result(w.result(edits(w, counts(1.0), manifest, **other)), w.clara, w.expected())


def test_a_machine_that_rounds_otherwise_may_find_the_next_step_of_the_grid_and_no_other(w: World) -> None:
    plan, found = audited(w.plan()), counts(0.75)
    event = job_event(plan, plan.datasets[0])
    report, grid = audit_report(plan, found), _factors(event)
    assert report.profile_epsilon > 0
    values = [epsilon(scaled(event, factor), plan.privacy.delta) for factor in grid]
    at = values.index(report.profile_epsilon)
    assert 1 < grid[at + 1] / grid[at] <= 1.01
    for step in (-2, -1, 0, 1, 2):
        result = w.result(edits(w, found, changed(profile_epsilon=values[at + step])))
        if abs(step) <= 1:
            verify_result(result, w.clara, w.expected())
        else:
            with pytest.raises(ReleaseError, match="the audit's profile_epsilon"):
                verify_result(result, w.clara, w.expected())
    between = math.sqrt(values[at] * values[at + 1])
    with pytest.raises(ReleaseError, match="the audit's profile_epsilon"):
        verify_result(w.result(edits(w, found, changed(profile_epsilon=between))), w.clara, w.expected())


def test_how_gradients_were_clipped_is_part_of_a_results_provenance(w: World) -> None:
    strategies = {"0.weight": "ghost", "0.bias": "per_sample", "2.weight": "ghost"}
    edit = Edits(manifest=lambda message: message.model_copy(update={"clipping": strategies}))
    result = open_result(w.result(edit), w.clara, w.expected())
    assert result.provenance()["clipping"] == strategies
    assert ", clipped by ghost (2), per_sample (1)" in str(result)


async def test_an_audit_is_the_training_with_canaries(gateway: FakeGateway, options: dict[str, Any], w: World) -> None:
    torch.set_num_threads(1)
    async with cm.connect(gateway.url, **options) as consortium:
        await consortium.train(**request_of())
        training = opened_job(gateway, w)[0].plan
        await consortium.audit(canaries=200, confidence=0.99, **request_of())
        audit = opened_job(gateway, w)[0].plan
    assert audit.audit == Audit(canaries=200, confidence=0.99)
    alike = {"kind": audit.kind, "audit": audit.audit, "release": audit.release}
    assert training.model_copy(update=alike) == audit
    assert (audit.kind, audit.release) == ("privacy_audit", ("audit",))


@pytest.mark.parametrize(
    "changes",
    [
        {"canaries": 15},
        {"canaries": 10_001},
        {"confidence": 1.0},
        {"confidence": float("nan")},
        {"metrics": cm.Metrics()},
        {"padded_batch": "auto"},
        {"augmentation": cm.Augmentation(multiplicity=2, flip=True)},
        {"privacy": cm.Privacy(3.0, 1e-3, unit="subject")},
        {"audit": 1000},
    ],
    ids=str,
)
async def test_what_no_worker_could_audit_is_refused_before_anything_is_sent(
    gateway: FakeGateway, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    async with cm.connect(gateway.url, **options) as consortium:
        ask = consortium.train if "audit" in changes else consortium.audit
        with pytest.raises(ParameterError):
            await ask(**request_of(**changes))
    assert not gateway.envelopes and not gateway.submissions


async def test_an_audit_from_the_command_line(
    gateway: FakeGateway, w: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed_in(monkeypatch, gateway.url, w.clara.keys, tmp_path)
    line = "jobs submit --dataset cardio@south --target outcome --epsilon 3 --delta 1e-3 --batch-size 50 --steps 20"
    words = [*line.split(), "--lr", "0.5", "--audit", "500", "--model", network_in(tmp_path)]
    assert await asyncio.to_thread(casemate, *words) == 0
    assert opened_job(gateway, w)[0].plan.audit == Audit(canaries=500, confidence=0.95)
