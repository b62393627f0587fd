"""Sections that stream by: the first ones held, the last one handed on, and nothing that does not add up."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
from casemate_schemas.errors import CasemateError, MalformedError, TooLargeError
from casemate_schemas.sections import pack_sections, stream_sections, unpack_sections

SECTIONS = {"spec": b"s" * 300, "terms": b"", "weights": bytes(range(256)) * 8}
NAMES = tuple(SECTIONS)
WHOLE = pack_sections(SECTIONS)


async def in_pieces(data: bytes, size: int) -> AsyncGenerator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def streamed(data: bytes, size: int, names: tuple[str, ...] = NAMES, max_bytes: int = 300) -> dict[str, bytes]:
    first, last = await stream_sections(in_pieces(data, size), names, max_bytes=max_bytes)
    return {**first, names[-1]: b"".join([piece async for piece in last])}


@pytest.mark.parametrize("size", [1, 7, 300, 1 << 20])
async def test_however_it_is_cut_the_sections_are_the_same(size: int) -> None:
    assert await streamed(WHOLE, size) == SECTIONS == {k: bytes(v) for k, v in unpack_sections(WHOLE, NAMES).items()}


@pytest.mark.parametrize("data", [WHOLE[:-1], WHOLE + b"\0", WHOLE[:100], WHOLE[:3], b"", b"\xff" * 400])
@pytest.mark.parametrize("size", [5, 1 << 20])
async def test_what_does_not_add_up_has_no_end(data: bytes, size: int) -> None:
    with pytest.raises(MalformedError):
        await streamed(data, size)


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"names": ("spec", "weights", "terms")}, MalformedError), ({"max_bytes": 299}, TooLargeError)],
)
async def test_other_sections_and_larger_ones_are_refused(
    changes: dict[str, tuple[str, ...] | int], error: type[CasemateError]
) -> None:
    with pytest.raises(error):
        await streamed(WHOLE, 64, **changes)  # type: ignore[arg-type]
