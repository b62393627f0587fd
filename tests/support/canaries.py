"""Secrets that are easy to recognise, every form they could leak in, and the places where a leak could lie.

A :class:`Canary` is a secret and the folders of those who may know it. :func:`leaks` finds it in a :class:`Place`, raw
or encoded, unless the place lies in such a folder.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_PREFIX_BYTES = 3
_MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Canary:
    """``secret`` (8 bytes or more), who may hold it, and other forms of the same thing: a number's decimals, a text."""

    name: str
    secret: bytes = field(repr=False)
    homes: tuple[Path, ...]
    texts: tuple[str, ...] = field(default=(), repr=False)

    def forms(self) -> dict[str, bytes]:
        """Each encoding by name."""
        found = {"raw": self.secret, "reversed": self.secret[::-1], **_written(self.secret)}
        for number, text in enumerate(self.texts):
            found[f"text {number}"] = text.encode()
        wide = {
            f"{name} in {codec}": form.decode("ascii").encode(codec)
            for name, form in found.items()
            if name not in ("raw", "reversed") and form.isascii()
            for codec in ("utf-16-le", "utf-16-be")
        }
        return found | wide


@dataclass(frozen=True)
class Place:
    """Some bytes that others could read, and where they are (``path`` only for a file)."""

    name: str
    data: bytes = field(repr=False)
    path: Path | None = None


@dataclass(frozen=True, order=True)
class Leak:
    """A canary outside its home."""

    canary: str
    form: str
    place: str


def leaks(canaries: Iterable[Canary], places: Iterable[Place]) -> list[Leak]:
    """Every canary, in every form, in every place outside its homes."""
    wanted: dict[bytes, list[tuple[bytes, Canary, str]]] = {}
    for canary in canaries:
        for name, form in canary.forms().items():
            wanted.setdefault(form[:_PREFIX_BYTES], []).append((form, canary, name))
    prefixes = np.zeros(1 << 8 * _PREFIX_BYTES, dtype=bool)
    prefixes[[int.from_bytes(prefix, "big") for prefix in wanted]] = True
    found = set()
    for place in places:
        for position in _positions(place.data, prefixes):
            for form, canary, name in wanted[place.data[position : position + _PREFIX_BYTES]]:
                if place.data.startswith(form, position) and not _at_home(canary, place):
                    found.add(Leak(canary.name, name, place.name))
    return sorted(found)


def _positions(data: bytes, prefixes: np.ndarray[Any, np.dtype[np.bool_]]) -> list[int]:
    """Where one of the prefixes stands: what is looked for is so much that each place must be read once only."""
    values = np.frombuffer(data, np.uint8).astype(np.uint32)
    if len(values) < _PREFIX_BYTES:
        return []
    positions: list[int] = np.flatnonzero(prefixes[values[:-2] << 16 | values[1:-1] << 8 | values[2:]]).tolist()
    return positions


def _at_home(canary: Canary, place: Place) -> bool:
    return place.path is not None and any(place.path.is_relative_to(home) for home in canary.homes)


def _written(secret: bytes) -> dict[str, bytes]:
    """The secret as text: hexadecimal, decimal bytes, Python's escapes, and base64 wherever in a longer string it begins."""
    found = {
        "hex": secret.hex().encode(),
        "HEX": secret.hex().upper().encode(),
        "decimal bytes": ", ".join(map(str, secret)).encode(),
        "decimal bytes, close": ",".join(map(str, secret)).encode(),
        "escapes": "".join(f"\\x{byte:02x}" for byte in secret).encode(),
    }
    for name, encode in (("base64", base64.b64encode), ("base64url", base64.urlsafe_b64encode)):
        for offset in range(3):
            first, last = -(-8 * offset // 6), 8 * (offset + len(secret)) // 6
            found[f"{name} +{offset}"] = encode(bytes(offset) + secret)[first:last]
    return found


# --- places ---------------------------------------------------------------------------------------------------------


def files(folder: Path) -> Iterator[Place]:
    """Every file below ``folder``, whole; sockets and what vanishes meanwhile are left out."""
    for path in sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names):
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_size <= _MAX_FILE_BYTES:
                yield Place(f"file {path.relative_to(folder)}", path.read_bytes(), path)


def processes(roots: Iterable[int]) -> Iterator[Place]:
    """Command line, environment and deleted but open files of each process and of all its descendants."""
    for pid in sorted({found for root in roots for found in with_descendants(root)}):
        for what in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                yield Place(f"{what} of {pid}", Path(f"/proc/{pid}/{what}").read_bytes())
        yield from _deleted_files(pid)


def with_descendants(pid: int) -> Iterator[int]:
    """A process, its children, and theirs."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from with_descendants(int(child))


def _deleted_files(pid: int) -> Iterator[Place]:
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if link.is_file() and os.readlink(link).endswith("(deleted)"):
                    yield Place(f"open file of {pid}", link.read_bytes())


class RecordingProxy:
    """A TCP proxy on loopback that keeps every byte of both directions. Use as an async context manager."""

    def __init__(self) -> None:
        self.target_port = 0
        self.port = 0
        self._recorded: list[bytearray] = []
        self._relays: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def places(self) -> Iterator[Place]:
        """What has crossed so far, one place for each direction of each connection."""
        for number, data in enumerate(self._recorded):
            yield Place(f"HTTP {'answers' if number % 2 else 'requests'}", bytes(data))

    async def __aenter__(self) -> RecordingProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
            for relay in self._relays:
                relay.cancel()
            await asyncio.gather(*self._relays, return_exceptions=True)
            await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay = asyncio.create_task(self._relay(reader, writer))
        self._relays.add(relay)
        relay.add_done_callback(self._relays.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests, answers = bytearray(), bytearray()
        self._recorded += [requests, answers]
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        try:
            await asyncio.gather(_copy(reader, far_writer, requests), _copy(far_reader, writer, answers))
        finally:
            writer.close()
            far_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
    with contextlib.suppress(OSError):  # the other end may be gone by the time it is told of the end
        while piece := await reader.read(64 << 10):
            kept += piece
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
