"""Evidence and keys by ``/dev/sev-guest``, the SEV-SNP driver of Linux 5.19 and newer: three ioctls.

Sources: Linux, ``include/uapi/linux/sev-guest.h`` (structures, numbers, errors), ``Documentation/virt/coco/
sev-guest.rst`` and ``drivers/virt/coco/sev-guest/sev-guest.c`` (what comes back when); AMD 56860, "MSG_REPORT_REQ" and
"MSG_REPORT_RSP", "MSG_KEY_REQ" and "MSG_KEY_RSP"; AMD 56421, "SNP Guest Request" and "SNP Extended Guest Request".
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import hmac
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from casemate_schemas.errors import MalformedError, ParameterError, SetupError, TooLargeError, UnavailableError
from casemate_schemas.evidence import SevSnp

from .guest import CertificateSource, certificates_of_table, check_report_data, snp_component
from .report import REPORT_BYTES

DEVICE: Final = Path("/dev/sev-guest")

SNP_GET_REPORT: Final = 0xC0205300
SNP_GET_DERIVED_KEY: Final = 0xC0205301
SNP_GET_EXT_REPORT: Final = 0xC0205302
"""_IOWR('S', number, struct snp_guest_request_ioctl), whose size is 32."""

VMM_ERR_INVALID_LEN: Final = 1
VMM_ERR_BUSY: Final = 2
FIRST_TABLE_BYTES: Final = 16 << 10
"""What Linux takes for the certificates at most (SEV_FW_BLOB_MAX_SIZE), until it says that it needs more."""
MAX_TABLE_BYTES: Final = 1 << 20

ROOT_KEY_VEK: Final = 0
"""The chip's (or, with a VLEK, the provider's) key, at the TCB it reports. The other root changes with each launch."""
FIELD_GUEST_POLICY: Final = 1 << 0
FIELD_MEASUREMENT: Final = 1 << 3

_MESSAGE_VERSION: Final = 1
_BUSY_TRIES: Final = 5
_BUSY_WAIT_S: Final = 0.5
_PAGE_BYTES: Final = 4096

Ioctl = Callable[[int, int, Any], int]
"""``fcntl.ioctl``: descriptor, request number, a structure to read from and write to; raises :class:`OSError`."""


class ReportRequest(ctypes.Structure):
    """struct snp_report_req."""

    _fields_ = (("user_data", ctypes.c_uint8 * 64), ("vmpl", ctypes.c_uint32), ("reserved", ctypes.c_uint8 * 28))


class ExtendedReportRequest(ctypes.Structure):
    """struct snp_ext_report_req."""

    _fields_ = (
        ("data", ReportRequest),
        ("certs_address", ctypes.c_uint64),
        ("certs_len", ctypes.c_uint32),
    )


class ReportResponse(ctypes.Structure):
    """struct snp_report_resp: 4000 bytes, which begin with MSG_REPORT_RSP."""

    _fields_ = (
        ("status", ctypes.c_uint32),
        ("report_size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint8 * 24),
        ("report", ctypes.c_uint8 * REPORT_BYTES),
        ("rest", ctypes.c_uint8 * (4000 - 32 - REPORT_BYTES)),
    )


class KeyRequest(ctypes.Structure):
    """struct snp_derived_key_req."""

    _fields_ = (
        ("root_key_select", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("guest_field_select", ctypes.c_uint64),
        ("vmpl", ctypes.c_uint32),
        ("guest_svn", ctypes.c_uint32),
        ("tcb_version", ctypes.c_uint64),
    )


class KeyResponse(ctypes.Structure):
    """struct snp_derived_key_resp: 64 bytes, MSG_KEY_RSP."""

    _fields_ = (
        ("status", ctypes.c_uint32),
        ("reserved", ctypes.c_uint8 * 28),
        ("key", ctypes.c_uint8 * 32),
    )


class GuestRequest(ctypes.Structure):
    """struct snp_guest_request_ioctl; the kernel writes the firmware's and the hypervisor's errors into it."""

    _fields_ = (
        ("msg_version", ctypes.c_uint8),
        ("req_data", ctypes.c_uint64),
        ("resp_data", ctypes.c_uint64),
        ("fw_error", ctypes.c_uint32),
        ("vmm_error", ctypes.c_uint32),
    )


class _Refusal(NamedTuple):
    """What the kernel said: errno, and the errors of firmware and hypervisor."""

    code: int
    fw_error: int
    vmm_error: int

    def error(self) -> UnavailableError | SetupError:
        errors = f"firmware error {self.fw_error:#x}, hypervisor error {self.vmm_error:#x}"
        what = f"{os.strerror(self.code)}, {errors}" if self.code else errors
        if self.code in (errno.ENOTTY, errno.EINVAL, errno.EPERM, errno.ENODEV):
            return SetupError(f"the SEV-SNP driver takes no such request: {what}")
        return UnavailableError(f"the chip gave nothing: {what}")


class SevGuest:
    """A :class:`~casemate_attestation.guest.KeyedGuest` on ``/dev/sev-guest``.

    With ``certificates`` it asks for a report alone and that source for the certificates of it. Without, it asks for an
    extended report, whose certificates the host hands out.

    Args:
        vmpl: the privilege level to be named in the report, 0 to 3; the kernel can ask only for its own level and those
            with fewer rights (higher numbers).
        ioctl, sleep: how the kernel is called and how time passes, for tests.
    """

    def __init__(
        self,
        device: Path = DEVICE,
        vmpl: int = 0,
        certificates: CertificateSource | None = None,
        *,
        ioctl: Ioctl = fcntl.ioctl,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not 0 <= vmpl <= 3:
            raise ParameterError(f"expected a VMPL of 0 to 3, got {vmpl}")
        self._device = device
        self.vmpl = vmpl
        self._certificates = certificates
        self._ioctl = ioctl
        self._sleep = sleep

    def attest(self, report_data: bytes) -> SevSnp:
        """See :meth:`GuestDriver.attest`; a throttled request is made again for a few seconds."""
        check_report_data(report_data)
        descriptor = self._open()
        try:
            if self._certificates is not None:
                report = self._report(descriptor, report_data)
                return snp_component(report, self._certificates(report))
            report, table = self._extended_report(descriptor, report_data)
            return snp_component(report, certificates_of_table(table))
        finally:
            os.close(descriptor)

    def derive_key(self, context: bytes) -> bytes:
        """See :meth:`KeySource.derive_key`: from the VCEK or VLEK, the launch measurement and the guest policy.

        Firmware that reports another TCB makes another key.
        """
        descriptor = self._open()
        try:
            fields = FIELD_GUEST_POLICY | FIELD_MEASUREMENT
            request = KeyRequest(root_key_select=ROOT_KEY_VEK, guest_field_select=fields, vmpl=self.vmpl)
            response = KeyResponse()
            refusal = self._call(descriptor, SNP_GET_DERIVED_KEY, request, response)
        finally:
            os.close(descriptor)
        if refusal is not None:
            raise refusal.error()
        key = bytes(response.key)
        if response.status or not any(key):
            raise UnavailableError(f"the firmware gave no key: status {response.status:#x}")
        return hmac.digest(key, b"casemate/v1/derived-key\x00" + context, hashlib.sha256)

    def _open(self) -> int:
        try:
            return os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise SetupError(f"expected a SEV-SNP guest with {self._device}; there is none on this machine") from error
        except OSError as error:
            raise SetupError(f"{self._device} cannot be opened: {error.strerror}") from error

    def _report(self, descriptor: int, report_data: bytes) -> bytes:
        request = self._request(report_data)
        response = ReportResponse()
        refusal = self._call(descriptor, SNP_GET_REPORT, request, response)
        if refusal is not None:
            raise refusal.error()
        return _report_of(response)

    def _extended_report(self, descriptor: int, report_data: bytes) -> tuple[bytes, bytes]:
        """Once more with a larger buffer, if the kernel says that the certificates need one."""
        size = FIRST_TABLE_BYTES
        for _ in range(2):
            table = ctypes.create_string_buffer(size)
            request = ExtendedReportRequest(self._request(report_data), ctypes.addressof(table), size)
            response = ReportResponse()
            refusal = self._call(descriptor, SNP_GET_EXT_REPORT, request, response)
            if refusal is None:
                return _report_of(response), table.raw
            if refusal.vmm_error != VMM_ERR_INVALID_LEN:
                raise refusal.error()
            size = _table_bytes(request.certs_len, size)
        raise UnavailableError("the host's certificates grow faster than they can be read")

    def _request(self, report_data: bytes) -> ReportRequest:
        request = ReportRequest(vmpl=self.vmpl)
        request.user_data[:] = report_data
        return request

    def _call(
        self, descriptor: int, number: int, request: ctypes.Structure, response: ctypes.Structure
    ) -> _Refusal | None:
        """Fills ``response``, or says why not; what is throttled is made again after a while."""
        for attempt in range(_BUSY_TRIES):
            if attempt:
                self._sleep(_BUSY_WAIT_S)
            call = GuestRequest(_MESSAGE_VERSION, ctypes.addressof(request), ctypes.addressof(response), 0, 0)
            code = 0
            try:
                self._ioctl(descriptor, number, call)
            except OSError as error:
                code = error.errno or errno.EIO
            if not code and not call.fw_error and not call.vmm_error:
                return None
            if code not in (errno.EAGAIN, errno.EINTR) and call.vmm_error != VMM_ERR_BUSY:
                return _Refusal(code, call.fw_error, call.vmm_error)
        raise UnavailableError(f"the host throttles requests to the chip: none passed in {_BUSY_TRIES} tries")


def _table_bytes(wanted: int, had: int) -> int:
    if wanted % _PAGE_BYTES or wanted <= had:
        raise MalformedError(f"expected a number of pages over {had} bytes for the certificates, got {wanted} bytes")
    if wanted > MAX_TABLE_BYTES:
        raise TooLargeError(f"expected at most {MAX_TABLE_BYTES} bytes of certificates, the host announces {wanted}")
    return wanted


def _report_of(response: ReportResponse) -> bytes:
    """The report in MSG_REPORT_RSP, which must be whole and announced with success."""
    if response.status:
        raise UnavailableError(f"the firmware gave no report: status {response.status:#x}")
    if response.report_size != REPORT_BYTES:
        raise MalformedError(
            f"expected a report of {REPORT_BYTES} bytes, the firmware announces {response.report_size}"
        )
    return bytes(response.report)
