"""Evidence of an Azure guest: what its paravisor left in the virtual TPM, and a fresh quote.

Sources: Microsoft Learn, *Azure confidential VM guest attestation design* (NV index 0x01400001, key 0x81000003).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from casemate_schemas.errors import MalformedError, SetupError, UnavailableError
from casemate_schemas.evidence import PcrValue, SevSnpVtpm
from pydantic import ValidationError

from .guest import CertificateSource, check_report_data
from .hcl import MAX_HCL_REPORT_BYTES, HclReport
from .tpm import MAX_RESPONSE_BYTES, Quote, Tpm, Transport, pcr_digest, qualifying_data

DEVICE: Final = Path("/dev/tpmrm0")
HCL_REPORT_NV_INDEX: Final = 0x01400001
ATTESTATION_KEY_HANDLE: Final = 0x81000003
QUOTED_REGISTERS: Final = tuple(range(16))
"""Those that keep their history until a restart: firmware, boot loader, kernel, command line, IMA."""


class AzureGuest:
    """A :class:`~casemate_attestation.guest.GuestDriver` on the virtual TPM of an Azure confidential VM.

    Azure's host puts no certificates beside the report, so ``certificates`` has to find them. Whoever can open the TPM's
    device can have any report data quoted: nothing but the worker may run in the guest, and the registers must say so.

    Args:
        certificates: finds VEK, intermediate and ARK of a raw report.
        device: the kernel's resource manager of the TPM.
        transport: carries one command to the TPM instead of ``device``, for tests.
    """

    def __init__(
        self, certificates: CertificateSource, device: Path = DEVICE, *, transport: Transport | None = None
    ) -> None:
        self._certificates = certificates
        self._device = device
        self._transport = transport

    def attest(self, report_data: bytes) -> SevSnpVtpm:
        """See :meth:`GuestDriver.attest`."""
        check_report_data(report_data)
        if self._transport is not None:
            return self._attest(Tpm(self._transport), report_data)
        with opened(self._device) as transport:
            return self._attest(Tpm(transport), report_data)

    def _attest(self, tpm: Tpm, report_data: bytes) -> SevSnpVtpm:
        hcl = HclReport.parse(tpm.nv_read(HCL_REPORT_NV_INDEX, MAX_HCL_REPORT_BYTES))
        values = tpm.pcr_values(QUOTED_REGISTERS)
        quote, signature = tpm.quote(ATTESTATION_KEY_HANDLE, qualifying_data(report_data), QUOTED_REGISTERS)
        if Quote.parse(quote).pcr_digest != pcr_digest(values):
            raise UnavailableError("a register changed between being read and being quoted")
        certificates = self._certificates(hcl.report)
        try:
            return SevSnpVtpm(
                report=hcl.report,
                certificates=certificates,
                runtime_data=hcl.runtime_data,
                quote=quote,
                signature=signature,
                pcrs=tuple(PcrValue(index=i, digest=v) for i, v in zip(QUOTED_REGISTERS, values, strict=True)),
            )
        except ValidationError as error:
            raise MalformedError("what the virtual TPM gave makes no evidence") from error


@contextmanager
def opened(device: Path) -> Iterator[Transport]:
    """A transport to the TPM behind a Linux character device, open while the context is.

    Raises :class:`SetupError` if it cannot be opened.
    """
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SetupError(f"expected a virtual TPM at {device}: {error.strerror}") from error

    def exchange(command: bytes) -> bytes:
        os.write(descriptor, command)
        return os.read(descriptor, MAX_RESPONSE_BYTES + 1)

    try:
        yield exchange
    finally:
        os.close(descriptor)
