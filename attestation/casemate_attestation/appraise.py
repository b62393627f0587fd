"""Does it meet policy: genuine claims against a consortium's policy.

Only :func:`~casemate_attestation.verify.verify` makes :class:`Claims`, so nothing unverified can be appraised.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from datetime import datetime

from casemate_schemas.attestation_policy import (
    AcceptedProduct,
    AppraisalPolicy,
    AttestationPolicy,
    GuestPolicyRules,
    PlatformRules,
)
from casemate_schemas.errors import ParameterError

from .chain import ChainCache
from .products import decode_tcb, dotted
from .report import AttestationReport
from .verdict import Checklist, CheckName, Claims, Verdict
from .verify import verify

REPORT_DATA_BYTES = 64

_SMT, _MIGRATE_MA, _DEBUG, _SINGLE_SOCKET, _CXL = (1 << bit for bit in (16, 18, 19, 20, 21))
_PERMITTED_BITS = {"smt": _SMT, "migrate_ma": _MIGRATE_MA, "debug": _DEBUG, "cxl": _CXL}
_DEMANDED_BITS = {
    "single_socket": _SINGLE_SOCKET,
    "mem_aes_256_xts": 1 << 22,
    "rapl_dis": 1 << 23,
    "ciphertext_hiding": 1 << 24,
    "page_swap_disable": 1 << 25,
}
_PLATFORM_BITS = {
    "smt": 1 << 0,
    "tsme": 1 << 1,
    "ecc": 1 << 2,
    "rapl_dis": 1 << 3,
    "ciphertext_hiding": 1 << 4,
    "alias_check": 1 << 5,
    "iommu_write_safe": 1 << 6,
    "tio": 1 << 7,
}


def verify_and_appraise(
    report: bytes,
    certificates: Sequence[bytes],
    policy: AttestationPolicy,
    report_data: bytes,
    now: datetime,
    crl: bytes | None = None,
    chains: ChainCache | None = None,
) -> Verdict:
    """Whether ``report`` is genuine and meets ``policy``: first :func:`verify`, then, only if it is, :func:`appraise`.

    Arguments as there; ``report_data`` is the 64 bytes that fresh evidence must carry. Call ``raise_for_failure()`` on
    the verdict, or use it as a condition.

    Raises: :class:`ParameterError` for a ``report_data`` of another length or a time without a time zone.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise ParameterError(f"expected {REPORT_DATA_BYTES} bytes of report data, got {len(report_data)}")
    verified = verify(report, certificates, policy, now, crl, chains)
    if verified.claims is None:
        return verified
    appraised = appraise(verified.claims, policy, report_data)
    return Verdict(verified.checks + appraised.checks, appraised.claims)


def appraise(claims: Claims, policy: AppraisalPolicy, report_data: bytes | None) -> Verdict:
    """Whether genuine ``claims`` meet ``policy``.

    Checks, in this order; what the policy does not ask for is left out:

    1. ``simulation``, ``accepted_root``, ``report_version``: evidence of the policy's kind, under its own pins.
    2. ``report_data`` (compared in constant time), ``measurement``, ``host_data``.
    3. ``guest_policy`` (bits, least ABI, and an ABI that the firmware has), ``vmpl``, ``guest_svn``.
    4. ``family_id``, ``image_id``, ``id_key``, ``author_key`` (only with AUTHOR_KEY_EN).
    5. ``min_tcb`` (current, reported, committed and launch), ``min_firmware`` (current and committed), ``provisional``.
    6. ``platform``, ``launch_mitigations``, ``current_mitigations``.
    7. ``chip``: chip or cloud provider among the allowed ones. ``crl``, ``crl_age``: a list was there, if one has to be,
       and is not older than the policy permits.

    Args:
        claims: from :func:`~casemate_attestation.verify.verify`.
        policy: what to hold them against.
        report_data: the 64 bytes that the report must carry; None only to inspect a report whose nonce is nobody's.

    Returns: a verdict that carries the claims if every check passed.

    Source: AMD 56860, tables "GUEST_POLICY", "PLATFORM_INFO", "ATTESTATION_REPORT"; RFC 9334 (appraisal).
    """
    checks = Checklist("appraise")
    # 1.
    accepted = _check_origin(checks, claims, policy)
    # 2.
    _check_workload(checks, claims.report, policy, report_data)
    # 3.
    _check_guest(checks, claims.report, policy)
    # 4.
    _check_identities(checks, claims.report, policy)
    # 5.
    if accepted is not None:
        _check_floors(checks, claims, accepted)
    _check_provisional(checks, claims, policy)
    # 6.
    _check_platform(checks, claims.report, policy)
    # 7.
    _check_allowed_hardware(checks, claims, policy)
    return checks.verdict(claims)


def _check_origin(checks: Checklist, claims: Claims, policy: AppraisalPolicy) -> AcceptedProduct | None:
    kinds = {True: "simulated", False: "AMD's"}
    checks.record(
        "simulation", claims.simulated == policy.simulation, kinds[policy.simulation], kinds[claims.simulated]
    )
    accepted = next((p for p in policy.products if p.product == claims.product), None)
    pinned = accepted is not None and claims.ark_sha256 in accepted.ark_sha256
    checks.record(
        "accepted_root", pinned, "an accepted product and root", f"{claims.product} {claims.ark_sha256.hex()}"
    )
    version = claims.report.version
    floor = policy.min_report_version
    checks.record("report_version", version >= floor, f"at least {floor}", str(version))
    return accepted


def _check_workload(
    checks: Checklist, report: AttestationReport, policy: AppraisalPolicy, report_data: bytes | None
) -> None:
    if report_data is not None:
        fresh = hmac.compare_digest(report.report_data, report_data)
        checks.record("report_data", fresh, report_data.hex(), None if fresh else report.report_data.hex())
    if policy.measurements:
        _check_member(checks, "measurement", report.measurement, policy.measurements)
    if policy.host_data is not None:
        _check_member(checks, "host_data", report.host_data, (policy.host_data,))


def _check_guest(checks: Checklist, report: AttestationReport, policy: AppraisalPolicy) -> None:
    problems = _guest_policy_problems(report, policy.guest_policy)
    checks.record(
        "guest_policy", not problems, "a permitted guest policy", ", ".join(problems) or f"{report.policy:#x}"
    )
    levels = ", ".join(map(str, policy.vmpl))
    checks.record("vmpl", report.vmpl in policy.vmpl, f"one of {levels}", str(report.vmpl))
    floor = policy.min_guest_svn
    checks.record("guest_svn", report.guest_svn >= floor, f"at least {floor}", str(report.guest_svn))


def _guest_policy_problems(report: AttestationReport, rules: GuestPolicyRules) -> list[str]:
    problems = [f"{n} allowed" for n, bit in _PERMITTED_BITS.items() if report.policy & bit and not getattr(rules, n)]
    problems += [f"no {n}" for n, bit in _DEMANDED_BITS.items() if getattr(rules, n) and not report.policy & bit]
    if report.policy_abi < rules.min_abi:
        problems.append(f"ABI {report.policy_abi} below {rules.min_abi}")
    if report.policy_abi > report.current_firmware[:2]:
        problems.append(f"ABI {report.policy_abi} above the firmware's {report.current_firmware[:2]}")
    return problems


def _check_identities(checks: Checklist, report: AttestationReport, policy: AppraisalPolicy) -> None:
    if policy.family_id is not None:
        _check_member(checks, "family_id", report.family_id, (policy.family_id,))
    if policy.image_id is not None:
        _check_member(checks, "image_id", report.image_id, (policy.image_id,))
    if policy.id_keys:
        _check_member(checks, "id_key", report.id_key_digest, policy.id_keys)
    if policy.author_keys:
        known = report.author_key_enabled and report.author_key_digest in policy.author_keys
        got = report.author_key_digest.hex() if report.author_key_enabled else "no author key (AUTHOR_KEY_EN is 0)"
        checks.record("author_key", known, _one_of(policy.author_keys), got)


def _check_floors(checks: Checklist, claims: Claims, accepted: AcceptedProduct) -> None:
    report = claims.report
    raw = {
        "current": report.current_tcb,
        "reported": report.reported_tcb,
        "committed": report.committed_tcb,
        "launch": report.launch_tcb,
    }
    levels = {name: decode_tcb(tcb, claims.product) for name, tcb in raw.items()}
    low = [f"{name} {tcb}" for name, tcb in levels.items() if not tcb.covers(accepted.min_tcb)]
    got = "; ".join(low) or f"current {levels['current']}"
    checks.record("min_tcb", not low, f"at least {accepted.min_tcb}", got)
    firmware = min(report.current_firmware, report.committed_firmware)
    floor = accepted.min_firmware
    checks.record("min_firmware", firmware >= floor, f"at least {dotted(floor)}", dotted(firmware))


def _check_provisional(checks: Checklist, claims: Claims, policy: AppraisalPolicy) -> None:
    if policy.provisional:
        return
    report = claims.report
    settled = report.committed_tcb == report.current_tcb and report.committed_firmware == report.current_firmware
    expected = f"committed TCB {report.current_tcb.hex()}, firmware {dotted(report.current_firmware)}, as current"
    got = None if settled else f"{report.committed_tcb.hex()}, {dotted(report.committed_firmware)}"
    checks.record("provisional", settled, expected, got)


def _check_platform(checks: Checklist, report: AttestationReport, policy: AppraisalPolicy) -> None:
    wrong = _platform_problems(report.platform_info, policy.platform)
    got = ", ".join(wrong) or f"{report.platform_info:#x}"
    checks.record("platform", not wrong, "platform bits as required", got)
    vectors: tuple[tuple[CheckName, int, int], ...] = (
        ("launch_mitigations", policy.launch_mitigations, report.launch_mitigations),
        ("current_mitigations", policy.current_mitigations, report.current_mitigations),
    )
    for name, required, vector in vectors:
        if required:
            checks.record(name, vector & required == required, f"at least {required:#x}", f"{vector:#x}")


def _platform_problems(platform_info: int, rules: PlatformRules) -> list[str]:
    return [
        f"{name} {'off' if want else 'on'}"
        for name, bit in _PLATFORM_BITS.items()
        if (want := getattr(rules, name)) is not None and want != bool(platform_info & bit)
    ]


def _check_allowed_hardware(checks: Checklist, claims: Claims, policy: AppraisalPolicy) -> None:
    if policy.chip_ids or policy.csp_ids:
        known = claims.hardware_id in policy.chip_ids or claims.csp_id in policy.csp_ids
        got = claims.csp_id or (claims.hardware_id or b"").hex()
        checks.record("chip", known, "an allowed chip or cloud provider", got)
    _check_revocation_list(checks, claims, policy)


def _check_revocation_list(checks: Checklist, claims: Claims, policy: AppraisalPolicy) -> None:
    """A bound on the age asks for a list: otherwise the oldest one would be the one that is left out."""
    age_s, max_age_s = claims.crl_age_s, policy.max_crl_age_s
    if policy.crl_required or max_age_s is not None:
        checks.record("crl", age_s is not None, "a revocation list", "none" if age_s is None else "one")
    if age_s is not None and max_age_s is not None:
        checks.record("crl_age", age_s <= max_age_s, f"a list of at most {max_age_s} s", f"one of {age_s:.0f} s")


def _check_member(checks: Checklist, name: CheckName, value: bytes, allowed: Iterable[bytes]) -> None:
    accepted = tuple(allowed)
    checks.record(name, value in accepted, _one_of(accepted), value.hex())


def _one_of(values: Sequence[bytes]) -> str:
    return values[0].hex() if len(values) == 1 else f"one of {', '.join(value.hex() for value in values)}"
