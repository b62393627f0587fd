"""What the bytes of a TPM are: the attestation structure of a quote, and the four commands that a guest needs.

Sources: TCG *Trusted Platform Module Library*, part 2 (structures) and part 3 (commands), revision 1.59; all integers
are big-endian.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Self

from casemate_schemas.errors import MalformedError, SetupError, TooLargeError, UnavailableError

ALG_SHA256: Final = 0x000B
ALG_RSASSA: Final = 0x0014
ALG_RSAPSS: Final = 0x0016

MAX_RESPONSE_BYTES: Final = 4096
"""What Linux' TPM character devices carry at most."""

Transport = Callable[[bytes], bytes]
"""Takes one command and returns its response; raises :class:`OSError` where that fails."""

_GENERATED: Final = 0xFF544347
_ATTEST_QUOTE: Final = 0x8018
_MAX_SELECTIONS: Final = 16
_CLOCK_AND_FIRMWARE_BYTES: Final = 17 + 8


class _Reader:
    """Takes big-endian integers and sized buffers off some bytes. Raises :class:`MalformedError` past their end."""

    def __init__(self, data: bytes, what: str) -> None:
        self._rest = data
        self._what = what

    def take(self, size: int) -> bytes:
        if size > len(self._rest):
            raise MalformedError(f"{self._what} ends early")
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        """A TPM2B: two bytes of length, then as many bytes."""
        return self.take(self.number(2))

    def rest(self) -> bytes:
        return self.take(len(self._rest))

    def end(self) -> None:
        if self._rest:
            raise MalformedError(f"{self._what} goes on after its end")


@dataclass(frozen=True, slots=True)
class Quote:
    """One TPMS_ATTEST of type quote. Clock and firmware version are left out: nothing may rest on them."""

    extra_data: bytes
    selections: tuple[tuple[int, tuple[int, ...]], ...]
    """(hash algorithm, register indices) in their order."""
    pcr_digest: bytes

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The quote in ``data``. Raises :class:`MalformedError` for anything else, one more byte included.

        TPM_GENERATED_VALUE at its start is what a restricted key never signs unless the TPM itself made the structure.
        """
        reader = _Reader(data, "the quote")
        if (magic := reader.number(4)) != _GENERATED:
            raise MalformedError(f"expected TPM_GENERATED_VALUE, got {magic:#x}")
        if (kind := reader.number(2)) != _ATTEST_QUOTE:
            raise MalformedError(f"expected the type TPM_ST_ATTEST_QUOTE, got {kind:#x}")
        reader.sized()  # the signer's qualified name: the signature says who signed
        extra_data = reader.sized()
        reader.take(_CLOCK_AND_FIRMWARE_BYTES)
        selections = _selections(reader)
        pcr_digest = reader.sized()
        reader.end()
        return cls(extra_data, selections, pcr_digest)


@dataclass(frozen=True, slots=True)
class Signature:
    """One TPMT_SIGNATURE by an RSA key."""

    scheme: int
    hash: int
    value: bytes

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The signature in ``data``. Raises :class:`MalformedError` for anything else."""
        reader = _Reader(data, "the signature")
        scheme = reader.number(2)
        if scheme not in (ALG_RSASSA, ALG_RSAPSS):
            raise MalformedError(f"expected RSASSA or RSAPSS, got {scheme:#x}")
        signature = cls(scheme, reader.number(2), reader.sized())
        reader.end()
        return signature


def pcr_digest(values: Iterable[bytes]) -> bytes:
    """What a quote says of registers with these values, given in the order of their indices."""
    return hashlib.sha256(b"".join(values)).digest()


def qualifying_data(report_data: bytes) -> bytes:
    """What a quote carries as extraData for these 64 bytes of report data: their SHA-256.

    A TPM takes at most as many bytes as its largest TPMT_HA has, and one without SHA-512 takes fewer than 64; 32 fit
    every TPM that has the SHA-256 bank.
    """
    return hashlib.sha256(report_data).digest()


def _selections(reader: _Reader) -> tuple[tuple[int, tuple[int, ...]], ...]:
    if (count := reader.number(4)) > _MAX_SELECTIONS:
        raise MalformedError(f"expected at most {_MAX_SELECTIONS} banks, got {count}")
    return tuple((reader.number(2), _indices(reader.take(reader.number(1)))) for _ in range(count))


def _indices(bitmap: bytes) -> tuple[int, ...]:
    return tuple(8 * place + bit for place, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1)


# --- commands ---------------------------------------------------------------------------------------------------------

_NO_SESSIONS, _SESSIONS = 0x8001, 0x8002
_NV_READ, _NV_READ_PUBLIC, _QUOTE, _PCR_READ = 0x14E, 0x169, 0x158, 0x17E
_OWNER: Final = 0x40000001
_ALG_NULL: Final = 0x0010
_HEADER = struct.Struct(">HII")
_EMPTY_PASSWORD: Final = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
"""The authorisation area of one password session (TPM_RS_PW) with an empty password."""
_NV_CHUNK_BYTES: Final = 512
"""What every TPM of the PC Client profile reads from an NV index at once."""
_RC_RETRY: Final = 0x922
_RC_HANDLE: Final = 0x18B
_RETRIES: Final = 8


class Tpm:
    """Four TPM commands over a transport, authorised by empty passwords.

    Every method raises :class:`UnavailableError` where the TPM cannot be reached or refuses, :class:`SetupError` where it
    lacks the NV index or key, and :class:`MalformedError` for an answer that is none.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def nv_read(self, index: int, max_bytes: int) -> bytes:
        """All of an NV index that the owner may read. Raises :class:`TooLargeError` if it has over ``max_bytes``."""
        public = _Reader(
            _Reader(self._call(_NV_READ_PUBLIC, struct.pack(">I", index)), "the answer").sized(), "the index"
        )
        public.take(4 + 2 + 4)  # its number, name algorithm and attributes
        public.sized()
        if (size := public.number(2)) > max_bytes:
            raise TooLargeError(f"expected at most {max_bytes} bytes in NV index {index:#x}, got {size}")
        data = b""
        while len(data) < size:
            data += self._nv_chunk(index, len(data), min(_NV_CHUNK_BYTES, size - len(data)))
        return data

    def pcr_values(self, indices: tuple[int, ...]) -> tuple[bytes, ...]:
        """The values of these registers of the SHA-256 bank, in their order."""
        values: dict[int, bytes] = {}
        while missing := tuple(index for index in indices if index not in values):
            reader = _Reader(self._call(_PCR_READ, _selection(missing)), "the answer")
            reader.take(4)  # the update counter: the quote's digest tells of a change
            read = [index for bank, chosen in _selections(reader) if bank == ALG_SHA256 for index in chosen]
            digests = [reader.sized() for _ in range(min(reader.number(4), 8))]
            reader.end()
            if not read or len(read) != len(digests) or not set(read) <= set(missing):
                raise UnavailableError("expected registers of the SHA-256 bank; this TPM has none")
            values |= zip(read, digests, strict=True)
        return tuple(values[index] for index in indices)

    def quote(self, key: int, qualifying_data: bytes, indices: tuple[int, ...]) -> tuple[bytes, bytes]:
        """TPMS_ATTEST over these registers of the SHA-256 bank, and the key's TPMT_SIGNATURE, by the key's own scheme."""
        parameters = struct.pack(f">H{len(qualifying_data)}sH", len(qualifying_data), qualifying_data, _ALG_NULL)
        reader = _Reader(self._call(_QUOTE, struct.pack(">I", key), parameters + _selection(indices)), "the answer")
        return reader.sized(), reader.rest()

    def _nv_chunk(self, index: int, offset: int, size: int) -> bytes:
        response = self._call(_NV_READ, struct.pack(">II", _OWNER, index), struct.pack(">HH", size, offset))
        data = _Reader(response, "the answer").sized()
        if len(data) != size:
            raise MalformedError(f"expected {size} bytes of NV index {index:#x}, got {len(data)}")
        return data

    def _call(self, command: int, body: bytes, authorised: bytes | None = None) -> bytes:
        """The response's parameters. With ``authorised``, ``body`` is handles and those are the parameters."""
        tag = _NO_SESSIONS if authorised is None else _SESSIONS
        payload = body if authorised is None else body + _EMPTY_PASSWORD + authorised
        code, reader = self._exchange(tag, _HEADER.pack(tag, _HEADER.size + len(payload), command) + payload)
        if code == _RC_HANDLE:
            raise SetupError(f"expected an object of TPM command {command:#x} in this TPM; it is not there")
        if code:
            raise UnavailableError(f"expected success of TPM command {command:#x}, got response code {code:#x}")
        return reader.rest() if authorised is None else reader.take(reader.number(4))

    def _exchange(self, tag: int, request: bytes) -> tuple[int, _Reader]:
        """Response code and what follows it. A TPM that says "retry" has done nothing, and wants the very same again."""
        code, reader = _RC_RETRY, _Reader(b"", "the answer")
        for _ in range(_RETRIES):
            try:
                response = self._transport(request)
            except OSError as error:
                raise UnavailableError(f"the TPM does not answer: {error.strerror}") from error
            if len(response) > MAX_RESPONSE_BYTES:
                raise TooLargeError(f"expected an answer of at most {MAX_RESPONSE_BYTES} bytes, got {len(response)}")
            reader = _Reader(response, "the answer")
            got_tag, size, code = reader.number(2), reader.number(4), reader.number(4)
            if size != len(response) or (not code and got_tag != tag):
                raise MalformedError("the TPM's answer has another tag or size than it should")
            if code != _RC_RETRY:
                break
        return code, reader


def _selection(indices: tuple[int, ...]) -> bytes:
    bitmap = sum(1 << index for index in indices)
    return struct.pack(">IHB", 1, ALG_SHA256, 3) + bitmap.to_bytes(3, "little")
