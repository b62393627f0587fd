"""The key broker program: ``python -m casemate_key_broker --settings FILE``."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from casemate_messaging.connection import connect
from casemate_messaging.logs import ProgramLog
from casemate_messaging.rpc import Handler, serve
from casemate_messaging.settings import read_file
from casemate_schemas import subjects
from casemate_schemas.errors import CasemateError, IntegrityError, SetupError, UnavailableError
from casemate_schemas.keyring import MAX_FILE_BYTES, KeyRing

from . import audit_log, ledger
from .database import Database
from .party import Party, pin_consortium
from .seed_shares import SeedSecrets
from .service import KeyBroker, Limits
from .settings import Settings

MAX_CRL_BYTES: Final = 1 << 20

Operation = Callable[[bytes], bytes]


def main(arguments: list[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Exits 0 then, and 1 with one logged reason if it cannot start or must stop."""
    parser = argparse.ArgumentParser(prog="casemate-key-broker", description="A member's key broker.")
    parser.add_argument("--settings", type=Path, required=True, help="TOML file, see docs/key-broker.md")
    options = parser.parse_args(arguments)
    log = ProgramLog("key-broker")
    try:
        asyncio.run(run(Settings.load(options.settings), log))
    except CasemateError as error:
        log.error("stopped", reason=error.reason, error=type(error).__name__)
        sys.exit(f"key broker: {error}")


async def run(settings: Settings, log: ProgramLog) -> None:
    """Opens and verifies the state, connects, serves, and closes it all again.

    Raises :class:`SetupError`, :class:`ManifestError` or :class:`UnavailableError` if it cannot start, and
    :class:`IntegrityError` as soon as its state is found broken.
    """
    database = Database(settings.state_dir)
    try:
        broker, party = open_key_broker(settings, database)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        client = await connect(settings.nats_url, settings.nats_seed_file, user=settings.key_broker, on_closed=stop.set)
        try:
            handlers = Handlers(broker, log, stop)
            prefix = subjects.key_broker(party.id)
            async with await serve(client, prefix, handlers.by_op, max_concurrency=settings.max_concurrency):
                manifest = party.consortium.manifest
                log.info("ready", key_broker=party.id, number=manifest.number, simulation=manifest.simulation)
                await stop.wait()
            handlers.raise_for_failure()
            if client.is_closed:
                raise UnavailableError("NATS ended the connection for good: is the nkey still allowed?")
        finally:
            await client.close()
    finally:
        database.close()


def open_key_broker(settings: Settings, database: Database) -> tuple[KeyBroker, Party]:
    """The key broker of these settings, its whole state verified. Raises :class:`IntegrityError` if it is broken."""
    with database.transaction() as tx:
        ledger.verify(tx)
        audit_log.verify(tx)
        epochs = ledger.epochs(tx)
    chain = settings.manifest_chain()
    consortium = pin_consortium(database, settings.key_broker, settings.consortium_id, chain, now_ms())
    keys = KeyRing.from_text(read_file(settings.keys_file, MAX_FILE_BYTES, private=True).decode("ascii", "replace"))
    party = Party(settings.key_broker, keys, consortium)
    limits = Limits(
        nonce_ttl_ms=settings.nonce_ttl_s * 1000,
        max_outstanding_nonces=settings.max_outstanding_nonces,
        grant_ttl_ms=settings.grant_ttl_s * 1000,
        max_submissions_per_day=settings.max_submissions_per_day,
    )
    seeds = SeedSecrets(settings.state_dir, needed=epochs)
    return KeyBroker(party, database, seeds, clock=now_ms, limits=limits, crl=crl_reader(settings.crl_file)), party


class Handlers:
    """The operations off the event loop, each answer logged by its reason code; a broken state stops the program."""

    def __init__(self, broker: KeyBroker, log: ProgramLog, stop: asyncio.Event) -> None:
        operations = {
            "precheck": broker.precheck,
            "message": broker.message,
            "nonce": broker.nonce,
            "grant": broker.grant,
            "commit": broker.commit,
        }
        self.by_op: dict[str, Handler] = {op: self._handler(op, call) for op, call in operations.items()}
        self._log = log
        self._stop = stop
        self._failure: IntegrityError | None = None

    def raise_for_failure(self) -> None:
        """Raises the :class:`IntegrityError` that stopped the program, if one did."""
        if self._failure is not None:
            raise self._failure

    def _handler(self, op: str, call: Operation) -> Handler:
        async def handle(payload: bytes) -> bytes:
            start = time.monotonic()
            try:
                if self._failure is not None:
                    raise UnavailableError("stopping")
                answer = await asyncio.to_thread(call, payload)
            except IntegrityError as error:
                self._failure = error
                self._stop.set()
                raise
            except CasemateError as error:
                self._log.warning("refused", op=op, reason=error.reason, duration_ms=_since(start))
                raise
            self._log.info("answered", op=op, duration_ms=_since(start))
            return answer

        return handle


def now_ms() -> int:
    """Unix ms."""
    return time.time_ns() // 1_000_000


def crl_reader(path: Path | None) -> Callable[[], bytes | None]:
    """Reads the revocation list anew each time. Raises :class:`UnavailableError` while there is none to read."""

    def read() -> bytes | None:
        if path is None:
            return None
        try:
            return read_file(path, MAX_CRL_BYTES)
        except SetupError as error:
            raise UnavailableError("the revocation list cannot be read") from error

    return read


def _since(start: float) -> float:
    return round((time.monotonic() - start) * 1000, 1)


if __name__ == "__main__":
    main()
