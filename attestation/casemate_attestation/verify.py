"""Is it genuine: an attestation report, its certificates and, if there is one, a revocation list.

Nothing is decided here about whether the evidence is welcome; that is :mod:`.appraise`. Note that an ECDSA signature
stays valid when S becomes n−S, so one report has two byte strings: never recognise a replay by a report's digest. Nonces
in REPORT_DATA do that.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from casemate_schemas.attestation_policy import AppraisalPolicy
from casemate_schemas.errors import MalformedError, ParameterError, UnsupportedVersionError, VerificationError
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from .certificates import Certificate, RevocationList, VekFacts, crl_profile, parse_crl, signed_by
from .chain import CHAIN_LENGTH, Chain, ChainCache, JudgedChain, judge_chain, parse_chain
from .products import AMD_ROOTS, Product, decode_tcb, dotted, product_of_cpuid, tcb_reserved_is_zero
from .report import ECDSA_P384_SHA384, AttestationReport
from .verdict import Checklist, Claims, Verdict

_P384_ORDER: Final = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)
_FORMAT: Final = "DER of VEK, intermediate and ARK"
_PROFILE: Final = "AMD's profiles of VEK, intermediate and ARK"


def verify(
    report: bytes,
    certificates: Sequence[bytes],
    policy: AppraisalPolicy,
    now: datetime,
    crl: bytes | None = None,
    chains: ChainCache | None = None,
) -> Verdict:
    """Whether a chip under one of the policy's roots signed ``report``.

    Checks, in this order; one that cannot be made because an earlier one failed is left out:

    1. ``format``, ``version``: 1184 bytes, version 2 to 5.
    2. ``signature_algorithm``, ``reserved``, ``signer``: ECDSA P-384 with SHA-384, reserved fields, a signing key.
    3. ``certificate_format``, ``certificate_profile``: three certificates, each of AMD's profile for its place.
    4. ``signer_certificate``, ``root``, ``chain``: the kind of key that the report names; the ARK by its SHA-256 among
       the policy's pins and of the policy's kind (AMD's or simulated); exact issuers, names and signatures.
    5. ``validity``: all three certificates are in date at ``now``.
    6. ``revocation``: a list signed by the ARK, current at ``now``, that names neither intermediate nor ARK. Made if
       there is a list; whether there has to be one is for appraisal.
    7. ``product``: CPUID (from version 3 on), issuer and the VEK certificate's product name agree.
    8. ``signature``: over the first 0x2A0 bytes, all 72 bytes of R and of S read.
    9. ``chip_id``: a VCEK's hwID is the report's CHIP_ID, which is not masked.
    10. ``tcb_layout``, ``tcb_certificate``, ``tcb_order``: reserved bytes of the product's layout; REPORTED_TCB is the
        one that the VEK is derived from; committed ≤ current and reported ≤ current, component by component.

    Args:
        report: what claims to be an attestation report.
        certificates: DER, in this order: VEK (VCEK or VLEK), intermediate (ASK or ASVK), ARK.
        policy: its ``simulation`` and ``products`` say which roots are trusted; nothing else of it is used.
        now: the time to verify at, with a time zone.
        crl: DER of the ARK's revocation list.
        chains: chains that were judged before; the verdict is the same without.

    Returns: a verdict; it carries claims if, and only if, every check passed. Hostile input never raises.

    Raises: :class:`ParameterError` if ``now`` has no time zone.

    Source: AMD 56860, "ATTESTATION_REPORT"; AMD 57230; RFC 9334 (verification).
    """
    if now.tzinfo is None:
        raise ParameterError("expected a time with a time zone")
    checks = Checklist("verify")
    # 1.
    if (parsed := _parse_report(checks, report)) is None:
        return checks.verdict()
    # 2.
    _check_fields(checks, parsed)
    # 3.
    known = None if chains is None else chains.find(certificates)
    if (judged := _judge_chain(checks, certificates, known)) is None:
        return checks.verdict()
    chain, vek = judged.chain, judged.vek
    # 4.
    _check_chain(checks, parsed, judged, policy)
    # 5.
    _check_validity(checks, chain, now)
    # 6.
    crl_age_s = None if crl is None else _check_revocation(checks, crl, chain, now)
    # 7.
    _check_product(checks, parsed, vek, judged.product)
    # 8.
    _check_signature(checks, parsed, chain.vek)
    # 9.
    if vek.hardware_id is not None:
        _check_chip_id(checks, parsed, vek.hardware_id)
    # 10.
    _check_tcb(checks, parsed, vek)
    verdict = checks.verdict(_claims(parsed, judged, policy, crl_age_s))
    if chains is not None and known is None and verdict.claims is not None:
        chains.remember(judged)
    return verdict


def _parse_report(checks: Checklist, report: bytes) -> AttestationReport | None:
    try:
        parsed = AttestationReport.parse(report)
    except UnsupportedVersionError as error:
        checks.record("version", False, "report version 2 to 5", str(error))
        return None
    except MalformedError as error:
        checks.record("format", False, "1184 bytes", str(error))
        return None
    checks.record("format", True, "1184 bytes", f"{len(report)} bytes")
    checks.record("version", True, "report version 2 to 5", str(parsed.version))
    return parsed


def _check_fields(checks: Checklist, report: AttestationReport) -> None:
    algorithm = report.signature_algorithm
    checks.record("signature_algorithm", algorithm == ECDSA_P384_SHA384, "1 (ECDSA P-384 SHA-384)", str(algorithm))
    checks.record("reserved", not report.reserved, "reserved fields as specified", ", ".join(report.reserved) or None)
    signer = report.signing_key or f"none (signer info {report.signer_info:#x})"
    checks.record("signer", report.signing_key is not None, "vcek or vlek", signer)


def _judge_chain(checks: Checklist, certificates: Sequence[bytes], known: JudgedChain | None) -> JudgedChain | None:
    """Both checks of the certificates' form; a known chain passed them when it was judged."""
    if known is not None:
        checks.record("certificate_format", True, _FORMAT)
        checks.record("certificate_profile", True, _PROFILE)
        return known
    if len(certificates) != CHAIN_LENGTH:
        checks.record("certificate_format", False, _FORMAT, f"{len(certificates)} certificates")
        return None
    try:
        chain = parse_chain(certificates)
    except MalformedError as error:
        checks.record("certificate_format", False, _FORMAT, str(error))
        return None
    checks.record("certificate_format", True, _FORMAT)
    try:
        judged = judge_chain(chain)
    except VerificationError as error:
        checks.record("certificate_profile", False, _PROFILE, str(error))
        return None
    checks.record("certificate_profile", True, _PROFILE)
    return judged


def _check_chain(checks: Checklist, report: AttestationReport, judged: JudgedChain, policy: AppraisalPolicy) -> None:
    kind = judged.vek.kind
    if report.signing_key is not None:
        checks.record("signer_certificate", report.signing_key == kind, f"a {report.signing_key}", f"a {kind}")
    digest, product = judged.ark_sha256, judged.product
    pinned = any(accepted.product == product and digest in accepted.ark_sha256 for accepted in policy.products)
    root = "a simulated" if policy.simulation else "AMD's"
    trusted = pinned and (digest in AMD_ROOTS) != policy.simulation
    checks.record("root", trusted, f"{root} pinned ARK for {product}", f"SHA-256 {digest.hex()}")
    checks.record("chain", judged.problem is None, "ARK signed the intermediate, which signed the VEK", judged.problem)


def _check_validity(checks: Checklist, chain: Chain, now: datetime) -> None:
    def wrong(certificate: Certificate) -> bool:
        return not certificate.not_before <= now <= certificate.not_after

    outside = [c for c in (chain.vek, chain.intermediate, chain.ark) if wrong(c)]
    got = ", ".join(f"{c.common_name!r} from {c.not_before:%F} to {c.not_after:%F}" for c in outside)
    checks.record("validity", not outside, f"certificates in date at {now.isoformat()}", got or None)


def _check_revocation(checks: Checklist, crl: bytes, chain: Chain, now: datetime) -> float | None:
    """The list's age in seconds, if it is one."""
    expected = "a current list by the ARK without this chain's authorities"
    age_s = None
    try:
        parsed = parse_crl(crl)
        problem = _revocation_problem(parsed, chain, now)
        age_s = (now - parsed.last_update).total_seconds()
    except (MalformedError, VerificationError) as error:
        problem = str(error)
    checks.record("revocation", problem is None, expected, problem)
    return age_s


def _revocation_problem(crl: RevocationList, chain: Chain, now: datetime) -> str | None:
    crl_profile(crl)
    if crl.issuer != chain.ark.subject or not signed_by(crl.tbs, crl.signature, chain.ark):
        return "a list that the ARK did not sign"
    if crl.next_update is None or not crl.last_update <= now < crl.next_update:
        return f"a list of {crl.last_update:%F} to be renewed by {crl.next_update or 'no date'}"
    revoked = [repr(c.common_name) for c in (chain.intermediate, chain.ark) if c.serial_number in crl.revoked]
    return f"revoked: {', '.join(revoked)}" if revoked else None


def _check_product(checks: Checklist, report: AttestationReport, vek: VekFacts, chain: Product | None) -> None:
    """Version 2 reports hold no CPUID: their product is that of the verified certificate alone."""
    claims = {"certificate": vek.product, "issuer": chain}
    if report.version >= 3:
        claims["CPUID"] = product_of_cpuid(report.cpuid_family, report.cpuid_model)
    agree = None not in claims.values() and len(set(claims.values())) == 1
    got = ", ".join(f"{value} by {source}" for source, value in claims.items())
    checks.record("product", agree, "one known product", got)


def _check_signature(checks: Checklist, report: AttestationReport, vek: Certificate) -> None:
    checks.record("signature", *_signature_outcome(report, vek))


def _signature_outcome(report: AttestationReport, vek: Certificate) -> tuple[bool, str, str]:
    expected = "an ECDSA signature by the VEK"
    r = int.from_bytes(report.signature_r, "little")
    s = int.from_bytes(report.signature_s, "little")
    if not (0 < r < _P384_ORDER and 0 < s < _P384_ORDER):
        return False, expected, "R or S outside 1 to n−1"
    if not isinstance(vek.key, ec.EllipticCurvePublicKey):
        return False, expected, "a key of another kind"
    try:
        vek.key.verify(encode_dss_signature(r, s), report.signed, ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False, expected, "one that does not verify"
    return True, expected, expected


def _check_chip_id(checks: Checklist, report: AttestationReport, hardware_id: bytes) -> None:
    expected = hardware_id.ljust(64, b"\0")
    ok = not report.chip_key_masked and report.chip_id == expected
    masked = " (masked)" if report.chip_key_masked else ""
    checks.record("chip_id", ok, f"{hardware_id.hex()}, not masked", report.chip_id.hex() + masked)


def _check_tcb(checks: Checklist, report: AttestationReport, vek: VekFacts) -> None:
    raw = (report.current_tcb, report.reported_tcb, report.committed_tcb, report.launch_tcb)
    unclean = [tcb.hex() for tcb in set(raw) if not tcb_reserved_is_zero(tcb, vek.product)]
    checks.record("tcb_layout", not unclean, f"TCB versions of {vek.product}", ", ".join(unclean) or None)
    current, reported, committed, _ = (decode_tcb(tcb, vek.product) for tcb in raw)
    same = reported == vek.tcb
    checks.record("tcb_certificate", same, f"reported TCB {vek.tcb}", None if same else str(reported))
    firmware = report.committed_firmware <= report.current_firmware
    ordered = current.covers(committed) and current.covers(reported) and firmware
    expected = f"at most current {current}, firmware {dotted(report.current_firmware)}"
    got = (
        None if ordered else f"committed {committed}, reported {reported}, firmware {dotted(report.committed_firmware)}"
    )
    checks.record("tcb_order", ordered, expected, got)


def _claims(report: AttestationReport, judged: JudgedChain, policy: AppraisalPolicy, crl_age_s: float | None) -> Claims:
    return Claims(
        report=report,
        product=judged.vek.product,
        ark_sha256=judged.ark_sha256,
        simulated=policy.simulation,
        hardware_id=judged.vek.hardware_id,
        csp_id=judged.vek.csp_id,
        crl_age_s=crl_age_s,
    )
