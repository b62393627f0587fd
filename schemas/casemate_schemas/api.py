"""What the gateway's HTTP API says in JSON, and its paths and header names. Sealed and signed things travel as msgpack."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict

from .job_state import JobState

MEDIA_TYPE: Final = "application/vnd.casemate+msgpack"
UPLOAD_MEDIA_TYPE: Final = "application/offset+octet-stream"
PROBLEM_MEDIA_TYPE: Final = "application/problem+json"
PROBLEM_TYPE_PREFIX: Final = "https://casemate.dev/problems/"
DELEGATION_HEADER: Final = "Casemate-Delegation"
"""Base64 of the canonical signed delegation of whoever signs the request."""
JOB_HEADER: Final = "Casemate-Job"
"""Of a message to a key broker: the job that it may have something to do with. A hint, which nobody has to give or heed."""
SIGNATURE_LABEL: Final = "casemate"
SIGNATURE_TAG: Final = "casemate-v1"
SIGNATURE_WINDOW_S: Final = 60
SIGNED_COMPONENTS: Final = ("@method", "@target-uri", "content-digest", "casemate-delegation")
"""Covered by every request's RFC 9421 signature; ``content-digest`` (RFC 9530, sha-256) is present even for no body."""

OPENAPI_PATH: Final = "/openapi.json"
CONSORTIUM_PATH: Final = "/v1/consortium"
MANIFEST_PATH: Final = "/v1/consortium/manifest"
REVOCATIONS_PATH: Final = "/v1/consortium/revocations"
ENVELOPES_PATH: Final = "/v1/envelopes"
UPLOADS_PATH: Final = "/v1/uploads"
KEY_BROKERS_PATH: Final = "/v1/key-brokers"
JOBS_PATH: Final = "/v1/jobs"
WORKERS_PATH: Final = "/v1/workers"

TUS_VERSION: Final = "1.0.0"
"""Of the protocol for resumable uploads: https://tus.io/protocols/resumable-upload."""
UPLOAD_CHUNK_BYTES: Final = 512 << 10
"""What is sent of an upload's ciphertext at once is a multiple of this, but for the end."""
MIN_PIECE_BYTES: Final = 4 << 20
MAX_PIECE_BYTES: Final = 64 << 20
"""How much is sent at once at least (but for the end), and at most."""


class JsonModel(BaseModel):
    """A JSON body: strict, frozen, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProblemDetails(JsonModel):
    """RFC 9457. ``reason`` repeats the last part of ``type``: a reason code of the error tree."""

    type: str
    title: str
    status: int
    detail: str
    reason: str


class ManifestPublished(JsonModel):
    """A manifest is in force at the gateway, and on its way to everyone else."""

    number: int
    digest: str


class RevocationPublished(JsonModel):
    """A revocation is in force at the gateway, and on its way to the key brokers."""

    member: str
    person: str
    before: int


class EnvelopeStored(JsonModel):
    """An envelope is stored, whole and with the digest its header says."""

    envelope: str
    bytes: int


class ApprovalStatus(JsonModel):
    """One key broker's word on a job; ``answer`` is its signed answer in base64, once given.

    A pending one may have an answer too, which tells the submitter what is awaited.
    """

    key_broker: str
    verdict: str
    answer: str | None


class JobStatus(JsonModel):
    """A job as those concerned may see it."""

    job_id: str
    state: JobState
    attempt: int
    step: int | None
    steps: int | None
    epsilon: float | None
    """Planned epsilon at ``step``."""
    reason: str | None
    approvals: tuple[ApprovalStatus, ...]
    created: int
    updated: int
    deadline: int | None
    simulation: bool


class JobList(JsonModel):
    """Jobs of the asking person's member, newest first."""

    jobs: tuple[JobStatus, ...]


class PresentWorker(JsonModel):
    """A worker as it announced itself: its own word, which no key broker goes by."""

    worker: str
    state: str
    """``waiting``, ``working``, ``draining``, or ``silent``: it has not been heard for a while."""
    since: int
    """When its program was started, by its own clock."""
    heard: int
    """When NATS last heard of it."""
    manifest_number: int


class PresentWorkers(JsonModel):
    """The workers of the last day, by name."""

    workers: tuple[PresentWorker, ...]
