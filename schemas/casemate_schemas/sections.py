"""How one plaintext holds several byte strings: a short canonical table of contents, then the bytes themselves."""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, ClassVar, Final

from pydantic import Field

from .codec import Name, WireModel, decode, encode
from .errors import MalformedError, TooLargeError

_MAX_TABLE_BYTES: Final = 4096


class _Section(WireModel):
    name: Name
    bytes: Annotated[int, Field(ge=0, lt=1 << 48)]


class _Table(WireModel):
    KIND: ClassVar[str] = "sections"

    sections: Annotated[tuple[_Section, ...], Field(min_length=1, max_length=16)]


def pack_sections(sections: Mapping[str, bytes | memoryview]) -> bytes:
    """One byte string that :func:`unpack_sections` takes apart again."""
    return b"".join((sections_head({name: len(data) for name, data in sections.items()}), *sections.values()))


def sections_head(sizes: Mapping[str, int]) -> bytes:
    """What precedes sections of these sizes in bytes."""
    table = encode(_Table(sections=tuple(_Section(name=name, bytes=size) for name, size in sizes.items())))
    return struct.pack(">I", len(table)) + table


def unpack_sections(data: bytes | memoryview, names: tuple[str, ...]) -> dict[str, memoryview]:
    """Views of the sections, which must be exactly ``names`` in that order. Raises :class:`MalformedError`."""
    view = memoryview(data)
    if len(view) < 4:
        raise MalformedError("plaintext ends before its table of contents")
    length = _table_bytes(view[:4])
    table = _table(bytes(view[4 : 4 + length]), names)
    if 4 + length + sum(section.bytes for section in table.sections) != len(view):
        raise MalformedError("section lengths do not add up")
    found, start = {}, 4 + length
    for section in table.sections:
        found[section.name] = view[start : start + section.bytes]
        start += section.bytes
    return found


async def stream_sections(
    plaintext: AsyncGenerator[bytes], names: tuple[str, ...], *, max_bytes: int
) -> tuple[dict[str, bytes], AsyncGenerator[bytes]]:
    """The sections before the last one, at most ``max_bytes`` together, and the last one's bytes as they come.

    Raises :class:`MalformedError` unless they are exactly ``names`` in that order, :class:`TooLargeError`, and what
    ``plaintext`` raises. The last section is whole only when its iterator has ended.
    """
    held = bytearray()

    async def take(count: int) -> bytes:
        while len(held) < count:
            if (piece := await anext(plaintext, None)) is None:
                raise MalformedError("plaintext ends before its sections do")
            held.extend(piece)
        taken = bytes(held[:count])
        del held[:count]
        return taken

    table = _table(await take(_table_bytes(await take(4))), names)
    *first, last = table.sections
    if sum(section.bytes for section in first) > max_bytes:
        raise TooLargeError(f"expected at most {max_bytes} bytes before the section {last.name}")
    found = {section.name: await take(section.bytes) for section in first}
    return found, _last_section(bytes(held), plaintext, last.bytes)


async def _last_section(begun: bytes, plaintext: AsyncGenerator[bytes], size: int) -> AsyncGenerator[bytes]:
    piece: bytes | None = begun
    while piece is not None:
        size -= len(piece)
        if size < 0:
            break
        if piece:
            yield piece
        piece = await anext(plaintext, None)
    if size:
        raise MalformedError("section lengths do not add up")


def _table_bytes(head: bytes | memoryview) -> int:
    length: int = struct.unpack(">I", head)[0]
    if length > _MAX_TABLE_BYTES:
        raise MalformedError("table of contents is too long")
    return length


def _table(data: bytes, names: tuple[str, ...]) -> _Table:
    table = decode(_Table, data)
    if tuple(section.name for section in table.sections) != names:
        raise MalformedError(f"expected the sections {', '.join(names)}")
    return table
