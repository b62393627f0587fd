"""Who may see a job, who may fetch its result, and records that are not what their submitter signed."""

from __future__ import annotations

import pytest
from casemate_gateway.authentication import Person
from casemate_gateway.records import Job, RecordReader
from casemate_schemas.admission import Routing
from casemate_schemas.codec import encode
from casemate_schemas.errors import AuthorisationError, IntegrityError, NotFoundError, StateError
from casemate_schemas.identity import Delegation
from casemate_schemas.job_state import Approval, JobRecord
from casemate_schemas.signatures import sign
from support.consortium import DAY_MS, NOW_MS, PersonKeys, consortium_for_tests

KEYS = consortium_for_tests()
CLARA, COLLEAGUE = KEYS.person("clara", "clara"), KEYS.person("clara", "colleague")
RECIPIENT = KEYS.person("east", "recipient")
JOB_ID = "0123456789abcdef" * 2


def routing(**changes: object) -> Routing:
    fields: dict[str, object] = {
        "consortium": KEYS.consortium.id,
        "job_id": JOB_ID,
        "terms": b"t" * 32,
        "job_envelope": b"e" * 32,
        "job_key_broker": "clara",
        "key_brokers": ("clara", "north"),
        "recipients": (CLARA.signing.public, RECIPIENT.signing.public),
        "created": NOW_MS + 1,
        "deadline": NOW_MS + DAY_MS,
    }
    return Routing.model_validate({**fields, **changes})


def record(signed: PersonKeys = CLARA, header: Routing | None = None, **changes: object) -> JobRecord:
    header = header or routing()
    fields: dict[str, object] = {
        "job_id": JOB_ID,
        "routing": encode(sign(header, signed.signing)),
        "delegation": encode(signed.delegation),
        "job_envelope": header.job_envelope,
        "submission": b"s" * 32,
        "approvals": {name: Approval() for name in header.key_brokers},
        "created": NOW_MS,
        "updated": NOW_MS,
    }
    return JobRecord.model_validate({**fields, **changes})


def opened(found: JobRecord) -> Job:
    return RecordReader(lambda: (KEYS.consortium,)).open(found)


def person(keys: PersonKeys) -> Person:
    return Person(keys.delegation.peek(Delegation), keys.delegation)


@pytest.mark.parametrize(
    ("keys", "visible", "submitter", "recipient"),
    [
        (CLARA, True, True, True),
        (COLLEAGUE, True, True, False),
        (RECIPIENT, True, False, True),
        (KEYS.person("north"), True, False, False),
        (KEYS.person("east"), False, False, False),
        (KEYS.person("south"), False, False, False),
    ],
    ids=["submitter", "colleague", "recipient", "owner", "recipient's colleague", "stranger"],
)
def test_who_may_do_what(keys: PersonKeys, visible: bool, submitter: bool, recipient: bool) -> None:
    job, asker = opened(record()), person(keys)

    def allowed(error: type[Exception], check: object, *arguments: object) -> bool:
        try:
            check(*arguments)  # type: ignore[operator]
        except error:
            return False
        return True

    assert allowed(NotFoundError, job.check_visible, asker, KEYS.consortium) == visible
    assert allowed(AuthorisationError, job.check_submitter, asker) == submitter
    assert allowed(AuthorisationError, job.check_recipient, asker) == recipient


@pytest.mark.parametrize("state", ["running", "committing", "failed"])
def test_no_release_before_the_job_is_sealed(state: str) -> None:
    with pytest.raises(StateError):
        opened(record(state=state, release=b"release")).release()
    assert opened(record(state="sealed", release=b"release")).release() == b"release"


def test_the_status_shows_approvals_and_no_keys() -> None:
    approvals = {"clara": Approval(verdict="yes", answer=b"\x00signed"), "north": Approval()}
    status = opened(record(approvals=approvals, epsilon=1.5, step=3, steps=9)).status(simulation=True)
    assert [(item.key_broker, item.verdict, item.answer) for item in status.approvals] == [
        ("clara", "yes", "AHNpZ25lZA=="),
        ("north", "pending", None),
    ]
    assert (status.epsilon, status.step, status.steps, status.simulation) == (1.5, 3, 9, True)


@pytest.mark.parametrize(
    "broken",
    [
        record(delegation=b""),
        record(delegation=encode(COLLEAGUE.delegation)),
        record(routing=b"\x00"),
        record(job_id="f" * 32),
        record(header=routing(consortium=b"c" * 32)),
        record(KEYS.person("clara", signed_by=KEYS.members["north"].signing)),
    ],
    ids=["no delegation", "another's delegation", "no routing", "another job", "another consortium", "forged member"],
)
def test_a_record_that_its_submitter_did_not_sign(broken: JobRecord) -> None:
    with pytest.raises(IntegrityError):
        opened(broken)
