"""How long it takes to verify one SEV-SNP report, beside omne-attest 0.1.0, in one run.

Both get the same bytes: a real Milan report (version 3) with its VCEK, ASK and ARK. Both start from DER each time, and both
make these checks: length, version, signature algorithm; the ARK by its SHA-256; RSA-PSS signatures of ASK and VCEK; a P-384
key; the report's ECDSA signature; hwID; four TCB components against the certificate; measurement, report data, VMPL, DEBUG, a
TCB floor. Theirs also verifies the ARK's signature by itself each time; ours knows it for AMD's three roots by their SHA-256,
and verifies it for every other root (as in ``full_with_list_vs_omne``).

Ours makes 24 more, all on here: every reserved field and all 72 bytes of R and S, signer info, both AlgorithmIdentifiers,
key sizes, names, exact issuers, basic constraints and key usage, canonical extensions, three validity periods, product by
CPUID, issuer and certificate, TCB layout and order; every guest policy and platform bit, ABI, host data, guest SVN, family
and image id, id key, committed firmware, provisional firmware, allowed chip; and it returns a checklist.

``full_vs_omne``: ours without any memory. ``warm_vs_omne``: ours with a chain cache that knows this chain, as a key broker
has it, against theirs, which has none. ``full_with_list_vs_omne``: a simulated chip's report and a revocation list, which
theirs cannot read; no target. Times are CPU time of the one thread at work.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import omne_attest
from _bench import Metric, Samples, arguments, interleaved, machine, print_samples, report
from casemate_attestation.appraise import verify_and_appraise
from casemate_attestation.chain import ChainCache
from casemate_attestation.report import AttestationReport
from casemate_attestation.simulated_chip import SimulatedAuthority, SimulatedKeys
from casemate_schemas.attestation_policy import (
    AcceptedProduct,
    AttestationPolicy,
    GuestPolicyRules,
    PlatformRules,
    TcbVersion,
)

VECTORS = Path(__file__).parents[1] / "tests" / "vectors" / "snp"
BATCH = 10
NOW = datetime(2026, 11, 21, tzinfo=UTC)

Chain = tuple[bytes, bytes, bytes]


def main() -> None:
    options = arguments("Verification of an SEV-SNP report: ours beside omne-attest")
    rounds = 150 if options.quick else 1_500
    # Every VCEK has serial number 0, which the library warns of once; omne-attest does not filter that.
    warnings.simplefilter("ignore")
    data, certificates = real_evidence()
    chains = ChainCache()
    cases = {
        "ours, full": ours(data, certificates, NOW, simulation=False),
        "ours, warm": ours(data, certificates, NOW, simulation=False, chains=chains),
        "omne-attest": omne(data, certificates),
    }
    real = interleaved(cases, rounds=rounds, batch=BATCH, clock=time.thread_time)
    print_samples(real, "real Milan report, version 3")
    simulated = simulated_samples(rounds // 3)
    print_samples(simulated, "simulated Milan report, version 3")
    metrics = [
        Metric("full_vs_omne", ratio(real, "ours, full"), "x", 1.2),
        Metric("warm_vs_omne", ratio(real, "ours, warm"), "x", 0.7),
        Metric("full_with_list_vs_omne", ratio(simulated, "ours, full, with list"), "x"),
        Metric("full_us", real["ours, full"].median_s * 1e6, "µs"),
        Metric("warm_us", real["ours, warm"].median_s * 1e6, "µs"),
    ]
    runs = {name: samples.summary() for name, samples in (real | simulated).items()}
    report(metrics, runs, machine("casemate", "omne-attest", "cryptography"), options.json)


def ratio(samples: dict[str, Samples], name: str) -> float:
    """Of the medians of one run."""
    theirs = next(value for key, value in samples.items() if key.startswith("omne-attest"))
    return samples[name].median_s / theirs.median_s


def real_evidence() -> tuple[bytes, Chain]:
    names = ("milan-v3-azure-v0.vek.der", "roots/ask_milan.der", "roots/ark_milan.der")
    vek, ask, ark = ((VECTORS / name).read_bytes() for name in names)
    return (VECTORS / "milan-v3-azure-v0.bin").read_bytes(), (vek, ask, ark)


def simulated_samples(rounds: int) -> dict[str, Samples]:
    authority = SimulatedAuthority(SimulatedKeys.generate())
    # Theirs takes a bare hwID that begins with 4, as one in 256 does, for an OCTET STRING, and refuses it.
    chip = next(c for c in iter(authority.issue_chip, None) if (c.facts.hardware_id or b"")[0] != 4)
    data = chip.launch(b"\x4d" * 48).attest(bytes(range(64))).report
    now = datetime.now(UTC)
    cases = {
        "ours, full, with list": ours(data, chip.certificates, now, simulation=True, crl=authority.issue_crl()),
        "omne-attest, simulated": omne(data, chip.certificates),
    }
    return interleaved(cases, rounds=rounds, batch=BATCH, clock=time.thread_time)


def ours(
    data: bytes,
    certificates: Chain,
    now: datetime,
    *,
    simulation: bool,
    crl: bytes | None = None,
    chains: ChainCache | None = None,
) -> Callable[[], None]:
    """One verification under a policy that asks for everything this report can show."""
    parsed = AttestationReport.parse(data)
    policy = strictest_policy(parsed, certificates[2], simulation=simulation, has_list=crl is not None)

    def run() -> None:
        verify_and_appraise(data, certificates, policy, parsed.report_data, now, crl, chains).raise_for_failure()

    return run


def strictest_policy(parsed: AttestationReport, ark: bytes, *, simulation: bool, has_list: bool) -> AttestationPolicy:
    accepted = AcceptedProduct(
        product="Milan",
        ark_sha256=(hashlib.sha256(ark).digest(),),
        min_tcb=TcbVersion(bl=1, snp=1, ucode=1),
        min_firmware=(1, 51, 0),
    )
    return AttestationPolicy(
        simulation=simulation,
        products=(accepted,),
        min_report_version=3,
        measurements=(parsed.measurement,),
        host_data=parsed.host_data,
        family_id=parsed.family_id,
        image_id=parsed.image_id,
        id_keys=(parsed.id_key_digest,),
        min_guest_svn=parsed.guest_svn,
        guest_policy=GuestPolicyRules(min_abi=parsed.policy_abi),
        platform=PlatformRules(smt=True, tsme=bool(parsed.platform_info & 2), rapl_dis=False, tio=False),
        chip_ids=(parsed.chip_id,),
        max_crl_age_s=7 * 86_400 if has_list else None,
    )


def omne(data: bytes, certificates: Chain) -> Callable[[], None]:
    """One verification with every check of theirs on."""
    parsed = omne_attest.Report.parse(data)
    pin = hashlib.sha256(certificates[2]).digest()
    policy = omne_attest.Policy(
        measurement=parsed.measurement,
        report_data=parsed.report_data,
        tcb_floor=omne_attest.Tcb(1, 0, 1, 1),
        max_vmpl=0,
        reject_debug=True,
    )

    def run() -> None:
        omne_attest.verify(data, *certificates, pin, policy)

    return run


if __name__ == "__main__":
    main()
