"""``casemate-worker --settings FILE``: one enclave worker."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

from casemate_attestation.guest import ConfigfsGuest, GuestDriver, SimulatedGuest
from casemate_messaging.connection import connect
from casemate_messaging.logs import ProgramLog
from casemate_schemas.consortium import Consortium, verify_chain
from casemate_schemas.errors import CasemateError, SetupError

from .isolation import keep_memory_private
from .settings import Settings
from .worker import Worker


def main() -> None:
    """Runs until SIGTERM or SIGINT; exit code 0 then, 2 for a wrong set-up."""
    parser = argparse.ArgumentParser(prog="casemate-worker", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="TOML file (docs/worker.md)")
    log = ProgramLog("worker")
    arguments = parser.parse_args()
    try:
        keep_memory_private()
        asyncio.run(_serve(Settings.load(arguments.settings), log))
    except CasemateError as error:
        print(f"casemate-worker: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def guest_driver(settings: Settings, consortium: Consortium) -> GuestDriver:
    """The way to the chip that the manifest demands. Raises :class:`SetupError` for the other one."""
    if consortium.manifest.simulation != (settings.guest == "simulated"):
        raise SetupError("the manifest and the setting 'guest' disagree on whether this is a simulation")
    if settings.guest == "configfs":
        return ConfigfsGuest()
    if settings.simulated_chip_socket is None:
        raise SetupError("a simulated worker needs 'simulated_chip_socket'")
    return SimulatedGuest(settings.simulated_chip_socket)


async def _serve(settings: Settings, log: ProgramLog) -> None:
    consortium = verify_chain(settings.manifest_chain(), consortium=settings.consortium_id)
    guest = guest_driver(settings, consortium)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    client = await connect(settings.nats_url, settings.nats_seed_file, user=settings.name)
    try:
        worker = Worker(settings, client, consortium, guest, clock=now_ms, log=log)
        log.info("ready", worker=settings.name, simulation=consortium.manifest.simulation)
        await worker.run(stop)
    finally:
        await client.close()


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    main()
