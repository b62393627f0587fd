"""Who acts: a person, under a short-lived delegation that their member signed."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from .codec import Digest, Name, UnixMs, WireModel
from .keys import PublicSigningKey, SealingPublicKey

Role = Literal["scientist", "steward", "admin"]
"""``scientist`` submits jobs, ``steward`` looks after datasets and licences, ``admin`` after people and key brokers."""

MAX_DELEGATION_MS: Final = 92 * 24 * 3600 * 1000


class Delegation(WireModel):
    """A member's statement that a person may act for it: with this key, in these roles, for this time."""

    KIND: ClassVar[str] = "delegation"

    version: Literal[1] = 1
    consortium: Digest
    member: Name
    person: Name
    signing_key: PublicSigningKey
    sealing_key: SealingPublicKey
    roles: Annotated[tuple[Role, ...], Field(min_length=1, max_length=3)]
    not_before: UnixMs
    expires: UnixMs

    @model_validator(mode="after")
    def _is_short_lived(self) -> Self:
        if not 0 < self.expires - self.not_before <= MAX_DELEGATION_MS:
            raise ValueError("a delegation lasts at most 92 days")
        if len(set(self.roles)) != len(self.roles):
            raise ValueError("roles must be unique")
        return self


class Revocation(WireModel):
    """A member's word that a person's delegations count no longer: all that begin before that time. Signed by the member.

    It stands for ever, and covers every key that the person had. They go on under a delegation that begins later.
    """

    KIND: ClassVar[str] = "revocation"

    version: Literal[1] = 1
    consortium: Digest
    member: Name
    person: Name
    before: UnixMs
    created: UnixMs
