"""What `casemate workers` shows: the newest verdict on each worker, for those whose policy it is."""

from __future__ import annotations

import os
from typing import Any

import pytest
from casemate_key_broker import worker_verdicts
from casemate_schemas.errors import AppraisalError, CasemateError, VerificationError
from casemate_schemas.evidence import Evidence, SevSnp
from casemate_schemas.licence import AllOf, MemberIs, WithMeasurement
from casemate_schemas.requests import Refusal, ShowWorkers, WorkerList, WorkerVerdict
from support.key_brokers import MEASUREMENT, Bench, Job, Worker, chip

OTHER = b"\x4e" * 48


@pytest.fixture
def job(bench: Bench) -> Job:
    return bench.accepted_job(bench.register().use())


def shown(bench: Bench) -> tuple[WorkerVerdict, ...]:
    answer = bench.ask("north", bench.stewards["north"], ShowWorkers())
    assert isinstance(answer, WorkerList), answer
    assert (answer.key_broker, answer.manifest_number) == ("north", bench.consortium.manifest.number)
    return answer.workers


def present(bench: Bench, evidence: Evidence, worker: Worker) -> type[CasemateError] | None:
    try:
        bench.broker("north").grant(worker.request(evidence))
    except CasemateError as error:
        return type(error)
    return None


def launched(bench: Bench, worker: Worker, launch: Any) -> Evidence:
    """Evidence of one launch, however often it is asked for."""
    claims = bench.evidence(worker).claims
    return Evidence(claims=claims, components=(launch.attest(claims.report_data),))


def forged(evidence: Evidence) -> Evidence:
    """The same words, and a signature that is not the chip's."""
    (component,) = evidence.components
    assert isinstance(component, SevSnp)
    report = component.report[:0x2A0] + bytes(len(component.report) - 0x2A0)
    return evidence.model_copy(update={"components": (component.model_copy(update={"report": report}),)})


def test_a_worker_is_shown_as_it_was_judged_last(bench: Bench, job: Job) -> None:
    launch, worker = chip().launch(MEASUREMENT), Worker(job)
    evidence = launched(bench, worker, launch)
    assert present(bench, evidence, worker) is None
    (found,) = shown(bench)
    assert found.accepted and found.genuine and found.failed == () and found.unnamed_by == ()
    assert (found.worker, found.measurement) == (launch.template.report_id, MEASUREMENT)
    assert found.chip == launch.template.chip_id and found.product == chip().facts.product
    assert found.tcb == chip().facts.tcb
    assert (found.job_id, found.at, found.manifest_number) == (job.terms.job_id, bench.clock(), 1)
    bench.amend(**bench.policy(measurements=(OTHER,)))
    bench.clock.advance(1)
    assert present(bench, launched(bench, worker, launch), worker) is AppraisalError
    (again,) = shown(bench)
    assert not again.accepted and again.genuine and again.worker == found.worker
    assert (again.at, again.manifest_number) == (bench.clock(), 2)
    (check,) = again.failed
    assert check.name == "measurement" and check.got == MEASUREMENT.hex() and OTHER.hex() in check.expected


def test_what_is_not_genuine_hides_nothing_that_is(bench: Bench, job: Job) -> None:
    """Also when it copies a genuine worker's report, and however much of it there is."""
    launch, worker = chip().launch(MEASUREMENT), Worker(job)
    assert present(bench, launched(bench, worker, launch), worker) is None
    for _ in range(worker_verdicts.MAX_KEPT[False] + 2):
        bench.clock.advance(0.001)
        fake = forged(launched(bench, worker, chip().launch(MEASUREMENT)))
        assert present(bench, fake, worker) is VerificationError
    assert present(bench, forged(launched(bench, worker, launch)), worker) is VerificationError
    genuine = [found for found in shown(bench) if found.genuine]
    assert [(found.worker, found.accepted) for found in genuine] == [(launch.template.report_id, True)]
    rest = [found for found in shown(bench) if not found.genuine]
    assert len(rest) == worker_verdicts.MAX_KEPT[False]
    assert rest[0].worker == launch.template.report_id and "signature" in rest[0].failed[0].name


def test_the_oldest_workers_are_forgotten_first(bench: Bench, job: Job) -> None:
    with bench.database("north").transaction() as tx:
        verdict = WorkerVerdict(
            worker=os.urandom(32),
            genuine=True,
            accepted=True,
            failed=(),
            product=None,
            chip=b"",
            measurement=None,
            tcb=None,
            manifest_number=1,
            evidence=bytes(32),
            job_id=job.terms.job_id,
            at=1,
        )
        for number in range(worker_verdicts.MAX_KEPT[True] + 3):
            worker_verdicts.keep(tx, verdict.model_copy(update={"worker": bytes([number]) * 32, "at": 1000 + number}))
    found = shown(bench)
    assert len(found) == worker_verdicts.MAX_KEPT[True]
    assert [one.at for one in found] == sorted((one.at for one in found), reverse=True)
    assert found[-1].at == 1003


def test_a_licence_that_names_other_measurements_is_told(bench: Bench, job: Job) -> None:
    rule = AllOf(rules=(MemberIs(principal="submitter", member="clara"), WithMeasurement(measurement=OTHER)))
    bench.register(name="picky", permissions=bench.permissions(train=rule))
    worker = Worker(job)
    assert present(bench, bench.evidence(worker), worker) is None
    assert present(bench, bench.evidence(worker, measurement=OTHER), worker) is None
    told = {found.measurement: found.unnamed_by for found in shown(bench)}
    assert told == {MEASUREMENT: ("picky@north",), OTHER: ()}


def test_only_stewards_and_admins_of_the_members_served_are_told(bench: Bench) -> None:
    admin, scientist = bench.person("north", "nora", ("admin",)), bench.person("north", "sam", ("scientist",))
    assert isinstance(bench.ask("north", admin, ShowWorkers()), WorkerList)
    for person in (scientist, bench.clara, bench.stewards["south"]):
        answer = bench.ask("north", person, ShowWorkers())
        assert isinstance(answer, Refusal) and answer.reason == "not_allowed"
