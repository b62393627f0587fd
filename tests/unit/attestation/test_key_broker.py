"""Evidence of hosted key brokers: never a worker's, never an image's that nobody accepted; and the keys that chips derive."""

from __future__ import annotations

import ctypes
import errno
import struct
from pathlib import Path
from typing import Any

import pytest
from casemate_attestation.guest_sev import SevGuest
from casemate_attestation.key_broker import verify_key_broker
from casemate_schemas.attestation_policy import PcrRule, VtpmRules
from casemate_schemas.errors import AppraisalError, SetupError, UnavailableError
from casemate_schemas.evidence import REPORT_DATA_DOMAIN, Evidence, KeyBrokerNonce, WorkerClaims
from casemate_schemas.key_broker_evidence import KEY_BROKER_REPORT_DATA_DOMAIN, KeyBrokerClaims, KeyBrokerEvidence
from casemate_schemas.keyring import KeyRing
from pydantic import ValidationError

from .conftest import MEASUREMENT, Bench

IMAGE = b"\x4b" * 48
KEYS = KeyRing.generate()


def claims(**changed: Any) -> KeyBrokerClaims:
    fields: dict[str, Any] = {
        "consortium": b"\x01" * 32,
        "manifest": b"\x02" * 32,
        "manifest_number": 2,
        "key_broker": "north",
        "sealing_key": KEYS.sealing.public,
        "signing_key": KEYS.signing.public,
        "nonce": b"\x03" * 32,
    }
    return KeyBrokerClaims(**(fields | changed))


def evidence(bench: Bench, image: bytes = IMAGE, report_data: bytes | None = None) -> KeyBrokerEvidence:
    claimed = claims()
    return KeyBrokerEvidence(
        claims=claimed, component=bench.chip.launch(image).attest(report_data or claimed.report_data)
    )


def failed(bench: Bench, offered: KeyBrokerEvidence, **policy: Any) -> tuple[str, ...]:
    accepted = bench.policy(**({"key_broker_measurements": (IMAGE,)} | policy))
    return verify_key_broker(offered, accepted, bench.now).failed


def test_the_accepted_image_is_accepted_and_a_workers_is_not(milan: Bench) -> None:
    assert failed(milan, evidence(milan)) == ()
    assert failed(milan, evidence(milan, MEASUREMENT)) == ("measurement",)


def test_every_claim_is_covered(milan: Bench) -> None:
    good = evidence(milan)
    other = KeyRing.generate()
    for changed in (
        {"consortium": bytes(32)},
        {"manifest": bytes(32)},
        {"manifest_number": 3},
        {"key_broker": "south"},
        {"sealing_key": other.sealing.public},
        {"signing_key": other.signing.public},
        {"nonce": bytes(32)},
    ):
        forged = good.model_copy(update={"claims": claims(**changed)})
        assert failed(milan, forged) == ("report_data",), changed


def test_what_a_worker_can_have_signed_is_no_evidence_of_a_key_broker(milan: Bench) -> None:
    """The worker's claims have a domain of their own, whatever stands in them."""
    worker = WorkerClaims(
        consortium=b"\x01" * 32,
        manifest=b"\x02" * 32,
        job_id="0" * 32,
        terms=bytes(32),
        attempt=1,
        sealing_key=KEYS.sealing.public,
        signing_key=KEYS.signing.public,
        nonces=(KeyBrokerNonce(key_broker="north", nonce=b"\x03" * 32),),
    )
    assert failed(milan, evidence(milan, report_data=worker.report_data)) == ("report_data",)
    domains = (REPORT_DATA_DOMAIN, KEY_BROKER_REPORT_DATA_DOMAIN)
    assert not any(a.startswith(b) for a, b in (domains, domains[::-1]))
    with pytest.raises(ValidationError):
        Evidence(claims=claims(), components=())  # type: ignore[arg-type]


def test_nothing_is_accepted_without_an_image_or_without_plain_reports(milan: Bench) -> None:
    with pytest.raises(AppraisalError, match="no image"):
        failed(milan, evidence(milan), key_broker_measurements=())
    vtpm = VtpmRules(pcrs=(PcrRule(index=4, digests=(bytes(32),)),))
    with pytest.raises(AppraisalError, match="plain SEV-SNP"):
        failed(milan, evidence(milan), evidence_types=(("sev-snp-vtpm",),), vtpm=vtpm)


def test_the_rest_of_the_policy_holds_for_key_brokers_too(milan: Bench) -> None:
    assert failed(milan, evidence(milan), host_data=b"\x55" * 32) == ("host_data",)


def test_no_image_is_both(milan: Bench) -> None:
    with pytest.raises(ValidationError, match="a worker's and a key broker's"):
        milan.policy(key_broker_measurements=(IMAGE, MEASUREMENT))


# --- derived keys -----------------------------------------------------------------------------------------------------


def test_a_simulated_chip_derives_by_image_context_and_chip(milan: Bench, turin: Bench) -> None:
    launches = {"a": milan.chip.launch(IMAGE), "again": milan.chip.launch(IMAGE)}
    launches |= {"other image": milan.chip.launch(MEASUREMENT), "other chip": turin.chip.launch(IMAGE)}
    keys = {name: launch.derive_key(b"state") for name, launch in launches.items()}
    assert keys["a"] == keys["again"] and len(keys["a"]) == 32
    assert len({*keys.values(), launches["a"].derive_key(b"else")}) == 4


class Firmware:
    """``ioctl`` of Linux' driver for SNP_GET_DERIVED_KEY, over raw bytes: what comes back depends on what was asked."""

    def __init__(self, code: int = 0, status: int = 0, key: bytes | None = None) -> None:
        self.code, self.status, self.key = code, status, key
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, _: int, request: int, argument: ctypes.Structure) -> int:
        view = memoryview(argument).cast("B")
        assert (request, len(view)) == (0xC0205301, 32)
        version, req, resp = struct.unpack("<B7xQQ", view[:24])
        assert version == 1
        if self.code:
            raise OSError(self.code, "no")
        self.asked.append(struct.unpack("<IIQIIQ", ctypes.string_at(req, 32)))
        key = bytes(range(32)) if self.key is None else self.key
        ctypes.memmove(resp, struct.pack("<I28x", self.status) + key, 64)
        return 0


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "sev-guest"
    path.touch()
    return path


def test_a_real_chip_is_asked_for_a_key_of_image_and_policy_under_the_vcek(device: Path) -> None:
    firmware = Firmware()
    guest = SevGuest(device, 1, ioctl=firmware)
    key = guest.derive_key(b"state")
    assert firmware.asked == [(0, 0, 0b1001, 1, 0, 0)], "root VCEK; guest policy and measurement; nothing else mixed in"
    assert key == guest.derive_key(b"state") != guest.derive_key(b"else")
    assert key != bytes(range(32)), "the chip's own key is never handed on"
    assert SevGuest(device, ioctl=Firmware(key=b"\x01" * 32)).derive_key(b"state") != key


@pytest.mark.parametrize(
    ("firmware", "error"),
    [
        (Firmware(status=0x16), UnavailableError),
        (Firmware(key=bytes(32)), UnavailableError),
        (Firmware(errno.EIO), UnavailableError),
        (Firmware(errno.ENOTTY), SetupError),
    ],
)
def test_no_key_is_made_of_a_refusal(device: Path, firmware: Firmware, error: type[Exception]) -> None:
    with pytest.raises(error):
        SevGuest(device, ioctl=firmware).derive_key(b"state")
