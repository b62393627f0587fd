from __future__ import annotations

from typing import Any

import msgpack
import pytest
from casemate_schemas.codec import MAX_DEPTH, Name, WireModel, decode, digest_of, domain_digest, encode, pack, unpack
from casemate_schemas.errors import MalformedError, TooLargeError
from hypothesis import given
from hypothesis import strategies as st


class Sample(WireModel):
    KIND = "sample"

    count: int
    rate: float
    names: tuple[Name, ...]
    blob: bytes
    note: str | None = None


SAMPLE = Sample(count=3, rate=0.5, names=("north", "south"), blob=b"\x00\xff")

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.binary(max_size=20)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_what_is_packed_unpacks_to_itself(value: Any) -> None:
    data = pack(value)
    assert unpack(data) == value
    assert pack(unpack(data)) == data


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_malformed(data: bytes) -> None:
    try:
        value = unpack(data)
    except MalformedError:
        return
    assert pack(value) == data


def test_key_order_does_not_matter_but_reaches_the_wire_sorted() -> None:
    assert pack({"b": 1, "a": 2}) == pack({"a": 2, "b": 1}) == bytes.fromhex("82a16102a16201")


@pytest.mark.parametrize(
    "data",
    [
        bytes.fromhex("82a16201a16102"),  # keys out of order
        bytes.fromhex("cc05"),  # 5 in two bytes
        bytes.fromhex("d90161"),  # "a" with a long header
        bytes.fromhex("ca3f800000"),  # a float32
        bytes.fromhex("82a16101a16102"),  # the same key twice
        bytes.fromhex("8101c0"),  # a key that is no text
        bytes.fromhex("cb7ff8000000000000"),  # NaN
        bytes.fromhex("cb7ff0000000000000"),  # infinity
        bytes.fromhex("d6ff00000000"),  # an extension type
        bytes.fromhex("a1ff"),  # text that is not UTF-8
        bytes.fromhex("0101"),  # two values
        bytes.fromhex("dfffffffff"),  # a map that announces 2**32 - 1 entries
        b"",
    ],
)
def test_anything_but_the_one_canonical_form_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        unpack(data)


def test_depth_is_bounded_both_ways() -> None:
    nested: Any = None
    for _ in range(MAX_DEPTH):
        nested = (nested,)
    with pytest.raises(MalformedError):
        pack(nested)
    with pytest.raises(MalformedError):
        unpack(b"\x91" * 100_000 + b"\xc0")


@pytest.mark.parametrize(
    "value", [1 << 64, -(1 << 63) - 1, {"a": 1 << 64}, [float("nan")], {"a": {1: 2}}, {1: 2}, {"a": {1}}, "\ud800"]
)
def test_what_has_no_canonical_form_is_refused(value: Any) -> None:
    with pytest.raises(MalformedError):
        pack(value)


def test_size_is_checked_before_anything_is_parsed() -> None:
    with pytest.raises(TooLargeError):
        unpack(pack(b"x" * 100), max_bytes=50)


def test_model_round_trip_and_digest_domain() -> None:
    assert decode(Sample, encode(SAMPLE)) == SAMPLE
    assert digest_of(SAMPLE) == domain_digest("sample", encode(SAMPLE))
    assert digest_of(SAMPLE) != domain_digest("other", encode(SAMPLE))


@pytest.mark.parametrize(
    "change",
    [
        {"count": "3"},
        {"count": True},
        {"rate": None},
        {"names": ("North",)},
        {"names": ("north\n",)},
        {"blob": "text"},
        {"extra": 1},
        {"note": b"bytes"},
    ],
)
def test_models_are_strict(change: dict[str, Any]) -> None:
    value = {**SAMPLE.model_dump(), **change}
    with pytest.raises(MalformedError):
        decode(Sample, pack(value))


def test_an_integer_is_not_another_spelling_of_a_float() -> None:
    with pytest.raises(MalformedError, match="canonical"):
        decode(Sample, pack({**SAMPLE.model_dump(), "rate": 1}))


def test_a_left_out_default_is_not_another_spelling() -> None:
    value = SAMPLE.model_dump()
    del value["note"]
    with pytest.raises(MalformedError, match="canonical"):
        decode(Sample, bytes(msgpack.packb(dict(sorted(value.items())))))


def test_errors_name_the_field_and_never_its_value() -> None:
    with pytest.raises(MalformedError) as caught:
        decode(Sample, pack({**SAMPLE.model_dump(), "count": "CANARY"}))
    assert "count" in str(caught.value)
    assert "CANARY" not in str(caught.value)
