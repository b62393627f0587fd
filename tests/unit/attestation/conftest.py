"""A bench: simulated chips whose evidence is right, so that each test can break one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from casemate_attestation.appraise import verify_and_appraise
from casemate_attestation.certificates import VekKind
from casemate_attestation.products import Product
from casemate_attestation.simulated_chip import SimulatedAuthority, SimulatedChip, SimulatedKeys
from casemate_attestation.verdict import Verdict
from casemate_schemas.attestation_policy import AcceptedProduct, AttestationPolicy, TcbVersion

REPORT_DATA = bytes(range(64))
MEASUREMENT = b"\x4d" * 48
TCB = TcbVersion(fmc=1, bl=4, tee=1, snp=24, ucode=219)


@dataclass
class Bench:
    """One chip, evidence of which every check accepts, and a policy that accepts it."""

    authority: SimulatedAuthority
    chip: SimulatedChip
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def body(self, **changed: Any) -> bytes:
        """The signed part of a report with some fields changed."""
        template = self.chip.launch(MEASUREMENT).template
        return replace(template, report_data=REPORT_DATA, **changed).body()

    def report(self, **changed: Any) -> bytes:
        """A report with some fields changed, and signed so."""
        return self.chip.sign(self.body(**changed))

    def patched(self, offset: int, value: int) -> bytes:
        """A report with one byte of the signed part set, and signed so."""
        body = bytearray(self.body())
        body[offset] = value
        return self.chip.sign(bytes(body))

    def policy(self, **changed: Any) -> AttestationPolicy:
        """A policy that accepts this bench's evidence, with some fields changed."""
        accepted = AcceptedProduct(product=self.chip.facts.product, ark_sha256=(self.chip.root.ark_sha256,))
        fields: dict[str, Any] = {"simulation": True, "products": (accepted,), "measurements": (MEASUREMENT,)}
        return AttestationPolicy(**(fields | {"min_report_version": 2} | changed))

    def with_vek(self, extensions: dict[str, bytes | None] | None = None, **changed: Any) -> Bench:
        """The same chip under another VEK certificate: some extensions set or (None) removed, some fields changed."""
        facts = self.chip.facts
        merged = self.authority.vek_extensions(facts.tcb, facts.hardware_id or b"") | (extensions or {})
        kept = {oid: value for oid, value in merged.items() if value is not None}
        key = changed.pop("key", self.chip._key.public_key())
        vek = self.authority.issue_vek(key, kept, **changed)
        return Bench(self.authority, self.with_certificates(vek), self.now)

    def with_certificates(self, vek: bytes) -> SimulatedChip:
        chip = SimulatedChip(self.chip._key, self.chip.certificates, self.chip.version)
        chip.certificates = (vek, *self.chip.certificates[1:])
        return chip

    def judge(
        self, report: bytes | None = None, policy: AttestationPolicy | None = None, crl: bytes | None = None
    ) -> Verdict:
        """The verdict on evidence of this bench."""
        return verify_and_appraise(
            self.report() if report is None else report,
            self.chip.certificates,
            policy or self.policy(),
            REPORT_DATA,
            self.now,
            crl,
        )


MakeBench = Callable[..., Bench]


@pytest.fixture(scope="session")
def simulated_keys() -> SimulatedKeys:
    """RSA-4096 keys, made once: they take seconds."""
    return SimulatedKeys.generate()


@pytest.fixture(scope="session")
def make_bench(simulated_keys: SimulatedKeys) -> MakeBench:
    """A bench of any product, report version and kind of VEK."""

    def make(product: Product = "Milan", version: int = 3, kind: VekKind = "vcek") -> Bench:
        tcb = TCB if product == "Turin" else TCB.model_copy(update={"fmc": 0})
        authority = SimulatedAuthority(simulated_keys, product, kind)
        return Bench(authority, authority.issue_chip(tcb, version))

    return make


@pytest.fixture(scope="session")
def milan(make_bench: MakeBench) -> Bench:
    """A Milan VCEK and version 3 reports."""
    return make_bench()


@pytest.fixture(scope="session")
def turin(make_bench: MakeBench) -> Bench:
    """A Turin VCEK and version 5 reports."""
    return make_bench("Turin", 5)


@pytest.fixture(scope="session")
def vlek(make_bench: MakeBench) -> Bench:
    """A Genoa VLEK and version 3 reports."""
    return make_bench("Genoa", 3, "vlek")
