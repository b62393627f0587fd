"""How one plaintext holds several byte strings: a short canonical table of contents, then the bytes themselves."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Annotated, ClassVar, Final

from pydantic import Field

from .codec import Name, WireModel, decode, encode
from .errors import MalformedError

_MAX_TABLE_BYTES: Final = 4096


class _Section(WireModel):
    name: Name
    bytes: Annotated[int, Field(ge=0, lt=1 << 48)]


class _Table(WireModel):
    KIND: ClassVar[str] = "sections"

    sections: Annotated[tuple[_Section, ...], Field(min_length=1, max_length=16)]


def pack_sections(sections: Mapping[str, bytes | memoryview]) -> bytes:
    """One byte string that :func:`unpack_sections` takes apart again."""
    table = encode(_Table(sections=tuple(_Section(name=name, bytes=len(data)) for name, data in sections.items())))
    return b"".join((struct.pack(">I", len(table)), table, *sections.values()))


def unpack_sections(data: bytes | memoryview, names: tuple[str, ...]) -> dict[str, memoryview]:
    """Views of the sections, which must be exactly ``names`` in that order. Raises :class:`MalformedError`."""
    view = memoryview(data)
    if len(view) < 4:
        raise MalformedError("plaintext ends before its table of contents")
    (length,) = struct.unpack(">I", view[:4])
    if length > _MAX_TABLE_BYTES:
        raise MalformedError("table of contents is too long")
    table = decode(_Table, bytes(view[4 : 4 + length]))
    if tuple(section.name for section in table.sections) != names:
        raise MalformedError(f"expected the sections {', '.join(names)}")
    if 4 + length + sum(section.bytes for section in table.sections) != len(view):
        raise MalformedError("section lengths do not add up")
    found, start = {}, 4 + length
    for section in table.sections:
        found[section.name] = view[start : start + section.bytes]
        start += section.bytes
    return found
