"""Every error Casemate raises on purpose, in one tree.

::

    CasemateError
    ├── MalformedError                 the bytes are not what they claim to be
    │   ├── TooLargeError              a declared or actual size is over its bound
    │   ├── UnsupportedVersionError    a version this release does not speak
    │   └── ChecksumError              a piece of an upload is not what its sender said it is (tus)
    ├── ParameterError                 a value is out of its range (epsilon, delta, rate, sigma, ...)
    │   ├── KeyReusedError             an idempotency key was used for another request before
    │   └── DeadlineError              it is too late, by the clock of who says so
    ├── ModelError                     a model cannot be trained here
    │   ├── UnsupportedOperationError  an operation outside the allow-list
    │   └── BatchDependenceError       one example can touch another's loss
    ├── DatasetError                   a dataset does not fit its card, or lacks a column
    ├── CryptographyError
    │   ├── SignatureError             a signature does not verify
    │   └── SealError                  a seal does not open, or a digest does not match
    ├── AttestationError
    │   ├── VerificationError          the evidence is not genuine
    │   ├── AppraisalError             genuine, but it does not meet the policy
    │   └── NonceError                 the nonce is unknown, used or expired
    ├── AuthenticationError            who sends this cannot be established
    ├── AuthorisationError             known, but not allowed
    │   ├── LicenceError               the owner's licence forbids it
    │   │   └── ApprovalMissingError   the licence wants approvals that are not there yet
    │   └── BudgetError                the privacy budget does not cover it
    ├── ManifestError                  the consortium manifest is not valid, or older than the pinned one
    ├── NotFoundError                  no such thing, or not for this party
    ├── ConflictError                  another decision was made first
    │   ├── CommitConflictError        another result digest holds the commit
    │   └── StateError                 the state machine has no such transition
    ├── ReleaseError                   a result's provenance does not hold
    ├── IntegrityError                 own stored state is broken: stop, do not guess
    ├── TrainingError                  training failed; outside the enclave it has one reason only
    ├── UnavailableError               try again later (transient)
    │   ├── StorageFullError           no room to store it (transient)
    │   │   └── QuotaError             no room for this member: something of its own must go first
    │   ├── ThrottledError             asked too often: wait first (transient)
    │   └── RolledBackError            the state is older than one already seen: its owners must endorse it
    └── SetupError                     this installation or its settings are wrong
        └── MissingExtraError          a command whose optional dependencies are not installed

The class decides what happens: :data:`PROBLEMS` maps it to the HTTP status of an RFC 9457 problem and to what becomes of
the work-queue delivery. A ``reason`` is a stable code that may cross a trust boundary; the message never leaves the
program that raised it unless that program's input was already known to the receiver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Delivery = Literal["term", "nak", "redeliver"]
"""What becomes of a work-queue delivery: ``term`` (permanent), ``nak`` (with delay), ``redeliver`` (leave it unacked)."""


class CasemateError(Exception):
    """Root of the tree. ``reason`` is the stable code that other parties may see."""

    reason: ClassVar[str] = "internal"


class MalformedError(CasemateError):
    reason = "malformed"


class TooLargeError(MalformedError):
    reason = "too_large"


class UnsupportedVersionError(MalformedError):
    reason = "unsupported_version"


class ChecksumError(MalformedError):
    reason = "checksum_mismatch"


class ParameterError(CasemateError):
    reason = "invalid_parameter"


class KeyReusedError(ParameterError):
    reason = "key_reused"


class DeadlineError(ParameterError):
    reason = "deadline_passed"


class ModelError(CasemateError):
    reason = "model_refused"


class UnsupportedOperationError(ModelError):
    reason = "operation_not_allowed"


class BatchDependenceError(ModelError):
    reason = "batch_dependence"


class DatasetError(CasemateError):
    reason = "dataset_mismatch"


class CryptographyError(CasemateError):
    reason = "cryptography"


class SignatureError(CryptographyError):
    reason = "bad_signature"


class SealError(CryptographyError):
    reason = "seal_does_not_open"


class AttestationError(CasemateError):
    reason = "attestation_refused"


class VerificationError(AttestationError):
    reason = "evidence_not_genuine"


class AppraisalError(AttestationError):
    reason = "evidence_outside_policy"


class NonceError(AttestationError):
    reason = "nonce_refused"


class AuthenticationError(CasemateError):
    reason = "not_authenticated"


class AuthorisationError(CasemateError):
    reason = "not_allowed"


class LicenceError(AuthorisationError):
    reason = "licence_forbids"


class ApprovalMissingError(LicenceError):
    reason = "approval_missing"


class BudgetError(AuthorisationError):
    reason = "budget_exceeded"


class ManifestError(CasemateError):
    reason = "manifest_refused"


class NotFoundError(CasemateError):
    reason = "not_found"


class ConflictError(CasemateError):
    reason = "conflict"


class CommitConflictError(ConflictError):
    reason = "another_result_committed"


class StateError(ConflictError):
    reason = "wrong_state"


class ReleaseError(CasemateError):
    reason = "provenance_broken"


class IntegrityError(CasemateError):
    reason = "state_broken"


class TrainingError(CasemateError):
    reason = "training_failed"


class UnavailableError(CasemateError):
    reason = "unavailable"

    def __init__(self, message: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageFullError(UnavailableError):
    reason = "storage_full"


class QuotaError(StorageFullError):
    reason = "quota_exceeded"


class ThrottledError(UnavailableError):
    reason = "throttled"


class RolledBackError(UnavailableError):
    reason = "state_rolled_back"


class SetupError(CasemateError):
    reason = "setup"


class MissingExtraError(SetupError):
    reason = "missing_extra"


@dataclass(frozen=True)
class Problem:
    """How one class of error is answered: HTTP status of its RFC 9457 problem, and the fate of a delivery."""

    status: int
    delivery: Delivery


PROBLEMS: dict[type[CasemateError], Problem] = {
    CasemateError: Problem(500, "redeliver"),
    MalformedError: Problem(400, "term"),
    TooLargeError: Problem(413, "term"),
    ChecksumError: Problem(460, "term"),
    ParameterError: Problem(422, "term"),
    ModelError: Problem(422, "term"),
    DatasetError: Problem(422, "term"),
    CryptographyError: Problem(400, "term"),
    SignatureError: Problem(401, "term"),
    # Another worker may be able to show what this one could not.
    AttestationError: Problem(403, "nak"),
    NonceError: Problem(409, "nak"),
    AuthenticationError: Problem(401, "term"),
    AuthorisationError: Problem(403, "term"),
    ManifestError: Problem(409, "nak"),
    NotFoundError: Problem(404, "term"),
    ConflictError: Problem(409, "redeliver"),
    # The next attempt is told the committed result in its Grants, and publishes that one.
    CommitConflictError: Problem(409, "nak"),
    ReleaseError: Problem(502, "term"),
    IntegrityError: Problem(500, "redeliver"),
    TrainingError: Problem(500, "term"),
    UnavailableError: Problem(503, "nak"),
    StorageFullError: Problem(507, "nak"),
    ThrottledError: Problem(429, "nak"),
    SetupError: Problem(500, "redeliver"),
}
"""One row for each class that is answered in its own way; other classes take their nearest ancestor's."""


def problem_of(error: BaseException) -> Problem:
    """The answer for ``error``: its class's row, or its nearest ancestor's; a stranger's is the root's."""
    for cls in type(error).__mro__:
        if (problem := PROBLEMS.get(cls)) is not None:
            return problem
    return PROBLEMS[CasemateError]


def _classes(root: type[CasemateError]) -> dict[str, type[CasemateError]]:
    found = {root.reason: root}
    for child in root.__subclasses__():
        found |= _classes(child)
    return found


def error_from_reason(reason: str, message: str) -> CasemateError:
    """The error whose class has this ``reason`` code, to be raised again on the other side of a wire."""
    return _classes(CasemateError).get(reason, CasemateError)(message)
