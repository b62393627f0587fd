"""Evidence of a guest under a paravisor: its report, the attestation key it vouches for, that key's quote.

An authentic report alone says nothing here: it covers the paravisor and the key, and every guest of the same host
software can show one. Which program runs and what it claims is known by the quote.
"""

from __future__ import annotations

import hmac
from datetime import datetime

from casemate_schemas.attestation_policy import AppraisalPolicy, AttestationPolicy
from casemate_schemas.errors import MalformedError
from casemate_schemas.evidence import PcrValue, SevSnpVtpm
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from .appraise import appraise
from .chain import ChainCache
from .hcl import attestation_key, expected_report_data
from .tpm import ALG_RSAPSS, ALG_SHA256, Quote, Signature, pcr_digest, qualifying_data
from .verdict import Checklist, Verdict
from .verify import verify


def verify_and_appraise_vtpm(
    component: SevSnpVtpm,
    policy: AttestationPolicy,
    report_data: bytes,
    now: datetime,
    crl: bytes | None = None,
    chains: ChainCache | None = None,
) -> Verdict:
    """Whether ``component`` is genuine, covers ``report_data`` (64 bytes) and meets ``policy``.

    1. The report is genuine: the checks of :func:`~casemate_attestation.verify.verify`.
    2. ``hcl_runtime_data``: its REPORT_DATA is SHA-256 of the runtime data, and zeros. Nothing else in the component
       is looked at unless 1 and 2 hold.
    3. ``attestation_key``: the runtime data hold one such key, fit to be used.
    4. ``quote_format``: a TPMS_ATTEST, made by a TPM, of type quote, and nothing after it.
    5. ``quote_signature``: RSASSA or RSAPSS with SHA-256 over the quote, by that key.
    6. ``quote_pcrs``: exactly the component's registers, of the SHA-256 bank alone; the digest is that of their values.
    7. If all of that is genuine, ``quote_nonce``: extraData is SHA-256(``report_data``), compared in constant time.
    8. The report meets policy: the checks of :func:`~casemate_attestation.appraise.appraise`, without ``report_data``,
       whose place 2 and 7 take.
    9. ``pcr_values``: every register that the policy has a rule for is quoted and holds one of its values.

    Returns: a verdict; it carries the report's claims if, and only if, every check passed. Hostile input never raises.

    Raises: :class:`ParameterError` if ``now`` has no time zone.

    Source: TCG TPM 2.0 Library, part 2, "TPMS_ATTEST"; Microsoft, *Azure confidential VM guest attestation design*.
    """
    # 1.
    verified = verify(component.report, component.certificates, policy, now, crl, chains)
    if (claims := verified.claims) is None:
        return verified
    # 2. to 6.
    checks = Checklist("verify")
    quote = None
    if _check_runtime_data(checks, claims.report.report_data, component.runtime_data):
        quote = _check_quote(checks, component)
    genuine = Verdict(verified.checks + checks.verdict().checks)
    if quote is None or not genuine:
        return genuine
    # 7.
    checks = Checklist("appraise")
    expected = qualifying_data(report_data)
    fresh = hmac.compare_digest(quote.extra_data, expected)
    checks.record("quote_nonce", fresh, expected.hex(), quote.extra_data.hex())
    # 8.
    appraised = appraise(claims, policy, None)
    # 9.
    values = Checklist("appraise")
    _check_values(values, component.pcrs, policy)
    every = genuine.checks + checks.verdict().checks + appraised.checks + values.verdict().checks
    verdict = Verdict(every, claims)
    return verdict if verdict.ok else Verdict(every)


def _check_runtime_data(checks: Checklist, report_data: bytes, runtime_data: bytes) -> bool:
    expected = expected_report_data(runtime_data)
    bound = hmac.compare_digest(report_data, expected)
    checks.record("hcl_runtime_data", bound, f"REPORT_DATA {expected.hex()}", report_data.hex())
    return bound


def _check_quote(checks: Checklist, component: SevSnpVtpm) -> Quote | None:
    key = _attestation_key(checks, component.runtime_data)
    quote = _quote(checks, component.quote)
    if key is not None:
        checks.record("quote_signature", *_signature_outcome(component.quote, component.signature, key))
    if quote is not None:
        _check_registers(checks, quote, component.pcrs)
    return quote


def _attestation_key(checks: Checklist, runtime_data: bytes) -> rsa.RSAPublicKey | None:
    expected = "one RSA key HCLAkPub"
    try:
        key = attestation_key(runtime_data)
    except MalformedError as error:
        checks.record("attestation_key", False, expected, str(error))
        return None
    checks.record("attestation_key", True, expected, f"RSA-{key.key_size}")
    return key


def _quote(checks: Checklist, data: bytes) -> Quote | None:
    try:
        quote = Quote.parse(data)
    except MalformedError as error:
        checks.record("quote_format", False, "a quote that a TPM made", str(error))
        return None
    checks.record("quote_format", True, "a quote that a TPM made")
    return quote


def _signature_outcome(quote: bytes, data: bytes, key: rsa.RSAPublicKey) -> tuple[bool, str, str]:
    expected = "RSASSA or RSAPSS with SHA-256 by the attestation key"
    try:
        signature = Signature.parse(data)
    except MalformedError as error:
        return False, expected, str(error)
    if signature.hash != ALG_SHA256:
        return False, expected, f"hash algorithm {signature.hash:#x}"
    pss = padding.PSS(padding.MGF1(SHA256()), padding.PSS.AUTO)
    try:
        key.verify(signature.value, quote, pss if signature.scheme == ALG_RSAPSS else padding.PKCS1v15(), SHA256())
    except InvalidSignature:
        return False, expected, "one that does not verify"
    return True, expected, "RSAPSS" if signature.scheme == ALG_RSAPSS else "RSASSA"


def _check_registers(checks: Checklist, quote: Quote, pcrs: tuple[PcrValue, ...]) -> None:
    selection = (ALG_SHA256, tuple(value.index for value in pcrs))
    digest = pcr_digest(value.digest for value in pcrs)
    matches = quote.selections == (selection,) and quote.pcr_digest == digest
    got = f"{_shown(quote.selections)} with digest {quote.pcr_digest.hex()}"
    checks.record("quote_pcrs", matches, f"{_shown((selection,))} with digest {digest.hex()}", got)


def _shown(selections: tuple[tuple[int, tuple[int, ...]], ...]) -> str:
    return "; ".join(f"bank {bank:#x}: {', '.join(map(str, indices))}" for bank, indices in selections) or "no register"


def _check_values(checks: Checklist, pcrs: tuple[PcrValue, ...], policy: AppraisalPolicy) -> None:
    held = {value.index: value.digest for value in pcrs}
    rules = policy.vtpm.pcrs
    wrong = [rule.index for rule in rules if held.get(rule.index) not in rule.digests]
    got = ", ".join(f"{index}: {held[index].hex() if index in held else 'not quoted'}" for index in wrong)
    named = ", ".join(str(rule.index) for rule in rules)
    expected = f"a reference value in each of {named}" if rules else "reference values in the policy"
    checks.record("pcr_values", bool(rules) and not wrong, expected, got or ("none" if not rules else None))
