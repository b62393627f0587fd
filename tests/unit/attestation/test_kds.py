"""The client of the key distribution service, its folder and its manners; the service is a function here."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from casemate_attestation.appraise import verify_and_appraise
from casemate_attestation.kds import KdsClient, KdsLimits, crl_file, roots_of, vek_file
from casemate_attestation.policy_file import TrustedRoots
from casemate_attestation.simulated_chip import SimulatedAuthority, SimulatedKeys
from casemate_schemas.errors import MalformedError, SetupError, ThrottledError, UnavailableError
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.hashes import SHA384
from support.kds import Answer, SimulatedKds

from .conftest import REPORT_DATA, Bench, MakeBench

DAY_S = 86400.0


class Time:
    """One clock for everything; waiting passes time, and is written down."""

    def __init__(self, bench: Bench) -> None:
        self.now_s = bench.now.timestamp()
        self.waits: list[float] = []

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now_s += seconds

    def client(self, kds: SimulatedKds, folder: Path, *, online: bool = True, max_wait_s: float = 45.0) -> KdsClient:
        return KdsClient(
            folder,
            kds.roots,
            fetch=kds.fetch if online else None,
            base_url="https://kds.invalid",
            limits=KdsLimits(max_wait_s=max_wait_s),
            clock=lambda: int(self.now_s * 1000),
            monotonic=lambda: self.now_s,
            wait=self.wait,
        )


@pytest.fixture
def time(milan: Bench) -> Time:
    return Time(milan)


def of(*benches: Bench) -> SimulatedKds:
    return SimulatedKds(*((bench.authority, bench.chip) for bench in benches))


@pytest.mark.parametrize(("product", "version"), [("Milan", 2), ("Milan", 3), ("Genoa", 3), ("Turin", 2), ("Turin", 5)])
def test_the_certificates_of_each_product_verify(
    make_bench: MakeBench, tmp_path: Path, product: str, version: int
) -> None:
    bench, others = make_bench(product, version), [make_bench(p) for p in ("Milan", "Genoa", "Turin") if p != product]
    client = Time(bench).client(of(*others, bench), tmp_path / "kds")
    certificates = client.certificates(bench.report())
    assert verify_and_appraise(bench.report(), certificates, bench.policy(), REPORT_DATA, bench.now).ok


def test_urls_are_amds(milan: Bench, turin: Bench, tmp_path: Path) -> None:
    for bench, prefix, size in ((milan, "Milan", 128), (turin, "Turin", 16)):
        kds = of(bench)
        Time(bench).client(kds, tmp_path / prefix).certificates(bench.report())
        levels = "blSPL=04&teeSPL=01&snpSPL=24&ucodeSPL=219" + ("&fmcSPL=01" if bench is turin else "")
        hardware_id = bench.report()[0x1A0 : 0x1A0 + size // 2].hex()
        assert kds.requests == [f"/vcek/v1/{prefix}/cert_chain", f"/vcek/v1/{prefix}/{hardware_id}?{levels}"]


def test_a_second_call_asks_nobody_and_another_process_finds_the_files(
    milan: Bench, tmp_path: Path, time: Time
) -> None:
    kds = of(milan)
    first = time.client(kds, tmp_path / "kds").certificates(milan.report())
    assert time.client(kds, tmp_path / "kds", online=False).certificates(milan.report()) == first
    assert len(kds.requests) == 2
    assert (tmp_path / "kds").stat().st_mode & 0o777 == 0o700
    assert TrustedRoots.load(tmp_path / "kds").certificates_for(first[0]) == first


def test_offline_says_what_to_put_where(milan: Bench, tmp_path: Path, time: Time) -> None:
    kds = of(milan)
    with pytest.raises(SetupError, match=r"ask_milan\.der is missing.*casemate attestation fetch"):
        time.client(kds, tmp_path, online=False).certificates(milan.report())
    assert kds.requests == []


def test_a_vlek_cannot_be_fetched_but_can_be_put_there(vlek: Bench, tmp_path: Path) -> None:
    kds = of(vlek)
    client = Time(vlek).client(kds, tmp_path)
    with pytest.raises(SetupError, match="hands out no VLEK"):
        client.certificates(vlek.report())
    report = vlek.report()
    (tmp_path / vek_file("Genoa", "vlek", report[0x1A0:0x1E0], report[0x180:0x188])).write_bytes(
        vlek.chip.certificates[0]
    )
    assert client.certificates(report) == vlek.chip.certificates
    assert kds.requests == ["/vlek/v1/Genoa/cert_chain"]


@pytest.mark.parametrize("spoilt", ["garbage", "another chip", "another root", "empty"])
def test_a_spoilt_file_is_fetched_anew(
    milan: Bench, make_bench: MakeBench, tmp_path: Path, time: Time, spoilt: str
) -> None:
    kds = of(milan)
    client = time.client(kds, tmp_path)
    good = client.certificates(milan.report())
    other = make_bench()
    new_root = SimulatedAuthority(SimulatedKeys(milan.authority.keys.ask, milan.authority.keys.ark))
    name, content = {
        "garbage": ("vcek_", b"\x30\x03abc"),
        "another chip": ("vcek_", other.chip.certificates[0]),
        "another root": ("ark_", new_root.ark),
        "empty": ("ask_", b""),
    }[spoilt]
    next(tmp_path.glob(f"{name}*")).write_bytes(content)
    assert client.certificates(milan.report()) == good
    assert len(kds.requests) == 3
    assert time.client(kds, tmp_path, online=False).certificates(milan.report()) == good


def _other_chip(bench: Bench) -> Callable[[str, Answer], Answer]:
    other = bench.authority.issue_chip(bench.chip.facts.tcb)
    return lambda target, answer: Answer(body=other.certificates[0]) if "SPL" in target else answer


def _vek_of(authority: SimulatedAuthority, bench: Bench, **changed: Any) -> bytes:
    """A certificate for the bench's chip at its TCB, right but for what is changed."""
    facts = bench.chip.facts
    extensions = authority.vek_extensions(facts.tcb, facts.hardware_id or b"")
    return authority.issue_vek(ec.generate_private_key(ec.SECP384R1()).public_key(), extensions, **changed)


def _forged(bench: Bench) -> Callable[[str, Answer], Answer]:
    vek = _vek_of(bench.authority, bench, signer=bench.authority.keys.ark)
    return lambda target, answer: Answer(body=vek) if "SPL" in target else answer


def _another_root(bench: Bench) -> Callable[[str, Answer], Answer]:
    """A hierarchy in itself without fault."""
    keys = bench.authority.keys
    other = SimulatedAuthority(SimulatedKeys(ark=keys.ask, ask=keys.ark))
    vek, chain = _vek_of(other, bench), "".join(map(ssl.DER_cert_to_PEM_cert, (other.ask, other.ark))).encode()
    return lambda target, _: Answer(body=vek if "SPL" in target else chain)


@pytest.mark.parametrize(
    "hostile", ["garbage", "another chip", "forged", "another root", "too large", "one certificate", "status 500"]
)
def test_a_hostile_answer_is_unavailable_and_not_kept(milan: Bench, tmp_path: Path, time: Time, hostile: str) -> None:
    kds = of(milan)
    kds.twist = {
        "garbage": lambda _, answer: Answer(body=b"<html>\xff"),
        "another chip": _other_chip(milan),
        "forged": _forged(milan),
        "another root": _another_root(milan),
        "too large": lambda _, answer: Answer(body=b"-" * (1 << 20)),
        "one certificate": lambda _, answer: Answer(body=answer.body[: len(answer.body) // 2]),
        "status 500": lambda _, answer: Answer(500),
    }[hostile]
    client = time.client(kds, tmp_path)
    with pytest.raises(UnavailableError):
        client.certificates(milan.report())
    assert not list(tmp_path.glob("vcek_*"))
    kds.twist = lambda _, answer: answer
    assert client.certificates(milan.report()) == milan.chip.certificates


def test_a_chip_that_the_service_does_not_know(milan: Bench, make_bench: MakeBench, tmp_path: Path, time: Time) -> None:
    kds = of(make_bench("Milan"), make_bench("Genoa"))
    with pytest.raises(SetupError, match="Milan: "):
        time.client(kds, tmp_path).certificates(milan.report())
    old = make_bench("Milan", 2)
    with pytest.raises(SetupError, match=r"Milan: .*Genoa: "):  # without CPUID both are tried
        time.client(kds, tmp_path / "old").certificates(old.report())


def test_reports_that_lead_nowhere(milan: Bench, turin: Bench, tmp_path: Path, time: Time) -> None:
    client = time.client(of(milan), tmp_path)
    with pytest.raises(SetupError, match="hides the chip's id"):
        client.certificates(milan.report(chip_id=bytes(64)))
    with pytest.raises(SetupError, match="not signed by a VCEK or VLEK"):
        client.certificates(milan.report(signer_info=7 << 2))
    with pytest.raises(SetupError, match="expected a report of Milan"):
        client.certificates(turin.report())
    with pytest.raises(MalformedError):
        client.certificates(b"\0" * 99)


# --- manners ----------------------------------------------------------------------------------------------------------


def test_requests_are_ten_seconds_apart(milan: Bench, tmp_path: Path, time: Time) -> None:
    time.client(of(milan), tmp_path).certificates(milan.report())
    assert time.waits == [pytest.approx(10.0)]


def test_told_to_wait_it_waits_and_asks_again(milan: Bench, tmp_path: Path, time: Time) -> None:
    kds = of(milan)
    kds.twist = lambda _, answer: Answer(429, headers={"Retry-After": "21"}) if len(kds.requests) == 1 else answer
    assert time.client(kds, tmp_path).certificates(milan.report()) == milan.chip.certificates
    assert time.waits == [pytest.approx(21.0), pytest.approx(10.0)]


def test_told_to_wait_too_long_it_says_so_and_stays_away(milan: Bench, tmp_path: Path, time: Time) -> None:
    kds = of(milan)
    kds.twist = lambda _, answer: Answer(429, headers={"Retry-After": "600"})
    client = time.client(kds, tmp_path)
    with pytest.raises(ThrottledError) as caught:
        client.certificates(milan.report())
    assert caught.value.retry_after_s == pytest.approx(600)
    with pytest.raises(ThrottledError):
        client.certificates(milan.report())
    assert len(kds.requests) == 1
    assert time.waits == []


def test_twenty_callers_make_two_requests(milan: Bench, tmp_path: Path, time: Time) -> None:
    kds = of(milan)
    client, found, start = time.client(kds, tmp_path), [], threading.Barrier(20)

    def ask() -> None:
        start.wait()
        found.append(client.certificates(milan.report()))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [milan.chip.certificates] * 20
    assert len(kds.requests) == 2


def test_a_folder_that_others_may_write_to_is_refused(milan: Bench, tmp_path: Path, time: Time) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(SetupError, match="chmod 700"):
        time.client(of(milan), tmp_path)


def test_a_draft_is_never_left_behind(
    milan: Bench, tmp_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SetupError, match="No space left"):
        time.client(of(milan), tmp_path).certificates(milan.report())
    assert list(tmp_path.iterdir()) == []


# --- revocation lists -------------------------------------------------------------------------------------------------


def test_a_list_is_fetched_held_and_good_for_verification(milan: Bench, tmp_path: Path, time: Time) -> None:
    client = time.client(of(milan), tmp_path)
    with pytest.raises(UnavailableError, match="no revocation list"):
        client.cached_crl("Milan", "vcek")
    crl = client.refresh_crl("Milan", "vcek")
    assert client.cached_crl("Milan", "vcek") == crl
    assert milan.judge(policy=milan.policy(crl_required=True), crl=crl).ok


def test_the_authority_of_vleks_has_a_list_of_its_own(vlek: Bench, tmp_path: Path) -> None:
    """Which its certificate names: that of VCEKs' authority does not tell that it was revoked."""
    kds = of(vlek)
    client = Time(vlek).client(kds, tmp_path)
    assert client.refresh_crl("Genoa", "vlek") == client.cached_crl("Genoa", "vlek") == kds.crls["Genoa"]
    assert kds.requests == ["/vlek/v1/Genoa/cert_chain", "/vlek/v1/Genoa/crl"]
    with pytest.raises(UnavailableError, match="no revocation list for Genoa"):
        client.cached_crl("Genoa", "vcek")
    assert {path.name for path in tmp_path.iterdir()} == {"ark_genoa.der", "asvk_genoa.der", "crl_vlek_genoa.der"}


def test_a_list_is_used_for_a_week_after_it_was_fetched_and_not_a_second_longer(
    milan: Bench, tmp_path: Path, time: Time
) -> None:
    kds = of(milan)
    client = time.client(kds, tmp_path)
    crl = client.refresh_crl("Milan", "vcek")
    kds.twist = lambda _, answer: Answer(503)
    time.now_s += 7 * DAY_S
    with pytest.raises(UnavailableError):
        client.refresh_crl("Milan", "vcek")
    assert client.cached_crl("Milan", "vcek") == crl
    time.now_s += 1
    with pytest.raises(UnavailableError, match="too long ago"):
        client.cached_crl("Milan", "vcek")
    kds.twist = lambda _, answer: answer
    assert client.refresh_crl("Milan", "vcek") == client.cached_crl("Milan", "vcek")  # the same list, asked for anew


def test_a_list_past_its_own_date_is_not_used(milan: Bench, tmp_path: Path, time: Time) -> None:
    kds = of(milan)
    kds.crls["Milan"] = milan.authority.issue_crl(expires_in=timedelta(days=1))
    until = x509.load_der_x509_crl(kds.crls["Milan"]).next_update_utc
    assert until is not None
    client = time.client(kds, tmp_path)
    client.refresh_crl("Milan", "vcek")
    time.now_s = until.timestamp() - 1
    assert client.cached_crl("Milan", "vcek") == kds.crls["Milan"]
    time.now_s += 1
    with pytest.raises(UnavailableError, match="expected a current list"):
        client.cached_crl("Milan", "vcek")


def test_a_list_from_a_future_beyond_clock_skew_is_not_used(milan: Bench, tmp_path: Path, time: Time) -> None:
    client = time.client(of(milan), tmp_path)
    client.refresh_crl("Milan", "vcek")
    time.now_s -= 301
    with pytest.raises(UnavailableError, match="too long ago"):
        client.cached_crl("Milan", "vcek")


def _older_list(bench: Bench) -> bytes:
    builder = x509.CertificateRevocationListBuilder().issuer_name(bench.authority.ark_name)
    builder = builder.last_update(bench.now - timedelta(days=3)).next_update(bench.now + timedelta(days=9))
    salted = padding.PSS(padding.MGF1(SHA384()), 48)
    signed = builder.sign(bench.authority.keys.ark, SHA384(), rsa_padding=salted)
    return signed.public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize("hostile", ["garbage", "another signer", "older"])
def test_a_hostile_list_never_replaces_a_good_one(milan: Bench, tmp_path: Path, time: Time, hostile: str) -> None:
    kds = of(milan)
    newer = kds.crls["Milan"]
    client = time.client(kds, tmp_path)
    client.refresh_crl("Milan", "vcek")
    bad = {
        "garbage": b"\x30\x00",
        "another signer": milan.authority.issue_crl(signer=milan.authority.keys.ask),
        "older": _older_list(milan),
    }[hostile]
    kds.twist = lambda target, answer: Answer(body=bad) if target.endswith("crl") else answer
    with pytest.raises(UnavailableError):
        client.refresh_crl("Milan", "vcek")
    assert client.cached_crl("Milan", "vcek") == newer


def test_a_swapped_list_in_the_folder_is_not_used(milan: Bench, tmp_path: Path, time: Time) -> None:
    client = time.client(of(milan), tmp_path)
    client.refresh_crl("Milan", "vcek")
    path = tmp_path / crl_file("Milan", "vcek")
    path.write_bytes(milan.authority.issue_crl(signer=milan.authority.keys.ask))
    os.utime(path, (time.now_s, time.now_s))
    with pytest.raises(UnavailableError, match="did not sign"):
        client.cached_crl("Milan", "vcek")


def test_offline_a_list_needs_its_ark_beside_it_and_is_never_fetched(milan: Bench, tmp_path: Path, time: Time) -> None:
    kds = of(milan)
    client = time.client(kds, tmp_path, online=False)
    path = tmp_path / crl_file("Milan", "vcek")
    path.write_bytes(kds.crls["Milan"])
    os.utime(path, (time.now_s, time.now_s))
    with pytest.raises(UnavailableError, match="the ARK that signed it is not at hand"):
        client.cached_crl("Milan", "vcek")
    with pytest.raises(SetupError):
        client.refresh_crl("Milan", "vcek")
    (tmp_path / "ark_milan.der").write_bytes(milan.authority.ark)
    (tmp_path / "ask_milan.der").write_bytes(milan.authority.ask)
    assert client.cached_crl("Milan", "vcek") == kds.crls["Milan"]
    assert kds.requests == []


def test_roots_come_from_the_policy(milan: Bench) -> None:
    assert roots_of(milan.policy()) == {"Milan": (milan.chip.root.ark_sha256,)}
