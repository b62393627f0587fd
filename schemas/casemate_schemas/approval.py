"""A person's word on the very terms of a job, under the licence that asks for it.

Approvals add up in :func:`casemate_schemas.licence.evaluate`; here is what one looks like and when it is genuine.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from .codec import Digest, Name, UnixMs, WireModel
from .consortium import Consortium, verify_delegation
from .errors import AuthenticationError, ParameterError
from .identity import MAX_DELEGATION_MS
from .job import JobId
from .licence import VerifiedApproval, actor_of
from .signatures import Signed


class Approval(WireModel):
    """Yes or no to these terms, under this licence, given to the key broker that asks. Signed by the person's key."""

    KIND: ClassVar[str] = "approval"

    version: Literal[1] = 1
    consortium: Digest
    key_broker: Name
    job_id: JobId
    terms: Digest
    licence: Digest
    decision: Literal["approve", "deny"]
    at: UnixMs
    expires: UnixMs

    @model_validator(mode="after")
    def _is_short_lived(self) -> Self:
        if not 0 < self.expires - self.at <= MAX_DELEGATION_MS:
            raise ValueError("an approval is good for at most 92 days")
        return self


def verify_approval(
    signed: Signed, delegation: Signed, consortium: Consortium, *, key_broker: str, job_id: str, terms: bytes, now: int
) -> VerifiedApproval:
    """The approval as a licence's evaluation takes it.

    1. The person's delegation is valid ``now``: an approval ends with the delegation it was given under.
    2. The person's key signed the approval, for this consortium and this key broker.
    3. It is about this job and these terms. Under which licence it was given is compared by ``evaluate``.

    Raises :class:`AuthenticationError`, :class:`SignatureError`, :class:`MalformedError` or :class:`ParameterError`.
    """
    person = verify_delegation(delegation, consortium, at=now)  # 1
    approval = signed.verify(Approval, person.signing_key)  # 2
    if (approval.consortium, approval.key_broker) != (consortium.id, key_broker):
        raise AuthenticationError("the approval is for another consortium or key broker")
    if (approval.job_id, approval.terms) != (job_id, terms):  # 3
        raise ParameterError("the approval is about another job or other terms")
    return VerifiedApproval(
        approver=actor_of(person),
        terms=approval.terms,
        licence=approval.licence,
        decision=approval.decision,
        at=approval.at,
        expires=approval.expires,
    )
