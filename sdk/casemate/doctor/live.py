"""What only the running servers and gateways can tell."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp
import nats.errors
import nats.js.errors
from casemate_messaging.connection import connect, settle
from casemate_messaging.durability import ServerStatus, durability_problem, servers_with_streams
from casemate_messaging.manifests import ManifestStore
from casemate_messaging.server import MAX_PAYLOAD_BYTES
from casemate_messaging.setup import StreamSettings, stream_configs
from casemate_schemas.api import CONSORTIUM_PATH
from casemate_schemas.codec import decode
from casemate_schemas.consortium import MAX_CHAIN_BYTES, ManifestChain
from casemate_schemas.errors import AuthenticationError, CasemateError, NotFoundError, SetupError, UnavailableError
from casemate_schemas.subjects import inbox_prefix
from nats.aio.client import Client
from nats.js.api import StreamConfig

from .findings import Finding
from .programs import Program
from .settings_checks import consortium_of

MAX_SKEW_MS: Final = 5_000
"""Signed requests count for a minute to each side; this leaves room for the way there."""

NEARLY_FULL: Final = 0.9
CONNECT_S: Final = 5.0
_HTTP_S: Final = 5.0


async def check_nats(program: Program, clock_ms: Callable[[], int]) -> AsyncIterator[Finding]:
    """Connects as ``program`` would. With a gateway's key it sees the most."""
    reported: list[Exception] = []
    settings = program.settings
    try:
        client = await connect(
            settings.nats_url,
            settings.nats_seed_file,
            user=program.user,
            tls=settings.nats_tls(),
            name="casemate-doctor",
            timeout_s=CONNECT_S,
            on_error=reported.append,
        )
    except CasemateError as error:
        yield _not_connected(program, error)
        return
    try:
        yield Finding(program.about, "NATS", f"connected to nats-server {client.connected_server_version}")
        own = await _inbox(program, client, reported)
        yield own
        if not own.ok:
            return  # it hears no answers
        if program.kind == "gateway":
            async for finding in _as_gateway(program, client, clock_ms):
                yield finding
        async for finding in _manifests(program, client):
            yield finding
    except UnavailableError as error:
        fix = "see its log, and whether a majority of its servers runs"
        yield Finding(program.about, "NATS", str(error), "an answer", fix)
    finally:
        await client.close()


async def check_gateway(program: Program, clock_ms: Callable[[], int]) -> AsyncIterator[Finding]:
    """That the gateway is where clients are told to look for it, and that its clock agrees with this one."""
    url = _url_of(program)
    if url is None:
        return
    try:
        timeout = aiohttp.ClientTimeout(total=_HTTP_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(url + CONSORTIUM_PATH, allow_redirects=False) as response,
        ):
            body = await response.content.read(MAX_CHAIN_BYTES + 1)
            now, date = clock_ms(), response.headers.get("Date")
            status = response.status
    except aiohttp.ClientSSLError as error:
        fix = "a certificate for that host, from an authority that clients trust"
        yield Finding(
            program.about, "public address", f"{type(error).__name__} at {url}", "TLS that clients accept", fix
        )
        return
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        fix = f"start it (casemate-gateway --settings {program.file}), or set public_url to where it is reached"
        yield Finding(
            program.about, "public address", f"{type(error).__name__} at {url}", "a gateway that answers", fix
        )
        return
    yield _same_consortium(program, url, status, body)
    with contextlib.suppress(TypeError, ValueError):
        at = parsedate_to_datetime(date or "")
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        yield _clock(program.about, "the gateway's clock", int(at.timestamp() * 1000), now)


def check_servers(about: str, servers: list[ServerStatus], replicas: int) -> Iterator[Finding]:
    """Versions, syncing, clocks and room of all servers that answered."""
    if (problem := durability_problem(servers)) is not None:
        found, _, fix = problem.partition(": ")
        yield Finding(about, "durability", found, "servers that sync before they acknowledge", fix)
    for server in servers:
        name = f"nats {server.name}"
        if server.syncs_always:
            yield Finding(name, "durability", "syncs before it acknowledges")
        if server.is_recent:
            yield Finding(name, "version", server.version)
        else:
            yield Finding(name, "version", server.version, "2.14 or newer", "update nats-server")
        yield _clock(name, "its clock", server.at_ms, server.heard_ms)
        if server.max_bytes and server.stored_bytes > NEARLY_FULL * server.max_bytes:
            found = f"{server.stored_bytes >> 20} of {server.max_bytes >> 20} MiB used"
            yield Finding(
                name, "store", found, f"less than {NEARLY_FULL:.0%}", "a larger max_file_store, or a larger disk"
            )
    size = max((server.cluster_size for server in servers), default=1)
    if size > len(servers) > 0:
        yield Finding(
            about, "cluster", f"{len(servers)} of {size} servers", "all of them", "start the others; see their logs"
        )
    if replicas < min(size, 3):
        fix = f"stream_replicas = {min(size, 3)}, and start the gateway again"
        yield Finding(about, "stream_replicas", f"{replicas} in a cluster of {size} servers", str(min(size, 3)), fix)


def _not_connected(program: Program, error: CasemateError) -> Finding:
    if isinstance(error, AuthenticationError):
        fix = "the seed that NATS' configuration has the public key of, or that key in its section of accounts"
        return Finding(program.about, "NATS", str(error), "a key that NATS knows", fix)
    if isinstance(error, SetupError):
        fix = "update nats-server" if "nats-server" in str(error) else f"correct {program.file}"
        return Finding(
            program.about, "NATS", str(error), "settings to connect with, and nats-server 2.14 or newer", fix
        )
    fix = (
        "start nats-server, or correct nats_url; with tls:// it needs handshake_first, and a certificate for that host"
    )
    return Finding(program.about, "NATS", str(error), "a server that answers", fix)


async def _inbox(program: Program, client: Client, reported: list[Exception]) -> Finding:
    """Whether the server made this key's permissions for this user: only that one may read its inboxes."""
    subscription = await client.subscribe(f"{inbox_prefix(program.user)}.doctor")
    await settle(client)
    await subscription.unsubscribe()
    if any("permissions violation" in str(error).lower() for error in reported):
        found = f"a seed of another user than {program.user}"
        fix = f"the seed that was made for {program.user}, or that user's name in {program.file}"
        return Finding(program.about, "NATS user", found, f"the seed of {program.user}", fix)
    return Finding(program.about, "NATS user", program.user)


async def _as_gateway(program: Program, client: Client, clock_ms: Callable[[], int]) -> AsyncIterator[Finding]:
    if client.max_payload < MAX_PAYLOAD_BYTES:
        found, fix = str(client.max_payload), f"max_payload: {MAX_PAYLOAD_BYTES} in NATS' configuration"
        yield Finding(program.about, "max_payload", found, f"at least {MAX_PAYLOAD_BYTES}", fix)
    replicas = int(program.value("stream_replicas"))
    servers = await servers_with_streams(client, clock_ms)
    for finding in check_servers(program.about, servers, replicas):
        yield finding
    for config in stream_configs(StreamSettings(replicas=replicas)):
        yield await _stream(program, client, config)


async def _stream(program: Program, client: Client, wanted: StreamConfig) -> Finding:
    check = f"stream {wanted.name}"
    try:
        found = (await client.jetstream(timeout=CONNECT_S).stream_info(wanted.name or "")).config
    except nats.js.errors.NotFoundError:
        fix = f"start the gateway, which makes it: casemate-gateway --settings {program.file}"
        return Finding(program.about, check, "no such stream", "one that the gateway made", fix)
    except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
        fix = "jetstream in NATS' configuration, for the account of the gateway too, and a majority of servers"
        return Finding(program.about, check, f"no answer ({type(error).__name__})", "JetStream to answer", fix)
    if found.retention != wanted.retention or found.storage != wanted.storage:
        said = f"retention {_word(found.retention)}, storage {_word(found.storage)}"
        fix = "delete it if nothing in it counts (nats stream rm), and start the gateway, which makes it"
        return Finding(program.about, check, said, f"{_word(wanted.retention)}, {_word(wanted.storage)}", fix)
    if (found.num_replicas or 1) != (wanted.num_replicas or 1):
        fix = "start the gateway again: it brings streams to its settings"
        return Finding(program.about, check, f"{found.num_replicas} replicas", str(wanted.num_replicas), fix)
    return Finding(program.about, check, f"{_word(found.retention)}, {found.num_replicas or 1} replicas")


def _word(value: object) -> str:
    return str(getattr(value, "value", value))


async def _manifests(program: Program, client: Client) -> AsyncIterator[Finding]:
    """Whether NATS holds this consortium's manifests, and none newer than the file."""
    try:
        consortium = consortium_of(program)
    except CasemateError:
        return
    store, number = ManifestStore(client), consortium.manifest.number
    try:
        first = await store.get(1)
        if first.digest != consortium.id:
            fix = "a NATS of its own for each consortium, or the right consortium's settings"
            yield Finding(program.about, "NATS' manifests", "another consortium's", "this one's", fix)
            return
        newer = (await store.get(number + 1)).open().number
    except NotFoundError:
        yield Finding(program.about, "NATS' manifests", f"none newer than {number}")
        return
    fix = f"fetch the newer chain (GET {CONSORTIUM_PATH}) into {program.settings.manifest_file}"
    yield Finding(program.about, "manifest_file", f"manifest {number}; NATS has {newer}", "the newest manifest", fix)


def _same_consortium(program: Program, url: str, status: int, body: bytes) -> Finding:
    check, expected = "public address", f"consortium {program.settings.consortium[:12]}…"
    try:
        found = decode(ManifestChain, body, max_bytes=MAX_CHAIN_BYTES).manifests[0].digest
    except CasemateError:
        fix = "public_url = the origin of the gateway, and a proxy that passes requests on as they are"
        return Finding(program.about, check, f"no gateway at {url}: HTTP status {status}", expected, fix)
    if found != program.settings.consortium_id:
        fix = "public_url = the origin of this consortium's gateway"
        return Finding(program.about, check, f"consortium {found.hex()[:12]}… at {url}", expected, fix)
    return Finding(program.about, check, url)


def _clock(about: str, check: str, theirs_ms: int, ours_ms: int) -> Finding:
    apart = theirs_ms - ours_ms
    if abs(apart) <= MAX_SKEW_MS:
        return Finding(about, check, f"within {MAX_SKEW_MS // 1000} s of this one")
    found = f"{abs(apart) / 1000:.0f} s {'ahead of' if apart > 0 else 'behind'} this machine's"
    return Finding(
        about, check, found, f"within {MAX_SKEW_MS // 1000} s", "time synchronisation (chrony, NTP) on both machines"
    )


def _url_of(program: Program) -> str | None:
    public_url, host, port = (program.value(name) for name in ("public_url", "host", "port"))
    if public_url is not None:
        return str(public_url)
    if port == 0:
        return None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not listened on, but asked
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
