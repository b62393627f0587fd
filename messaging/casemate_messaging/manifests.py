"""The consortium's manifests: how they travel, and what a program believes of them.

NATS keeps one message per manifest number, which nobody can replace. A program that knows manifest n asks for n + 1, and
for nothing else: so an older chain cannot even be offered to it, and a fork does not follow what it has. Whatever comes
is verified against the version it has already; NATS and the gateway can withhold a manifest, never make one.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Self

from casemate_schemas import subjects
from casemate_schemas.codec import decode, encode
from casemate_schemas.consortium import (
    MAX_CHAIN_BYTES,
    MAX_MANIFESTS,
    Consortium,
    ManifestChain,
    SignedManifest,
    verify_next,
    verify_versions,
)
from casemate_schemas.errors import (
    CasemateError,
    IntegrityError,
    ManifestError,
    NotFoundError,
    SetupError,
    StorageFullError,
    UnavailableError,
)
from nats.aio.client import Client

from .connection import REQUEST_TIMEOUT_S, publish_once, translated
from .direct import read_last
from .files import read_file, write_durably
from .logs import ProgramLog
from .settings import ProgramSettings

FILE_NAME: Final = "manifests"


class ManifestStore:
    """The stream of manifests over one connection. What is read is as untrusted as NATS."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._js = client.jetstream(timeout=REQUEST_TIMEOUT_S)

    async def get(self, number: int) -> SignedManifest:
        """What is stored as manifest ``number``, not verified.

        Raises :class:`NotFoundError`, :class:`MalformedError` or :class:`UnavailableError`.
        """
        stored = await read_last(self._client, subjects.MANIFEST_STREAM, subjects.manifest(number))
        return decode(SignedManifest, stored.data)

    async def put(self, number: int, signed: SignedManifest) -> None:
        """Stores manifest ``number`` durably; storing it again changes nothing. The gateway only.

        Raises :class:`ManifestError` if another one of that number is there, :class:`UnavailableError`.
        """
        with translated("storing a manifest"):
            is_new = await publish_once(self._js, subjects.manifest(number), encode(signed))
        if not is_new and (await self.get(number)).digest != signed.digest:
            raise ManifestError(
                f"NATS holds another manifest of number {number}: a fork, or another consortium's store"
            )


class TrustedManifests:
    """All manifests that this program has accepted. It only ever goes forward, for its threads together."""

    def __init__(
        self,
        chain: ManifestChain,
        consortium: bytes,
        *,
        kept_in: Path | None = None,
        before_use: Callable[[Consortium], None] = lambda _: None,
    ) -> None:
        """Begins with ``chain``, which must be the consortium's of that id.

        ``kept_in`` is the file that every accepted chain is written to, if there is one; ``before_use`` hears of each
        newer version before it is used, and may raise to prevent that. Raises :class:`ManifestError`.
        """
        self._manifests = chain.manifests
        self._encoded = encode(chain)
        self._versions = verify_versions(chain, consortium=consortium)
        self._kept_in = kept_in
        self.before_use = before_use
        self._lock = threading.Lock()

    @classmethod
    def open(cls, settings: ProgramSettings) -> Self:
        """What was accepted before and kept in the settings' ``state_dir``, and all that is in its manifest file.

        Raises :class:`ManifestError` if they are forks of each other, :class:`SetupError` or :class:`IntegrityError` if
        a file cannot be read.
        """
        offered = settings.manifest_chain()
        if settings.state_dir is None:
            return cls(offered, settings.consortium_id)
        _prepare(settings.state_dir)
        kept_in = settings.state_dir / FILE_NAME
        known = _read(kept_in) if kept_in.exists() else offered
        manifests = cls(known, settings.consortium_id, kept_in=kept_in)
        manifests.offer_chain(offered)
        _write(kept_in, manifests.encoded)
        return manifests

    @property
    def current(self) -> Consortium:
        """The consortium at the newest version. Ask once at the start of a piece of work, and stay with the answer."""
        return self._versions[-1]

    @property
    def versions(self) -> tuple[Consortium, ...]:
        """The consortium at each version, first to newest."""
        return self._versions

    @property
    def chain(self) -> ManifestChain:
        """The manifests as they were signed."""
        return ManifestChain(manifests=self._manifests)

    @property
    def encoded(self) -> bytes:
        """The canonical bytes of :attr:`chain`."""
        return self._encoded

    def offer(self, signed: SignedManifest) -> bool:
        """Accepts the manifest right after the newest; whether it was news.

        It is on the disk, where there is one, before it is used. Raises :class:`ManifestError` for a fork and for what
        does not follow, :class:`MalformedError`, :class:`StorageFullError`, and what ``before_use`` raises.
        """
        with self._lock:
            number = signed.open().number
            if number <= len(self._manifests):
                if self._manifests[number - 1].digest != signed.digest:
                    raise ManifestError(f"another manifest of number {number} was accepted before: this is a fork")
                return False
            following = verify_next(self.current, signed)
            manifests = (*self._manifests, signed)
            encoded = encode(ManifestChain(manifests=manifests)) if number <= MAX_MANIFESTS else b""
            if not 0 < len(encoded) <= MAX_CHAIN_BYTES:
                raise ManifestError(f"expected at most {MAX_MANIFESTS} manifests of {MAX_CHAIN_BYTES} bytes together")
            if self._kept_in is not None:
                _write(self._kept_in, encoded)
            self.before_use(following)
            self._manifests, self._encoded, self._versions = manifests, encoded, (*self._versions, following)
            return True

    def offer_chain(self, chain: ManifestChain) -> bool:
        """Accepts what is newer in a chain; whether anything was. An older chain is no news. Raises as :meth:`offer`."""
        news = [self.offer(signed) for signed in chain.manifests]
        return any(news)


class ManifestFollower:
    """Brings :class:`TrustedManifests` up to date, from NATS and from the manifest file.

    The file is a way past a gateway that withholds manifests: whoever runs a program may replace it at any time.
    """

    def __init__(
        self, manifests: TrustedManifests, store: ManifestStore, settings: ProgramSettings, log: ProgramLog
    ) -> None:
        self._manifests = manifests
        self._store = store
        self._settings = settings
        self._log = log
        self._file_seen = _stamp(settings.manifest_file)
        self._said: set[str] = set()

    async def run(self) -> None:
        """Catches up every ``manifest_poll_s``, for ever. Raises as :meth:`catch_up`."""
        while True:
            await asyncio.sleep(self._settings.manifest_poll_s)
            await self.catch_up()

    async def catch_up(self) -> bool:
        """Accepts every newer manifest that is to be had; whether there was one.

        What is refused or cannot be read is logged. NATS is asked again the next time, whatever the file held; a file is
        read again once it was replaced, or once there is room for what it holds. Raises :class:`SetupError` or
        :class:`IntegrityError` if the program cannot go on with a manifest that the quorum signed.
        """
        before = self._manifests.current.manifest.number
        refused = [error for source in (self._from_file, self._from_nats) if (error := await _tried(source))]
        for error in refused:
            self._say(error)
        self._said = {error.reason for error in refused}
        number = self._manifests.current.manifest.number
        if number > before:
            self._log.info("manifest", number=number)
        return number > before

    async def _from_nats(self) -> None:
        while True:
            wanted = self._manifests.current.manifest.number + 1
            try:
                signed = await self._store.get(wanted)
            except NotFoundError:
                return
            await asyncio.to_thread(self._manifests.offer, signed)
            if self._manifests.current.manifest.number < wanted:
                raise ManifestError(f"NATS answered with an older manifest than number {wanted}")

    async def _from_file(self) -> None:
        if (stamp := _stamp(self._settings.manifest_file)) == self._file_seen:
            return
        self._file_seen = stamp
        try:
            chain = await asyncio.to_thread(self._settings.manifest_chain)
        except SetupError as error:
            raise UnavailableError("the manifest file cannot be read") from error
        try:
            await asyncio.to_thread(self._manifests.offer_chain, chain)
        except StorageFullError:
            self._file_seen = None
            raise

    def _say(self, error: CasemateError) -> None:
        """Once for each reason in a row: NATS may be away, or offer the same rubbish, for long."""
        if error.reason in self._said:
            return
        say = self._log.warning if isinstance(error, UnavailableError) else self._log.error
        say("manifest_refused", number=self._manifests.current.manifest.number + 1, reason=error.reason)


async def _tried(source: Callable[[], Awaitable[None]]) -> CasemateError | None:
    try:
        await source()
    except (SetupError, IntegrityError):
        raise
    except CasemateError as error:
        return error
    return None


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"setting state_dir: cannot make {folder}: {error.strerror}") from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise SetupError(f"setting state_dir: {folder} is not this program's to write to")


def _read(path: Path) -> ManifestChain:
    try:
        return decode(ManifestChain, read_file(path, MAX_CHAIN_BYTES), max_bytes=MAX_CHAIN_BYTES)
    except CasemateError as error:
        raise IntegrityError(f"the manifests kept in {path} cannot be read") from error


def _write(path: Path, chain: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(path, chain)
    except OSError as error:
        raise StorageFullError(f"cannot keep the manifests in {path}: {error.strerror}") from error


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
