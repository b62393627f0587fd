"""The simulated chip: its process, its key's privacy, and a measurement that one changed line changes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import casemate_schemas
import pytest
from casemate_attestation.appraise import verify_and_appraise
from casemate_attestation.guest import MAX_FRAME_BYTES, SimulatedGuest
from casemate_attestation.report import AttestationReport
from casemate_attestation.simulated_chip import (
    WORKER_PACKAGES,
    SimulatedChip,
    SimulatedRoot,
    create_hierarchy,
    measure_key_broker_image,
    measure_packages,
    measure_worker_image,
)
from casemate_schemas.attestation_policy import AttestationPolicy
from casemate_schemas.errors import ParameterError, SetupError, TooLargeError, UnavailableError
from cryptography import x509

from .conftest import Bench

HOST_DATA = b"\x17" * 32


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    socket_path: Path
    key_dir: Path
    root: SimulatedRoot


def wait_until_listening(process: subprocess.Popen[bytes], path: Path) -> None:
    """Try to connect until the chip answers; the process's end is an error."""
    while process.poll() is None:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                return
        os.sched_yield()
    raise RuntimeError("the simulated chip ended")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("chip")
    root = create_hierarchy(folder / "keys")
    socket_path = folder / "run" / "chip.sock"
    command = [sys.executable, "-m", "casemate_attestation.simulated_chip", "--socket", str(socket_path)]
    command += ["--key-broker-socket", str(socket_path.with_name("key-broker.sock"))]
    process = subprocess.Popen([*command, "--key-dir", str(folder / "keys"), "--host-data", HOST_DATA.hex()])
    wait_until_listening(process, socket_path.with_name("key-broker.sock"))
    yield Running(process, socket_path, folder / "keys", root)
    process.terminate()
    assert process.wait(timeout=20) == 0
    assert not socket_path.exists()


@pytest.fixture
def guest(running: Running) -> Iterator[SimulatedGuest]:
    driver = SimulatedGuest(running.socket_path)
    yield driver
    driver.close()


def policy_for(root: SimulatedRoot, measurement: bytes) -> AttestationPolicy:
    return AttestationPolicy(
        simulation=True,
        products=(root.accepted(),),
        measurements=(measurement,),
        host_data=HOST_DATA,
        chip_ids=(root.chip_id or b"",),
    )


def test_evidence_over_the_socket_is_accepted(running: Running, guest: SimulatedGuest, milan: Bench) -> None:
    policy = policy_for(running.root, measure_worker_image())
    for report_data in (os.urandom(64), os.urandom(64)):
        attested = guest.attest(report_data)
        verdict = verify_and_appraise(attested.report, attested.certificates, policy, report_data, milan.now)
        assert verdict.ok, verdict
        wrong = verify_and_appraise(attested.report, attested.certificates, policy, os.urandom(64), milan.now)
        assert wrong.failed == ("report_data",)


def test_each_socket_launches_its_own_image_with_its_own_keys(running: Running, guest: SimulatedGuest) -> None:
    key_broker = SimulatedGuest(running.socket_path.with_name("key-broker.sock"))
    images = [AttestationReport.parse(driver.attest(bytes(64)).report).measurement for driver in (guest, key_broker)]
    assert images == [measure_worker_image(), measure_key_broker_image()] and len(set(images)) == 2
    key = key_broker.derive_key(b"state")
    key_broker.close()
    assert key == key_broker.derive_key(b"state"), "the same at the next launch"
    assert key not in (guest.derive_key(b"state"), key_broker.derive_key(b"else"))
    key_broker.close()


def test_a_connection_is_one_launch(running: Running, guest: SimulatedGuest) -> None:
    ids = [AttestationReport.parse(guest.attest(bytes(64)).report).report_id for _ in range(2)]
    assert ids[0] == ids[1]
    other = SimulatedGuest(running.socket_path)
    assert AttestationReport.parse(other.attest(bytes(64)).report).report_id != ids[0]
    other.close()


def test_report_data_of_another_length_never_leaves(guest: SimulatedGuest) -> None:
    with pytest.raises(ParameterError):
        guest.attest(bytes(63))


@pytest.mark.parametrize("frame", [b"\xff\xff\xff\xff", (MAX_FRAME_BYTES + 1).to_bytes(4, "big"), b"\0\0\0\1\x00"])
def test_bad_frames_end_their_own_connection_only(running: Running, guest: SimulatedGuest, frame: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(running.socket_path))
        connection.sendall(frame)
        assert connection.recv(1) == b""
    assert guest.attest(bytes(64)).report


def test_an_absent_chip_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        SimulatedGuest(tmp_path / "nobody").attest(bytes(64))


def test_a_guest_bounds_what_it_reads(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    guest = SimulatedGuest(tmp_path / "unused")
    guest._connection = ours
    theirs.sendall((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with theirs, pytest.raises(TooLargeError):
        guest.attest(bytes(64))
    assert guest._connection is None


def test_the_key_is_private(running: Running) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in running.key_dir.iterdir()}
    assert modes["SIMULATED-vcek-key.pem"] == 0o600
    assert stat.S_IMODE(running.key_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(running.socket_path.parent.stat().st_mode) == 0o700
    keys = [path for path in running.key_dir.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert [key.name for key in keys] == ["SIMULATED-vcek-key.pem"]  # the ARK's and ASK's are gone
    assert SimulatedChip.load(running.key_dir).root == running.root


def test_a_folder_that_others_can_read_is_refused(milan: Bench, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(SetupError, match="chmod 700"):
        milan.chip.save(tmp_path)
    with pytest.raises(SetupError):
        SimulatedChip.load(tmp_path)
    tmp_path.chmod(0o700)
    with pytest.raises(SetupError, match="key and certificates"):
        SimulatedChip.load(tmp_path)
    milan.chip.save(tmp_path)
    assert SimulatedChip.load(tmp_path).root == milan.chip.root
    with pytest.raises(SetupError, match="holds one"):
        create_hierarchy(tmp_path)


def test_the_process_says_why_it_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "casemate_attestation.simulated_chip", "--socket", str(tmp_path / "s" / "c")]
    run = subprocess.run(
        [*command, "--key-dir", str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 1
    assert "simulated chip: expected" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_killed_chip_leaves_a_socket_that_its_successor_replaces(
    running: Running, tmp_path: Path, milan: Bench
) -> None:
    tmp_path.chmod(0o700)
    command = [sys.executable, "-m", "casemate_attestation.simulated_chip", "--socket", str(tmp_path / "c")]
    guest = SimulatedGuest(tmp_path / "c")
    for attempt in range(2):
        process = subprocess.Popen([*command, "--key-dir", str(running.key_dir)])
        wait_until_listening(process, tmp_path / "c")
        if attempt:
            with pytest.raises(UnavailableError):
                guest.attest(bytes(64))
        assert guest.attest(bytes(64)).certificates
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
    guest.close()


def test_nobody_can_take_it_for_amds(milan: Bench) -> None:
    for der in milan.chip.certificates:
        subject = x509.load_der_x509_certificate(der).subject.rfc4514_string()
        assert "SIMULATED" in subject
        assert "Advanced Micro Devices" not in subject


def test_one_changed_line_changes_the_measurement(tmp_path: Path) -> None:
    package = tmp_path / "casemate_schemas"
    shutil.copytree(Path(casemate_schemas.__file__).parent, package)
    before = measure_packages({"casemate_schemas": package})
    assert len(before) == 48
    assert measure_packages({"casemate_schemas": Path(casemate_schemas.__file__).parent}) == before
    (package / "notes.txt").write_text("not part of the image")
    assert measure_packages({"casemate_schemas": package}) == before
    codec = package / "codec.py"
    codec.write_text(codec.read_text().replace("MAX_DEPTH: Final = 32", "MAX_DEPTH: Final = 33"))
    changed = measure_packages({"casemate_schemas": package})
    assert changed != before
    codec.rename(package / "codec2.py")
    assert measure_packages({"casemate_schemas": package}) not in (before, changed)


def test_the_image_is_the_workers_and_leaves_this_chip_out(tmp_path: Path) -> None:
    assert "casemate_worker" in WORKER_PACKAGES
    assert not {"casemate", "casemate_gateway", "casemate_key_broker"} & set(WORKER_PACKAGES)
    package = tmp_path / "casemate_attestation"
    package.mkdir()
    (package / "verify.py").write_text("1")
    before = measure_packages({"casemate_attestation": package})
    (package / "simulated_chip.py").write_text("2")
    assert measure_packages({"casemate_attestation": package}) == before
    (package / "another.py").write_text("2")
    assert measure_packages({"casemate_attestation": package}) != before
