"""One attempt at one job: what the worker knows of it, and the keys made for it alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from casemate_schemas.admission import Routing
from casemate_schemas.codec import decode
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import MalformedError
from casemate_schemas.identity import Delegation
from casemate_schemas.job_state import JobRecord
from casemate_schemas.sealing import SealingKey
from casemate_schemas.signatures import Signed, SigningKey


@dataclass(frozen=True)
class Attempt:
    """Routing header as the submitter signed it, the number of this attempt, the manifest it began with, fresh keys."""

    routing: Routing
    consortium: Consortium
    number: int
    record: JobRecord
    signing: SigningKey = field(default_factory=SigningKey.generate)
    sealing: SealingKey = field(default_factory=SealingKey.generate)

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.routing.job_id


def begin_attempt(record: JobRecord, consortium: Consortium) -> Attempt:
    """The attempt that a freshly claimed record starts, with fresh keys.

    The routing header is only a hint of whom to ask: terms and Grants decide. Its signature is checked when the terms
    are known (:func:`check_routing`). Raises :class:`MalformedError`.
    """
    signed = decode(Signed, record.routing)
    routing = signed.peek(Routing)
    if routing.job_id != record.job_id or routing.consortium != consortium.id:
        raise MalformedError("the routing header is another job's")
    return Attempt(routing=routing, consortium=consortium, number=record.attempt, record=record)


def check_routing(record: JobRecord, submitter: Delegation) -> Routing:
    """The routing header, if the submitter signed it. Raises :class:`SignatureError`."""
    return decode(Signed, record.routing).verify(Routing, submitter.signing_key)
