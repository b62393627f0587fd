"""What an operator chooses: one TOML file, environment variables ``CASEMATE_GATEWAY_<FIELD>`` on top. No secrets, only paths."""

from __future__ import annotations

from typing import Annotated

from casemate_messaging.blobs import MAX_BLOB_BYTES
from casemate_messaging.settings import ProgramSettings
from pydantic import Field, StringConstraints
from pydantic_settings import SettingsConfigDict

Seconds = Annotated[float, Field(gt=0, le=92 * 24 * 3600)]


class Settings(ProgramSettings):
    """The gateway's settings beside those that all programs share. Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="CASEMATE_GATEWAY_")

    nats_user: str = "gateway"
    nats_connect_s: Seconds = 10.0
    """How long to wait for NATS at start."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8440
    """0 takes a free one; event ``ready`` tells which."""
    public_url: Annotated[str, StringConstraints(pattern=r"^https?://[^/?#@\s]+$")] | None = None
    """The origin that clients sign for, if it is not the address listened on (a TLS proxy in front, say)."""

    max_envelope_bytes: Annotated[int, Field(ge=1 << 10, le=MAX_BLOB_BYTES)] = MAX_BLOB_BYTES
    max_uploads: Annotated[int, Field(ge=1, le=1024)] = 8
    """Uploads at once; each holds about 10 MiB of memory."""
    max_downloads: Annotated[int, Field(ge=1, le=1024)] = 16
    max_event_streams: Annotated[int, Field(ge=1, le=65536)] = 2048
    max_unfinished_bytes: Annotated[int, Field(ge=1 << 20)] = 16 << 30
    """What the unfinished uploads of one member's people may add up to."""
    upload_expiry_s: Annotated[float, Field(ge=60, le=30 * 24 * 3600)] = 24 * 3600.0
    """How long an upload may stand still before it is given up."""
    max_stored_bytes_per_member: Annotated[int, Field(ge=1 << 20)] = 1 << 40
    """What the envelopes that one member's people have stored, or begun to, may add up to."""
    max_jobs_per_member: Annotated[int, Field(ge=1, le=100_000)] = 20_000
    """Jobs of one member that have not ended."""
    max_jobs_listed: Annotated[int, Field(ge=1, le=10_000)] = 1000
    body_idle_s: Seconds = 30.0
    """How long a body may stand still, on its way in or out."""
    min_upload_bytes_per_s: Annotated[int, Field(ge=1)] = 16 << 10
    """A slower upload is given up, so that few slow ones cannot hold all places."""

    max_submission_age_s: Seconds = 3600.0
    """How old a routing header may be when it is first posted."""
    max_job_s: Seconds = 30 * 24 * 3600.0
    """How far a deadline may lie after the creation."""
    key_broker_timeout_s: Seconds = 30.0
    precheck_retry_s: Seconds = 5.0
    """How long to wait before a key broker that did not answer is asked again."""
    approval_poll_s: Seconds = 300.0
    """How long to wait at most before one that awaits approvals is asked again; each time twice as long, up to this."""
    lost_after_s: Seconds = 300.0
    """How long what was submitted may be missing from the store before its job ends as failed."""
    reconcile_every_s: Seconds = 15.0
    sweep_every_s: Seconds = 3600.0
    """How often what nobody needs any more is removed."""
    unreferenced_s: Annotated[float, Field(ge=3600, le=92 * 24 * 3600)] = 24 * 3600.0
    """How long envelopes that no job refers to, superseded checkpoints among them, are kept. Datasets always are."""
    retention_s: Annotated[float, Field(ge=0, le=100 * 365 * 24 * 3600)] = 90 * 24 * 3600.0
    """How long the result of a job is kept after the job has ended, and the envelopes that it was made from."""
    record_retention_s: Annotated[float, Field(ge=24 * 3600, le=100 * 365 * 24 * 3600)] = 365 * 24 * 3600.0
    """How long a job's record is kept after the job has ended. Never shorter than its result, nor than a submission could
    be posted again: until then the record tells that it was."""
    heartbeat_s: Seconds = 15.0
    """How often a quiet event stream shows that it lives."""
    poll_after_s: Annotated[int, Field(ge=1, le=3600)] = 2
    """What ``Retry-After`` tells those who poll, or more while many do."""
    polls_per_s: Annotated[float, Field(gt=0)] = 100.0
    """How often all who poll should come, together."""

    requests_per_s_per_member: Annotated[float, Field(gt=0)] = 200.0
    request_burst_per_member: Annotated[int, Field(ge=1)] = 1000
    max_connections: Annotated[int, Field(ge=1, le=1 << 20)] = 8192
    idle_connection_s: Seconds = 75.0
    """How long a connection may go without a whole request head: slow heads end here too."""
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Where ``/metrics`` is, if anywhere; 0 takes a free port. It names no one, but only operators need it."""

    otlp_traces_url: Annotated[str, StringConstraints(pattern=r"^https?://[^?#@\s]+$")] | None = None
    """Where spans go, by OTLP over HTTP: a collector's whole URL, such as ``http://127.0.0.1:4318/v1/traces``. Nowhere if not
    given. Needs the extra ``otel``."""

    ack_wait_s: Annotated[float, Field(ge=1, le=3600)] = 30.0
    """How long a worker may be silent before its job goes to another one; workers speak up each ``heartbeat_s`` of theirs."""
    allow_unsafe_durability: bool = False
    """Whether to run on a NATS that may acknowledge before its disk has it, or that does not say."""
    stream_replicas: Annotated[int, Field(ge=1, le=5)] = 1
    max_blob_store_bytes: Annotated[int, Field(ge=-1)] = -1
