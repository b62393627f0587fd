"""The key broker program: ``python -m casemate_key_broker --settings FILE``."""

from __future__ import annotations

import argparse
import asyncio
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from casemate_attestation.guest import KeyedGuest
from casemate_messaging.connection import connect
from casemate_messaging.files import read_file
from casemate_messaging.ledger_heads import LedgerHeadStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.manifests import ManifestFollower, ManifestStore, TrustedManifests
from casemate_messaging.programs import run_program
from casemate_messaging.revocations import RevocationFollower, RevocationStore, TrustedRevocations
from casemate_messaging.rpc import serve
from casemate_messaging.tasks import end
from casemate_schemas import subjects
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import (
    ManifestError,
    SetupError,
    UnavailableError,
)
from casemate_schemas.identity import Revocation
from casemate_schemas.keyring import MAX_FILE_BYTES, KeyRing
from casemate_schemas.signatures import Signed
from nats.aio.client import Client

from . import audit_log, handover, hosted, ledger
from .anchoring import Anchoring
from .backups import back_up
from .clock import MonotoneClock
from .database import Database, State
from .handlers import Handlers
from .party import Party, keep_revocation, known_revocations, pin, pin_consortium
from .revocation import ListName, RevocationLists, lists_for
from .seed_shares import SeedSecrets
from .service import KeyBroker, Limits
from .settings import Settings


def now_ms() -> int:
    """Unix ms."""
    return time.time_ns() // 1_000_000


def main(arguments: list[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Exits 0 then. What ends it otherwise: :func:`run_program`."""
    parser = argparse.ArgumentParser(prog="casemate-key-broker", description="A member's key broker.")
    parser.add_argument("--settings", type=Path, required=True, help="TOML file, see docs/key-broker.md")
    parser.add_argument("--hand-over", type=Path, metavar="ORDER", help="seal the state for another enclave, and end")
    parser.add_argument("--take-over", type=Path, metavar="STATE", help="go on with that state from now on, and end")
    parser.add_argument("--out", type=Path, help="where --hand-over writes the sealed state")
    options = parser.parse_args(arguments)
    if (options.hand_over is None) != (options.out is None) or (options.hand_over and options.take_over):
        parser.error("--hand-over and --out go together, and not with --take-over")
    log = ProgramLog("key-broker")

    def key_broker() -> None:
        settings = Settings.load(options.settings)
        if options.hand_over or options.take_over:
            move_state(settings, options.hand_over, options.out, options.take_over)
        else:
            asyncio.run(run(settings, log))

    run_program("casemate-key-broker", key_broker)


async def run(settings: Settings, log: ProgramLog) -> None:
    """Opens and verifies the state, connects, serves, and closes it all again.

    Raises :class:`SetupError`, :class:`ManifestError` or :class:`UnavailableError` if it cannot start, and
    :class:`IntegrityError` as soon as its state is found broken.
    """
    guest = hosted.guest_of(settings)
    database, clock = open_state(settings, guest)
    try:
        program = open_key_broker(settings, database, guest, clock)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        client = await connect(
            settings.nats_url,
            settings.nats_seed_file,
            user=settings.key_broker,
            tls=settings.nats_tls(),
            on_closed=stop.set,
        )
        try:
            await _serve(program, settings, client, log, stop)
        finally:
            await client.close()
    finally:
        database.close()


async def _serve(program: Program, settings: Settings, client: Client, log: ProgramLog, stop: asyncio.Event) -> None:
    follower = ManifestFollower(program.manifests, ManifestStore(client), settings, log)
    revoking = RevocationFollower(program.revocations, RevocationStore(client), settings, log)
    await follower.catch_up()
    await revoking.catch_up()
    anchoring = Anchoring(LedgerHeadStore(client), settings.key_broker, program.serving, log)
    handlers = Handlers(
        program.serving,
        follower.catch_up,
        log,
        stop,
        attester=program.attester,
        anchoring=anchoring,
        max_concurrency=settings.max_concurrency,
    )
    prefix = subjects.key_broker(settings.key_broker)
    following = [asyncio.create_task(follower.run()), asyncio.create_task(revoking.run())]
    for task in following:
        task.add_done_callback(lambda _: stop.set())
    refreshing = asyncio.create_task(program.lists.keep_fresh(program.revocation_lists, log))
    refreshing.add_done_callback(lambda task: stop.set() if not task.cancelled() and task.exception() else None)
    try:
        async with await serve(client, prefix, handlers.by_op, max_concurrency=settings.max_concurrency):
            manifest = program.manifests.current.manifest
            log.info(
                "ready",
                key_broker=settings.key_broker,
                number=manifest.number,
                simulation=manifest.simulation,
                hosted=program.attester is not None,
            )
            await stop.wait()
        handlers.raise_for_failure()
        for task in (*following, refreshing):
            if task.done():
                task.result()
        if client.is_closed:
            raise UnavailableError("NATS ended the connection for good: is the nkey still allowed?")
    finally:
        handlers.close()
        await end((*following, refreshing))


@dataclass
class Program:
    """The key broker as it is now: a newer manifest puts another one over the same state in its place."""

    manifests: TrustedManifests
    revocations: TrustedRevocations
    consortium: Consortium
    broker: KeyBroker | None
    """``None`` while no manifest lists the keys that a hosted one has made."""
    lists: RevocationLists
    attester: hosted.Attester | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever puts another key broker in the place of this one."""

    def serving(self) -> KeyBroker:
        """The key broker. Raises :class:`UnavailableError` while it is none yet."""
        if self.broker is None:
            raise UnavailableError(
                "no manifest lists this key broker's keys yet: attest it, and let the members sign one"
            )
        return self.broker

    def revocation_lists(self) -> tuple[ListName, ...]:
        """The lists that evidence under the manifest in force can need."""
        return lists_for(self.manifests.current.manifest.attestation)


def move_state(settings: Settings, order: Path | None, out: Path | None, taken: Path | None) -> None:
    """Seals the state of a hosted key broker for the successor in ``order``, or makes the one in ``taken`` its own.

    Raises as :func:`.handover.hand_over` and :func:`.handover.take_over`.
    """
    if (guest := hosted.guest_of(settings)) is None:
        raise SetupError("only a key broker in an enclave hands its state over, or takes one over")
    database, clock = hosted.open_state(settings, guest, now_ms)
    try:
        manifests = TrustedManifests.open(settings)
        consortium = pin_consortium(database, settings.key_broker, settings.consortium_id, manifests.chain, clock())
        hosted.check_guest(settings, consortium)
        keys = hosted.own_keys(database)
        if order is not None and out is not None:
            revocations = TrustedRevocations(lambda: manifests.versions, known=known_revocations(database))
            party = Party(settings.key_broker, keys, revocations.applied_to(consortium))
            out.write_bytes(handover.hand_over(database, party, read_file(order, MAX_FILE_BYTES), clock()))
        elif taken is not None:
            sealed = read_file(taken, handover.MAX_STATE_BYTES)
            handover.take_over(database, consortium, settings.key_broker, keys, sealed)
    finally:
        database.close()


def open_state(settings: Settings, guest: KeyedGuest | None) -> tuple[State, Callable[[], int]]:
    """The state, and the clock that goes with it: an enclave's clock is its host's, so there it never runs backwards."""
    if guest is None:
        return Database(settings.state_dir), now_ms
    return hosted.open_state(settings, guest, now_ms)


def open_key_broker(
    settings: Settings, database: State, guest: KeyedGuest | None = None, clock: Callable[[], int] = now_ms
) -> Program:
    """The key broker of these settings, its whole state verified. Raises :class:`IntegrityError` if it is broken.

    With ``guest`` it is a hosted one, whose keys come from the state and not from a file.
    """
    handover.check_here(database)
    with database.transaction() as tx:
        ledger.verify(tx)
        audit_log.verify(tx)
        epochs = ledger.epochs(tx)
    manifests = TrustedManifests.open(settings)
    consortium = pin_consortium(database, settings.key_broker, settings.consortium_id, manifests.chain, clock())
    hosted.check_guest(settings, consortium)
    keys = hosted.own_keys(database) if settings.keys_file is None else _keys_in(settings.keys_file)
    limits = Limits(
        nonce_ttl_ms=settings.nonce_ttl_s * 1000,
        grant_ttl_ms=settings.grant_ttl_s * 1000,
        max_submissions_per_day=settings.max_submissions_per_day,
    )
    seeds = SeedSecrets(settings.state_dir, needed=epochs) if guest is None else SeedSecrets.in_state(database)
    lists = RevocationLists.of(settings, consortium.manifest.attestation)

    def at(consortium: Consortium) -> KeyBroker | None:
        if guest is not None and not any(
            hosted.lists(v, settings.key_broker, keys) for v in (*manifests.versions, consortium)
        ):
            return None
        try:
            party = Party(settings.key_broker, keys, revocations.applied_to(consortium))
        except ManifestError as error:
            raise SetupError(f"manifest {consortium.manifest.number} no longer lists this key broker") from error
        party.check_hosted(hosted=guest is not None)
        hear_time = clock.raise_to if isinstance(clock, MonotoneClock) else _trust_own_clock
        return KeyBroker(
            party,
            database,
            seeds,
            clock=clock,
            limits=limits,
            crl=lists.for_evidence,
            hear_time=hear_time,
            back_up=_backups(settings, database),
        )

    def move_on(consortium: Consortium) -> None:
        """Pinned durably before it is used; what is under way ends under the manifest that it began with."""
        pin(database, settings.key_broker, consortium, clock())
        with program.lock:
            program.consortium, program.broker = consortium, at(consortium)

    def without_revoked() -> None:
        with program.lock:
            program.broker = at(program.consortium)

    def keep(revocation: Revocation, signed: Signed) -> None:
        keep_revocation(database, settings.key_broker, revocation, signed, clock())

    known = known_revocations(database)
    revocations = TrustedRevocations(lambda: manifests.versions, known=known, keep=keep, after_news=without_revoked)
    attester = None
    if guest is not None:
        attester = hosted.Attester(guest, settings.key_broker, keys, lambda: manifests.current)
    program = Program(manifests, revocations, consortium, at(consortium), lists, attester)
    manifests.before_use = move_on
    return program


def _keys_in(path: Path) -> KeyRing:
    return KeyRing.from_text(read_file(path, MAX_FILE_BYTES, private=True).decode("ascii", "replace"))


def _backups(settings: Settings, database: State) -> Callable[[int], tuple[str, int]] | None:
    """Copies into the backup folder. A sealed state needs none: its file is whole at any moment, for any copier."""
    folder = settings.backup_dir
    if folder is None or not isinstance(database, Database):
        return None
    return lambda now: back_up(database, settings.state_dir, folder, now)


def _trust_own_clock(_: int) -> None:
    """A member-run key broker's clock is its owner's."""


if __name__ == "__main__":
    main()
