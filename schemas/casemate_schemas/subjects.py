"""Every NATS name in one place, and who may publish or subscribe to what.

::

    casemate.kb.<key broker>.<op>                 request-reply with one key broker
    casemate.work.<resource class>.<job>          the work queue                      stream WORK_<resource class>
    casemate.event.<job>                          job events                          stream EVENTS
    casemate.event-stored.<job>                   the same again, once stored: a wake-up for followers
    casemate.blob.chunk.<digest>.<upload>         chunks of ciphertext                stream BLOBS
    casemate.blob.marker.<digest>                 "this upload is the blob"           stream BLOB_MARKERS
    casemate.head.<digest>                        signed heads of envelopes           stream ENVELOPE_HEADS
    casemate.manifest.<number>                    signed consortium manifests         stream MANIFESTS
    casemate.revocation.<digest>                  revocations of delegations          stream REVOCATIONS
    casemate.ledger-head.<key broker>             newest head of each ledger          stream LEDGER_HEADS
    casemate.worker.<worker>.presence             that a worker is there              stream WORKERS
    casemate.worker.<worker>.drain                that it is to take no more jobs     stream WORKERS
    $KV.jobs-<shard>.<job>                        job records                         stream KV_jobs-<shard>
    $KV.nonces.<key>                              HTTP nonces already used            stream KV_nonces
    $KV.uploads.<member>.<digest>                 uploads that have not ended         stream KV_uploads
    $KV.leases.<name>                             who does what only one may do       stream KV_leases
    $KV.stored.<member>.<digest>                  size of an envelope it stored       stream KV_stored
    $SYS.REQ.SERVER.PING.JSZ                      how each server keeps streams: for gateways
    _INBOX_<user>.>                               replies to one user

Permissions keep an honest program with a bug, or one stolen key, inside its part. They are not enough alone: NATS never
checks the *reply* subject of a request, so whoever may ask JetStream for a message it wrote itself could have it
delivered to ``$JS.API.STREAM.DELETE.…`` or into another's inbox. Hence three kinds of account as well: JetStream and the
gateway in one, workers in another that reaches a short list of services, each key broker in its own. A reply then goes
to the requester's account and no further. None of it defends against NATS itself or its host, which the protocol treats
as hostile: those can cost availability and nothing else.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Final, Literal, get_args

from .errors import MalformedError

ResourceClass = Literal["cpu"]
"""What a job needs to run on; one work queue each."""

RESOURCE_CLASSES: Final[tuple[ResourceClass, ...]] = get_args(ResourceClass)

GatewayOp = Literal["precheck", "message", "evidence"]
"""What the gateway may ask of a key broker."""

WorkerOp = Literal["nonce", "grant", "commit"]
"""What a worker may ask of a key broker."""

GATEWAY_OPS: Final[tuple[GatewayOp, ...]] = get_args(GatewayOp)
WORKER_OPS: Final[tuple[WorkerOp, ...]] = get_args(WorkerOp)

GATEWAY_ACCOUNT: Final = "CASEMATE"
"""The NATS account that holds JetStream; gateways are its only users."""

WORKER_ACCOUNT: Final = "WORKERS"

SYSTEM_ACCOUNT: Final = "SYS"
"""The NATS account in which servers tell about themselves. It has no users; one of its services is handed on."""

SERVER_STATUS: Final = "$SYS.REQ.SERVER.PING.JSZ"
"""Subject on which every server with JetStream tells how it keeps streams. Handed on to the gateway's account alone."""

EVENT_STREAM: Final = "EVENTS"
BLOB_STREAM: Final = "BLOBS"
BLOB_MARKER_STREAM: Final = "BLOB_MARKERS"
HEAD_STREAM: Final = "ENVELOPE_HEADS"
MANIFEST_STREAM: Final = "MANIFESTS"
REVOCATION_STREAM: Final = "REVOCATIONS"
LEDGER_HEAD_STREAM: Final = "LEDGER_HEADS"
WORKER_STREAM: Final = "WORKERS"
JOB_SHARDS: Final = 8
"""Buckets that job records are spread over: a stream syncs one message after the other, several of them at once."""
JOB_BUCKETS: Final = tuple(f"jobs-{shard}" for shard in range(JOB_SHARDS))
JOB_STREAMS: Final = tuple(f"KV_{bucket}" for bucket in JOB_BUCKETS)
NONCE_BUCKET: Final = "nonces"
NONCE_STREAM: Final = "KV_nonces"
UPLOAD_BUCKET: Final = "uploads"
UPLOAD_STREAM: Final = "KV_uploads"
LEASE_BUCKET: Final = "leases"
LEASE_STREAM: Final = "KV_leases"
STORED_BUCKET: Final = "stored"
STORED_STREAM: Final = "KV_stored"
WORKER_CONSUMER: Final = "workers"

_TOKEN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")


def token(value: str) -> str:
    """``value`` itself if it may stand as one token of a subject; raises :class:`MalformedError` otherwise.

    The same alphabet as :data:`~casemate_schemas.codec.Name` and hexadecimal digests: no dots, no wildcards, no spaces.
    """
    if not _TOKEN.fullmatch(value):
        raise MalformedError("expected a name of 1 to 64 characters from a-z, 0-9 and inner hyphens")
    return value


def key_broker(key_broker_id: str) -> str:
    """Prefix of everything addressed to one key broker."""
    return f"casemate.kb.{token(key_broker_id)}"


def key_broker_op(key_broker_id: str, op: GatewayOp | WorkerOp) -> str:
    """Subject of one request to one key broker."""
    return f"{key_broker(key_broker_id)}.{op}"


def work_stream(resource_class: ResourceClass) -> str:
    """Name of the work-queue stream of a resource class."""
    return f"WORK_{token(resource_class)}"


def work(resource_class: ResourceClass, job_id: str) -> str:
    """Subject of a job's one message in the work queue."""
    return f"casemate.work.{token(resource_class)}.{token(job_id)}"


def next_delivery(resource_class: ResourceClass) -> str:
    """Subject on which a worker asks for its next job."""
    return f"$JS.API.CONSUMER.MSG.NEXT.{work_stream(resource_class)}.{WORKER_CONSUMER}"


def job_shard(job_id: str) -> int:
    """Which of :data:`JOB_BUCKETS` holds a job's record."""
    return zlib.crc32(token(job_id).encode("ascii")) % JOB_SHARDS


def job_record(job_id: str) -> str:
    """Subject of a job's record."""
    return f"$KV.{JOB_BUCKETS[job_shard(job_id)]}.{job_id}"


def job_stream(job_id: str) -> str:
    """Name of the stream that holds a job's record."""
    return JOB_STREAMS[job_shard(job_id)]


def max_deliveries_advisory(resource_class: ResourceClass) -> str:
    """Subject on which the server tells, once and best effort, that it gave up delivering a job."""
    return f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{work_stream(resource_class)}.{WORKER_CONSUMER}"


def event(job_id: str) -> str:
    """Subject that a job's events are published to."""
    return f"casemate.event.{token(job_id)}"


EVERY_EVENT_STORED: Final = "casemate.event-stored.*"
"""Subjects on which any job's events appear again."""


def blob_chunk(digest_hex: str, upload_id: str) -> str:
    """Subject of all chunks of one upload: another upload of the same blob has another subject."""
    return f"casemate.blob.chunk.{token(digest_hex)}.{token(upload_id)}"


def blob_marker(digest_hex: str) -> str:
    """Subject of the message that makes one complete upload the blob."""
    return f"casemate.blob.marker.{token(digest_hex)}"


def head(digest_hex: str) -> str:
    """Subject of the signed head of the envelope whose header has that digest."""
    return f"casemate.head.{token(digest_hex)}"


def manifest(number: int) -> str:
    """Subject of a consortium's manifest of that number."""
    return f"casemate.manifest.{number}"


EVERY_REVOCATION: Final = "casemate.revocation.*"
"""Subjects of all revocations."""


def revocation(digest_hex: str) -> str:
    """Subject of the signed revocation of that digest."""
    return f"casemate.revocation.{token(digest_hex)}"


def ledger_head(key_broker_id: str) -> str:
    """Subject of the newest head of one key broker's ledger."""
    return f"casemate.ledger-head.{token(key_broker_id)}"


def ledger_head_services(key_broker_id: str) -> tuple[str, ...]:
    """What the gateway's account offers to one key broker alone: to leave its ledger's head, and to read it."""
    subject = ledger_head(key_broker_id)
    return subject, f"$JS.API.DIRECT.GET.{LEDGER_HEAD_STREAM}.{subject}"


def worker_presence(worker: str) -> str:
    """Subject on which a worker says that it is there."""
    return f"casemate.worker.{token(worker)}.presence"


def worker_drain(worker: str) -> str:
    """Subject of the order to a worker to take no more jobs."""
    return f"casemate.worker.{token(worker)}.drain"


EVERY_WORKER_PRESENCE: Final = "casemate.worker.*.presence"
"""Subjects of what all workers say of themselves."""

PRESENCE_SERVICES: Final = (
    EVERY_WORKER_PRESENCE,
    f"$JS.API.DIRECT.GET.{WORKER_STREAM}.casemate.worker.*.drain",
)
"""What the gateway's account offers to the workers' besides: each worker may use them about itself only."""


def inbox_prefix(user: str) -> str:
    """Prefix of the inboxes that only ``user`` may subscribe to."""
    return f"_INBOX_{token(user)}"


def key_broker_account(key_broker_id: str) -> str:
    """Name of the account of one key broker."""
    return f"KEY_BROKER_{token(key_broker_id)}"


@dataclass(frozen=True)
class Permissions:
    """What one user may do. Whatever is not listed is denied."""

    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    allow_responses: bool = False
    """May publish one message to the reply subject of each request it receives."""


_MANIFEST_SERVICE: Final = f"$JS.API.DIRECT.GET.{MANIFEST_STREAM}.casemate.manifest.*"

KEY_BROKER_SERVICES: Final = (_MANIFEST_SERVICE, f"$JS.API.DIRECT.GET.{REVOCATION_STREAM}")
"""What the gateway's account offers to the key brokers': the consortium's manifests and revocations, to read."""

_SHARED_SERVICES: Final = (
    _MANIFEST_SERVICE,
    "casemate.blob.chunk.*.*",
    "casemate.blob.marker.*",
    "casemate.head.*",
    "casemate.event.*",
    *(f"$KV.{bucket}.*" for bucket in JOB_BUCKETS),
    *(f"$JS.API.DIRECT.GET.KV_{bucket}.$KV.{bucket}.*" for bucket in JOB_BUCKETS),
    f"$JS.API.DIRECT.GET.{BLOB_STREAM}",
    f"$JS.API.DIRECT.GET.{BLOB_MARKER_STREAM}.casemate.blob.marker.*",
    f"$JS.API.DIRECT.GET.{HEAD_STREAM}.casemate.head.*",
)

WORKER_SERVICES: Final = (
    *_SHARED_SERVICES,
    *(next_delivery(c) for c in RESOURCE_CLASSES),
    *(f"$JS.ACK.{work_stream(c)}.{WORKER_CONSUMER}.>" for c in RESOURCE_CLASSES),
)
"""What the gateway's account offers to the workers': manifests, blobs, job records, events, and pulling from the work queue."""

_PURGEABLE: Final = (
    BLOB_STREAM,
    BLOB_MARKER_STREAM,
    HEAD_STREAM,
    UPLOAD_STREAM,
    STORED_STREAM,
    *(work_stream(c) for c in RESOURCE_CLASSES),
)


_READ_THROUGH: Final = (
    EVENT_STREAM,
    *JOB_STREAMS,
    REVOCATION_STREAM,
    BLOB_MARKER_STREAM,
    HEAD_STREAM,
    UPLOAD_STREAM,
    STORED_STREAM,
    WORKER_STREAM,
)
"""Streams that the gateway reads from end to end."""


def gateway_permissions(user: str = "gateway") -> Permissions:
    """The gateway sets up streams, carries jobs and blobs, follows events, and asks key brokers for approval."""
    return Permissions(
        publish=(
            *(f"casemate.kb.*.{op}" for op in GATEWAY_OPS),
            *_SHARED_SERVICES,
            "casemate.work.*.*",
            f"$KV.{NONCE_BUCKET}.*",
            f"$KV.{UPLOAD_BUCKET}.*.*",
            f"$KV.{STORED_BUCKET}.*.*",
            f"$KV.{LEASE_BUCKET}.*",
            f"$JS.API.DIRECT.GET.{UPLOAD_STREAM}.$KV.{UPLOAD_BUCKET}.*.*",
            f"$JS.API.DIRECT.GET.{LEASE_STREAM}.$KV.{LEASE_BUCKET}.*",
            "casemate.manifest.*",
            EVERY_REVOCATION,
            "casemate.worker.*.drain",
            *(f"$JS.API.STREAM.{verb}.*" for verb in ("CREATE", "UPDATE", "INFO")),
            *(f"$JS.API.STREAM.PURGE.{stream}" for stream in _PURGEABLE),
            *(f"$JS.API.STREAM.MSG.DELETE.{stream}" for stream in JOB_STREAMS),
            *(f"$JS.API.CONSUMER.CREATE.{work_stream(c)}.{WORKER_CONSUMER}.>" for c in RESOURCE_CLASSES),
            *(f"$JS.API.CONSUMER.INFO.{work_stream(c)}.{WORKER_CONSUMER}" for c in RESOURCE_CLASSES),
            *(f"$JS.API.DIRECT.GET.{stream}" for stream in _READ_THROUGH),
            SERVER_STATUS,
        ),
        subscribe=(
            f"{inbox_prefix(user)}.>",
            EVERY_EVENT_STORED,
            *(max_deliveries_advisory(c) for c in RESOURCE_CLASSES),
        ),
    )


def worker_permissions(user: str) -> Permissions:
    """A worker uses the services offered to workers, asks key brokers for keys, and speaks of itself alone."""
    own = (worker_presence(user), f"$JS.API.DIRECT.GET.{WORKER_STREAM}.{worker_drain(user)}")
    return Permissions(
        publish=(*(f"casemate.kb.*.{op}" for op in WORKER_OPS), *WORKER_SERVICES, *own),
        subscribe=(f"{inbox_prefix(user)}.>",),
    )


def key_broker_permissions(key_broker_id: str) -> Permissions:
    """A key broker hears its own requests and answers each once. Of its own accord it reads manifests and
    revocations, leaves its ledger's head and reads that again, and nothing else.
    """
    return Permissions(
        publish=(*KEY_BROKER_SERVICES, *ledger_head_services(key_broker_id)),
        subscribe=(f"{key_broker(key_broker_id)}.*", f"{inbox_prefix(key_broker_id)}.>"),
        allow_responses=True,
    )
