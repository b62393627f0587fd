"""A valid result verifies; each step, broken alone, is the one named."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from casemate.identity import Identity, new_person
from casemate.results import load, open_result
from casemate.verification import verify_result
from casemate_privacy.statement import privacy_statement
from casemate_schemas.attestation_policy import AttestationPolicy
from casemate_schemas.consortium import ManifestChain, verify_chain
from casemate_schemas.envelope import PREFIX_BYTES
from casemate_schemas.errors import ReleaseError
from casemate_schemas.evidence import SevSnp
from casemate_schemas.job import Metrics, Plan, Privacy
from casemate_schemas.metrics import MetricSums, noise_std
from casemate_schemas.signatures import SigningKey
from support.results import JOB_ID, WEIGHTS, Edits, World, world


@pytest.fixture(scope="module")
def w() -> World:
    return world()


def update(**changes: Any) -> Callable[[Any], Any]:
    """An edit that sets fields."""
    return lambda message: message.model_copy(update=changes)


def failing(w: World, edits: Edits, **expected: Any) -> str:
    """What the release error says."""
    with pytest.raises(ReleaseError) as caught:
        verify_result(w.result(edits), w.clara, w.expected(**expected))
    return str(caught.value)


@pytest.mark.parametrize("successor", [True, False])
def test_a_valid_result_verifies_in_twelve_steps_without_a_network(
    w: World, successor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", None)
    verified = verify_result(w.result(successor=successor), w.clara, w.expected())
    steps = verified.verification.steps
    assert [step.number for step in steps] == list(range(1, 13))
    assert steps[2].by == "lab, north, south"
    assert verified.verification.simulation and "SIMULATED" in str(verified.verification)
    assert [owner.dataset for owner in verified.manifest.privacy.owners] == ["cardio@north", "cardio@south"]


def test_the_docstring_and_the_body_number_the_same_steps(w: World) -> None:
    text = verify_result.__doc__ or ""
    for step in verify_result(w.result(), w.clara, w.expected()).verification.steps:
        assert f"{step.number}. *{step.name}*" in text


OTHER = b"\x77" * 32
STRANGER = SigningKey.generate()


def flip(data: bytes, index: int) -> bytes:
    changed = bytearray(data)
    changed[index] ^= 1
    return bytes(changed)


def first_changed(**changes: Any) -> Callable[[Any], Any]:
    """An edit of north's Grant or receipt alone."""
    return lambda message: message.model_copy(update=changes) if message.key_broker == "north" else message


ASKED = Metrics(noise_multiplier=20.0, loss_bound=5.0)
METRICS = MetricSums(
    count=390.0,
    right=200.0,
    loss=-300.0,
    noise_std=noise_std("binary_cross_entropy", ASKED.noise_multiplier),
    loss_bound=ASKED.loss_bound,
)
OF_A_REGRESSION = METRICS.model_copy(update={"right": None})


def _with_metrics(plan: Plan) -> Plan:
    return plan.model_copy(update={"metrics": ASKED, "release": ("weights", "metrics")})


ASKING: dict[str, Any] = {
    "terms": lambda terms: terms.model_copy(update={"plan": _with_metrics(terms.plan)}),
    "statement": lambda _: privacy_statement(_with_metrics(world().plan())),
}
"""Edits to a result whose terms ask for metrics, and which states what that costs."""

BROKEN: list[tuple[str, str, Edits]] = [
    ("step 1 (release)", "another signer", Edits(release_signer=STRANGER)),
    ("step 1 (release)", "another consortium", Edits(release=update(consortium=OTHER))),
    ("step 1 (release)", "another job", Edits(release=update(job_id="f" * 32))),
    ("step 3 (grants)", "other terms than its evidence", Edits(release=update(terms=OTHER))),
    ("step 2 (manifest)", "an unknown version", Edits(claims=update(manifest=OTHER))),
    ("step 2 (manifest)", "another chain", Edits(chain=lambda c: _resigned_chain())),
    (
        "step 2 (manifest)",
        "a chain of their own",
        Edits(
            chain=lambda c: _resigned_chain(),
            claims=lambda claims: claims.model_copy(update={"manifest": _resigned_chain().manifests[-1].digest}),
        ),
    ),
    ("step 3 (grants)", "evidence of another consortium", Edits(claims=update(consortium=OTHER))),
    ("step 3 (grants)", "evidence of another job", Edits(claims=update(job_id="f" * 32))),
    ("step 7 (envelope)", "of another consortium", Edits(envelope_consortium=OTHER)),
    ("step 9 (terms)", "terms of another job", Edits(terms=update(job_id="f" * 32))),
    ("step 9 (terms)", "a key broker left out", Edits(grants=lambda g: g[:2], receipts=lambda r: r[:2])),
    ("step 10 (training worker)", "a key broker left out", Edits(trained_grants=lambda g: g[:2])),
    ("step 10 (training worker)", "of another consortium", Edits(trained_claims=update(consortium=OTHER))),
    ("step 10 (training worker)", "of another manifest", Edits(trained_claims=update(manifest=OTHER))),
    ("step 10 (training worker)", "of other terms", Edits(trained_claims=update(terms=OTHER))),
    ("step 3 (grants)", "signed by a stranger", Edits(grant_signer=STRANGER)),
    ("step 3 (grants)", "another manifest number", Edits(grant=first_changed(manifest_number=7))),
    ("step 3 (grants)", "another consortium", Edits(grant=first_changed(consortium=OTHER))),
    ("step 3 (grants)", "another manifest", Edits(grant=first_changed(manifest=OTHER))),
    ("step 3 (grants)", "another job", Edits(grant=first_changed(job_id="f" * 32))),
    ("step 3 (grants)", "other terms", Edits(grant=first_changed(terms=OTHER))),
    ("step 3 (grants)", "another attempt", Edits(grant=first_changed(attempt=9))),
    ("step 3 (grants)", "other evidence", Edits(grant=first_changed(evidence=OTHER))),
    ("step 3 (grants)", "another worker key", Edits(grant=first_changed(worker_key=OTHER))),
    ("step 3 (grants)", "another result committed", Edits(grant=first_changed(committed=OTHER))),
    ("step 3 (grants)", "granted twice", Edits(grants=lambda grants: (*grants, grants[0]))),
    ("step 4 (evidence)", "another measurement", Edits(evidence=lambda e: _measured(e, b"\x66" * 48))),
    ("step 4 (evidence)", "report of other claims", Edits(evidence=lambda e: _measured(e, None))),
    ("step 4 (evidence)", "before the certificates", Edits(grant=first_changed(issued=1000))),
    ("step 5 (receipts)", "signed by a stranger", Edits(receipt_signer=STRANGER)),
    ("step 5 (receipts)", "another consortium", Edits(receipt=first_changed(consortium=OTHER))),
    ("step 5 (receipts)", "another job", Edits(receipt=first_changed(job_id="f" * 32))),
    ("step 5 (receipts)", "other terms", Edits(receipt=first_changed(terms=OTHER))),
    ("step 5 (receipts)", "another result", Edits(receipt=first_changed(result=OTHER))),
    ("step 5 (receipts)", "one missing", Edits(receipts=lambda receipts: receipts[1:])),
    ("step 5 (receipts)", "one twice", Edits(receipts=lambda receipts: (*receipts, receipts[0]))),
    ("step 6 (inclusion)", "another root", Edits(proof=update(root=OTHER))),
    ("step 6 (inclusion)", "another place", Edits(proof=update(index=1))),
    ("step 6 (inclusion)", "a refusal's entry", Edits(audit_entry=update(event="refused"))),
    ("step 6 (inclusion)", "another result's entry", Edits(audit_entry=update(result=OTHER))),
    ("step 6 (inclusion)", "another terms' entry", Edits(audit_entry=update(terms=OTHER))),
    ("step 6 (inclusion)", "another job's entry", Edits(audit_entry=update(subject="f" * 32))),
    ("step 6 (inclusion)", "another broker's entry", Edits(audit_entry=update(key_broker="east"))),
    ("step 7 (envelope)", "a changed ciphertext", Edits(envelope=lambda data: flip(data, -1))),
    ("step 7 (envelope)", "a changed head", Edits(envelope=lambda data: flip(data, PREFIX_BYTES + 200))),
    ("step 7 (envelope)", "a shorter one", Edits(envelope=lambda data: data[:-1])),
    ("step 7 (envelope)", "another result", Edits(envelope=lambda _: world().result().envelope)),
    (
        "step 8 (opening)",
        "sealed to someone else",
        Edits(sealed_keys=lambda keys: (keys[0].model_copy(update={"recipient": OTHER}),)),
    ),
    ("step 8 (opening)", "a changed seal", Edits(sealed_keys=lambda keys: (_flipped_seal(keys[0]),))),
    ("step 9 (terms)", "other terms inside", Edits(manifest=lambda m: m.model_copy(update={"terms": _other_terms()}))),
    ("step 9 (terms)", "not signed by the submitter", Edits(terms_signer=STRANGER)),
    (
        "step 9 (terms)",
        "one recipient too many",
        Edits(sealed_keys=lambda keys: (*keys, keys[0].model_copy(update={"recipient": OTHER}))),
    ),
    (
        "step 9 (terms)",
        "another licence granted",
        Edits(grant=lambda h: h if h.key_broker != "north" else h.model_copy(update={"licences": (OTHER,)})),
    ),
    (
        "step 9 (terms)",
        "another version granted",
        Edits(grant=lambda h: h if h.key_broker != "north" else h.model_copy(update={"envelopes": (OTHER,)})),
    ),
    ("step 10 (training worker)", "sealed by someone else", Edits(result_signer=STRANGER)),
    ("step 10 (training worker)", "granted other evidence", Edits(trained_grant=first_changed(evidence=OTHER))),
    ("step 10 (training worker)", "another measurement", Edits(trained_evidence=lambda e: _measured(e, b"\x66" * 48))),
    ("step 10 (training worker)", "another licence", Edits(trained_grant=first_changed(licences=(OTHER,)))),
    ("step 10 (training worker)", "another job's worker", Edits(trained_claims=update(job_id="f" * 32))),
    ("step 11 (result manifest)", "another consortium", Edits(manifest=update(consortium=OTHER))),
    ("step 11 (result manifest)", "another job", Edits(manifest=update(job_id="f" * 32))),
    ("step 11 (result manifest)", "says it is not simulated", Edits(manifest=update(simulation=False))),
    ("step 12 (privacy)", "understated epsilon", Edits(statement=lambda s: _owner_changed(s, epsilon=0.1))),
    ("step 12 (privacy)", "another delta", Edits(statement=lambda s: _owner_changed(s, delta=1e-9))),
    ("step 12 (privacy)", "fewer steps", Edits(statement=lambda s: _noise_changed(s, steps=1))),
    ("step 12 (privacy)", "another mechanism", Edits(statement=lambda s: s.model_copy(update={"mechanism": "exact"}))),
    ("step 12 (privacy)", "more noise", Edits(statement=lambda s: _noise_changed(s, noise_multiplier=9.0))),
    (
        "step 12 (privacy)",
        "one owner left out",
        Edits(statement=lambda s: s.model_copy(update={"owners": s.owners[:1]})),
    ),
    ("step 12 (privacy)", "a person's epsilon", Edits(statement=update(person_epsilon=0.5))),
    ("step 12 (privacy)", "another unit", Edits(statement=update(unit="subject"))),
    ("step 12 (privacy)", "metrics nobody asked for", Edits(manifest=update(metrics=METRICS))),
    ("step 12 (privacy)", "metrics left out", Edits(**ASKING)),
    (
        "step 12 (privacy)",
        "metrics with less noise than asked for",
        Edits(**ASKING, manifest=update(metrics=METRICS.model_copy(update={"noise_std": 0.1}))),
    ),
    ("step 12 (privacy)", "metrics of a regression", Edits(**ASKING, manifest=update(metrics=OF_A_REGRESSION))),
    (
        "step 12 (privacy)",
        "metrics not charged",
        Edits(**ASKING | {"statement": update()}, manifest=update(metrics=METRICS)),
    ),
    ("step 12 (privacy)", "no person's epsilon", Edits(statement=update(person_epsilon=None))),
    (
        "step 12 (privacy)",
        "over the target",
        Edits(
            terms=lambda t: t.model_copy(
                update={"plan": t.plan.model_copy(update={"privacy": Privacy(epsilon=0.5, delta=1e-3)})}
            )
        ),
    ),
]


@pytest.mark.parametrize(("step", "how", "edits"), BROKEN, ids=[f"{step}: {how}" for step, how, _ in BROKEN])
def test_each_step_broken_alone_is_named(w: World, step: str, how: str, edits: Edits) -> None:
    assert failing(w, edits).startswith(f"{step}: "), how


def test_metrics_that_were_asked_for_are_read_with_their_error_bars(w: World) -> None:
    result = open_result(w.result(Edits(**ASKING, manifest=update(metrics=METRICS))), w.clara, w.expected())
    assert result.metrics is not None
    assert result.metrics.accuracy is not None
    assert result.metrics.accuracy.value == pytest.approx((1 + 200 / 390) / 2)
    assert result.metrics.accuracy.error == pytest.approx(1.96 * 34.64 * np.hypot(1, 200 / 390) / 390 / 2, rel=1e-3)
    assert result.provenance()["metrics"]["training accuracy"] == str(result.metrics.accuracy)
    assert "training accuracy 0.756" in str(result)
    assert open_result(w.result(), w.clara, w.expected()).metrics is None


def test_terms_must_be_those_submitted_from_here(w: World) -> None:
    assert failing(w, Edits(), terms=OTHER).startswith("step 9 (terms): ")
    terms = w.terms().digest
    assert verify_result(w.result(), w.clara, w.expected(terms=terms)).terms.digest == terms


def test_a_recipient_must_say_whose_result_they_expect(w: World) -> None:
    dora = _person(w, "dora")
    bundle = w.result(recipients=(w.clara, dora))
    with pytest.raises(ReleaseError, match=r"step 9 \(terms\): clara@lab submitted them: pass submitter='clara@lab'"):
        verify_result(bundle, dora, w.expected())
    with pytest.raises(ReleaseError, match=r"step 9 \(terms\)"):
        verify_result(bundle, dora, w.expected(submitter="mallory@lab"))
    assert verify_result(bundle, dora, w.expected(submitter="clara@lab")).terms.submitter.person == "clara"


def test_an_older_manifest_of_the_chain_still_verifies_by_its_own_policy(w: World) -> None:
    newer = ManifestChain(manifests=(*w.chain.manifests, w.next_manifest(name="renamed")))
    verified = verify_result(replace(w.result(), chain=newer), w.clara, w.expected())
    assert verified.verification.steps[1].finding == "number 1 of two hospitals and a lab"


def test_each_worker_is_held_to_the_manifest_it_worked_under(w: World) -> None:
    """The manifest may change between the training and the release; the terms are older than both."""
    other = AttestationPolicy(**dict(w.consortium.manifest.attestation) | {"measurements": (b"\x66" * 48,)})
    for policy, fails in ((w.consortium.manifest.attestation, False), (other, True)):
        newer = ManifestChain(manifests=(*w.chain.manifests, w.next_manifest(attestation=policy)))
        second = verify_chain(newer)
        claims = update(manifest=second.digest)
        grant = update(manifest=second.digest, manifest_number=2)
        chain = update(manifests=newer.manifests)
        released_later = w.result(Edits(claims=claims, grant=grant, chain=chain))
        trained_later = w.result(Edits(trained_claims=claims, trained_grant=grant, chain=chain))
        steps = (r"step 4 \(evidence\)", r"step 10 \(training worker\)")
        for bundle, step in zip((released_later, trained_later), steps, strict=True):
            if fails:
                with pytest.raises(ReleaseError, match=f"{step}: ✗ measurement"):
                    verify_result(bundle, w.clara, w.expected())
            else:
                assert verify_result(bundle, w.clara, w.expected()).terms.terms.manifest_number == 1


@pytest.mark.parametrize("demanded", [{"crl_required": True}, {"max_crl_age_s": 3600}])
def test_a_result_can_be_verified_where_key_brokers_need_a_revocation_list(w: World, demanded: dict[str, Any]) -> None:
    policy = AttestationPolicy(**dict(w.consortium.manifest.attestation) | demanded)
    newer = ManifestChain(manifests=(*w.chain.manifests, w.next_manifest(attestation=policy)))
    claims, grant = update(manifest=verify_chain(newer).digest), update(manifest_number=2)
    edits = Edits(claims=claims, grant=lambda header: grant(claims(header)), chain=update(manifests=newer.manifests))
    verified = verify_result(w.result(edits), w.clara, w.expected())
    assert verified.verification.steps[1].finding.startswith("number 2")
    with pytest.raises(ReleaseError, match=r"step 4 \(evidence\): ✗ measurement"):
        verify_result(w.result(replace(edits, evidence=lambda e: _measured(e, b"\x66" * 48))), w.clara, w.expected())


def test_a_result_opens_saves_and_is_verified_again_from_its_files(w: World, tmp_path: Any) -> None:
    result = open_result(w.result(), w.clara, w.expected())
    np.testing.assert_array_equal(result.arrays["0.weight"], WEIGHTS["0.weight"])
    assert "SIMULATED" in str(result)
    result.save(tmp_path / "out")
    again = load(tmp_path / "out", w.clara.keys)
    assert again.provenance() == result.provenance()
    assert again.provenance()["job_id"] == JOB_ID and again.provenance()["simulation"] is True
    stored = tmp_path / "out" / "result"
    stored.write_bytes(flip(stored.read_bytes(), -1))
    with pytest.raises(ReleaseError, match=r"step 7 \(envelope\)"):
        load(tmp_path / "out", w.clara.keys)


def test_weights_are_tensors_that_do_not_share_memory_with_the_arrays(w: World) -> None:
    result = open_result(w.result(), w.clara, w.expected())
    result.weights["0.bias"].zero_()
    assert result.arrays["0.bias"][0] == np.float32(0.125)


def _person(w: World, name: str) -> Identity:
    keys = new_person(
        w.members["lab"],
        consortium=w.consortium.id,
        member="lab",
        person=name,
        roles=("scientist",),
        not_before=w.now - 1000,
    )
    return Identity.of(keys)


def _resigned_chain() -> ManifestChain:
    w = world()
    return ManifestChain(manifests=(w.next_manifest(number=1, previous=None, name="another"),))


def _measured(evidence: Any, measurement: bytes | None) -> Any:
    """Evidence with a genuine report of another measurement, or of no report data."""
    w = world()
    template = w.chip.launch(measurement or b"\x4d" * 48).template
    data = evidence.claims.report_data if measurement else bytes(64)
    report = w.chip.sign(replace(template, report_data=data).body())
    component = SevSnp(report=report, certificates=w.chip.certificates)
    return evidence.model_copy(update={"components": (component,)})


def _flipped_seal(sealed: Any) -> Any:
    return sealed.model_copy(update={"ciphertext": flip(sealed.ciphertext, -1)})


def _other_terms() -> Any:
    return world().terms(update(deadline=world().now + 9_000_000))


def _noise_changed(statement: Any, **changes: Any) -> Any:
    first, *rest = statement.noise
    return statement.model_copy(update={"noise": (first.model_copy(update=changes), *rest)})


def _owner_changed(statement: Any, **changes: Any) -> Any:
    first, *rest = statement.owners
    return statement.model_copy(update={"owners": (first.model_copy(update=changes), *rest)})
