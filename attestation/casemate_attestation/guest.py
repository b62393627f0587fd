"""How a guest asks its chip for evidence.

:class:`ConfigfsGuest` is for real SEV-SNP guests (Linux 6.7 and newer, ``Documentation/ABI/testing/configfs-tsm``);
:mod:`.guest_sev` speaks the older ``/dev/sev-guest``, and :mod:`.guest_vtpm` to the virtual TPM of an Azure guest.
:class:`SimulatedGuest` asks the simulated chip's process over a Unix socket: frames of a 4-byte big-endian length and a
canonical message.
"""

from __future__ import annotations

import secrets
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, Protocol, TypeVar
from uuid import UUID

from casemate_schemas.codec import WireModel, decode, encode
from casemate_schemas.errors import MalformedError, ParameterError, SetupError, TooLargeError, UnavailableError
from casemate_schemas.evidence import Component, SevSnp
from pydantic import Field, ValidationError

from .certificates import MAX_CERTIFICATE_BYTES
from .report import REPORT_BYTES

CONFIGFS_REPORTS: Final = Path("/sys/kernel/config/tsm/report")
MAX_FRAME_BYTES: Final = 64 << 10
REPORT_DATA_BYTES: Final = 64
DERIVED_KEY_BYTES: Final = 32

_VCEK = UUID("63da758d-e664-4564-adc5-f4b93be8accd")
_VLEK = UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1")
_ASK = UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")
_ARK = UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")
_TABLE_ENTRY = struct.Struct("<16sII")
_MAX_TABLE_BYTES: Final = 1 << 20
_MAX_TABLE_ENTRIES: Final = 32

_R = TypeVar("_R", bound=WireModel)

Der = Annotated[bytes, Field(min_length=1, max_length=MAX_CERTIFICATE_BYTES)]


CertificateSource = Callable[[bytes], tuple[bytes, bytes, bytes]]
"""Given a raw report: DER of the VEK that signed it, of the intermediate (ASK or ASVK) and of the ARK.

For guests whose host hands out no certificates, or not the right ones. May raise any :class:`CasemateError`.
"""


class GuestDriver(Protocol):
    """A way to the chip."""

    def attest(self, report_data: bytes) -> Component:
        """Fresh evidence that covers ``report_data`` (64 bytes). Blocks for milliseconds.

        Raises :class:`ParameterError` for another length, :class:`SetupError` if this machine cannot attest,
        :class:`UnavailableError` if it cannot just now, and :class:`MalformedError` if what came makes no evidence.
        """
        ...


class KeySource(Protocol):
    """A chip that gives a guest a key of its own."""

    def derive_key(self, context: bytes) -> bytes:
        """32 secret bytes: the same for this image under this guest policy on this chip, at every start, and no other's.

        ``context`` keeps keys for different purposes apart. Raises :class:`SetupError` if this machine derives no keys,
        and :class:`UnavailableError` if it cannot just now.
        """
        ...


class KeyedGuest(GuestDriver, KeySource, Protocol):
    """A way to the chip for evidence and for keys: what an enclave that keeps a state needs."""


class ChipReportRequest(WireModel):
    """Sign a report over these bytes."""

    op: Literal["report"] = "report"
    report_data: Annotated[bytes, Field(min_length=REPORT_DATA_BYTES, max_length=REPORT_DATA_BYTES)]


class ChipKeyRequest(WireModel):
    """Derive a key for this context."""

    op: Literal["key"] = "key"
    context: Annotated[bytes, Field(max_length=256)]


class ChipRequest(WireModel):
    """To the simulated chip."""

    KIND: ClassVar[str] = "chip-request"

    body: Annotated[ChipReportRequest | ChipKeyRequest, Field(discriminator="op")]


class ChipResponse(WireModel):
    """From the simulated chip: a report."""

    KIND: ClassVar[str] = "chip-response"

    report: Annotated[bytes, Field(min_length=REPORT_BYTES, max_length=REPORT_BYTES)]
    certificates: tuple[Der, Der, Der]


class ChipKeyResponse(WireModel):
    """From the simulated chip: a key."""

    KIND: ClassVar[str] = "chip-key-response"

    key: Annotated[bytes, Field(min_length=DERIVED_KEY_BYTES, max_length=DERIVED_KEY_BYTES, repr=False)]


def check_report_data(report_data: bytes) -> None:
    """Raises :class:`ParameterError` unless there are 64 bytes."""
    if len(report_data) != REPORT_DATA_BYTES:
        raise ParameterError(f"expected {REPORT_DATA_BYTES} bytes of report data, got {len(report_data)}")


# --- a real chip ------------------------------------------------------------------------------------------------------


def snp_component(report: bytes, certificates: tuple[bytes, bytes, bytes]) -> SevSnp:
    """The component of a report and its certificates. Raises :class:`MalformedError` if one cannot be what it is for."""
    try:
        return SevSnp(report=report, certificates=certificates)
    except ValidationError as error:
        raise MalformedError(f"expected a report of {REPORT_BYTES} bytes and three certificates") from error


class ConfigfsGuest:
    """A :class:`GuestDriver` on Linux' configfs-tsm.

    The certificates come from ``certificates`` where it is given, and from the host, beside the report, where not.
    """

    def __init__(self, folder: Path = CONFIGFS_REPORTS, certificates: CertificateSource | None = None) -> None:
        self._folder = folder
        self._certificates = certificates

    def attest(self, report_data: bytes) -> SevSnp:
        """See :meth:`GuestDriver.attest`."""
        check_report_data(report_data)
        if not self._folder.is_dir():
            raise SetupError(f"expected a SEV-SNP guest with {self._folder}; there is none on this machine")
        try:
            report, table = self._ask(report_data)
        except OSError as error:
            raise UnavailableError(f"the chip gave no report: {error.strerror}") from error
        if self._certificates is not None:
            return snp_component(report, self._certificates(report))
        return snp_component(report, certificates_of_table(table))

    def _ask(self, report_data: bytes) -> tuple[bytes, bytes]:
        entry = self._folder / f"casemate-{secrets.token_hex(8)}"
        entry.mkdir()
        try:
            provider = _read(entry / "provider", 64).strip()
            if provider != b"sev_guest":
                raise SetupError(f"expected the provider sev_guest, got {provider.decode('ascii', 'replace')}")
            (entry / "inblob").write_bytes(report_data)
            generation = _read(entry / "generation", 64)
            report, table = _read(entry / "outblob", REPORT_BYTES), _read(entry / "auxblob", _MAX_TABLE_BYTES)
            if _read(entry / "generation", 64) != generation:
                raise UnavailableError("someone else wrote to the report's configfs entry meanwhile")
            return report, table
        finally:
            entry.rmdir()


def certificates_of_table(table: bytes) -> tuple[bytes, bytes, bytes]:
    """VEK, intermediate and ARK in DER from a GHCB certificate table (AMD 56421, "SNP Extended Guest Request").

    Raises :class:`MalformedError` for a table that is none, :class:`SetupError` for one that lacks a certificate.
    """
    entries = _table_entries(table)
    vek = entries.get(_VCEK) or entries.get(_VLEK)
    intermediate, ark = entries.get(_ASK), entries.get(_ARK)
    if not (vek and intermediate and ark):
        raise SetupError(
            "expected VCEK or VLEK, ASK and ARK in the host's certificate table; ask the operator for them"
        )
    return _to_der(vek), _to_der(intermediate), _to_der(ark)


def _table_entries(table: bytes) -> dict[UUID, bytes]:
    entries: dict[UUID, bytes] = {}
    for index in range(_MAX_TABLE_ENTRIES):
        header = table[index * _TABLE_ENTRY.size : (index + 1) * _TABLE_ENTRY.size]
        if len(header) < _TABLE_ENTRY.size:
            break
        guid, offset, length = _TABLE_ENTRY.unpack(header)
        if guid == bytes(16):
            return entries
        if offset + length > len(table) or length > MAX_CERTIFICATE_BYTES:
            raise MalformedError("a certificate table entry lies outside its table")
        entries[UUID(bytes=guid)] = table[offset : offset + length]
    raise MalformedError("expected a certificate table that ends with a zero entry")


def _to_der(certificate: bytes) -> bytes:
    if not certificate.startswith(b"-----BEGIN"):
        return certificate
    try:
        return ssl.PEM_cert_to_DER_cert(certificate.decode("ascii").strip("\0 \n"))
    except ValueError as error:
        raise MalformedError("expected a PEM certificate in the certificate table") from error


def _read(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise TooLargeError(f"expected at most {max_bytes} bytes in {path.name}")
    return data


# --- the simulated chip's client --------------------------------------------------------------------------------------


class SimulatedGuest:
    """A :class:`GuestDriver` on the simulated chip. Its connection is the launch: made first, measured, then kept.

    Thread-safe. After an error the next call connects anew, which is another launch.
    """

    def __init__(self, socket_path: Path, *, timeout_s: float = 10.0) -> None:
        self._path = socket_path
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None

    def attest(self, report_data: bytes) -> SevSnp:
        """See :meth:`GuestDriver.attest`."""
        check_report_data(report_data)
        response = self._ask(ChipReportRequest(report_data=report_data), ChipResponse)
        return SevSnp(report=response.report, certificates=response.certificates)

    def derive_key(self, context: bytes) -> bytes:
        """See :meth:`KeySource.derive_key`."""
        return self._ask(ChipKeyRequest(context=context), ChipKeyResponse).key

    def close(self) -> None:
        """End the launch."""
        with self._lock:
            self._disconnect()

    def _ask(self, body: ChipReportRequest | ChipKeyRequest, answer: type[_R]) -> _R:
        with self._lock:
            try:
                return decode(answer, self._exchange(encode(ChipRequest(body=body))), max_bytes=MAX_FRAME_BYTES)
            except OSError as error:
                self._disconnect()
                raise UnavailableError(f"the simulated chip at {self._path} does not answer") from error
            except MalformedError:
                self._disconnect()
                raise

    def _exchange(self, request: bytes) -> bytes:
        if self._connection is None:
            self._connection = self._connect()
        self._connection.sendall(len(request).to_bytes(4, "big") + request)
        length = int.from_bytes(_receive(self._connection, 4), "big")
        if length > MAX_FRAME_BYTES:
            raise TooLargeError(f"expected a frame of at most {MAX_FRAME_BYTES} bytes, got {length}")
        return _receive(self._connection, length)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self._timeout_s)
            connection.connect(str(self._path))
        except OSError:
            connection.close()
            raise
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _receive(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        if not (part := connection.recv(size - len(received))):
            raise ConnectionResetError("the connection ended inside a frame")
        received += part
    return bytes(received)
