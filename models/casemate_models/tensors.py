"""Named arrays as safetensors bytes, read with every size bounded before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
from casemate_schemas.errors import MalformedError, TooLargeError
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

MAX_HEADER_BYTES: Final = 1 << 21
"""Bound on the safetensors header, which names the tensors."""

DType = Literal["float32", "float64", "int64", "int32", "uint8"]

_DTYPES: Final[Mapping[str, str]] = {
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}

Array = np.ndarray[Any, np.dtype[Any]]


def read_tensors(data: bytes, *, max_bytes: int, max_tensors: int) -> dict[str, Array]:
    """The arrays of safetensors ``data``, little-endian, each with memory of its own.

    1. The whole is at most ``max_bytes``, its header at most :data:`MAX_HEADER_BYTES`.
    2. The header is a JSON object without double names and without metadata, of at most ``max_tensors`` tensors.
    3. The library reads it: offsets must cover the data exactly, without hole or overlap.
    4. Every dtype is one of ``DType``.

    Raises :class:`TooLargeError` or :class:`MalformedError`.
    """
    header = _header(data, max_bytes)  # 1
    names = _names(header)  # 2
    if len(names) > max_tensors:
        raise TooLargeError(f"expected at most {max_tensors} tensors, got {len(names)}")
    try:
        tensors = deserialize(data)  # type: ignore[no-untyped-call]  # 3
    except (SafetensorError, ValueError) as error:
        raise MalformedError("not valid safetensors") from error
    return {name: _array(name, view) for name, view in tensors}  # 4


def write_tensors(arrays: Mapping[str, Array]) -> bytes:
    """Safetensors bytes of ``arrays``: the same bytes for the same arrays, in whatever order they are given."""
    return save({name: np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape) for name in sorted(arrays)})


def _header(data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise TooLargeError(f"expected at most {max_bytes} bytes of tensors, got {len(data)}")
    if len(data) < 8:
        raise MalformedError("not valid safetensors: no header")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise TooLargeError(f"expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}")
    return data[8 : 8 + length]


def _names(header: bytes) -> list[str]:
    try:
        pairs = json.loads(header, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise MalformedError("not valid safetensors: the header is not JSON") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise MalformedError("not valid safetensors: the header is not an object")
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names) or "__metadata__" in names:
        raise MalformedError("expected tensors only, each named once")
    return names


def _array(name: str, view: Mapping[str, Any]) -> Array:
    dtype = _DTYPES.get(view["dtype"])
    if dtype is None:
        raise MalformedError(f"tensor '{name}' has a dtype that is not accepted: {view['dtype']}")
    return np.frombuffer(view["data"], dtype=np.dtype(dtype).newbyteorder("<")).reshape(view["shape"])
