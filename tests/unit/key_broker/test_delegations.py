"""Terms state their own time; whose word counts is decided by the time at which they are submitted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from casemate_schemas.identity import Delegation
from casemate_schemas.job import Plan
from casemate_schemas.signatures import sign
from support.key_brokers import DAY_MS, Bench, Job, Person


def redelegated(bench: Bench, person: Person, member: str, **changed: Any) -> Person:
    """The same person with the same keys, under another delegation."""
    delegation = person.delegation.peek(Delegation).model_copy(update={"member": member, **changed})
    return replace(person, delegation=sign(delegation, bench.members[member].signing))


def submitted_under(job: Job, delegation: Person) -> Job:
    """The job, posted under that delegation, whatever its terms say."""
    submission = job.precheck.submission.model_copy(update={"delegation": delegation.delegation})
    return replace(job, precheck=job.precheck.model_copy(update={"submission": submission}))


def run_out(bench: Bench, person: Person, member: str, **changed: Any) -> Person:
    """A delegation that ended yesterday."""
    times = {"not_before": bench.clock() - 3 * DAY_MS, "expires": bench.clock() - DAY_MS}
    return redelegated(bench, person, member, **times, **changed)


def plan_for_another(bench: Bench) -> Plan:
    """For a colleague at the lab whose delegation held three days ago and holds now."""
    carl = bench.person("clara", "carl", ("scientist",))
    lasting = redelegated(bench, carl, "clara", not_before=bench.clock() - 3 * DAY_MS)
    return bench.plan(bench.register().use(), recipients=(lasting.delegation,))


def test_the_same_terms_under_one_lasting_delegation_are_accepted(bench: Bench) -> None:
    early = redelegated(bench, bench.clara, "clara", not_before=bench.clock() - 3 * DAY_MS)
    bench.accepted_job(plan=plan_for_another(bench), by=early, terms={"created": bench.clock() - 2 * DAY_MS})


def test_an_old_role_does_not_come_back_by_dating_terms_back(bench: Bench) -> None:
    """She was a scientist once and is a steward now: her valid delegation, and terms of the time when she was."""
    plan = plan_for_another(bench)
    once = run_out(bench, bench.clara, "clara")
    today = redelegated(bench, bench.clara, "clara", roles=("steward",))
    job = bench.job(plan=plan, by=once, terms={"created": bench.clock() - 2 * DAY_MS})
    answer = bench.precheck("north", submitted_under(job, today))
    assert (answer.decision, answer.reason) == ("refused", "invalid_parameter")
    assert "submitter" in bench.detail("north", answer).message


def test_an_old_member_does_not_come_back_by_dating_terms_back(bench: Bench) -> None:
    """The licence lets only clara's lab train; she works for south now."""
    plan = plan_for_another(bench)
    once = run_out(bench, bench.clara, "clara")
    today = redelegated(bench, bench.clara, "south")
    job = bench.job(plan=plan, by=once, terms={"created": bench.clock() - 2 * DAY_MS})
    assert bench.precheck("north", submitted_under(job, today)).reason == "invalid_parameter"


def test_a_recipient_whose_delegation_ran_out_is_none_whatever_time_the_terms_state(bench: Bench) -> None:
    dataset = bench.register()
    gone = run_out(bench, bench.person("clara", "carl", ("scientist",)), "clara")
    early = redelegated(bench, bench.clara, "clara", not_before=bench.clock() - 3 * DAY_MS)
    plan = bench.plan(dataset.use(), recipients=(early.delegation, gone.delegation))
    job = bench.job(plan=plan, by=early, terms={"created": bench.clock() - 2 * DAY_MS})
    for broker in ("north", "clara"):
        answer = bench.precheck(broker, job)
        assert (answer.decision, answer.reason) == ("refused", "not_authenticated"), broker
        assert "not valid at this time" in bench.detail(broker, answer).message


def test_a_delegation_may_run_out_while_its_job_waits(bench: Bench) -> None:
    dataset = bench.register(expires=bench.clock() + 40 * DAY_MS)
    soon = redelegated(bench, bench.clara, "clara", expires=bench.clock() + 1000)
    plan = bench.plan(dataset.use(), recipients=(soon.delegation,))
    job = bench.accepted_job(plan=plan, by=soon)
    bench.clock.advance(60)
    bench.grant_all(job)
