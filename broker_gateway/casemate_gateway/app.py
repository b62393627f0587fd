"""The program: connect, set up streams, listen, admit, and stop cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from aiohttp import web
from casemate_messaging.blobs import BlobStore
from casemate_messaging.connection import connect
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.events import EventLog as JobEvents
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.manifests import ManifestFollower, ManifestStore, TrustedManifests
from casemate_messaging.nonces import NonceStore
from casemate_messaging.queue import WorkQueue
from casemate_messaging.revocations import RevocationFollower, RevocationStore, TrustedRevocations
from casemate_messaging.setup import StreamSettings, ensure_streams
from casemate_schemas.api import (
    CONSORTIUM_PATH,
    ENVELOPES_PATH,
    JOBS_PATH,
    KEY_BROKERS_PATH,
    MANIFEST_PATH,
    REVOCATIONS_PATH,
)
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import CasemateError, SetupError, UnavailableError
from nats.aio.client import Client

from .admission import Admission
from .authentication import Authenticator
from .gateway import GATEWAY, Gateway, Places
from .logs import quiet_logger
from .problems import error_boundary
from .records import RecordReader
from .routes import consortium, envelopes, health, jobs, key_brokers, results
from .settings import Settings
from .tasks import end
from .transitions import Transitions

SHUTDOWN_TIMEOUT_S: Final = 3.0
KEEPALIVE_S: Final = 75.0
MAX_HEADER_LINE_BYTES: Final = 16 << 10


def wall_clock() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


def make_gateway(
    settings: Settings,
    client: Client,
    manifests: TrustedManifests,
    revocations: TrustedRevocations | None = None,
    *,
    origin: str,
    log: ProgramLog,
    clock: Callable[[], int] = wall_clock,
) -> Gateway:
    """A gateway over one NATS connection, for requests that are signed for ``origin``."""
    revoked = revocations or TrustedRevocations(lambda: manifests.versions)

    def consortium() -> Consortium:
        return revoked.applied_to(manifests.current)

    blobs = BlobStore(client, may_purge=True)
    envelope_store = EnvelopeStore(client, blobs)
    job_store, job_events, queue = JobStore(client), JobEvents(client), WorkQueue(client)
    records = RecordReader(lambda: manifests.versions)
    transitions = Transitions(job_store, job_events, log, clock)
    admission = Admission(
        client,
        consortium=consortium,
        jobs=job_store,
        blobs=blobs,
        envelopes=envelope_store,
        queue=queue,
        transitions=transitions,
        records=records,
        log=log,
        clock=clock,
        key_broker_timeout_s=settings.key_broker_timeout_s,
        retry_s=settings.precheck_retry_s,
        max_wait_s=settings.approval_poll_s,
    )
    return Gateway(
        settings=settings,
        manifests=manifests,
        manifest_store=ManifestStore(client),
        revocations=revoked,
        revocation_store=RevocationStore(client),
        client=client,
        authenticator=Authenticator(consortium, NonceStore(client), origin=origin, clock=clock),
        blobs=blobs,
        envelopes=envelope_store,
        jobs=job_store,
        records=records,
        events=job_events,
        queue=queue,
        transitions=transitions,
        admission=admission,
        log=log,
        clock=clock,
        uploads=Places(settings.max_uploads),
        downloads=Places(settings.max_downloads),
        event_streams=Places(settings.max_event_streams),
    )


def make_app(gateway: Gateway) -> web.Application:
    """The HTTP application: every path there is."""
    app = web.Application(middlewares=[error_boundary(gateway.log)])
    app[GATEWAY] = gateway
    app[health.READINESS] = health.Readiness(gateway.client, _stream_settings(gateway.settings))
    job = JOBS_PATH + "/{job_id}"
    app.add_routes(
        [
            web.get("/livez", health.live),
            web.get("/readyz", health.ready),
            web.get(CONSORTIUM_PATH, consortium.show),
            web.post(MANIFEST_PATH, consortium.publish),
            web.post(REVOCATIONS_PATH, consortium.revoke),
            web.post(ENVELOPES_PATH, envelopes.store),
            web.delete(f"{ENVELOPES_PATH}/{{digest}}", envelopes.remove),
            web.post(KEY_BROKERS_PATH + "/{key_broker}/messages", key_brokers.message),
            web.post(KEY_BROKERS_PATH + "/{key_broker}/evidence", key_brokers.evidence),
            web.post(JOBS_PATH, jobs.submit),
            web.get(JOBS_PATH, jobs.listing, allow_head=False),
            web.get(job, jobs.show, allow_head=False),
            web.get(job + "/events", jobs.events, allow_head=False),
            web.post(job + "/cancel", jobs.cancel),
            web.get(job + "/release", results.release, allow_head=False),
            web.get(job + "/result", results.result, allow_head=False),
        ]
    )
    app.on_response_prepare.append(_harden)
    return app


@contextlib.asynccontextmanager
async def running(
    settings: Settings, client: Client, *, log: ProgramLog, clock: Callable[[], int] = wall_clock
) -> AsyncIterator[tuple[str, Gateway]]:
    """A gateway that listens and admits while the block runs; (origin, gateway)."""
    manifests = TrustedManifests.open(settings)
    follower = ManifestFollower(manifests, ManifestStore(client), settings, log)
    revocations = TrustedRevocations(lambda: manifests.versions)
    revoking = RevocationFollower(revocations, RevocationStore(client), settings, log)
    await _share_manifests(manifests, client)
    await follower.catch_up()
    await revoking.catch_up()
    with _listening(settings) as listener:
        origin = settings.public_url or _address(settings.host, listener)
        gateway = make_gateway(settings, client, manifests, revocations, origin=origin, log=log, clock=clock)
        runner = web.AppRunner(
            make_app(gateway),
            access_log=None,
            logger=quiet_logger(log),
            auto_decompress=False,
            keepalive_timeout=KEEPALIVE_S,
            max_line_size=MAX_HEADER_LINE_BYTES,
            max_field_size=MAX_HEADER_LINE_BYTES,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        await runner.setup()
        background: list[asyncio.Task[None]] = []
        try:
            await web.SockSite(runner, listener).start()
            background.append(asyncio.create_task(gateway.admission.run(settings.reconcile_every_s)))
            background.append(asyncio.create_task(follower.run()))
            background.append(asyncio.create_task(revoking.run()))
            background.append(asyncio.create_task(_sweep(client, settings.sweep_every_s, log, clock)))
            yield _address(settings.host, listener), gateway
        finally:
            gateway.stopping.set()
            await runner.cleanup()
            await end(background)
            await gateway.admission.close()


async def serve(settings: Settings, log: ProgramLog, stop: asyncio.Event) -> None:
    """Runs the gateway until ``stop`` is set, or NATS refuses to have it any longer.

    Raises :class:`SetupError`, :class:`ManifestError`, :class:`AuthenticationError` or :class:`UnavailableError`.
    """
    TrustedManifests.open(settings)
    client = await connect(
        settings.nats_url,
        settings.nats_seed_file,
        user=settings.nats_user,
        name="casemate-gateway",
        timeout_s=settings.nats_connect_s,
        on_closed=stop.set,
    )
    try:
        await ensure_streams(client.jetstream(), _stream_settings(settings))
        async with running(settings, client, log=log) as (address, gateway):
            simulation = gateway.consortium.manifest.simulation
            log.info("ready", address=address, number=gateway.consortium.manifest.number, simulation=simulation)
            await stop.wait()
            log.info("stopping")
            if client.is_closed:
                raise UnavailableError("NATS has closed the connection for good: does it still know this key?")
    finally:
        await client.close()


async def _share_manifests(manifests: TrustedManifests, client: Client) -> None:
    """Puts all manifests that are known here where other programs look for them. Raises :class:`ManifestError` for a fork."""
    store = ManifestStore(client)
    for number, signed in enumerate(manifests.chain.manifests, start=1):
        await store.put(number, signed)


async def _sweep(client: Client, every_s: float, log: ProgramLog, clock: Callable[[], int]) -> None:
    """Removes now and then what uploads left behind that never ended."""
    blobs = BlobStore(client, may_purge=True)
    while True:
        await asyncio.sleep(every_s)
        try:
            await blobs.sweep(now_ms=clock())
        except CasemateError as error:
            log.warning("sweep_failed", reason=error.reason)


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "casemate"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")


def _stream_settings(settings: Settings) -> StreamSettings:
    return StreamSettings(
        replicas=settings.stream_replicas,
        max_blob_store_bytes=settings.max_blob_store_bytes,
        ack_wait_s=settings.ack_wait_s,
    )


def _listening(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise SetupError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error


def _address(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
