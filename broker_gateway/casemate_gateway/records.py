"""Who a job concerns, as its record says: the record's signed parts are checked again, the store being no party's own."""

from __future__ import annotations

import base64
import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

from casemate_schemas.admission import Routing
from casemate_schemas.api import ApprovalStatus, JobStatus
from casemate_schemas.codec import decode
from casemate_schemas.consortium import Consortium, verify_delegation
from casemate_schemas.errors import (
    AuthenticationError,
    AuthorisationError,
    CasemateError,
    IntegrityError,
    NotFoundError,
    StateError,
)
from casemate_schemas.identity import Delegation
from casemate_schemas.job_state import JobRecord
from casemate_schemas.signatures import Signed

from .authentication import Person


@dataclass(frozen=True)
class Job:
    """A job's record with what its submitter signed."""

    record: JobRecord
    routing: Routing
    submitter: Delegation

    def check_visible(self, person: Person, consortium: Consortium) -> None:
        """Raises :class:`NotFoundError` unless the job concerns ``person``.

        It concerns the submitter's member, the recipients, and the members served by its key brokers.
        """
        if person.member == self.submitter.member or person.signing_key in self.routing.recipients:
            return
        for broker in consortium.manifest.key_brokers:
            if broker.id in self.routing.key_brokers and person.member in broker.serves:
                return
        raise no_such_job()

    def check_submitter(self, person: Person) -> None:
        """Raises :class:`AuthorisationError` unless ``person`` acts for the submitter's member."""
        if person.member != self.submitter.member:
            raise AuthorisationError("only the submitter's member may do that")

    def check_recipient(self, person: Person) -> None:
        """Raises :class:`AuthorisationError` unless ``person`` is a recipient, by signing key."""
        if person.signing_key not in self.routing.recipients:
            raise AuthorisationError("only a recipient of the result may fetch it")

    def release(self) -> bytes:
        """The signed release. Raises :class:`StateError` until there is one."""
        if self.record.state != "sealed" or self.record.release is None:
            raise StateError(f"the job is {self.record.state}: there is a release once it is sealed")
        return self.record.release

    def status(self, *, simulation: bool) -> JobStatus:
        """What those concerned may see."""
        record = self.record
        approvals = tuple(
            ApprovalStatus(
                key_broker=key_broker,
                verdict=approval.verdict,
                answer=base64.b64encode(approval.answer).decode("ascii") if approval.answer else None,
            )
            for key_broker, approval in sorted(record.approvals.items())
        )
        shared = {name: getattr(record, name) for name in JobStatus.model_fields if name in JobRecord.model_fields}
        return JobStatus(**{**shared, "approvals": approvals, "simulation": simulation})


def no_such_job() -> NotFoundError:
    """One answer for jobs that do not exist and jobs that do not concern the asker."""
    return NotFoundError("no such job")


class RecordReader:
    """Opens job records of one consortium; what was verified once is remembered.

    A record outlives manifests: its submitter may have left since. So a delegation counts that some version vouches for.
    """

    def __init__(self, versions: Callable[[], tuple[Consortium, ...]]) -> None:
        """``versions`` gives the consortium at each manifest accepted, the newest last."""
        self._versions = versions
        self._verified = functools.lru_cache(maxsize=4096)(self._verify)

    def open(self, record: JobRecord) -> Job:
        """The job a record speaks of. Raises :class:`IntegrityError` if the record is not what a person signed."""
        job = Job(record, *self._verified(record.routing, record.delegation))
        if job.routing.job_id != record.job_id:
            raise IntegrityError(f"the record of job {record.job_id} holds another job's routing")
        return job

    def _verify(self, routing: bytes, delegation: bytes) -> tuple[Routing, Delegation]:
        try:
            signed_routing, signed_delegation = decode(Signed, routing), decode(Signed, delegation)
            created = signed_routing.peek(Routing).created
            submitter = self._submitter(signed_delegation, created)
            opened = signed_routing.verify(Routing, submitter.signing_key)
        except CasemateError as error:
            raise IntegrityError("a job's record does not hold what its submitter signed") from error
        if opened.consortium != self._versions()[0].id:
            raise IntegrityError("a job's record belongs to another consortium")
        return opened, submitter

    def _submitter(self, delegation: Signed, created: int) -> Delegation:
        *earlier, newest = self._versions()
        for consortium in earlier:
            with contextlib.suppress(AuthenticationError):
                return verify_delegation(delegation, consortium, at=created)
        return verify_delegation(delegation, newest, at=created)
