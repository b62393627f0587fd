"""What handlers share: the stores, who belongs to the consortium, and how much may happen at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from aiohttp import web
from casemate_messaging.blobs import BlobStore
from casemate_messaging.direct import REPLICA_LAG_S
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.events import EventLog as JobEvents
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.manifests import ManifestStore, TrustedManifests
from casemate_messaging.queue import WorkQueue
from casemate_messaging.revocations import RevocationStore, TrustedRevocations
from casemate_messaging.uploads import UploadStore
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import MalformedError, NotFoundError, UnavailableError
from casemate_schemas.job import JobId
from nats.aio.client import Client
from pydantic import TypeAdapter, ValidationError

from .admission import Admission
from .authentication import Authenticator, Person
from .bodies import Body
from .dispatch import Dispatcher
from .housekeeping import Housekeeping
from .limits import Pace, TokenBuckets
from .metrics import Metrics
from .quotas import Quotas
from .records import Job, RecordReader, no_such_job
from .settings import Settings
from .tracing import Tracing
from .transitions import Transitions

_JOB_ID = TypeAdapter[str](JobId)


class Places:
    """At most ``count`` at once; who finds none is told to come back."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.free = count

    def held(self) -> int:
        """How many are taken."""
        return self._count - self.free

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Holds a place while the block runs. Raises :class:`UnavailableError` if none is free."""
        if self.free == 0:
            raise UnavailableError("too much is going on at once: try again later")
        self.free -= 1
        try:
            yield
        finally:
            self.free += 1


@dataclass(frozen=True)
class Gateway:
    """One running gateway. It holds no state that another one beside it would miss."""

    settings: Settings
    manifests: TrustedManifests
    manifest_store: ManifestStore
    revocations: TrustedRevocations
    revocation_store: RevocationStore
    client: Client
    authenticator: Authenticator
    blobs: BlobStore
    envelopes: EnvelopeStore
    unfinished: UploadStore
    housekeeping: Housekeeping
    jobs: JobStore
    records: RecordReader
    events: JobEvents
    queue: WorkQueue
    transitions: Transitions
    dispatcher: Dispatcher
    admission: Admission
    log: ProgramLog
    clock: Callable[[], int]
    uploads: Places
    downloads: Places
    event_streams: Places
    requests: TokenBuckets
    quotas: Quotas
    pace: Pace
    metrics: Metrics
    tracing: Tracing
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def consortium(self) -> Consortium:
        """The consortium at its newest manifest, without the delegations that were revoked."""
        return self.revocations.applied_to(self.manifests.current)

    async def authenticate(self, request: web.Request) -> tuple[Person, Body]:
        """Who asks, and their body, not yet read. Raises as :meth:`Authenticator.authenticate`."""
        if "Content-Encoding" in request.headers:
            raise MalformedError("expected a body without content encoding")
        found = await self.authenticator.authenticate(request)
        body = Body(
            request,
            found.content_digest,
            idle_s=self.settings.body_idle_s,
            min_bytes_per_s=self.settings.min_upload_bytes_per_s,
        )
        return found.person, body

    async def authenticate_empty(self, request: web.Request) -> Person:
        """Who asks, of a request that needs no body. Raises as :meth:`authenticate`, and for a body that is not empty."""
        person, body = await self.authenticate(request)
        await body.whole(0)
        return person

    async def check_kept(self, envelope: bytes, ciphertext: bytes) -> None:
        """That an envelope, which may have been there before, stays. Raises :class:`UnavailableError` if it did not."""
        try:
            await self.housekeeping.check_kept(envelopes=(envelope,), blobs=(ciphertext,))
        except NotFoundError as error:
            raise UnavailableError("the envelope was removed just now: try again") from error

    async def visible_job(self, job_id: str, person: Person) -> tuple[Job, int]:
        """(job, revision), if it concerns ``person``. Raises :class:`NotFoundError` otherwise."""
        try:
            patience_s = REPLICA_LAG_S if self.settings.stream_replicas > 1 else 0.0
            record, revision = await self.jobs.get(_JOB_ID.validate_python(job_id), patience_s=patience_s)
        except (ValidationError, NotFoundError) as error:
            raise no_such_job() from error
        job = self.records.open(record)
        job.check_visible(person, self.consortium)
        return job, revision


GATEWAY = web.AppKey("gateway", Gateway)


def gateway_of(request: web.Request) -> Gateway:
    """The gateway that serves ``request``."""
    return request.app[GATEWAY]
