"""The gateway's HTTP API as seen from outside: every request signed, every answer bounded, every problem a typed error.

The gateway is not trusted. What it answers is ciphertext, or signed by someone else, or shown to people only.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import IO, Final, Protocol, TypeVar

import aiohttp
from casemate_schemas import api
from casemate_schemas.codec import encode
from casemate_schemas.errors import (
    CasemateError,
    MalformedError,
    NotFoundError,
    ParameterError,
    StorageFullError,
    ThrottledError,
    TooLargeError,
    UnavailableError,
    error_from_reason,
)
from http_message_signatures import HTTPMessageSigner
from http_message_signatures.algorithms import ED25519
from pydantic import BaseModel, ValidationError
from yarl import URL

from .identity import Identity

MAX_JSON_BYTES: Final = 4 << 20
MAX_LIST_BYTES: Final = 64 << 20
ATTEMPTS: Final = 5
MAX_WAIT_S: Final = 90.0
"""How long one call waits in all for a gateway that is busy, full or away."""
_J = TypeVar("_J", bound=BaseModel)

_BLOCK_BYTES: Final = 1 << 20
_TRANSIENT: Final[dict[int, type[UnavailableError]]] = {
    429: ThrottledError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
    507: StorageFullError,
}
"""What a proxy between may answer by itself."""

_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=30, sock_read=60)


class Body(Protocol):
    """What a request carries. It can be sent more than once."""

    @property
    def length(self) -> int: ...
    @property
    def sha256(self) -> bytes: ...
    def blocks(self) -> AsyncIterator[bytes]: ...


class BytesBody:
    """A body in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.length = len(data)
        self.sha256 = hashlib.sha256(data).digest()

    async def blocks(self) -> AsyncIterator[bytes]:
        yield self._data


class FileBody:
    """A short prefix and then a file from its start, read in blocks."""

    def __init__(self, prefix: bytes, file: IO[bytes]) -> None:
        self._prefix, self._file = prefix, file
        digest = hashlib.sha256(prefix)
        self.length = len(prefix)
        file.seek(0)
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            self.length += len(block)
        self.sha256 = digest.digest()

    async def blocks(self) -> AsyncIterator[bytes]:
        yield self._prefix
        self._file.seek(0)
        while block := await asyncio.to_thread(self._file.read, _BLOCK_BYTES):
            yield block


@dataclass
class _Message:
    """A request as the signature library sees it."""

    method: str
    url: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """A whole answer in memory."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


def sign_request(
    identity: Identity, method: str, url: str, content_sha256: bytes, *, created: datetime | None = None
) -> dict[str, str]:
    """The headers that make a request the person's (RFC 9421, RFC 9530): digest, delegation, signature.

    Args:
        method: upper case.
        url: absolute, exactly as it is sent.
        content_sha256: of the body, also of an empty one.
    """
    message = _Message(
        method,
        url,
        {
            "Content-Digest": f"sha-256=:{base64.b64encode(content_sha256).decode('ascii')}:",
            api.DELEGATION_HEADER: base64.b64encode(encode(identity.signed_delegation)).decode("ascii"),
        },
    )
    signer = HTTPMessageSigner(signature_algorithm=ED25519)
    prepared = signer.prepare(
        message,
        key_id=identity.keys.signing.public.hex(),
        created=created or datetime.now(UTC),
        nonce=secrets.token_hex(16),
        label=api.SIGNATURE_LABEL,
        tag=api.SIGNATURE_TAG,
        include_alg=False,
        covered_component_ids=api.SIGNED_COMPONENTS,
        use_existing_digest=True,
    )
    signer.apply(message, prepared, identity.keys.signing.sign_bytes(prepared.signature_base))
    return message.headers


class Patience:
    """How often one thing is tried again, and how long that may take in all, before its error is raised."""

    def __init__(self, sleep: Callable[[float], Awaitable[None]], attempts: int, max_wait_s: float) -> None:
        self._sleep = sleep
        self._attempts = attempts
        self._max_wait_s = max_wait_s
        self.renew()

    def renew(self) -> None:
        """As if nothing had failed yet: it got further."""
        self._failures = 0
        self._waited_s = 0.0

    async def wait(self, error: CasemateError) -> None:
        """Waits until the next attempt; raises ``error`` if there is none, or if it would be too late.

        Each wait is twice as long as the one before, up to 8 s, and never shorter than ``error`` asks for; clients that were
        turned away together come back apart.
        """
        self._failures += 1
        asked_s = error.retry_after_s if isinstance(error, UnavailableError) else 0.0
        own_s = min(0.25 * 2**self._failures, 8.0)
        wait_s = max(own_s * random.uniform(0.5, 1.0), asked_s * random.uniform(1.0, 1.25))  # noqa: S311 - no secret
        if self._failures >= self._attempts or self._waited_s + wait_s > self._max_wait_s:
            raise error
        self._waited_s += wait_s
        await self._sleep(wait_s)


class Gateway:
    """Signed requests to one gateway, tried again while that is safe and may help."""

    def __init__(
        self,
        url: str,
        identity: Identity,
        session: aiohttp.ClientSession,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        """``max_wait_s``: how long one call may wait in all, at least 0."""
        if not 0 <= max_wait_s < math.inf:
            raise ParameterError(f"max_wait_s: expected a number of seconds, got {max_wait_s!r}")
        self._max_wait_s = max_wait_s
        self._base = _base_url(url)
        self._identity = identity
        self._session = session
        self._sleep = sleep

    async def get(self, path: str, *, max_bytes: int, headers: Mapping[str, str] | None = None) -> Answer:
        """GET. Raises the typed error of a problem, :class:`UnavailableError` or :class:`TooLargeError`."""
        return await self.request("GET", path, max_bytes=max_bytes, headers=headers)

    async def post(self, path: str, body: Body | None = None, *, max_bytes: int, again: bool = True) -> Answer:
        """POST of msgpack; ``again`` says that repeating it is the same as making it once."""
        return await self.request("POST", path, body=body, max_bytes=max_bytes, again=again)

    async def request(
        self,
        method: str,
        path: str,
        *,
        max_bytes: int,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        again: bool = True,
    ) -> Answer:
        """One request, at most :data:`ATTEMPTS` times if it may be repeated, each signed anew.

        Where the gateway says when to come back (429, 503, 507), not before that. Raises its error if that is too late.
        """
        patience = self.patience()
        while True:
            try:
                async with self.open(method, path, body=body, headers=headers) as response:
                    return Answer(response.status, response.headers, await _read(response, max_bytes))
            except UnavailableError as error:
                if not again:
                    raise
                await patience.wait(error)

    def patience(self, attempts: int = ATTEMPTS) -> Patience:
        """For one call."""
        return Patience(self.wait, attempts, self._max_wait_s)

    async def wait(self, seconds: float) -> None:
        """Wait so long."""
        await self._sleep(seconds)

    @asynccontextmanager
    async def open(
        self, method: str, path: str, *, body: Body | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response whose body is still to be read. Raises as :meth:`get`, for a problem or a lost connection."""
        url = self._base.join(URL(path, encoded=True))
        carried = body or BytesBody(b"")
        fields = {"Accept-Encoding": "identity", **(headers or {})}
        fields |= sign_request(self._identity, method, str(url), carried.sha256)
        if body is not None:
            fields = {"Content-Type": api.MEDIA_TYPE, **fields, "Content-Length": str(body.length)}
        try:
            async with self._session.request(
                method,
                url,
                data=body.blocks() if body is not None else None,
                headers=fields,
                allow_redirects=False,
                timeout=_TIMEOUT,
            ) as response:
                if response.status >= 300 and response.status != 304:
                    raise await _problem(response)
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnavailableError(f"no answer from {self._base.host}: {type(error).__name__}") from error


def printable(text: str, limit: int = 2000) -> str:
    """``text`` from someone not trusted, as a terminal may show it: no control characters, bounded."""
    return "".join(c if c.isprintable() else " " for c in text[:limit])


def retry_after_s(value: str | None) -> float:
    """The seconds that a ``Retry-After`` asks for (RFC 9110, section 10.2.3); 0 for none, or one that cannot be read."""
    text = (value or "").strip()
    if text.isascii() and text.isdecimal() and len(text) <= 6:
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def read_json(model: type[_J], body: bytes) -> _J:
    """The ``model`` in a JSON body. Raises :class:`MalformedError`."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise MalformedError(f"the gateway did not answer with a {model.__name__}") from error


def _base_url(url: str) -> URL:
    try:
        base = URL(url)
    except ValueError as error:
        raise ParameterError(f"expected a URL such as https://consortium.example, got {url!r}") from error
    extras = (base.user, base.query_string, base.fragment, base.path.strip("/"))
    if base.scheme not in ("http", "https") or not base.host or any(extras):
        raise ParameterError(f"expected a URL such as https://consortium.example, got {url!r}")
    return base.origin()


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    if (response.content_length or 0) > max_bytes:
        raise TooLargeError(f"expected an answer of at most {max_bytes} bytes, got {response.content_length}")
    body = bytearray()
    async for block in response.content.iter_chunked(_BLOCK_BYTES):
        body += block
        if len(body) > max_bytes:
            raise TooLargeError(f"expected an answer of at most {max_bytes} bytes")
    return bytes(body)


async def _problem(response: aiohttp.ClientResponse) -> CasemateError:
    """The typed error of an RFC 9457 problem; of the status alone where there is none. It knows when to try again."""
    error = await _error_of(response)
    if isinstance(error, UnavailableError) and (after_s := retry_after_s(response.headers.get("Retry-After"))):
        return type(error)(f"{error} (try again in {math.ceil(after_s)} s)", after_s)
    return error


async def _error_of(response: aiohttp.ClientResponse) -> CasemateError:
    if response.content_type == api.PROBLEM_MEDIA_TYPE:
        try:
            problem = api.ProblemDetails.model_validate_json(await _read(response, 64 << 10))
        except (ValidationError, TooLargeError):
            return MalformedError(f"the gateway answered {response.status} with a problem that cannot be read")
        return error_from_reason(problem.reason, printable(problem.detail or problem.title))
    if (kind := _TRANSIENT.get(response.status)) is not None:
        return kind(f"the gateway answered {response.status}")
    if response.status == 404:
        return NotFoundError("nothing is there: is this a Casemate gateway?")
    return CasemateError(f"the gateway answered {response.status} without saying why")
