"""The program: connect, set up streams, listen, admit, and stop cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from aiohttp import web
from casemate_messaging.blobs import BlobStore
from casemate_messaging.connection import connect
from casemate_messaging.durability import check_durability
from casemate_messaging.envelopes import EnvelopeStore
from casemate_messaging.events import EventLog as JobEvents
from casemate_messaging.jobs import JobStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.manifests import ManifestFollower, ManifestStore, TrustedManifests
from casemate_messaging.nonces import NonceStore
from casemate_messaging.queue import WorkQueue
from casemate_messaging.revocations import RevocationFollower, RevocationStore, TrustedRevocations
from casemate_messaging.setup import StreamSettings, ensure_streams
from casemate_messaging.stored import StoredSizes
from casemate_messaging.tasks import end
from casemate_messaging.uploads import UploadStore
from casemate_schemas.consortium import MAX_CLOCK_SKEW_MS, Consortium
from casemate_schemas.errors import SetupError, UnavailableError
from nats.aio.client import Client

from .admission import Admission
from .authentication import Authenticator
from .description import route_definitions
from .dispatch import Dispatcher
from .gateway import GATEWAY, Gateway, Places
from .housekeeping import Housekeeping, Retention
from .limits import Doorkeeper, Pace, TokenBuckets, look_at_lateness
from .logs import quiet_logger
from .metrics import Metrics, make_metrics_app
from .problems import error_boundary
from .quotas import Quotas
from .records import RecordReader
from .routes import health, uploads
from .settings import Settings
from .tasks import begin
from .tracing import OFF, Tracing, open_tracing
from .transitions import Transitions

SHUTDOWN_TIMEOUT_S: Final = 3.0
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
    tracing: Tracing = OFF,
) -> Gateway:
    """A gateway over one NATS connection, for requests that are signed for ``origin``."""
    revoked = revocations or TrustedRevocations(lambda: manifests.versions)

    def consortium() -> Consortium:
        return revoked.applied_to(manifests.current)

    blobs = BlobStore(client, may_purge=True)
    envelope_store = EnvelopeStore(client, blobs)
    unfinished = UploadStore(client, blobs)
    job_store, job_events, queue = JobStore(client), JobEvents(client), WorkQueue(client)
    records = RecordReader(lambda: manifests.versions)
    dispatcher = Dispatcher(client, {"cpu": queue}, job_store, records, log, clock, tracing)
    transitions = Transitions(job_store, job_events, log, clock)
    requests = TokenBuckets(settings.requests_per_s_per_member, settings.request_burst_per_member, time.monotonic)
    metrics = Metrics()
    sizes = StoredSizes(client)
    admission = Admission(
        client,
        consortium=consortium,
        jobs=job_store,
        blobs=blobs,
        envelopes=envelope_store,
        queue=queue,
        dispatcher=dispatcher,
        transitions=transitions,
        records=records,
        log=log,
        clock=clock,
        key_broker_timeout_s=settings.key_broker_timeout_s,
        retry_s=settings.precheck_retry_s,
        max_wait_s=settings.approval_poll_s,
        lost_after_s=settings.lost_after_s,
        counted=metrics.jobs,
        tracing=tracing,
    )
    housekeeping = Housekeeping(
        client,
        jobs=job_store,
        blobs=blobs,
        envelopes=envelope_store,
        uploads=unfinished,
        sizes=sizes,
        retention=_retention(settings),
        log=log,
        clock=clock,
    )
    return Gateway(
        settings=settings,
        manifests=manifests,
        manifest_store=ManifestStore(client),
        revocations=revoked,
        revocation_store=RevocationStore(client),
        client=client,
        authenticator=Authenticator(consortium, NonceStore(client), requests, origin=origin, clock=clock),
        blobs=blobs,
        envelopes=envelope_store,
        unfinished=unfinished,
        housekeeping=housekeeping,
        jobs=job_store,
        records=records,
        events=job_events,
        queue=queue,
        transitions=transitions,
        dispatcher=dispatcher,
        admission=admission,
        log=log,
        clock=clock,
        uploads=Places(settings.max_uploads),
        downloads=Places(settings.max_downloads),
        event_streams=Places(settings.max_event_streams),
        requests=requests,
        quotas=Quotas(
            sizes,
            envelope_store,
            unfinished,
            dispatcher,
            max_bytes=settings.max_stored_bytes_per_member,
            max_jobs=settings.max_jobs_per_member,
        ),
        pace=Pace(settings.poll_after_s, settings.polls_per_s, time.monotonic),
        metrics=metrics,
        tracing=tracing,
    )


def make_app(gateway: Gateway) -> web.Application:
    """The HTTP application: every path there is."""
    app = web.Application(middlewares=[error_boundary(gateway.log, gateway.metrics, gateway.tracing)])
    app[GATEWAY] = gateway
    app[health.READINESS] = health.Readiness(gateway.client, _stream_settings(gateway.settings))
    app.add_routes(route_definitions())
    app.on_response_prepare.extend((_harden, uploads.label))
    return app


@contextlib.asynccontextmanager
async def running(
    settings: Settings,
    client: Client,
    *,
    log: ProgramLog,
    clock: Callable[[], int] = wall_clock,
    on_failed: Callable[[], None] = lambda: None,
) -> AsyncIterator[tuple[str, Gateway]]:
    """A gateway that listens and admits while the block runs; (origin, gateway).

    ``on_failed`` hears of it if what goes on in the background has ended: then manifests, revocations or jobs stand still.
    """
    manifests = TrustedManifests.open(settings)
    follower = ManifestFollower(manifests, ManifestStore(client), settings, log)
    revocations = TrustedRevocations(lambda: manifests.versions)
    revoking = RevocationFollower(revocations, RevocationStore(client), settings, log)
    await _share_manifests(manifests, client)
    await follower.catch_up()
    await revoking.catch_up()
    stack, tracing = contextlib.AsyncExitStack(), open_tracing(settings.otlp_traces_url, log)
    with _listening(settings.host, settings.port) as listener:
        origin = settings.public_url or _address(settings.host, listener)
        gateway = make_gateway(
            settings, client, manifests, revocations, origin=origin, log=log, clock=clock, tracing=tracing
        )
        runner = web.AppRunner(
            make_app(gateway),
            access_log=None,
            logger=quiet_logger(log),
            auto_decompress=False,
            keepalive_timeout=settings.idle_connection_s,
            max_line_size=MAX_HEADER_LINE_BYTES,
            max_field_size=MAX_HEADER_LINE_BYTES,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        await runner.setup()
        background: list[asyncio.Task[None]] = []
        entrance = _entrance(runner, settings)
        try:
            server = await asyncio.get_running_loop().create_server(entrance, sock=listener)
            stack.callback(server.close)
            await _show_metrics(settings, gateway, stack, log)
            for work in (
                gateway.admission.run(settings.reconcile_every_s),
                gateway.dispatcher.run(),
                follower.run(),
                revoking.run(),
                gateway.housekeeping.run(settings.sweep_every_s),
                look_at_lateness(gateway.pace),
            ):
                background.append(begin(work, log, on_failed))
            yield _address(settings.host, listener), gateway
        finally:
            gateway.stopping.set()
            await stack.aclose()
            await runner.cleanup()
            await end(background)
            await gateway.admission.close()
            await tracing.close()


async def serve(settings: Settings, log: ProgramLog, stop: asyncio.Event) -> None:
    """Runs the gateway until ``stop`` is set, or NATS refuses to have it any longer.

    Raises :class:`SetupError`, :class:`ManifestError`, :class:`AuthenticationError` or :class:`UnavailableError`.
    """
    TrustedManifests.open(settings)
    failed = asyncio.Event()

    def on_failed() -> None:
        failed.set()
        stop.set()

    client = await connect(
        settings.nats_url,
        settings.nats_seed_file,
        user=settings.nats_user,
        tls=settings.nats_tls(),
        name="casemate-gateway",
        timeout_s=settings.nats_connect_s,
        on_closed=stop.set,
    )
    try:
        await _check_durability(settings, client, log)
        await ensure_streams(client.jetstream(), _stream_settings(settings))
        async with running(settings, client, log=log, on_failed=on_failed) as (address, gateway):
            simulation = gateway.consortium.manifest.simulation
            gc.collect()
            gc.freeze()  # what was loaded so far stays: no later collection, during which nothing is answered, looks through it
            log.info("ready", address=address, number=gateway.consortium.manifest.number, simulation=simulation)
            await stop.wait()
            log.info("stopping")
            if client.is_closed:
                raise UnavailableError("NATS has closed the connection for good: does it still know this key?")
            if failed.is_set():
                raise UnavailableError("something went wrong that nobody foresaw: see the log, and start it again")
    finally:
        await client.close()


async def _check_durability(settings: Settings, client: Client, log: ProgramLog) -> None:
    """Raises :class:`SetupError` on a NATS that may lose what it acknowledged; if that is allowed, the log says so."""
    try:
        await check_durability(client)
    except SetupError:
        if not settings.allow_unsafe_durability:
            raise
        log.warning("unsafe_durability")


async def _share_manifests(manifests: TrustedManifests, client: Client) -> None:
    """Puts all manifests that are known here where other programs look for them. Raises :class:`ManifestError` for a fork."""
    store = ManifestStore(client)
    for number, signed in enumerate(manifests.chain.manifests, start=1):
        await store.put(number, signed)


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "casemate"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")


def _retention(settings: Settings) -> Retention:
    """A job's record is there for as long as its result, and for as long as its submission could be posted once more."""
    posted_s = settings.max_submission_age_s + 2 * MAX_CLOCK_SKEW_MS / 1000
    records_s = max(settings.record_retention_s, settings.retention_s, posted_s)
    return Retention(settings.unreferenced_s, settings.retention_s, records_s)


def _stream_settings(settings: Settings) -> StreamSettings:
    return StreamSettings(
        replicas=settings.stream_replicas,
        max_blob_store_bytes=settings.max_blob_store_bytes,
        ack_wait_s=settings.ack_wait_s,
    )


def _entrance(runner: web.AppRunner, settings: Settings) -> Doorkeeper:
    server = runner.server
    if server is None:
        raise SetupError("the HTTP server was not set up")
    return Doorkeeper(server, lambda: len(server.connections), settings.max_connections, settings.body_idle_s)


async def _show_metrics(
    settings: Settings, gateway: Gateway, stack: contextlib.AsyncExitStack, log: ProgramLog
) -> None:
    """Has the operator's listener show the gateway's counts, if there is to be one, until ``stack`` is closed."""
    if settings.metrics_port is None:
        return
    for name, places in (
        ("uploads", gateway.uploads),
        ("downloads", gateway.downloads),
        ("watchers", gateway.event_streams),
    ):
        gateway.metrics.gauge(f"casemate_gateway_{name}", f"{name.capitalize()} under way.", places.held)
    listener = _listening(settings.metrics_host, settings.metrics_port)
    runner = web.AppRunner(make_metrics_app(gateway.metrics), access_log=None, logger=quiet_logger(log))
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.SockSite(runner, listener).start()
    gateway.metrics.address = _address(settings.metrics_host, listener)
    log.info("metrics", address=gateway.metrics.address)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SetupError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _address(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
