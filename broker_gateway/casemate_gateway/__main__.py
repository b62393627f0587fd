"""``python -m casemate_gateway --settings FILE``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from pathlib import Path

from casemate_messaging.logs import ProgramLog
from casemate_messaging.programs import run_program

from .app import serve
from .logs import ClassNames
from .settings import Settings


def main() -> None:
    """Runs the gateway until SIGTERM or SIGINT: exit status 0. What ends it otherwise: :func:`run_program`."""
    parser = argparse.ArgumentParser(prog="casemate-gateway", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="TOML file; see docs/gateway.md")
    parser.add_argument(
        "--allow-unsafe-durability",
        action="store_true",
        help="run on a NATS that may lose what it acknowledged; as the setting of that name",
    )
    arguments = parser.parse_args()
    log = ProgramLog("gateway")
    logging.basicConfig(handlers=[ClassNames(log)], level=logging.WARNING)

    def gateway() -> None:
        settings = Settings.load(arguments.settings)
        if arguments.allow_unsafe_durability:
            settings = settings.model_copy(update={"allow_unsafe_durability": True})
        asyncio.run(_run(settings, log))

    run_program("casemate-gateway", gateway)


async def _run(settings: Settings, log: ProgramLog) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(settings, log, stop)


if __name__ == "__main__":
    main()
