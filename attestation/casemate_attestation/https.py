"""One HTTPS GET, by the standard library: for small public files from a server that is not believed."""

from __future__ import annotations

import io
import re
import socket
import ssl
import time
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from typing import Final, cast
from urllib.parse import urlsplit

from casemate_schemas.errors import NotFoundError, ParameterError, ThrottledError, TooLargeError, UnavailableError

Fetch = Callable[[str, int], bytes]
"""Gets a URL's body of at most so many bytes. Raises as :meth:`HttpsFetch.__call__`."""

URL_PATTERN: Final = r"^https://[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?(:[0-9]{1,5})?(/[A-Za-z0-9._~-]+)*/?$"
"""A base URL: a host name, perhaps a port and a path; no user, query or fragment."""
_TARGET: Final = re.compile(r"/[A-Za-z0-9._~/-]*(\?[A-Za-z0-9._~=&-]*)?")
_DEFAULT_RETRY_S: Final = 10.0
_MAX_RETRY_S: Final = 3600.0


class HttpsFetch:
    """A :data:`Fetch` that verifies the server's certificate, follows no redirect and has one deadline for everything.

    Trusted authorities are the system's; ``SSL_CERT_FILE`` in the environment names others (a mirror's own).
    """

    def __init__(self, *, timeout_s: float = 8.0, context: ssl.SSLContext | None = None) -> None:
        self._timeout_s = timeout_s
        self._context = context or ssl.create_default_context()

    def __call__(self, url: str, max_bytes: int) -> bytes:
        """The body of the answer to one GET.

        1. Connect, and verify the server's certificate for its name.
        2. Send the request; read status and headers.
        3. Anything but 200 is an error: a redirect would lead to a server that nobody chose.
        4. Read the body, at most ``max_bytes`` (allocated as they come).

        Raises :class:`ThrottledError` for 429 and 503, :class:`NotFoundError` for 400 and 404, :class:`TooLargeError`
        for a body over ``max_bytes`` and :class:`UnavailableError` for whatever else is not an answer.
        """
        parts = urlsplit(url)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        if parts.scheme != "https" or not parts.hostname or not _TARGET.fullmatch(target):
            raise ParameterError("expected an https URL")
        deadline = time.monotonic() + self._timeout_s
        try:
            with self._connect(parts.hostname, parts.port or 443, deadline) as tls:  # 1
                tls.settimeout(_left(deadline))
                tls.sendall(_request(parts.netloc, target))  # 2
                response = HTTPResponse(cast(socket.socket, _Source(tls, deadline)), method="GET")
                response.begin()
                _check_status(response, parts.netloc)  # 3
                return _body(response, max_bytes)  # 4
        except (OSError, HTTPException, ValueError) as error:
            raise UnavailableError(f"no answer from {parts.netloc}: {type(error).__name__}") from error

    def _connect(self, host: str, port: int, deadline: float) -> ssl.SSLSocket:
        connection = socket.create_connection((host, port), timeout=_left(deadline))
        try:
            connection.settimeout(_left(deadline))
            return self._context.wrap_socket(connection, server_hostname=host)
        except BaseException:
            connection.close()
            raise


class _Source:
    """The part of a socket that :class:`HTTPResponse` uses, each read within what is left of the deadline."""

    def __init__(self, tls: ssl.SSLSocket, deadline: float) -> None:
        self._stream = _Stream(tls, deadline)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._stream)


class _Stream(io.RawIOBase):
    def __init__(self, tls: ssl.SSLSocket, deadline: float) -> None:
        super().__init__()
        self._tls = tls
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._tls.settimeout(_left(self._deadline))
        return self._tls.recv_into(buffer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _request(host: str, target: str) -> bytes:
    lines = (f"GET {target} HTTP/1.1", f"Host: {host}", "User-Agent: casemate", "Accept: */*", "Connection: close")
    return "\r\n".join((*lines, "", "")).encode("ascii")


def _check_status(response: HTTPResponse, host: str) -> None:
    if response.status in (429, 503):
        text = response.getheader("Retry-After") or ""
        seconds = float(text) if re.fullmatch(r"[0-9]{1,6}", text) else _DEFAULT_RETRY_S
        raise ThrottledError(f"{host} asks to wait", min(max(seconds, 1.0), _MAX_RETRY_S))
    if response.status in (400, 404):
        raise NotFoundError(f"{host} does not have it (status {response.status})")
    if response.status != 200:
        raise UnavailableError(f"expected status 200 from {host}, got {response.status}")


def _body(response: HTTPResponse, max_bytes: int) -> bytes:
    if response.length is not None and response.length > max_bytes:
        raise TooLargeError(f"expected at most {max_bytes} bytes, got a declared {response.length}")
    body = response.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise TooLargeError(f"expected at most {max_bytes} bytes")
    if response.length:
        raise UnavailableError("the answer ended early")
    return body
