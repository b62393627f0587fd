"""Streams, buckets and consumers, as they must be. The gateway runs :func:`ensure_streams` at each start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import nats.js.errors
from casemate_schemas import subjects
from casemate_schemas.errors import SetupError
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    PersistMode,
    RePublish,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)

from .connection import translated

_DAY_S: Final = 24 * 3600.0
_DUPLICATE_WINDOW_S: Final = 120.0
_STREAM_NOT_FOUND: Final = 10059


@dataclass(frozen=True)
class StreamSettings:
    """What an operator may choose. Sizes in bytes, times in seconds; -1 means no bound but the disk's."""

    replicas: int = 1
    max_blob_store_bytes: int = -1
    max_jobs_queued: int = 100_000
    max_events_per_job: int = 4096
    event_age_s: float = 30 * _DAY_S
    nonce_age_s: float = 180.0
    """Longer than a signature counts, both ways: a nonce that was forgotten belongs to a request that is too old."""
    ack_wait_s: float = 30.0
    max_deliver: int = -1
    """Deliveries of one job; without a bound (-1) its deadline ends it, and nothing is ever left undeliverable."""
    max_ack_pending: int = 10_000


async def ensure_streams(js: JetStreamContext, settings: StreamSettings | None = None) -> None:
    """Creates what is missing and brings the rest to ``settings``; safe to run at any time, by several at once.

    Raises :class:`SetupError` if something exists that cannot be brought there (another retention, say), and
    :class:`~casemate_schemas.errors.UnavailableError` if JetStream does not answer.
    """
    settings = settings or StreamSettings()
    for config in stream_configs(settings):
        await _ensure_stream(js, config)
    for resource_class in subjects.RESOURCE_CLASSES:
        stream = subjects.work_stream(resource_class)
        with translated(f"setting up the consumer of {stream}"):
            await js.add_consumer(stream, _work_consumer(resource_class, settings))


def stream_configs(settings: StreamSettings) -> list[StreamConfig]:
    """All streams. Each refuses new messages when full rather than forgetting old ones, events excepted."""
    return [
        *(_work_stream(resource_class, settings) for resource_class in subjects.RESOURCE_CLASSES),
        _stream(
            subjects.EVENT_STREAM,
            "casemate.event.*",
            settings,
            discard=DiscardPolicy.OLD,
            max_age=settings.event_age_s,
            max_msgs_per_subject=settings.max_events_per_job,
            allow_direct=True,
            republish=RePublish(
                src="casemate.event.*", dest="casemate.event-stored.{{wildcard(1)}}", headers_only=True
            ),
        ),
        _stream(
            subjects.BLOB_STREAM,
            "casemate.blob.chunk.*.*",
            settings,
            max_bytes=settings.max_blob_store_bytes,
            allow_direct=True,
        ),
        _write_once(subjects.BLOB_MARKER_STREAM, "casemate.blob.marker.*", settings),
        _write_once(subjects.HEAD_STREAM, "casemate.head.*", settings),
        _write_once(subjects.MANIFEST_STREAM, "casemate.manifest.*", settings),
        _write_once(subjects.REVOCATION_STREAM, subjects.EVERY_REVOCATION, settings),
        _stream(
            subjects.LEDGER_HEAD_STREAM,
            "casemate.ledger-head.*",
            settings,
            discard=DiscardPolicy.OLD,
            max_msgs_per_subject=1,
            allow_direct=True,
        ),
        _stream(
            subjects.WORKER_STREAM,
            "casemate.worker.*.*",
            settings,
            discard=DiscardPolicy.OLD,
            max_msgs_per_subject=1,
            max_age=_DAY_S,
            allow_direct=True,
        ),
        *(
            _stream(f"KV_{bucket}", f"$KV.{bucket}.*", settings, max_msgs_per_subject=1, allow_direct=True)
            for bucket in subjects.JOB_BUCKETS
        ),
        _stream(
            subjects.UPLOAD_STREAM,
            f"$KV.{subjects.UPLOAD_BUCKET}.*.*",
            settings,
            max_msgs_per_subject=1,
            allow_direct=True,
        ),
        _stream(
            subjects.STORED_STREAM,
            f"$KV.{subjects.STORED_BUCKET}.*.*",
            settings,
            max_msgs_per_subject=1,
            allow_direct=True,
        ),
        _stream(
            subjects.LEASE_STREAM, f"$KV.{subjects.LEASE_BUCKET}.*", settings, max_msgs_per_subject=1, allow_direct=True
        ),
        _nonce_stream(settings),
    ]


def _stream(name: str, subject: str, settings: StreamSettings, **options: Any) -> StreamConfig:
    defaults: dict[str, Any] = {
        "retention": RetentionPolicy.LIMITS,
        "storage": StorageType.FILE,
        "discard": DiscardPolicy.NEW,
        "duplicate_window": _DUPLICATE_WINDOW_S,
    }
    return StreamConfig(
        name=name,
        subjects=[subject],
        num_replicas=settings.replicas,
        **{**defaults, **options},
    )


def _write_once(name: str, subject: str, settings: StreamSettings) -> StreamConfig:
    """One message per subject, which nobody can replace: only a purge makes room for another."""
    return _stream(name, subject, settings, max_msgs_per_subject=1, discard_new_per_subject=True, allow_direct=True)


def _nonce_stream(settings: StreamSettings) -> StreamConfig:
    """Nonces of signed requests: they do not wait for the disk, on which every request would wait too.

    One server flushes them behind its answer, and has them again after a restart but for what it took in its last
    moments; a cluster, whose streams cannot do that, keeps them in the memory of all replicas.
    """
    is_clustered = settings.replicas > 1
    return _stream(
        subjects.NONCE_STREAM,
        f"$KV.{subjects.NONCE_BUCKET}.*",
        settings,
        max_msgs_per_subject=1,
        max_age=settings.nonce_age_s,
        max_bytes=64 << 20,
        duplicate_window=min(_DUPLICATE_WINDOW_S, settings.nonce_age_s),
        storage=StorageType.MEMORY if is_clustered else StorageType.FILE,
        persist_mode=None if is_clustered else PersistMode.ASYNC,
    )


def _work_stream(resource_class: subjects.ResourceClass, settings: StreamSettings) -> StreamConfig:
    """One message per job, gone once acknowledged; a second one for a queued job is refused.

    What is in it follows from the records, which are synced, and is put back from them: it need not be synced itself. A
    replicated stream has no such mode.
    """
    return _stream(
        subjects.work_stream(resource_class),
        f"casemate.work.{resource_class}.*",
        settings,
        retention=RetentionPolicy.WORK_QUEUE,
        max_msgs=settings.max_jobs_queued,
        max_msgs_per_subject=1,
        discard_new_per_subject=True,
        persist_mode=PersistMode.ASYNC if settings.replicas == 1 else None,
    )


def _work_consumer(resource_class: subjects.ResourceClass, settings: StreamSettings) -> ConsumerConfig:
    return ConsumerConfig(
        name=subjects.WORKER_CONSUMER,
        durable_name=subjects.WORKER_CONSUMER,
        filter_subject=f"casemate.work.{resource_class}.*",
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=settings.ack_wait_s,
        max_deliver=settings.max_deliver,
        max_ack_pending=settings.max_ack_pending,
    )


async def _ensure_stream(js: JetStreamContext, config: StreamConfig) -> None:
    with translated(f"setting up the stream {config.name}"):
        try:
            await js.update_stream(config)
        except nats.js.errors.NotFoundError as error:
            if error.err_code != _STREAM_NOT_FOUND:
                raise
            await js.add_stream(config)
        except (nats.js.errors.BadRequestError, nats.js.errors.ServerError) as error:
            raise SetupError(f"stream {config.name} cannot be brought to its settings: {error.description}") from error
