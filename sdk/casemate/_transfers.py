"""Large things to and from the gateway, gone on with where they broke off.

Up: envelopes over :data:`MIN_PIECE_BYTES` go in pieces (tus 1.0), each signed by itself; the gateway says how far it has got.
Down: what has come stays in the state folder, so that another process can go on as well. It is ciphertext, and nothing
until the whole of it was verified.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import aiohttp
from casemate_schemas import api
from casemate_schemas.envelope import open_head, split_envelope
from casemate_schemas.errors import (
    CasemateError,
    ChecksumError,
    ConflictError,
    MalformedError,
    NotFoundError,
    SealError,
    SetupError,
    TooLargeError,
    UnavailableError,
)

from ._http import MAX_JSON_BYTES, BytesBody, FileBody, Gateway, read_json

_BLOCK_BYTES: Final = 1 << 20
_TUS: Final = {"Tus-Resumable": api.TUS_VERSION, "Content-Type": api.UPLOAD_MEDIA_TYPE}
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/[0-9]{1,18}")
_PASSING: Final = (UnavailableError, ConflictError, ChecksumError, NotFoundError)
"""What may go away by asking how far the upload has got: another try, another piece first, a bit that tipped, an upload
that expired."""


class PartBody:
    """``count`` bytes of a file from ``start`` on."""

    def __init__(self, file: IO[bytes], start: int, count: int) -> None:
        self._file, self._start, self.length = file, start, count
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(block)
        self.sha256 = digest.digest()

    async def blocks(self) -> AsyncIterator[bytes]:
        blocks = self._blocks()
        while block := await asyncio.to_thread(next, blocks, b""):
            yield block

    def _blocks(self) -> Iterator[bytes]:
        for position in range(0, self.length, _BLOCK_BYTES):
            self._file.seek(self._start + position)
            yield self._file.read(min(_BLOCK_BYTES, self.length - position))


async def upload(gateway: Gateway, framing: bytes, file: IO[bytes], digest: bytes) -> None:
    """Uploads the envelope of that digest: ``framing``, all that precedes the ciphertext, and ``file``, the ciphertext.

    Raises :class:`SealError` if the gateway says that it stored another envelope, or the typed error of its problem;
    what may pass is tried again, :data:`~casemate._http.ATTEMPTS` times without getting any further.
    """
    if file.seek(0, os.SEEK_END) <= api.MIN_PIECE_BYTES:
        body = await asyncio.to_thread(FileBody, framing, file)
        answer = await gateway.post(api.ENVELOPES_PATH, body, max_bytes=MAX_JSON_BYTES)
        _check_stored(answer.body, digest)
    else:
        await _Upload(gateway, framing, file, digest).run()


class _Upload:
    """One upload in pieces: small ones at first and after each failure, then twice as large each time."""

    def __init__(self, gateway: Gateway, framing: bytes, file: IO[bytes], digest: bytes) -> None:
        self._gateway = gateway
        self._framing = framing
        self._file = file
        self._digest = digest
        self._total = len(framing) + file.seek(0, os.SEEK_END)
        self._piece_bytes = api.MIN_PIECE_BYTES
        self._furthest = -1
        self._patience = gateway.patience()

    async def run(self) -> None:
        while True:
            try:
                return await self._attempt()
            except _PASSING as error:
                await self._patience.wait(error)
            self._piece_bytes = api.MIN_PIECE_BYTES

    async def _attempt(self) -> None:
        """Asks where it stands, and sends from there on to the end. Only getting further than ever makes up for failures."""
        offset = await self._begin()
        while offset is not None:
            if offset > self._furthest:
                self._furthest = offset
                self._patience.renew()
            offset = await self._send(offset)
            self._piece_bytes = min(2 * self._piece_bytes, api.MAX_PIECE_BYTES)

    async def _begin(self) -> int | None:
        """Where the upload goes on; None if the gateway has all of it. Asking again is the same upload."""
        headers = {**_TUS, "Upload-Length": str(self._total)}
        answer = await self._gateway.request(
            "POST",
            api.UPLOADS_PATH,
            body=BytesBody(self._framing),
            headers=headers,
            max_bytes=MAX_JSON_BYTES,
            again=False,
        )
        if answer.status == 200:
            _check_stored(answer.body, self._digest)
            return None
        offset = _offset(answer.headers.get("Upload-Offset"))
        before = offset - len(self._framing)
        if not 0 <= before <= self._total - len(self._framing) or (
            offset != self._total and before % api.UPLOAD_CHUNK_BYTES
        ):
            raise MalformedError("the gateway says that the upload goes on where no piece begins")
        return offset

    async def _send(self, offset: int) -> int | None:
        """One piece; where the next one begins, None after the last."""
        count = min(self._piece_bytes, self._total - offset)
        body = await asyncio.to_thread(PartBody, self._file, offset - len(self._framing), count)
        headers = {**_TUS, "Upload-Offset": str(offset)}
        path = f"{api.UPLOADS_PATH}/{self._digest.hex()}"
        answer = await self._gateway.request(
            "PATCH", path, body=body, headers=headers, max_bytes=MAX_JSON_BYTES, again=False
        )
        if answer.status != 204 or _offset(answer.headers.get("Upload-Offset")) != offset + count:
            raise MalformedError("the gateway says that it stored another piece than was sent")
        return offset + count if offset + count < self._total else None


async def download(gateway: Gateway, path: str, digest: bytes, partial: Path, *, max_bytes: int) -> bytes:
    """What the gateway has at ``path``, which should be the envelope of that digest: for the caller to verify.

    What has come is kept in ``partial`` if this breaks off, and then only the rest is asked for. If the whole turns out not
    to have the digest, it is fetched once more from the start.

    Raises :class:`TooLargeError`, :class:`SetupError`, or the typed error of the gateway's problem; what may pass is tried
    again, :data:`~casemate._http.ATTEMPTS` times without getting any further.
    """
    with _open_partial(partial) as file:
        envelope = await _read(file, max_bytes)
        for from_start in (False, True):
            if await asyncio.to_thread(_is_whole, envelope, digest):
                break
            if from_start:
                file.truncate(0)
            await _fetch(gateway, path, digest, file, max_bytes)
            envelope = await _read(file, max_bytes)
        partial.unlink(missing_ok=True)
    return envelope


async def _fetch(gateway: Gateway, path: str, digest: bytes, file: IO[bytes], max_bytes: int) -> None:
    """Goes on with ``file`` if it holds the beginning, and else from the start, until the gateway has given everything."""
    patience, furthest = gateway.patience(), 0
    while True:
        size = file.seek(0, os.SEEK_END)
        if size > furthest:
            furthest = size
            patience.renew()
        ranged = {"Range": f"bytes={size}-", "If-Range": f'"{digest.hex()}"'} if size else {}
        try:
            async with gateway.open("GET", path, headers=ranged) as response:
                return await _receive(response, file, size, max_bytes)
        except MalformedError as error:
            if not size:
                raise
            await patience.wait(error)
            file.truncate(0)  # nothing comes after what is here: it is no beginning of this envelope
        except UnavailableError as error:
            await patience.wait(error)


async def _receive(response: aiohttp.ClientResponse, file: IO[bytes], size: int, max_bytes: int) -> None:
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status == 206 and (found is None or int(found[1]) != size):
        raise MalformedError("the gateway gave another part than asked for")
    position = size if response.status == 206 else 0
    file.truncate(position)
    file.seek(position)
    async for block in response.content.iter_chunked(_BLOCK_BYTES):
        position += len(block)
        if position > max_bytes:
            raise TooLargeError(f"expected at most {max_bytes} bytes")
        await asyncio.to_thread(file.write, block)


async def _read(file: IO[bytes], max_bytes: int) -> bytes:
    if file.seek(0, os.SEEK_END) > max_bytes:
        file.truncate(0)
    file.seek(0)
    return await asyncio.to_thread(file.read)


def _is_whole(envelope: bytes, digest: bytes) -> bool:
    """Whether this is the envelope of that digest, to its last byte."""
    try:
        signed_head, ciphertext = split_envelope(envelope, max_bytes=len(envelope))
        header = open_head(signed_head).header
    except CasemateError:
        return False
    return header.digest == digest and hashlib.sha256(ciphertext).digest() == header.ciphertext_digest


@contextmanager
def _open_partial(path: Path) -> Iterator[IO[bytes]]:
    """The file, to this process alone; if another one is at it, one that nobody sees."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with tempfile.TemporaryFile() as other:
                yield other
            return
        try:
            yield file
        except OSError as error:
            raise SetupError(f"cannot write {path}: {error.strerror}") from error


def _offset(value: str | None) -> int:
    if value is None or not value.isdecimal() or len(value) > 18:
        raise MalformedError("the gateway does not say how far the upload has got")
    return int(value)


def _check_stored(answer: bytes, digest: bytes) -> None:
    if read_json(api.EnvelopeStored, answer).envelope != digest.hex():
        raise SealError("the gateway says that it stored another envelope than was sent")
