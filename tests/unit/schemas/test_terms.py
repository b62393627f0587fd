"""Terms as every party checks them: each numbered step of ``verify_terms``, broken once."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import (
    AuthenticationError,
    AuthorisationError,
    CasemateError,
    MalformedError,
    ManifestError,
    ParameterError,
    SignatureError,
    UnavailableError,
)
from casemate_schemas.identity import Delegation
from casemate_schemas.job import SGD, DatasetUse, JobSpec, Plan, Privacy, Rational, SubjectUse, Training
from casemate_schemas.keyring import KeyRing
from casemate_schemas.model import ModelSpec, Node, Parameter
from casemate_schemas.pipeline import PipelineSpec
from casemate_schemas.signatures import Signed, SigningKey, sign
from casemate_schemas.terms import Terms, verify_terms, weights_commitment
from pydantic import ValidationError

from .conftest import NOW, Parties, amended

OTHER = b"\x0b" * 32
HOUR_MS = 3_600_000


def a_use(owner: str = "north", **changed: Any) -> DatasetUse:
    fields: dict[str, Any] = {
        "dataset": f"cardio@{owner}",
        "envelope": bytes(32),
        "card": bytes(32),
        "licence": bytes(32),
        "key_broker": owner,
        "row_bound": 100,
        "sample_rate": Rational.of(Fraction(1, 4)),
    }
    return DatasetUse(**{**fields, **changed})


def a_plan(recipients: tuple[Signed, ...], *uses: DatasetUse) -> Plan:
    return Plan(
        purpose="research",
        datasets=uses or (a_use("north"), a_use("south")),
        pipeline=PipelineSpec(features=("age",), target="outcome", target_kind="binary"),
        training=Training(
            loss="binary_cross_entropy", optimizer=SGD(lr=0.1), steps=10, clipping_norm=1.0, noise_multiplier=2.0
        ),
        privacy=Privacy(epsilon=3.0, delta=1e-4),
        recipients=recipients,
    )


class Clara:
    """A scientist of the university, and her terms."""

    def __init__(self, parties: Parties, **person: Any) -> None:
        self.parties = parties
        self.keys, self.delegation = parties.person("university", **person)

    def terms(self, **changed: Any) -> Terms:
        consortium = self.parties.consortium
        fields: dict[str, Any] = {
            "consortium": consortium.id,
            "manifest": consortium.digest,
            "manifest_number": 1,
            "job_id": "0" * 32,
            "created": NOW,
            "deadline": NOW + HOUR_MS,
            "submitter": self.delegation,
            "job_key_broker": "university",
            "plan": a_plan((self.delegation,)),
            "job_spec_commitment": bytes(32),
            "initial_weights_commitment": bytes(32),
        }
        return Terms(**{**fields, **changed})

    def refused(self, error: type[CasemateError], words: str, signer: SigningKey | None = None, **changed: Any) -> None:
        signed = sign(self.terms(**changed), signer or self.keys.signing)
        with pytest.raises(error, match=words):
            verify_terms(signed, self.parties.consortium)


@pytest.fixture
def clara(parties: Parties) -> Clara:
    return Clara(parties)


def test_right_terms_name_the_people_in_them(clara: Clara, parties: Parties) -> None:
    _, nora = parties.person("north", roles=("steward",))
    signed = sign(clara.terms(plan=a_plan((clara.delegation, nora))), clara.keys.signing)
    verified = verify_terms(signed, parties.consortium)
    assert verified.digest == signed.digest
    assert verified.submitter_actor.member == "university"
    assert [actor.member for actor in verified.recipient_actors] == ["university", "north"]
    assert verified.terms.key_brokers == ("north", "south", "university")


def test_1_another_consortium_or_manifest(clara: Clara) -> None:
    clara.refused(ManifestError, "another consortium", consortium=OTHER)
    clara.refused(ManifestError, "another manifest", manifest=OTHER)
    clara.refused(ManifestError, "another manifest", manifest_number=0)
    clara.refused(UnavailableError, "not seen here yet", manifest_number=2)


def test_1_an_earlier_manifest_of_the_chain_judged_by_the_newest(clara: Clara, parties: Parties) -> None:
    """Terms outlast a manifest that leaves them alone; a member who left, or moved to another key broker, does not."""
    signed = sign(clara.terms(), clara.keys.signing)

    first = parties.manifest
    kept = amended(parties)
    assert verify_terms(signed, kept).terms.manifest == parties.consortium.digest
    both = first.key_brokers[0].model_copy(update={"serves": ("north", "south")})
    moved = amended(parties, key_brokers=(both, first.key_brokers[2]))
    with pytest.raises(AuthorisationError, match="does not serve the owner of cardio@south"):
        verify_terms(signed, moved)
    with pytest.raises(AuthenticationError, match="no member 'university'"):
        verify_terms(signed, amended(parties, members=first.members[:2], key_brokers=first.key_brokers[:2]))
    newer = sign(clara.terms(manifest=kept.digest, manifest_number=2), clara.keys.signing)
    assert verify_terms(newer, kept).terms.manifest_number == 2
    with pytest.raises(ManifestError, match="another manifest"):
        verify_terms(newer, moved)


def test_2_the_submitter(clara: Clara, parties: Parties) -> None:
    """Signed by another; a delegation by nobody, of another consortium, not valid then, or without the role."""
    clara.refused(SignatureError, "another key", signer=SigningKey.generate())
    clara.refused(SignatureError, "another key", signer=parties.members["university"].signing)
    forged = Signed(**{**dict(clara.delegation), "signature": bytes(64)})
    clara.refused(AuthenticationError, "not signed by its member", submitter=forged)
    by_another = sign(clara.delegation.peek(Delegation), parties.members["north"].signing)
    clara.refused(AuthenticationError, "not signed by its member", submitter=by_another)
    foreign = clara.delegation.peek(Delegation).model_copy(update={"consortium": OTHER})
    submitter = sign(foreign, parties.members["university"].signing)
    clara.refused(AuthenticationError, "another consortium", submitter=submitter)
    clara.refused(AuthenticationError, "not valid at this time", created=NOW + HOUR_MS, deadline=NOW + 2 * HOUR_MS)
    clara.refused(AuthenticationError, "not valid at this time", created=NOW - HOUR_MS)
    steward = Clara(parties, roles=("steward", "admin"))
    steward.refused(AuthorisationError, "not a scientist")


def test_3_every_recipient(clara: Clara, parties: Parties) -> None:
    _, expired = parties.person("north", start=NOW - 2 * HOUR_MS, lasts=HOUR_MS)
    stranger = sign(expired.peek(Delegation).model_copy(update={"expires": NOW + 1}), KeyRing.generate().signing)
    for wrong, words in ((expired, "not valid at this time"), (stranger, "not signed by its member")):
        clara.refused(AuthenticationError, words, plan=a_plan((clara.delegation, wrong)))


def test_4_key_brokers(clara: Clara) -> None:
    clara.refused(AuthenticationError, "does not serve the submitter", job_key_broker="north")
    plan = a_plan((clara.delegation,), a_use("north", key_broker="south"))
    clara.refused(AuthorisationError, "does not serve the owner", plan=plan)
    plan = a_plan((clara.delegation,), a_use("east", key_broker="north"))
    clara.refused(AuthorisationError, "does not serve the owner", plan=plan)


def test_5_the_deadline(clara: Clara) -> None:
    clara.refused(ParameterError, "deadline", deadline=NOW)
    clara.refused(ParameterError, "deadline", deadline=NOW - 1)


def test_what_a_plan_releases_is_always_said(clara: Clara) -> None:
    for release in ((), ("weights", "weights")):
        with pytest.raises(ValidationError):
            Plan(**{**dict(a_plan((clara.delegation,))), "release": release})
        changed = clara.terms().model_copy(
            update={"plan": a_plan((clara.delegation,)).model_copy(update={"release": release})}
        )
        with pytest.raises(MalformedError, match="release"):
            decode(Terms, encode(changed))


def test_every_field_is_in_the_digest(clara: Clara, parties: Parties) -> None:
    """Change any field and it is another job, charged anew."""
    terms = clara.terms()
    training = terms.plan.training
    plans = [
        terms.plan.model_copy(update=update)
        for update in (
            {"purpose": "marketing"},
            {"datasets": terms.plan.datasets[:1]},
            {"datasets": (a_use("north", sample_rate=Rational.of(Fraction(1, 5))), a_use("south"))},
            {"datasets": (a_use("north", envelope=OTHER), a_use("south"))},
            {"datasets": (a_use("north", licence=OTHER), a_use("south"))},
            {"training": training.model_copy(update={"steps": 11})},
            {"training": training.model_copy(update={"noise_multiplier": 2.5})},
            {"training": training.model_copy(update={"clipping_norm": 1.5})},
            {"privacy": Privacy(epsilon=3.5, delta=1e-4)},
            {"recipients": (parties.person("north")[1],)},
            {"model": OTHER},
        )
    ]
    changes: list[dict[str, Any]] = [
        {"consortium": OTHER},
        {"manifest": OTHER},
        {"manifest_number": 2},
        {"job_id": "1" * 32},
        {"created": NOW + 1},
        {"deadline": NOW + 1},
        {"submitter": parties.person("north")[1]},
        {"job_key_broker": "north"},
        {"job_spec_commitment": OTHER},
        {"initial_weights_commitment": OTHER},
        *({"plan": plan} for plan in plans),
    ]
    assert {name for change in changes for name in change} == set(Terms.model_fields) - {"version"}
    made = [terms, *(terms.model_copy(update=change) for change in changes)]
    digests = {sign(item, clara.keys.signing).digest for item in made}
    assert len(digests) == len(changes) + 1


def test_the_weights_commitment_hides_and_binds(clara: Clara) -> None:
    nodes = tuple(
        Node(name=name, kind=kind, operation=kind, options={}, inputs=())
        for name, kind in (("x", "input"), ("y", "module"), ("z", "output"))
    )
    model = ModelSpec(input_shape=(1,), nodes=nodes, parameters=(Parameter(name="y.weight", shape=(1,)),))
    spec = JobSpec(job_id="0" * 32, salt=bytes(32), model=model, plan=a_plan((clara.delegation,)))
    salted = spec.model_copy(update={"salt": OTHER})
    weights = bytes(100)
    found = {weights_commitment(spec, weights), weights_commitment(salted, weights), weights_commitment(spec, b"")}
    assert len(found) == 3
    assert weights_commitment(spec, memoryview(weights)) == weights_commitment(spec, weights)


@pytest.mark.parametrize(
    ("rows", "subjects", "padded", "inputs", "told"),
    [
        (1 << 20, None, 64, (2045,), None),
        (1 << 20, None, 64, (2046,), "at the declared bounds"),
        (1 << 30, None, None, (2047,), None),
        (1 << 19, SubjectUse(max_records=16, bound=100), None, (4090,), None),
        (1 << 20, SubjectUse(max_records=16, bound=100), None, (4090,), "at the declared bounds"),
        (100, None, 1 << 15, (32768,), "a step of 32768 units"),
        (100, SubjectUse(max_records=16, bound=100), 1 << 12, (16384,), "a step of 4096 units"),
        (100, SubjectUse(max_records=16, bound=100), 1 << 12, (16382,), None),
    ],
)
def test_what_a_worker_cannot_hold_is_no_job_for_the_sdk_nor_for_it(
    clara: Clara, rows: int, subjects: SubjectUse | None, padded: int | None, inputs: tuple[int, ...], told: str | None
) -> None:
    plan = a_plan((clara.delegation,), a_use(row_bound=rows, subjects=None))
    plan = plan.model_copy(
        update={
            "datasets": (plan.datasets[0].model_copy(update={"subjects": subjects}),),
            "training": plan.training.model_copy(update={"padded_batch": padded}),
            "privacy": plan.privacy.model_copy(update={"unit": "subject" if subjects else "record"}),
        }
    )
    nodes = tuple(
        Node(name=name, kind=kind, operation=kind, options={}, inputs=())
        for name, kind in (("x", "input"), ("y", "module"), ("z", "output"))
    )
    model = ModelSpec(input_shape=inputs, nodes=nodes, parameters=(Parameter(name="y.weight", shape=(1,)),))
    fields = {"job_id": "0" * 32, "salt": bytes(32), "model": model, "plan": plan}
    sent = encode(JobSpec.model_construct(**fields))
    if told is None:
        assert JobSpec(**fields) == decode(JobSpec, sent)
        return
    with pytest.raises(ValidationError, match=told):
        JobSpec(**fields)
    with pytest.raises(MalformedError):
        decode(JobSpec, sent)
