"""Grants: one charge for terms, and each reason for which no key is given."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from casemate_attestation.chain import judge_chain
from casemate_key_broker import audit_log, ledger, prechecks
from casemate_key_broker.ledger import Charge
from casemate_key_broker.prechecks import OwnedUse
from casemate_schemas.codec import encode
from casemate_schemas.errors import (
    AppraisalError,
    AuthenticationError,
    BudgetError,
    CasemateError,
    DatasetError,
    LicenceError,
    ManifestError,
    NonceError,
    NotFoundError,
    ParameterError,
    SealError,
    SignatureError,
    UnavailableError,
    VerificationError,
)
from casemate_schemas.evidence import Evidence, KeyBrokerNonce, SevSnpVtpm, WorkerClaims
from casemate_schemas.grant import GrantRequest, NonceRequest, grant_info
from casemate_schemas.job import Plan
from casemate_schemas.keyring import KeyRing
from casemate_schemas.licence import AllOf, MemberIs, WithMeasurement
from casemate_schemas.requests import DatasetRegistered, ShowBudget
from casemate_schemas.signatures import sign
from support.key_brokers import DAY_MS, MEASUREMENT, Bench, Dataset, Job, Worker, chip
from support.vtpm import Paravisor


@pytest.fixture
def dataset(bench: Bench) -> Dataset:
    return bench.register()


@pytest.fixture
def job(bench: Bench, dataset: Dataset) -> Job:
    return bench.accepted_job(dataset.use())


def _charges(bench: Bench) -> int:
    with bench.database("north").transaction() as tx:
        return int(tx.execute("SELECT count(*) FROM charges").fetchone()[0])


def _refused(bench: Bench, error: type[CasemateError], request: bytes) -> None:
    with pytest.raises(error):
        bench.broker("north").grant(request)
    assert _charges(bench) == 0


def test_many_attempts_are_charged_once_and_share_one_seed(bench: Bench, job: Job) -> None:
    grants = [bench.grant("north", Worker(job, attempt)) for attempt in (1, 2, 2, 7)]
    bench.restart("north")
    grants.append(bench.grant("north", Worker(job, 8)))
    assert len({grant.header.reservation for grant, _ in grants}) == 1
    assert len({secrets.seed_share for _, secrets in grants}) == 1
    assert _charges(bench) == 1
    with bench.database("north").transaction() as tx:
        ledger.verify(tx)


def test_a_chips_certificates_are_judged_once(bench: Bench, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[object] = []
    monkeypatch.setattr("casemate_attestation.verify.judge_chain", lambda c: judged.append(c) or judge_chain(c))
    for attempt in (1, 2, 3):
        bench.grant("north", Worker(job, attempt))
    assert len(judged) == 1
    bench.restart("north")
    bench.grant("north", Worker(job, 4))
    assert len(judged) == 2


def test_another_job_is_charged_anew_with_another_seed(bench: Bench, dataset: Dataset, job: Job) -> None:
    _, first = bench.grant("north", Worker(job))
    _, second = bench.grant("north", Worker(bench.accepted_job(dataset.use())))
    assert first.seed_share != second.seed_share and first.content_keys == second.content_keys
    assert _charges(bench) == 2


def test_the_job_key_is_released_without_a_charge(bench: Bench, job: Job) -> None:
    grant, _ = bench.grant("clara", Worker(job))
    assert grant.header.envelopes == (job.routing.job_envelope,) and grant.header.licences == ()
    with bench.database("clara").transaction() as tx:
        reservation = ledger.find_reservation(tx, job.digest)
        assert reservation is not None and reservation.entry.event == "release"
        assert tx.execute("SELECT count(*) FROM charges").fetchone() == (0,)


def test_a_grant_opens_for_the_attested_key_alone(bench: Bench, job: Job) -> None:
    grant, _ = bench.grant("north", Worker(job))
    with pytest.raises(SealError):
        KeyRing.generate().sealing.open_secret(grant.sealed_secrets, info=grant_info(grant.header))


def test_two_jobs_race_for_the_last_of_a_budget(bench: Bench) -> None:
    dataset = bench.register(name="scarce", epsilon=1.0, epsilon_per_job=1.0)
    workers = [Worker(bench.accepted_job(dataset.use())) for _ in range(4)]
    requests = [worker.request(bench.evidence(worker)) for worker in workers]

    def outcome(request: bytes) -> str:
        try:
            bench.broker("north").grant(request)
        except BudgetError as error:
            return error.reason
        return "granted"

    with ThreadPoolExecutor(4) as pool:
        outcomes = sorted(pool.map(outcome, requests))
    assert outcomes == ["budget_exceeded"] * 3 + ["granted"]
    assert _charges(bench) == 1


def test_a_dataset_licensed_away_meanwhile(bench: Bench, dataset: Dataset, job: Job) -> None:
    """A stricter licence acts at the next Grant, also of a job that was charged already."""
    bench.grant("north", Worker(job))
    permissions = bench.permissions(train=MemberIs(principal="submitter", member="south"))
    stricter = replace(dataset, licence=bench.licence("cardio@north", number=2, permissions=permissions))
    answer = bench.ask("north", bench.stewards["north"], bench.registration(stricter))
    assert isinstance(answer, DatasetRegistered)
    with pytest.raises(LicenceError):
        bench.grant("north", Worker(job, 2))


def test_a_stricter_licence_leaves_what_was_granted_and_committed(bench: Bench, dataset: Dataset) -> None:
    granted, committed = (bench.grant_all(bench.accepted_job(dataset.use())) for _ in range(2))
    first = bench.receipt("clara", bench.broker("clara").commit(committed.commit(b"r" * 32)))
    commit = committed.commit(b"r" * 32, encode(sign(first, bench.key_brokers["clara"].signing)))
    before = bench.broker("north").commit(commit)
    stricter = bench.permissions(train=MemberIs(principal="submitter", member="south"))
    amended = replace(dataset, licence=bench.licence("cardio@north", number=2, permissions=stricter))
    bench.ask("north", bench.stewards["north"], bench.registration(amended))
    assert bench.broker("north").commit(commit) == before
    bench.broker("clara").commit(granted.commit(b"s" * 32))
    lines = bench.ask("north", bench.stewards["north"], ShowBudget(dataset="cardio@north")).lines
    assert {line.committed for line in lines} == {b"r" * 32, None} and len(lines) == 2


def test_a_grant_states_what_the_licence_obliges_to(bench: Bench) -> None:
    duties: dict[str, Any] = {"legal_basis": "consent", "regions": ("DE", "FR"), "retention_days": 90}
    dataset = bench.register(**duties)
    grant, _ = bench.grant("north", Worker(bench.accepted_job(dataset.use())))
    (stated,) = grant.header.obligations
    assert stated.subject == "cardio@north" and stated.purposes == ()
    assert {name: getattr(stated, name) for name in duties} == duties


def test_a_new_version_stops_jobs_not_yet_charged_only(bench: Bench, dataset: Dataset, job: Job) -> None:
    other = bench.accepted_job(dataset.use())
    first, secrets = bench.grant("north", Worker(job))
    newer = replace(bench.dataset(), licence=dataset.licence)
    answer = bench.ask("north", bench.stewards["north"], bench.registration(newer))
    assert isinstance(answer, DatasetRegistered)
    again, same = bench.grant("north", Worker(job, 2))
    assert again.header.envelopes == first.header.envelopes and same.content_keys == secrets.content_keys
    with pytest.raises(DatasetError):
        bench.grant("north", Worker(other))


def test_a_licence_that_changes_while_the_job_is_judged(
    bench: Bench, dataset: Dataset, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    stricter = replace(dataset, licence=bench.licence(dataset.card.id, number=2, epsilon_per_job=0.1))
    pricing = prechecks.price

    def interrupted(uses: tuple[OwnedUse, ...], plan: Plan) -> tuple[Charge, ...]:
        answer = bench.ask("north", bench.stewards["north"], bench.registration(stricter))
        assert isinstance(answer, DatasetRegistered)
        return pricing(uses, plan)

    worker = Worker(job)
    request = worker.request(bench.evidence(worker))
    with monkeypatch.context() as patch:
        patch.setattr(prechecks, "price", interrupted)
        _refused(bench, UnavailableError, request)
    _refused(bench, BudgetError, worker.request(bench.evidence(worker)))


def test_two_datasets_of_one_owner_and_its_own_job_in_one_grant(bench: Bench, dataset: Dataset) -> None:
    for_north = bench.permissions(train=MemberIs(principal="submitter", member="north"))
    uses = [bench.register(name=name, permissions=for_north).use() for name in ("alpha", "beta")]
    scientist = bench.person("north", "sam", ("scientist",))
    job = bench.accepted_job(*uses, by=scientist, terms={"job_key_broker": "north"})
    grant, secrets = bench.grant("north", Worker(job))
    envelopes = sorted([job.routing.job_envelope, *(use.envelope for use in uses)])
    assert list(grant.header.envelopes) == envelopes and len(secrets.content_keys) == 3
    assert list(grant.header.licences) == sorted(use.licence for use in uses)
    assert _charges(bench) == 2


def test_a_licence_that_expired_meanwhile(bench: Bench) -> None:
    dataset = bench.register(name="brief", expires=bench.clock() + 60_000)
    worker = Worker(bench.accepted_job(dataset.use()))
    bench.clock.advance(60)
    _refused(bench, LicenceError, worker.request(bench.evidence(worker)))


def test_a_licence_that_wants_another_measurement(bench: Bench) -> None:
    train = AllOf(rules=(MemberIs(principal="submitter", member="clara"), WithMeasurement(measurement=b"\x4e" * 48)))
    dataset = bench.register(name="picky", permissions=bench.permissions(train=train))
    worker = Worker(bench.accepted_job(dataset.use()))
    _refused(bench, LicenceError, worker.request(bench.evidence(worker)))
    bench.grant("north", worker, bench.evidence(worker, measurement=b"\x4e" * 48))
    assert _charges(bench) == 1


def test_no_first_grant_after_the_deadline_but_a_successors(bench: Bench, dataset: Dataset, job: Job) -> None:
    other = bench.accepted_job(dataset.use())
    for name in job.terms.key_brokers:
        bench.grant(name, Worker(job))
    late = Worker(other)
    late_request = late.request(bench.evidence(late))
    bench.clock.advance(DAY_MS / 1000 - 1)
    late = Worker(other, 2)
    almost_late = late.request(bench.evidence(late))
    bench.clock.advance(1)
    bench.grant("north", Worker(job, 2))
    with pytest.raises(NonceError):
        bench.broker("north").grant(late_request)
    with pytest.raises(ParameterError, match="deadline"):
        bench.broker("north").grant(almost_late)
    with pytest.raises(ParameterError, match="deadline"):
        bench.nonce("north", other)


# --- nonces -----------------------------------------------------------------------------------------------------------


def test_a_nonce_is_good_once_even_for_fifty_at_once(bench: Bench, job: Job) -> None:
    worker = Worker(job)
    request = worker.request(bench.evidence(worker))

    def outcome(_: int) -> str:
        try:
            bench.broker("north").grant(request)
        except NonceError as error:
            return error.reason
        return "granted"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(outcome, range(50)))
    assert (outcomes.count("granted"), outcomes.count("nonce_refused")) == (1, 49)
    bench.restart("north")
    with pytest.raises(NonceError):
        bench.broker("north").grant(request)


def test_an_expired_nonce(bench: Bench, job: Job) -> None:
    worker = Worker(job)
    request = worker.request(bench.evidence(worker))
    bench.clock.advance(120)
    _refused(bench, NonceError, request)


def test_a_nonce_just_before_it_expires(bench: Bench, job: Job) -> None:
    worker = Worker(job)
    evidence = bench.evidence(worker)
    bench.clock.advance(119.999)
    bench.grant("north", worker, evidence)


def test_a_nonce_that_nobody_gave_or_none_at_all(bench: Bench, job: Job) -> None:
    worker = Worker(job)
    for nonces in ({"north": os.urandom(32)}, {"clara": bench.nonce("clara", job)}):
        _refused(bench, NonceError, worker.request(worker.evidence(worker.claims(bench.consortium, nonces))))


def test_a_nonce_of_another_job_attempt_or_key_broker(bench: Bench, dataset: Dataset, job: Job) -> None:
    worker, other = Worker(job), bench.accepted_job(dataset.use())
    wrong = (
        bench.nonce("north", other),
        bench.nonce("north", job, attempt=2),
        bench.nonce("clara", job),
    )
    for nonce in wrong:
        claims = worker.claims(bench.consortium, {"north": nonce})
        _refused(bench, NonceError, worker.request(worker.evidence(claims)))
    second = Worker(job, attempt=2)
    claims = second.claims(bench.consortium, {"north": wrong[1]})
    bench.grant("north", second, second.evidence(claims))


def test_nonces_are_for_accepted_jobs(bench: Bench, dataset: Dataset, job: Job) -> None:
    refused = bench.job(dataset.use(row_bound=1))
    bench.precheck("north", refused)
    with pytest.raises(NotFoundError):
        bench.nonce("north", refused)
    for wrong in ({"job_id": refused.terms.job_id}, {"terms": refused.digest}):
        fields: dict[str, Any] = {"job_id": job.terms.job_id, "terms": job.digest, "attempt": 1} | wrong
        with pytest.raises(NotFoundError):
            bench.broker("north").nonce(encode(NonceRequest(**fields)))


def test_nobody_uses_up_the_nonces_of_others(bench: Bench, job: Job) -> None:
    """However many are asked for and never used, or used in vain: every attempt's nonce stays good for its time."""
    early, late = Worker(job, 1), Worker(job, 2)
    requests = [early.request(bench.evidence(early))]
    with bench.database("north").transaction() as tx:
        (before,) = tx.execute("PRAGMA data_version").fetchone()
        changes = tx.total_changes
    assert len({bench.nonce("north", job) for _ in range(1000)}) == 1000
    with bench.database("north").transaction() as tx:
        assert tx.total_changes == changes and tx.execute("PRAGMA data_version").fetchone() == (before,)
    stranger = Worker(job, 1)
    for _ in range(3):
        with pytest.raises(AppraisalError):
            bench.broker("north").grant(stranger.request(bench.evidence(stranger, measurement=b"\x66" * 48)))
    requests.append(late.request(bench.evidence(late)))
    bench.restart("north")
    for request in reversed(requests):
        bench.broker("north").grant(request)


def test_a_nonce_is_its_key_brokers_to_the_last_bit(bench: Bench, job: Job) -> None:
    """Neither its expiry nor anything else in it can be changed; a used one stays used if the clock is set back."""
    worker = Worker(job)
    evidence = bench.evidence(worker)
    nonce = evidence.claims.nonce_of("north") or b""
    for bit in (0, 8 * 8, 8 * 14 - 1, 8 * 14, 8 * 32 - 1):
        forged = bytearray(nonce)
        forged[bit // 8] ^= 1 << bit % 8
        nonces = {"clara": bench.nonce("clara", job), "north": bytes(forged)}
        _refused(bench, NonceError, worker.request(worker.evidence(worker.claims(bench.consortium, nonces))))
    bench.grant("north", worker, evidence)
    bench.clock.advance(12 * 3600)
    bench.grant("north", Worker(job, 2))
    bench.clock.advance(-12 * 3600)
    with pytest.raises(NonceError, match="used before"):
        bench.broker("north").grant(worker.request(evidence))
    bench.clock.advance(48 * 3600)
    late = Worker(job, 3)
    bench.grant("north", late, late.evidence(late.claims(bench.consortium, {"north": bench.nonce("north", job, 3)})))
    with bench.database("north").transaction() as tx:
        assert tx.execute("SELECT count(*) FROM used_nonces").fetchone() == (1,), "what expired long ago is forgotten"


# --- manifests --------------------------------------------------------------------------------------------------------


def test_a_job_of_an_earlier_manifest_goes_on_under_the_newest(bench: Bench, dataset: Dataset, job: Job) -> None:
    """The terms stay good and are charged once; evidence is judged by the newest manifest alone."""
    first, _ = bench.grant("north", Worker(job))
    under_the_old = Worker(job, 2)
    stale = bench.evidence(under_the_old)
    bench.amend(**bench.policy(measurements=(b"\x4e" * 48,)))
    with pytest.raises(ManifestError, match="another manifest than number 2"):
        bench.broker("north").grant(under_the_old.request(stale))
    refused = Worker(job, 3)
    with pytest.raises(AppraisalError, match="measurement"):
        bench.broker("north").grant(refused.request(bench.evidence(refused)))
    accepted = Worker(job, 3)
    second, _ = bench.grant("north", accepted, bench.evidence(accepted, measurement=b"\x4e" * 48))
    assert second.header.reservation == first.header.reservation
    assert (first.header.manifest_number, second.header.manifest_number) == (1, 2)
    assert second.header.manifest == bench.consortium.digest and _charges(bench) == 1


def test_a_job_whose_submitter_left_gets_no_more_keys(bench: Bench, job: Job) -> None:
    manifest = bench.consortium.manifest
    kept = [m for m in manifest.members if m.id != "clara"]
    brokers = [b for b in manifest.key_brokers if b.id != "clara"]
    bench.amend("north", members=tuple(kept), key_brokers=tuple(brokers))
    worker = Worker(job)
    claims = worker.claims(bench.consortium, {"north": bench.nonce("north", job)})
    _refused(bench, AuthenticationError, worker.request(worker.evidence(claims)))


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_a_request_signed_by_another_key_than_claimed(bench: Bench, job: Job) -> None:
    worker = Worker(job)
    evidence = bench.evidence(worker)
    _refused(bench, SignatureError, encode(sign(GrantRequest(evidence=evidence), KeyRing.generate().signing)))
    bench.grant("north", worker, evidence)


@pytest.mark.parametrize("key", ["sealing_key", "signing_key"])
def test_a_key_substituted_after_attestation(bench: Bench, job: Job, key: str) -> None:
    worker, thief = Worker(job), Worker(job)
    honest = bench.evidence(worker)
    public = thief.keys.sealing.public if key == "sealing_key" else thief.keys.signing.public
    evidence = honest.model_copy(update={"claims": honest.claims.model_copy(update={key: public})})
    signer = thief if key == "signing_key" else worker
    _refused(bench, AppraisalError, signer.request(evidence))


@pytest.mark.parametrize(
    ("changed", "error"),
    [({"manifest": b"\x07" * 32}, ManifestError), ({"consortium": b"\x07" * 32}, ManifestError)],
)
def test_claims_for_another_consortium_or_manifest(
    bench: Bench, job: Job, changed: dict[str, bytes], error: type[CasemateError]
) -> None:
    worker = Worker(job)
    _refused(bench, error, worker.request(bench.evidence(worker, **changed)))


def test_evidence_that_is_not_genuine(bench: Bench, job: Job) -> None:
    worker = Worker(job)
    evidence = bench.evidence(worker)
    (component,) = evidence.components
    report = bytearray(component.report)
    report[0x2A0] ^= 1
    forged = component.model_copy(update={"report": bytes(report)})
    _refused(bench, VerificationError, worker.request(evidence.model_copy(update={"components": (forged,)})))
    with bench.database("north").transaction() as tx:
        entry = audit_log.entries(tx)[-1]
    assert (entry.event, entry.reason, entry.terms) == ("refused", "evidence_not_genuine", job.digest)


def test_evidence_of_a_program_outside_the_policy(bench: Bench, job: Job) -> None:
    worker = Worker(job)
    _refused(bench, AppraisalError, worker.request(bench.evidence(worker, measurement=b"\x66" * 48)))


def _quoted(claims: WorkerClaims) -> SevSnpVtpm:
    """Good evidence by a virtual TPM under the accepted program's measurement."""

    def attest(report_data: bytes) -> tuple[bytes, tuple[bytes, bytes, bytes]]:
        component = chip().launch(MEASUREMENT).attest(report_data)
        return component.report, component.certificates

    return Paravisor(attest).component(claims.report_data)


@pytest.mark.parametrize("beside", [False, True], ids=["instead of a plain report", "beside one"])
def test_evidence_of_a_kind_that_the_policy_does_not_accept(bench: Bench, job: Job, *, beside: bool) -> None:
    worker = Worker(job)
    plain = bench.evidence(worker)
    quoted = _quoted(plain.claims)
    components = (*plain.components, quoted) if beside else (quoted,)
    with pytest.raises(AppraisalError, match="evidence_types: expected sev-snp, got"):
        bench.broker("north").grant(worker.request(Evidence(claims=plain.claims, components=components)))
    assert _charges(bench) == 0


def test_a_report_made_for_other_claims(bench: Bench, job: Job) -> None:
    worker = Worker(job)
    claims = worker.claims(bench.consortium, {"north": bench.nonce("north", job), "clara": os.urandom(32)})
    nonces = (KeyBrokerNonce(key_broker="clara", nonce=os.urandom(32)), claims.nonces[1])
    changed = claims.model_copy(update={"nonces": nonces})
    evidence = Evidence(claims=claims, components=worker.evidence(changed, MEASUREMENT).components)
    _refused(bench, AppraisalError, worker.request(evidence))


def test_a_refusal_after_the_nonce_uses_it_up(bench: Bench, job: Job) -> None:
    worker = Worker(job)
    claims = worker.claims(bench.consortium, {"north": bench.nonce("north", job)})
    _refused(bench, AppraisalError, worker.request(worker.evidence(claims, b"\x66" * 48)))
    _refused(bench, NonceError, worker.request(worker.evidence(claims)))


def test_a_grant_that_cannot_be_sealed_charges_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only reservation that is ever given back is one whose Grant was never made: it does not exist."""
    dataset = bench.register()
    job = bench.accepted_job(dataset.use())
    worker = Worker(job)
    request = worker.request(bench.evidence(worker))

    def fails(*_: Any, **__: Any) -> bytes:
        raise SealError("no")

    with monkeypatch.context() as patched:
        patched.setattr("casemate_key_broker.key_release.seal_secret", fails)
        with pytest.raises(SealError):
            bench.broker("north").grant(request)
    with bench.database("north").transaction() as tx:
        assert ledger.find_reservation(tx, job.digest) is None and ledger.newest_entry(tx)[0] == 0
    assert bench.ask("north", bench.stewards["north"], ShowBudget(dataset=dataset.card.id)).lines == ()
    bench.grant("north", Worker(job, attempt=2))
