"""Connecting to NATS, and NATS' errors in words of our own tree."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, Protocol, TypeVar
from urllib.parse import urlsplit

import nats.errors
import nats.js.errors
from casemate_schemas.errors import (
    AuthenticationError,
    CasemateError,
    ConflictError,
    NotFoundError,
    SetupError,
    StorageFullError,
    TooLargeError,
    UnavailableError,
)
from casemate_schemas.subjects import inbox_prefix
from nats.aio.client import Client

from .files import check_private
from .server import public_user_key

logger = logging.getLogger(__name__)

T = TypeVar("T")

MIN_SERVER_VERSION: Final = (2, 14)
"""Oldest nats-server that has all that is used here, and brings a consumer back to a stream that a power cut has shortened."""

REQUEST_TIMEOUT_S: Final = 5.0
"""How long one exchange with the server may take; an acknowledged write waits for the disk."""

TRIES: Final = 3
"""How often an exchange that may safely happen twice is tried."""

_RETRY_S: Final = 0.1

_AUTHORISATION_VIOLATION: Final = "authorization violation"
_WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})
_STORAGE_ERRORS: Final = frozenset({10023, 10028, 10047})
_STORE_FAILED: Final = 10077


async def connect(
    url: str,
    seed_file: Path,
    *,
    user: str,
    tls: ssl.SSLContext | None = None,
    name: str | None = None,
    timeout_s: float = 10.0,
    on_error: Callable[[Exception], None] | None = None,
    on_closed: Callable[[], None] | None = None,
) -> Client:
    """A connection that proves possession of the nkey in ``seed_file``, with inboxes that only ``user`` may read.

    ``url`` is one server's, or those of a cluster's servers with commas between. With ``tls://`` nothing is said before the
    TLS handshake (the server needs ``handshake_first``); ``tls`` then says whom to trust and what certificate to show.

    Once made it reconnects for ever. ``user`` is the name the permissions were made for; ``name`` is shown to the
    operator. ``on_error`` hears what the connection reports on the side (a refused subject, a lost connection);
    ``on_closed`` hears that it has ended for good: by ``Client.close``, or because the server threw this user out.

    Raises :class:`SetupError` for an unusable seed, a ``url`` of mixed schemes or with credentials, or a server older than
    :data:`MIN_SERVER_VERSION`, :class:`AuthenticationError` if the server refuses the key, :class:`UnavailableError` after
    ``timeout_s``.
    """
    servers = server_urls(url)
    is_tls = servers[0].startswith("tls://")
    if tls is not None and not is_tls:
        raise SetupError("TLS files are set, and the NATS URL is not tls://: nothing would be encrypted")
    check_private(seed_file)
    public_user_key(seed_file)
    client, connected = Client(), False

    async def error(problem: Exception) -> None:
        logger.info("nats_error error=%s", type(problem).__name__)
        if on_error is not None:
            on_error(problem)
        if not connected and _AUTHORISATION_VIOLATION in str(problem).lower():
            # Raised out of connect(), which would otherwise try for ever.
            raise AuthenticationError(f"the NATS server at {url} does not know the key in {seed_file}") from problem

    async def closed() -> None:
        if on_closed is not None:
            on_closed()

    try:
        async with asyncio.timeout(timeout_s):
            await client.connect(
                servers,
                nkeys_seed=str(seed_file),
                tls=(tls or ssl.create_default_context()) if is_tls else None,
                tls_handshake_first=is_tls,
                name=name or user,
                inbox_prefix=inbox_prefix(user),
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=1,
                error_cb=error,
                closed_cb=closed,
            )
            connected = True
        check_server_version(client)
    except (TimeoutError, OSError, nats.errors.Error) as problem:
        await client.close()
        raise UnavailableError(f"no NATS server answers at {url}") from problem
    except BaseException:
        await client.close()
        raise
    return client


def server_urls(url: str) -> list[str]:
    """The servers that a setting ``nats_url`` lists. Raises :class:`SetupError`."""
    servers = [server.strip() for server in url.split(",")]
    if any("@" in server for server in servers):
        raise SetupError("credentials do not belong in a NATS URL; the key is read from its file")
    schemes = {server.partition("://")[0] for server in servers}
    if len(schemes) != 1 or not schemes <= {"nats", "tls"}:
        raise SetupError("expected NATS URLs that all begin with nats://, or all with tls://")
    if not all(map(_names_a_server, servers)):
        raise SetupError("expected NATS URLs that name a server, such as nats://host:4222")
    return servers


def _names_a_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def check_server_version(client: Client) -> None:
    """Raises :class:`SetupError` if the connected server is older than :data:`MIN_SERVER_VERSION`."""
    version = client.connected_server_version
    if (version.major, version.minor) < MIN_SERVER_VERSION:
        wanted = ".".join(map(str, MIN_SERVER_VERSION))
        raise SetupError(f"expected nats-server {wanted} or newer, found {version.major}.{version.minor}")


async def settle(client: Client) -> None:
    """Returns once the server has acted on the subscriptions made so far.

    Twice, because nats-py 2.16 writes the PING of ``flush`` straight to the socket, past commands that still wait for
    its flusher task; by the time the first PONG is back, those have gone out. Raises errors of NATS.
    """
    await client.flush()
    await client.flush()


async def repeated(action: Callable[[], Awaitable[T]]) -> T:
    """``action``, tried again when no answer came: what is on its way when a connection breaks is lost without a word.

    Only for what may happen twice. Raises errors of NATS.
    """
    for number in range(1, TRIES):
        try:
            return await action()
        except (nats.errors.TimeoutError, nats.errors.NoRespondersError, nats.js.errors.NoStreamResponseError):
            await asyncio.sleep(_RETRY_S * number)
    return await action()


class Publishes(Protocol):
    """Publishes to a stream, and returns once that has acknowledged: nats-py's context, or a ``Publisher`` of ours."""

    def publish(self, subject: str, payload: bytes, /) -> Awaitable[object]: ...


async def publish_once(js: Publishes, subject: str, payload: bytes) -> bool:
    """Publishes to a stream that keeps one message per subject and lets nobody replace it; False if there is one.

    After a broken connection the one that is there may be this very call's. Raises errors of NATS.
    """
    try:
        await repeated(lambda: js.publish(subject, payload))
    except nats.js.errors.APIError as error:
        if error.err_code == _STORE_FAILED and "per subject" in str(error):
            return False
        raise
    return True


@contextlib.contextmanager
def translated(action: str) -> Iterator[None]:
    """Raises errors of NATS inside the block as errors of our tree; ``action`` says what was being done.

    An answer that is not the JSON it should be is one of them: nats-py 2.16 lets that one through.
    """
    try:
        yield
    except (nats.errors.Error, OSError, TimeoutError, json.JSONDecodeError) as error:
        raise casemate_error(error, action) from error


def is_wrong_revision(error: nats.js.errors.APIError) -> bool:
    """Whether a write was refused because of what was there already."""
    return error.err_code in _WRONG_LAST_SEQUENCE


def casemate_error(error: BaseException, action: str) -> CasemateError:
    """The error of our tree for an error of NATS; what nobody foresaw is :class:`UnavailableError`, to be tried again."""
    code = getattr(error, "err_code", None)
    if isinstance(error, nats.js.errors.NotFoundError):
        return NotFoundError(f"{action}: there is no such thing")
    if isinstance(error, nats.js.errors.KeyWrongLastSequenceError) or code in _WRONG_LAST_SEQUENCE:
        return ConflictError(f"{action}: somebody else wrote first")
    if code in _STORAGE_ERRORS or (code == _STORE_FAILED and "maximum bytes" in str(error)):
        return StorageFullError(f"{action}: the store is full; try again when there is room")
    if isinstance(error, nats.errors.MaxPayloadError):
        return TooLargeError(f"{action}: over the server's bound on one message")
    if isinstance(error, nats.errors.NoRespondersError | nats.js.errors.NoStreamResponseError):
        return UnavailableError(f"{action}: nobody answers there")
    return UnavailableError(f"{action}: NATS did not do it ({type(error).__name__}); try again")
