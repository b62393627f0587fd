"""``casemate-worker --settings FILE [--settings FILE ...]``: one enclave worker, of one consortium or of several in turn."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from casemate_attestation.guest import CertificateSource, ConfigfsGuest, GuestDriver, SimulatedGuest
from casemate_attestation.guest_sev import SevGuest
from casemate_attestation.guest_vtpm import AzureGuest
from casemate_attestation.https import HttpsFetch
from casemate_attestation.kds import KdsClient, KdsLimits, roots_of
from casemate_messaging.connection import connect
from casemate_messaging.logs import ProgramLog
from casemate_messaging.manifests import ManifestFollower, ManifestStore, TrustedManifests
from casemate_messaging.programs import run_program
from casemate_messaging.tasks import end
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import SetupError

from .accelerators import refuse_devices
from .isolation import keep_memory_private
from .settings import Settings
from .turns import serve_in_turn
from .worker import Worker


def main() -> None:
    """Runs until SIGTERM or SIGINT; after SIGUSR1 or an order to drain until the job under way has ended.

    Exit status 0 then. What ends it otherwise: :func:`run_program`.
    """
    parser = argparse.ArgumentParser(prog="casemate-worker", description=__doc__)
    parser.add_argument(
        "--settings",
        type=Path,
        required=True,
        action="append",
        help="TOML file; one for each consortium (docs/worker.md)",
    )
    log = ProgramLog("worker")
    arguments = parser.parse_args()

    def worker() -> None:
        keep_memory_private()
        asyncio.run(_serve([Settings.load(path) for path in arguments.settings], log))

    run_program("casemate-worker", worker)


def certificate_source(settings: Settings, consortium: Consortium) -> CertificateSource | None:
    """Where the chip's certificates come from; None if the host hands them out. Raises :class:`SetupError`."""
    if settings.kds_cache_dir is None:
        if settings.kds == "online":
            raise SetupError("setting kds: online needs 'kds_cache_dir'")
        return None
    kds = KdsClient(
        settings.kds_cache_dir,
        roots_of(consortium.manifest.attestation),
        fetch=HttpsFetch() if settings.kds == "online" else None,
        base_url=settings.kds_url,
        limits=KdsLimits(interval_s=settings.kds_interval_s),
    )
    return kds.certificates


def guest_driver(settings: Settings, consortium: Consortium) -> GuestDriver:
    """The way to the chip that the settings name and the manifest permits. Raises :class:`SetupError`."""
    if consortium.manifest.simulation != (settings.guest == "simulated"):
        raise SetupError("the manifest and the setting 'guest' disagree on whether this is a simulation")
    if settings.guest == "simulated":
        if settings.simulated_chip_socket is None:
            raise SetupError("a simulated worker needs 'simulated_chip_socket'")
        return SimulatedGuest(settings.simulated_chip_socket)
    certificates = certificate_source(settings, consortium)
    if settings.guest == "configfs":
        return ConfigfsGuest(certificates=certificates)
    if settings.guest == "sev-guest":
        return SevGuest(vmpl=settings.vmpl, certificates=certificates)
    if certificates is None:
        raise SetupError("setting guest: Azure's host hands out no certificates, so azure-vtpm needs 'kds_cache_dir'")
    return AzureGuest(certificates)


async def _serve(consortia: Sequence[Settings], log: ProgramLog) -> None:
    stop, drain = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number, event in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGUSR1, drain)):
        loop.add_signal_handler(number, event.set)
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(_worker(settings, log, stop)) for settings in consortia]
        gc.collect()
        gc.freeze()  # what was loaded so far stays: no later collection, in the midst of a job, looks through it
        await serve_in_turn(workers, stop, drain)


@contextlib.asynccontextmanager
async def _worker(settings: Settings, log: ProgramLog, stop: asyncio.Event) -> AsyncIterator[Worker]:
    """A worker of one consortium, which hears of new manifests; should it stop hearing, it stops."""
    manifests = TrustedManifests.open(settings)
    refuse_devices(simulation=manifests.current.manifest.simulation)
    guest = guest_driver(settings, manifests.current)
    client = await connect(settings.nats_url, settings.nats_seed_file, user=settings.name, tls=settings.nats_tls())
    follower = ManifestFollower(manifests, ManifestStore(client), settings, log)
    following = asyncio.create_task(follower.run())
    following.add_done_callback(lambda _: stop.set())
    try:
        await follower.catch_up()
        manifest = manifests.current.manifest
        log.info("ready", worker=settings.name, number=manifest.number, simulation=manifest.simulation)
        worker = Worker(settings, client, lambda: manifests.current, guest, clock=now_ms, log=log)
        announcing = asyncio.create_task(worker.announcer.run())
        try:
            yield worker
        finally:
            await end([announcing])
        if following.done():
            following.result()
    finally:
        await end([following])
        await client.close()


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    main()
