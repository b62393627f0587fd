"""What bytes a message has: canonical msgpack, one byte string per value, and strict pydantic models on top.

Canonical means: map keys are strings in code-point order, integers and lengths take their shortest form (msgpack does
that), floats are finite float64, binary and text are kept apart. :func:`decode` accepts a byte string only if encoding
its model again gives the very same bytes, so a digest or signature over the bytes is one over the value.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, ClassVar, Final, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from .errors import MalformedError, TooLargeError

MAX_MESSAGE_BYTES: Final = 1 << 20
"""Default bound on one encoded message, in bytes."""

MAX_DEPTH: Final = 32
"""Bound on nesting, well above any message and well below Python's recursion limit."""

Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
"""A SHA-256 digest: 32 bytes."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")]
"""A short identifier that is safe in URLs, file names and NATS subjects."""

Text = Annotated[str, StringConstraints(max_length=2000)]
"""Free text for people: bounded, never parsed."""

UnixMs = Annotated[int, Field(ge=0, lt=1 << 48)]
"""A point in time: milliseconds since 1970-01-01T00:00Z."""


class WireModel(BaseModel):
    """A message that crosses a wire. Strict, frozen, no unknown fields, no NaN or infinity.

    Sequences are tuples, choices are ``Literal``; ``KIND`` separates the domains of digests and signatures.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    KIND: ClassVar[str] = ""


M = TypeVar("M", bound=WireModel)


def pack(value: Any) -> bytes:
    """Canonical msgpack of ``value``. Raises :class:`MalformedError` for what has no canonical form."""
    try:
        return bytes(msgpack.packb(_canonical(value, MAX_DEPTH), use_bin_type=True))
    except (OverflowError, UnicodeEncodeError) as error:
        raise MalformedError("integer outside 64 bits, or text that is no Unicode") from error


def unpack(data: bytes | memoryview, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Any:
    """The value of canonical msgpack ``data``, arrays as tuples.

    Raises :class:`TooLargeError` over ``max_bytes`` and :class:`MalformedError` for anything that is not canonical.
    """
    value = _unpacked(data, max_bytes)
    if pack(value) != data:
        raise MalformedError("msgpack value is not in canonical form")
    return value


def _unpacked(data: bytes | memoryview, max_bytes: int) -> Any:
    """The value, whose form is still to be compared."""
    if len(data) > max_bytes:
        raise TooLargeError(f"expected at most {max_bytes} bytes, got {len(data)}")
    try:
        return msgpack.unpackb(data, use_list=False, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise MalformedError("expected one canonical msgpack value") from error


def encode(message: WireModel) -> bytes:
    """Canonical bytes of ``message``."""
    return pack(message.model_dump(mode="python"))


def decode(model: type[M], data: bytes | memoryview, *, max_bytes: int = MAX_MESSAGE_BYTES) -> M:
    """The ``model`` that ``data`` encodes, and no other bytes encode.

    Raises :class:`TooLargeError` or :class:`MalformedError`; the message names fields, never their values.
    """
    value = _unpacked(data, max_bytes)
    try:
        message = model.model_validate(value)
    except (ValidationError, RecursionError) as error:
        raise MalformedError(f"not a valid {model.__name__}: {_where(error)}") from error
    if encode(message) != data:
        raise MalformedError(f"{model.__name__} is not in canonical form")
    return message


def domain_digest(kind: str, data: bytes | memoryview) -> bytes:
    """SHA-256 of ``data`` in the domain ``kind``: digests of different kinds never collide."""
    h = domain_hash(kind)
    h.update(data)
    return h.digest()


def domain_hash(kind: str) -> hashlib._Hash:
    """The hash whose digest :func:`domain_digest` is of what it is fed with."""
    return hashlib.sha256(b"casemate\x00v1\x00" + kind.encode("ascii") + b"\x00")


def digest_of(message: WireModel) -> bytes:
    """SHA-256 of the message's canonical bytes, in its kind's domain."""
    return domain_digest(message.KIND, encode(message))


def _where(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


_PLAIN: Final = frozenset({type(None), bool, bytes, int, str})
"""Types of most values, which are their own canonical form; msgpack itself refuses an integer outside 64 bits."""

_TEXT: Final = frozenset({str})


def _canonical(value: Any, depth: int) -> Any:
    """Looked at for every message there is: what is plain within a map or a list takes no call of its own."""
    if depth == 0:
        raise MalformedError(f"nested deeper than {MAX_DEPTH}")
    if type(value) in _PLAIN or isinstance(value, bytes | str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise MalformedError("floats must be finite")
        return value
    if depth == 1 and isinstance(value, dict | list | tuple) and value:
        raise MalformedError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, list | tuple):
        return [item if type(item) in _PLAIN else _canonical(item, depth - 1) for item in value]
    if isinstance(value, dict):
        if not _TEXT.issuperset(map(type, value)) and not all(isinstance(key, str) for key in value):
            raise MalformedError("map keys must be text")
        return {
            key: item if type(item := value[key]) in _PLAIN else _canonical(item, depth - 1) for key in sorted(value)
        }
    raise MalformedError(f"no canonical form for {type(value).__name__}")
