"""The /dev/sev-guest driver against a kernel that reads and writes the real structures at the addresses it is given."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from casemate_attestation.appraise import verify_and_appraise
from casemate_attestation.guest_sev import SevGuest
from casemate_schemas.errors import CasemateError, MalformedError, ParameterError, SetupError, UnavailableError

from .conftest import MEASUREMENT, REPORT_DATA, Bench
from .test_guest import ARK, ASK, VCEK, table_of

GET_REPORT, GET_EXT_REPORT = 0xC0205300, 0xC0205302
INVALID_LEN, BUSY = 1, 2


def memory(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


@dataclass
class Kernel:
    """``ioctl`` of Linux' driver, over raw bytes: what it does with each call is ``answers``, the last one for ever."""

    bench: Bench
    table: bytes
    answers: list[Callable[[Kernel], tuple[int, int, int]]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    vmpl: int | None = None
    status: int = 0
    report_size: int = 1184
    announced: int | None = None

    def __call__(self, _: int, request: int, argument: ctypes.Structure) -> int:
        view = memoryview(argument).cast("B")
        assert len(view) == 32
        version, req, resp, _fw, _vmm = struct.unpack("<B7xQQII", view)
        assert version == 1
        self.calls.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0] if self.answers else good
        code, fw_error, vmm_error = answer(self)
        if request == GET_EXT_REPORT and not code:
            address, length = struct.unpack("<QI4x", memory(req + 96, 16))
            if length < len(self.table) or length % 4096:
                code, vmm_error = errno.EIO, INVALID_LEN
                needed = -(-len(self.table) // 4096) * 4096 if self.announced is None else self.announced
                ctypes.memmove(req + 104, struct.pack("<I", needed), 4)
            else:
                ctypes.memmove(address, self.table, len(self.table))
        view[24:32] = struct.pack("<II", fw_error, vmm_error)
        if code:
            raise OSError(code, "no")
        user_data, self.vmpl = struct.unpack("<64sI28x", memory(req, 96))
        report = self.bench.chip.launch(MEASUREMENT).attest(user_data).report
        message = struct.pack("<II24x", self.status, self.report_size) + report
        ctypes.memmove(resp, message.ljust(4000, b"\0"), 4000)
        return 0


def good(_: Kernel) -> tuple[int, int, int]:
    return 0, 0, 0


def failing(code: int, fw_error: int = 0, vmm_error: int = 0) -> Callable[[Kernel], tuple[int, int, int]]:
    return lambda _: (code, fw_error, vmm_error)


@pytest.fixture
def kernel(milan: Bench) -> Kernel:
    vek, ask, ark = milan.chip.certificates
    return Kernel(milan, table_of({VCEK: vek, ASK: ask, ARK: ark}))


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "sev-guest"
    path.touch()
    return path


def test_an_extended_report_is_accepted(kernel: Kernel, device: Path) -> None:
    component = SevGuest(device, ioctl=kernel).attest(REPORT_DATA)
    bench = kernel.bench
    verdict = verify_and_appraise(component.report, component.certificates, bench.policy(), REPORT_DATA, bench.now)
    assert verdict.ok, str(verdict)
    assert (kernel.calls, kernel.vmpl) == ([GET_EXT_REPORT], 0)


def test_with_a_source_of_certificates_the_host_is_not_asked_for_them(kernel: Kernel, device: Path) -> None:
    asked: list[bytes] = []

    def source(report: bytes) -> tuple[bytes, bytes, bytes]:
        asked.append(report)
        return kernel.bench.chip.certificates

    component = SevGuest(device, 2, source, ioctl=kernel).attest(REPORT_DATA)
    assert (kernel.calls, kernel.vmpl, asked) == ([GET_REPORT], 2, [component.report])
    assert component.certificates == kernel.bench.chip.certificates


def test_a_larger_table_is_asked_for_again(kernel: Kernel, device: Path) -> None:
    kernel.table = kernel.table.ljust(20_000, b"\0")
    component = SevGuest(device, ioctl=kernel).attest(REPORT_DATA)
    assert component.certificates == kernel.bench.chip.certificates
    assert kernel.calls == [GET_EXT_REPORT] * 2


@pytest.mark.parametrize("announced", [0, 4096, 16 << 10, 20_001, 2 << 20])
def test_a_table_of_an_impossible_size(kernel: Kernel, device: Path, announced: int) -> None:
    kernel.table, kernel.announced = kernel.table.ljust(20_000, b"\0"), announced
    with pytest.raises(MalformedError):
        SevGuest(device, ioctl=kernel).attest(REPORT_DATA)
    assert len(kernel.calls) == 1


def test_a_table_that_keeps_growing(kernel: Kernel, device: Path) -> None:
    def grow(kernel: Kernel) -> tuple[int, int, int]:
        kernel.table += bytes(20_000)
        return 0, 0, 0

    kernel.answers = [grow]
    with pytest.raises(UnavailableError, match="grow"):
        SevGuest(device, ioctl=kernel).attest(REPORT_DATA)


@pytest.mark.parametrize("busy", [failing(errno.EAGAIN), failing(errno.EIO, 0, BUSY), failing(0, 0, BUSY)])
def test_what_is_throttled_is_asked_again(
    kernel: Kernel, device: Path, busy: Callable[[Kernel], tuple[int, int, int]]
) -> None:
    slept: list[float] = []
    kernel.answers = [busy, busy, good]
    SevGuest(device, ioctl=kernel, sleep=slept.append).attest(REPORT_DATA)
    assert len(kernel.calls) == 3 and len(slept) == 2 and all(seconds > 0 for seconds in slept)


def test_what_is_throttled_for_ever_is_unavailable(kernel: Kernel, device: Path) -> None:
    slept: list[float] = []
    kernel.answers = [failing(errno.EAGAIN)]
    with pytest.raises(UnavailableError, match="throttles"):
        SevGuest(device, ioctl=kernel, sleep=slept.append).attest(REPORT_DATA)
    assert len(kernel.calls) == 5 and sum(slept) <= 5


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (failing(errno.EIO, 0x16), UnavailableError, "firmware error 0x16"),
        (failing(errno.EIO, 0, 1 << 31), UnavailableError, "hypervisor error 0x80000000"),
        (failing(errno.ETIMEDOUT), UnavailableError, "timed out"),
        (failing(0, 0x15), UnavailableError, "firmware error 0x15"),
        (failing(errno.ENOTTY), SetupError, "takes no such request"),
        (failing(errno.EINVAL), SetupError, "takes no such request"),
    ],
)
def test_errors_of_firmware_and_hypervisor(
    kernel: Kernel,
    device: Path,
    answer: Callable[[Kernel], tuple[int, int, int]],
    error: type[CasemateError],
    words: str,
) -> None:
    kernel.answers = [answer]
    for source in (None, lambda _: kernel.bench.chip.certificates):
        with pytest.raises(error, match=words):
            SevGuest(device, certificates=source, ioctl=kernel).attest(REPORT_DATA)


def test_a_response_that_holds_no_report(kernel: Kernel, device: Path) -> None:
    kernel.status = 0x16
    with pytest.raises(UnavailableError, match="status 0x16"):
        SevGuest(device, ioctl=kernel).attest(REPORT_DATA)
    kernel.status, kernel.report_size = 0, 1200
    with pytest.raises(MalformedError, match="1200"):
        SevGuest(device, ioctl=kernel).attest(REPORT_DATA)


def test_a_host_without_certificates(kernel: Kernel, device: Path) -> None:
    kernel.table = bytes(24)
    with pytest.raises(SetupError, match="certificate table"):
        SevGuest(device, ioctl=kernel).attest(REPORT_DATA)


def test_wrong_parameters(tmp_path: Path, device: Path) -> None:
    with pytest.raises(SetupError, match="there is none"):
        SevGuest(tmp_path / "absent").attest(REPORT_DATA)
    with pytest.raises(ParameterError):
        SevGuest(device).attest(REPORT_DATA[:-1])
    for vmpl in (-1, 4):
        with pytest.raises(ParameterError):
            SevGuest(device, vmpl)


def test_another_devices_ioctl_is_a_wrong_set_up(device: Path) -> None:
    """With the real ``fcntl.ioctl``: an ordinary file knows no such request."""
    with pytest.raises(SetupError, match="takes no such request"):
        SevGuest(device).attest(REPORT_DATA)
