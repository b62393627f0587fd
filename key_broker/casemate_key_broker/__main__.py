"""The key broker program: ``python -m casemate_key_broker --settings FILE``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from casemate_attestation.guest import KeyedGuest
from casemate_messaging.connection import connect
from casemate_messaging.ledger_heads import LedgerHeadStore
from casemate_messaging.logs import ProgramLog
from casemate_messaging.manifests import ManifestFollower, ManifestStore, TrustedManifests
from casemate_messaging.programs import run_program
from casemate_messaging.revocations import RevocationFollower, RevocationStore, TrustedRevocations
from casemate_messaging.rpc import Handler, serve
from casemate_messaging.settings import read_file
from casemate_messaging.tasks import end
from casemate_schemas import subjects
from casemate_schemas.consortium import Consortium
from casemate_schemas.errors import (
    AuthenticationError,
    CasemateError,
    IntegrityError,
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
from .party import Party, keep_revocation, known_revocations, pin, pin_consortium
from .revocation import ListName, RevocationLists, lists_for
from .seed_shares import SeedSecrets
from .service import KeyBroker, Limits
from .settings import Settings

Operation = Callable[[bytes], bytes]

_ASKED_BY_PEOPLE: Final = frozenset({"precheck", "message"})
"""A person knows the newest manifest, for a new member's delegation, before the key broker has looked for it."""

_MOVING: Final = frozenset({"precheck", "message", "grant", "commit"})
"""Operations that move the state."""

_DECIDING: Final = _MOVING - {"message"}
"""Of these, those that a state that was set back never answers. By messages its owners look at it, and endorse it."""


_JUDGES: Final = 4
"""Threads for prechecks; accounting may keep a core busy for seconds."""


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


class Handlers:
    """The operations off the event loop, each answer logged by its reason code; a broken state stops the program."""

    def __init__(
        self,
        broker: Callable[[], KeyBroker],
        catch_up: Callable[[], Awaitable[bool]],
        log: ProgramLog,
        stop: asyncio.Event,
        *,
        attester: hosted.Attester | None = None,
        anchoring: Anchoring | None = None,
        max_concurrency: int = 16,
    ) -> None:
        """``broker`` gives the key broker as it is now; ``catch_up`` takes a newer manifest up, if there is one.

        ``attester`` answers for a hosted one. ``anchoring`` keeps the ledger's head where others see it. Prechecks, which
        anyone can make take seconds, are given at most half of ``max_concurrency`` places, and threads of their own.
        """
        operations: dict[str, Callable[[], Operation]] = {
            "precheck": lambda: broker().precheck,
            "message": lambda: broker().message,
            "nonce": lambda: broker().nonce,
            "grant": lambda: broker().grant,
            "commit": lambda: broker().commit,
        }
        if attester is not None:
            operations["evidence"] = lambda: attester.evidence
        self.by_op: dict[str, Handler] = {op: self._handler(op, operation) for op, operation in operations.items()}
        self._judging = ThreadPoolExecutor(_JUDGES, thread_name_prefix="precheck")
        self._judged = 0
        self._max_judged = max(1, max_concurrency // 2)
        self._anchoring = anchoring
        self._catch_up = catch_up
        self._log = log
        self._stop = stop
        self._failure: IntegrityError | None = None

    def raise_for_failure(self) -> None:
        """Raises the :class:`IntegrityError` that stopped the program, if one did."""
        if self._failure is not None:
            raise self._failure

    def _handler(self, op: str, operation: Callable[[], Operation]) -> Handler:
        async def handle(payload: bytes) -> bytes:
            start = time.monotonic()
            try:
                if self._failure is not None:
                    raise UnavailableError("stopping")
                with self._place(op):
                    answer = await self._anchored(op, operation, payload)
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

    async def _anchored(self, op: str, operation: Callable[[], Operation], payload: bytes) -> bytes:
        """The answer, once the newest head was met before it and the head after it was left."""
        if self._anchoring is None or op not in _MOVING:
            return await self._answered(op, operation, payload)
        await self._anchoring.meet()
        try:
            answer = await self._answered(op, operation, payload)
        except IntegrityError:
            raise  # of a broken state there is nothing to leave
        except CasemateError:
            await self._anchoring.leave(decided=False)
            raise
        await self._anchoring.leave(decided=op in _DECIDING)
        return answer

    async def _answered(self, op: str, operation: Callable[[], Operation], payload: bytes) -> bytes:
        """The answer. Whoever is refused for what a newer manifest may say otherwise is judged by that one, if there is one."""
        try:
            return await self._off_the_loop(op, operation(), payload)
        except (AuthenticationError, ManifestError, UnavailableError):
            if op not in _ASKED_BY_PEOPLE or not await self._catch_up():
                raise
        return await self._off_the_loop(op, operation(), payload)

    async def _off_the_loop(self, op: str, operation: Operation, payload: bytes) -> bytes:
        """The answer, from a thread: whatever there is to judge, no other operation waits for it."""
        if op != "precheck":
            return await asyncio.to_thread(operation, payload)
        return await asyncio.get_running_loop().run_in_executor(self._judging, operation, payload)

    @contextlib.contextmanager
    def _place(self, op: str) -> Iterator[None]:
        """One of the places for such operations. Raises :class:`UnavailableError` if all are taken."""
        if op != "precheck":
            yield
            return
        if self._judged >= self._max_judged:
            raise UnavailableError("judging other jobs: ask again")
        self._judged += 1
        try:
            yield
        finally:
            self._judged -= 1


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


def _since(start: float) -> float:
    return round((time.monotonic() - start) * 1000, 1)


if __name__ == "__main__":
    main()
