"""A proxy between NATS and its clients that drops, doubles, replays, reorders, cuts, garbles and swaps whole messages.

It speaks the framing of NATS' client protocol (https://docs.nats.io/reference/reference-protocols/nats-protocol), so what it
passes on is always well-formed: what is wrong with it, only those who read it can find out. What it does to the nth message of
the nth connection, each way, follows from the seed; what that message is, from everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final

DEEDS: Final = ("drop", "double", "replay", "reorder", "cut", "garble", "swap")
_REMEMBERED: Final = 64
_MAX_LINE_BYTES: Final = 64 << 10
_MAX_HELD_S: Final = 0.1
_PLAIN: Final = {b"PUB": b"HPUB", b"MSG": b"HMSG"}
_WITH_HEADERS: Final = {with_headers: plain for plain, with_headers in _PLAIN.items()}


@dataclass(frozen=True)
class Message:
    """One PUB, HPUB, MSG or HMSG. ``address`` is subject, subscription id (server to client) and reply subject."""

    verb: bytes
    address: tuple[bytes, ...]
    headers: bytes
    payload: bytes = field(repr=False)

    @classmethod
    async def read(cls, line: bytes, reader: asyncio.StreamReader) -> Message | None:
        """The message that ``line`` begins; None for a line that is all there is."""
        verb, *words = line.split()
        verb = verb.upper()
        if verb not in _PLAIN and verb not in _WITH_HEADERS:
            return None
        header_bytes = int(words[-2]) if verb in _WITH_HEADERS else 0
        data = await reader.readexactly(int(words[-1]) + 2)
        address = tuple(words[: -2 if verb in _WITH_HEADERS else -1])
        return cls(_WITH_HEADERS.get(verb, verb), address, data[:header_bytes], data[header_bytes:-2])

    def encode(self) -> bytes:
        """As it goes over the wire."""
        total = len(self.headers) + len(self.payload)
        verb, sizes = self.verb, [total]
        if self.headers:
            verb, sizes = _PLAIN[verb], [len(self.headers), total]
        line = b" ".join((verb, *self.address, *(b"%d" % size for size in sizes)))
        return line + b"\r\n" + self.headers + self.payload + b"\r\n"


class _Way:
    """One direction of one connection."""

    def __init__(self, proxy: ByzantineProxy, name: str, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._random = random.Random(f"{proxy.seed}/{name}")
        self._writer = writer
        self._seen: deque[Message] = deque(maxlen=_REMEMBERED)
        self._held: list[Message] = []

    async def pump(self, reader: asyncio.StreamReader) -> None:
        """Passes on until the connection ends."""
        with contextlib.suppress(OSError, EOFError, ValueError):
            while True:
                line = await reader.readuntil(b"\r\n")
                message = await Message.read(line, reader) if line.strip() else None
                if line[:4].upper() == b"SUB ":
                    self._proxy.subscribed.append(line.split()[1].decode())
                if message is None:
                    self._writer.write(line)
                else:
                    self._pass(message)
                await self._writer.drain()
        self._writer.close()

    def _pass(self, message: Message) -> None:
        """Sends what becomes of the message, then whatever was held back until there was another."""
        deed = self._random.choice(DEEDS) if self._random.random() < self._proxy.rate else None
        draw = self._random.random()
        held, self._held = self._held, []
        if deed is not None and self._proxy.is_hostile:
            self._proxy.deeds[deed] += 1
            self._do(deed, message, draw)
        else:
            self._send(message)
        self._seen.append(message)
        for other in held:
            self._send(other)

    def _do(self, deed: str, message: Message, draw: float) -> None:
        other = self._seen[int(draw * len(self._seen))] if self._seen else message
        match deed:
            case "double":
                self._send(message)
                self._send(message)
            case "replay":
                self._send(message)
                self._send(other)
            case "reorder":
                self._held.append(message)
                asyncio.get_running_loop().call_later(_MAX_HELD_S, self._release)
            case "cut":
                self._send(replace(message, payload=message.payload[: int(draw * len(message.payload))]))
            case "garble":
                changed = bytearray(message.payload)
                if changed:
                    changed[int(draw * len(changed))] ^= 0x55
                self._send(replace(message, payload=bytes(changed)))
            case "swap":
                self._send(replace(message, headers=other.headers, payload=other.payload))

    def _release(self) -> None:
        held, self._held = self._held, []
        for message in held:
            self._send(message)

    def _send(self, message: Message) -> None:
        if not self._writer.is_closing():
            self._writer.write(message.encode())


class ByzantineProxy:
    """Listens on 127.0.0.1, on a free port. Honest until :attr:`is_hostile` is set, and again once it is not."""

    def __init__(self, seed: str, upstream: Callable[[], int], *, rate: float = 0.1) -> None:
        """``upstream`` is the port of nats-server; ``rate`` of all messages meet with something."""
        self.seed = seed
        self.rate = rate
        self.is_hostile = False
        self.deeds: Counter[str] = Counter()
        """How often it did what."""
        self.subscribed: list[str] = []
        """Every subject that anyone began to listen to, in that order."""
        self.port = 0
        self._upstream = upstream
        self._connections = 0
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """What clients are told in place of the server's address."""
        return f"nats://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client."""
        number, self._connections = self._connections, self._connections + 1
        try:
            back_reader, back_writer = await asyncio.open_connection(
                "127.0.0.1", self._upstream(), limit=_MAX_LINE_BYTES
            )
        except OSError:
            writer.close()
            return
        self._open |= {writer, back_writer}
        up, down = _Way(self, f"{number}/up", back_writer), _Way(self, f"{number}/down", writer)
        await asyncio.gather(up.pump(reader), down.pump(back_reader))
        self._open -= {writer, back_writer}

    def cut(self) -> None:
        """Breaks off all connections, with whatever is on its way."""
        for writer in self._open:
            writer.transport.abort()


@asynccontextmanager
async def byzantine(seed: str, upstream: Callable[[], int], *, rate: float = 0.1) -> AsyncIterator[ByzantineProxy]:
    """A proxy that listens until the block ends."""
    proxy = ByzantineProxy(seed, upstream, rate=rate)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=_MAX_LINE_BYTES)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
        await server.wait_closed()
