"""What a privacy audit reports: how often an auditor guessed right, and which lower bounds on epsilon follow from that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .codec import WireModel, pack
from .job import MAX_CANARIES, Rational

Score = Literal["likelihood", "spread"]
"""What canaries were ranked by; see ``casemate_worker.privacy_audit``."""

Count = Annotated[int, Field(ge=0, le=MAX_CANARIES)]


class Guesses(WireModel):
    """An auditor's word on some canaries: the ``top`` by that score are in the data, the ``bottom`` are not.

    So many of these guesses were right.
    """

    score: Score
    top: Count
    bottom: Count
    correct: Count

    @model_validator(mode="after")
    def _is_right_no_more_than_it_speaks(self) -> Self:
        if not 1 <= self.made <= MAX_CANARIES or self.correct > self.made:
            raise ValueError("expected at most as many right guesses as guesses")
        return self

    @property
    def made(self) -> int:
        """How many guesses; about other canaries the auditor abstained."""
        return self.top + self.bottom


class AuditCounts(WireModel):
    """All that an audited training says: several ways to guess, and how often each was right."""

    KIND: ClassVar[str] = "audit-counts"

    guesses: Annotated[tuple[Guesses, ...], Field(min_length=1, max_length=64)]


def padding_of(guesses: Sequence[Guesses]) -> bytes:
    """Zeros for what the numbers of right guesses are shorter than the longest there can be, in bytes as encoded."""
    return bytes(sum(len(pack(MAX_CANARIES)) - len(pack(item.correct)) for item in guesses))


class AuditReport(WireModel):
    """Lower bounds on epsilon at ``delta`` beside the epsilon that is guaranteed to whom the canaries stand for.

    Both bounds hold at once with ``confidence``. Everything else follows from ``guesses`` and the terms, so whoever holds them
    computes it again.
    """

    canaries: Annotated[int, Field(ge=1, le=MAX_CANARIES)]
    sample_rate: Rational
    confidence: Annotated[float, Field(gt=0, lt=1)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    epsilon: Annotated[float, Field(ge=0)]
    """What is guaranteed at this rate."""
    one_run_epsilon: Annotated[float, Field(ge=0)]
    """Lower bound that holds whatever the mechanism is."""
    profile_epsilon: Annotated[float, Field(ge=0)]
    """Lower bound in terms of the mechanism's whole privacy profile: its epsilon with the noise that the guesses just refute."""
    guesses: Annotated[tuple[Guesses, ...], Field(min_length=1, max_length=64)]
    padding: Annotated[bytes, Field(max_length=128)]
    """Makes all reports of a plan equally long (:func:`padding_of`): sizes of results are seen before the commit."""

    @property
    def epsilon_lower(self) -> float:
        """The larger of the two."""
        return max(self.one_run_epsilon, self.profile_epsilon)

    @property
    def refutes(self) -> bool:
        """Whether the guarantee is refuted, with that confidence: if so, do not use what this engine made."""
        return self.epsilon_lower > self.epsilon
