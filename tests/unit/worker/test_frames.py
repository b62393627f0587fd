from __future__ import annotations

import asyncio
import io

import pytest
from casemate_schemas.errors import MalformedError
from casemate_worker.frames import MAX_FRAME_BYTES, PIECE_BYTES, frame, pieces, read_frame, read_frame_async


def test_frames_round_trip_in_order() -> None:
    stream = io.BytesIO(frame(b"S", b"one") + frame(b"D", b""))
    assert read_frame(stream) == (b"S", b"one")
    assert read_frame(stream) == (b"D", b"")
    with pytest.raises(MalformedError):
        read_frame(stream)


@pytest.mark.parametrize("data", [b"", b"S", b"S\x00\x00\x00\x04abc", b"S" + (MAX_FRAME_BYTES + 1).to_bytes(4, "big")])
async def test_what_is_cut_short_or_too_large_is_refused_by_both_readers(data: bytes) -> None:
    with pytest.raises(MalformedError):
        read_frame(io.BytesIO(data))
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    with pytest.raises(MalformedError):
        await read_frame_async(reader)


def test_pieces_are_whole_and_fit() -> None:
    data = bytes(range(256)) * (3 * PIECE_BYTES // 256) + b"rest"
    parts = list(pieces(data))
    assert b"".join(parts) == data
    assert max(map(len, parts)) == PIECE_BYTES
    assert list(pieces(b"")) == []
    with pytest.raises(MalformedError):
        frame(b"D", bytes(MAX_FRAME_BYTES + 1))
