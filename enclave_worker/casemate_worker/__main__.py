"""``casemate-worker --settings FILE``: one enclave worker."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
import tomllib
from pathlib import Path

from casemate_attestation.guest import ConfigfsGuest, GuestDriver, SimulatedGuest
from casemate_messaging.connection import connect
from casemate_messaging.logs import ProgramLog
from casemate_schemas.codec import decode
from casemate_schemas.consortium import Consortium, ManifestChain, verify_chain
from casemate_schemas.errors import CasemateError, SetupError
from pydantic import ValidationError

from .isolation import keep_memory_private
from .settings import Settings
from .worker import Worker

_MAX_CHAIN_BYTES = 64 << 20


def main() -> None:
    """Runs until SIGTERM or SIGINT; exit code 0 then, 2 for a wrong set-up."""
    parser = argparse.ArgumentParser(prog="casemate-worker", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="TOML file (docs/worker.md)")
    log = ProgramLog("worker")
    arguments = parser.parse_args()
    try:
        keep_memory_private()
        asyncio.run(_serve(load_settings(arguments.settings), log))
    except CasemateError as error:
        print(f"casemate-worker: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def load_settings(path: Path) -> Settings:
    """Settings from a TOML file. Raises :class:`SetupError` that names the field."""
    try:
        return Settings(**tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SetupError(f"cannot read the settings file {path}") from error
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise SetupError(f"settings file {path}: wrong or missing {fields}") from error


def load_consortium(settings: Settings) -> Consortium:
    """The pinned consortium. Raises :class:`SetupError` or :class:`ManifestError`."""
    try:
        data = settings.manifest_file.read_bytes()
    except OSError as error:
        raise SetupError(f"cannot read the manifest file {settings.manifest_file}") from error
    chain = decode(ManifestChain, data, max_bytes=_MAX_CHAIN_BYTES)
    return verify_chain(chain, consortium=bytes.fromhex(settings.consortium))


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
    consortium = load_consortium(settings)
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
