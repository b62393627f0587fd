"""Evidence by a virtual TPM: each check broken alone, hostile bytes, and real evidence of Azure guests."""

from __future__ import annotations

import hashlib
import json
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from casemate_attestation.hcl import MAX_HCL_REPORT_BYTES, HclReport, attestation_key
from casemate_attestation.tpm import Quote, Signature
from casemate_attestation.verdict import Verdict
from casemate_attestation.vtpm import verify_and_appraise_vtpm
from casemate_schemas.attestation_policy import (
    AMD_ARK_SHA256,
    AcceptedProduct,
    AttestationPolicy,
    PcrRule,
    VtpmRules,
)
from casemate_schemas.errors import AppraisalError, MalformedError, VerificationError
from casemate_schemas.evidence import SevSnpVtpm
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vtpm import (
    PCRS,
    RULES,
    Paravisor,
    Quoted,
    base64url,
    hcl_report,
    jwk,
    pcr_values,
    runtime_data,
    tpmt_signature,
)
from support.vtpm import attestation_key as our_key

from .conftest import REPORT_DATA, Bench

VECTORS = Path(__file__).parents[2] / "vectors"
NONCE = hashlib.sha256(REPORT_DATA).digest()

OWN_CHECKS = ("hcl_runtime_data", "attestation_key", "quote_format", "quote_signature", "quote_pcrs", "quote_nonce")


def policy(bench: Bench, **changed: Any) -> AttestationPolicy:
    return bench.policy(**({"evidence_types": (("sev-snp-vtpm",),), "vtpm": RULES} | changed))


def judged(bench: Bench, component: SevSnpVtpm, **changed: Any) -> Verdict:
    return verify_and_appraise_vtpm(component, policy(bench, **changed), REPORT_DATA, bench.now)


@pytest.fixture(scope="module")
def paravisor(milan: Bench) -> Paravisor:
    def attest(report_data: bytes) -> tuple[bytes, tuple[bytes, bytes, bytes]]:
        launch = milan.chip.launch(milan.policy().measurements[0])
        component = launch.attest(report_data)
        return component.report, component.certificates

    return Paravisor(attest)


def with_runtime(paravisor: Paravisor, *keys: dict[str, Any], raw: bytes | None = None) -> SevSnpVtpm:
    """Genuine evidence in which the chip covers other runtime data."""
    return Paravisor(paravisor.attest, runtime_data(*keys) if raw is None else raw).component(REPORT_DATA)


def test_good_evidence_passes_every_check(milan: Bench, paravisor: Paravisor) -> None:
    verdict = judged(milan, paravisor.component(REPORT_DATA))
    assert verdict.ok and verdict.claims is not None, str(verdict)
    names = [check.name for check in verdict.checks]
    assert [name for name in names if name in OWN_CHECKS] == list(OWN_CHECKS)
    assert names[-1] == "pcr_values" and {"format", "signature", "measurement", "min_tcb"} < set(names)
    assert "report_data" not in names


def test_rsapss_passes(milan: Bench, paravisor: Paravisor) -> None:
    quote = Quoted(NONCE).attest()
    assert judged(milan, paravisor.component(REPORT_DATA, signature=tpmt_signature(quote, pss=True))).ok


# --- each check broken alone ------------------------------------------------------------------------------------------


def test_report_that_is_not_genuine(milan: Bench, paravisor: Paravisor) -> None:
    component = paravisor.component(REPORT_DATA)
    report = bytearray(component.report)
    report[0x2A0] ^= 1
    verdict = judged(milan, component.model_copy(update={"report": bytes(report)}))
    assert verdict.failed == ("signature",)
    assert not {check.name for check in verdict.checks} & set(OWN_CHECKS)


@pytest.mark.parametrize("where", ["runtime data", "report data", "second half"])
def test_runtime_data_that_the_report_does_not_cover(milan: Bench, paravisor: Paravisor, where: str) -> None:
    component = paravisor.component(REPORT_DATA)
    digest = hashlib.sha256(component.runtime_data).digest()
    reports = {"report data": REPORT_DATA, "second half": digest + b"\x01" + bytes(31)}
    changed: dict[str, Any] = {"runtime_data": component.runtime_data + b" "}
    if where in reports:
        changed = {"report": paravisor.attest(reports[where])[0]}
    verdict = judged(milan, component.model_copy(update=changed))
    assert verdict.failed == ("hcl_runtime_data",)
    assert "quote_signature" not in {check.name for check in verdict.checks}
    with pytest.raises(VerificationError):
        verdict.raise_for_failure()


def test_an_authentic_report_without_a_fitting_quote(milan: Bench, paravisor: Paravisor) -> None:
    """Another guest of the same paravisor: its report is genuine, the quote is by another TPM's key."""
    other = jwk(rsa.generate_private_key(65537, 2048).public_key())
    assert judged(milan, with_runtime(paravisor, other)).failed == ("quote_signature",)


KEYS: dict[str, list[dict[str, Any]]] = {
    "none": [{"kid": "HCLEkPub", "kty": "RSA", "e": "AQAB", "n": "AQAB"}],
    "two": [jwk(our_key().public_key()), jwk(our_key().public_key())],
    "another kind": [jwk(our_key().public_key(), kty="EC")],
    "small exponent": [jwk(our_key().public_key(), e="Aw")],
    "small modulus": [jwk(our_key().public_key(), n=base64url(our_key().public_key().public_numbers().n >> 1024))],
    "large modulus": [jwk(our_key().public_key(), n=base64url((1 << 4096) + 1))],
    "even modulus": [jwk(our_key().public_key(), n=base64url(1 << 2047))],
    "not base64url": [jwk(our_key().public_key(), n="+/" * 171)],
    "no modulus": [{"kid": "HCLAkPub", "kty": "RSA", "e": "AQAB"}],
    "number": [jwk(our_key().public_key(), n=7)],
}


@pytest.mark.parametrize("case", KEYS)
def test_runtime_data_without_a_usable_key(milan: Bench, paravisor: Paravisor, case: str) -> None:
    verdict = judged(milan, with_runtime(paravisor, *KEYS[case]))
    assert verdict.failed == ("attestation_key",)
    assert "quote_signature" not in {check.name for check in verdict.checks}


HOSTILE_JSON = [
    b"\x00",
    b"[]",
    b"{}",
    b'{"keys": {"kid": "HCLAkPub"}}',
    b'{"keys": []}',
    b'{"keys": [], ' + runtime_data(jwk(our_key().public_key()))[1:],
    b"[" * 16000,
    b'{"keys": ' + b"1" * 10000 + b"}",
    json.dumps({"keys": [jwk(our_key().public_key())]}).encode("utf-16"),
    runtime_data() + b"x",
]


@pytest.mark.parametrize("raw", HOSTILE_JSON, ids=range(len(HOSTILE_JSON)))
def test_runtime_data_that_are_no_such_json(milan: Bench, paravisor: Paravisor, raw: bytes) -> None:
    assert judged(milan, with_runtime(paravisor, raw=raw)).failed == ("attestation_key",)


def test_a_key_that_older_paravisors_describe_wrongly_is_taken() -> None:
    key = attestation_key(runtime_data(jwk(our_key().public_key(), key_ops=["encrypt"])))
    assert key.public_numbers() == our_key().public_key().public_numbers()


@pytest.mark.parametrize(
    "quoted",
    [Quoted(NONCE, magic=0xFF544348), Quoted(NONCE, kind=0x8017), Quoted(NONCE, tail=b"\0")],
    ids=["magic", "type", "tail"],
)
def test_what_is_signed_but_no_quote(milan: Bench, paravisor: Paravisor, quoted: Quoted) -> None:
    assert judged(milan, paravisor.component(REPORT_DATA, quoted)).failed == ("quote_format",)


@pytest.mark.parametrize("size", [0, 6, 50, 90, 144])
def test_a_quote_that_ends_early(milan: Bench, paravisor: Paravisor, size: int) -> None:
    quote = Quoted(NONCE).attest()[:size] or b"\0"
    component = paravisor.component(REPORT_DATA, quote=quote, signature=tpmt_signature(quote))
    assert judged(milan, component).failed == ("quote_format",)


def test_more_banks_than_there_are_is_no_quote() -> None:
    head = Quoted(NONCE, banks=()).attest()
    place = len(head) - 2 - 32 - 4
    with pytest.raises(MalformedError, match="banks"):
        Quote.parse(head[:place] + struct.pack(">I", 1 << 31) + head[place + 4 :])


def signatures() -> dict[str, bytes]:
    quote = Quoted(NONCE).attest()
    good = tpmt_signature(quote)
    return {
        "another quote's": tpmt_signature(quote + b"\0"),
        "one bit": good[:-1] + bytes([good[-1] ^ 1]),
        "SHA-1 named": tpmt_signature(quote, hash_algorithm=4),
        "RSAPSS named": b"\x00\x16" + good[2:],
        "ECDSA named": b"\x00\x18" + good[2:],
        "tail": good + b"\0",
        "short": good[:-1],
        "empty": struct.pack(">HHH", 0x14, 0x0B, 0),
        "nothing": b"\0",
    }


@pytest.mark.parametrize("case", list(signatures()))
def test_a_signature_that_is_none(milan: Bench, paravisor: Paravisor, case: str) -> None:
    component = paravisor.component(REPORT_DATA, signature=signatures()[case])
    verdict = judged(milan, component)
    assert verdict.failed == ("quote_signature",)
    assert not {"quote_nonce", "measurement"} & {check.name for check in verdict.checks}, "appraised, but not genuine"


OTHER_PCRS = (*PCRS[:4], b"\xee" * 32, *PCRS[5:])
REGISTERS: dict[str, tuple[Quoted, dict[str, Any]]] = {
    "value": (Quoted(NONCE), {"pcrs": pcr_values(OTHER_PCRS)}),
    "fewer values": (Quoted(NONCE), {"pcrs": pcr_values(PCRS[:15])}),
    "more values": (Quoted(NONCE), {"pcrs": pcr_values((*PCRS, bytes(32)))}),
    "another bank": (Quoted(NONCE, banks=((0x04, tuple(range(16))),)), {}),
    "another selection": (Quoted(NONCE, banks=((0x0B, tuple(range(1, 17))),)), {}),
    "a bank more": (Quoted(NONCE, banks=((0x0B, tuple(range(16))), (0x0C, ()))), {}),
    "no bank": (Quoted(NONCE, banks=()), {}),
    "digest": (Quoted(NONCE, digest=bytes(32)), {}),
    "no digest": (Quoted(NONCE, digest=b""), {}),
}


@pytest.mark.parametrize("case", REGISTERS)
def test_registers_that_were_not_quoted_so(milan: Bench, paravisor: Paravisor, case: str) -> None:
    quoted, changed = REGISTERS[case]
    assert judged(milan, paravisor.component(REPORT_DATA, quoted, **changed)).failed == ("quote_pcrs",)


@pytest.mark.parametrize("nonce", [b"", REPORT_DATA, REPORT_DATA[:32], NONCE[:31], NONCE + b"\0", bytes(32)])
def test_a_quote_over_something_else(milan: Bench, paravisor: Paravisor, nonce: bytes) -> None:
    verdict = judged(milan, paravisor.component(REPORT_DATA, Quoted(nonce)))
    assert verdict.failed == ("quote_nonce",) and verdict.claims is None
    with pytest.raises(AppraisalError):
        verdict.raise_for_failure()


def test_registers_that_hold_something_else(milan: Bench, paravisor: Paravisor) -> None:
    component = paravisor.component(REPORT_DATA, Quoted(NONCE, values=OTHER_PCRS), pcrs=pcr_values(OTHER_PCRS))
    assert judged(milan, component).ok  # the first of two values for register 4
    rules = VtpmRules(pcrs=(PcrRule(index=4, digests=(PCRS[4],)), PcrRule(index=9, digests=(PCRS[9],))))
    verdict = judged(milan, component, vtpm=rules)
    assert verdict.failed == ("pcr_values",) and "4: " + "ee" * 32 in str(verdict)


def test_a_register_with_a_rule_has_to_be_quoted(milan: Bench, paravisor: Paravisor) -> None:
    some = Quoted(NONCE, values=PCRS[:5], banks=((0x0B, tuple(range(5))),))
    verdict = judged(milan, paravisor.component(REPORT_DATA, some, pcrs=pcr_values(PCRS[:5])))
    assert verdict.failed == ("pcr_values",) and "9: not quoted" in str(verdict)


def test_a_policy_without_reference_values_accepts_nothing(milan: Bench, paravisor: Paravisor) -> None:
    plain = milan.policy()  # one that accepts no virtual TPM, so it needs no such values
    assert verify_and_appraise_vtpm(paravisor.component(REPORT_DATA), plain, REPORT_DATA, milan.now).failed == (
        "pcr_values",
    )


@pytest.mark.parametrize(
    ("changed", "failed"), [({"measurements": (b"\x99" * 48,)}, "measurement"), ({"vmpl": (1,)}, "vmpl")]
)
def test_the_paravisor_itself_is_appraised(
    milan: Bench, paravisor: Paravisor, changed: dict[str, Any], failed: str
) -> None:
    assert judged(milan, paravisor.component(REPORT_DATA), **changed).failed == (failed,)


# --- hostile bytes ----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=140).map(lambda data: Quoted(NONCE).attest()[:6] + data))
def test_bytes_at_random_raise_nothing_else(data: bytes) -> None:
    for parse in (Quote.parse, Signature.parse, HclReport.parse, attestation_key):
        try:
            parse(data)
        except MalformedError:
            continue


def test_hcl_report() -> None:
    report, runtime = bytes(range(256)) * 4 + bytes(160), runtime_data()
    parsed = HclReport.parse(hcl_report(report, runtime))
    assert (parsed.report, parsed.runtime_data) == (report, runtime)


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"HCLA" + bytes(1231),
        b"hcla" + hcl_report(bytes(1184), b"{}")[4:],
        hcl_report(bytes(1184), b"{}", report_type=4),
        hcl_report(bytes(1184), b"{}", hash_type=2),
        hcl_report(bytes(1184), b""),
        hcl_report(bytes(1184), b"x" * 16385),
        hcl_report(bytes(1184), b"x" * 16384)[: MAX_HCL_REPORT_BYTES - 1],
    ],
    ids=["empty", "short", "magic", "TDX", "SHA-384", "no runtime data", "too long", "cut"],
)
def test_hostile_hcl_reports(blob: bytes) -> None:
    with pytest.raises(MalformedError):
        HclReport.parse(blob)


# --- recorded evidence ------------------------------------------------------------------------------------------------


def recorded(name: str) -> dict[str, Any]:
    vector = json.loads((VECTORS / "vtpm" / f"{name}.json").read_text())
    return {key: [*map(bytes.fromhex, value)] if key == "pcrs" else value for key, value in vector.items()}


def azure(name: str, snp: str) -> tuple[SevSnpVtpm, AttestationPolicy]:
    """A real guest's evidence, and a policy with its own paravisor and registers as reference values."""
    vector = recorded(name)
    hcl = HclReport.parse(bytes.fromhex(vector["hcl_report"]))
    product = "Milan" if "milan" in snp else "Genoa"
    chain = [(VECTORS / "snp" / "roots" / f"{kind}_{product.lower()}.der").read_bytes() for kind in ("ask", "ark")]
    component = SevSnpVtpm(
        report=hcl.report,
        certificates=((VECTORS / "snp" / f"{snp}.vek.der").read_bytes(), chain[0], chain[1]),
        runtime_data=hcl.runtime_data,
        quote=bytes.fromhex(vector["quote"]),
        signature=bytes.fromhex(vector["signature"]),
        pcrs=pcr_values(tuple(vector["pcrs"])),
    )
    return component, AttestationPolicy(
        simulation=False,
        products=(AcceptedProduct(product=product, ark_sha256=(AMD_ARK_SHA256[product],)),),
        measurements=(hcl.report[0x90:0xC0],),
        evidence_types=(("sev-snp-vtpm",),),
        vtpm=VtpmRules(pcrs=tuple(PcrRule(index=i, digests=(vector["pcrs"][i],)) for i in (0, 4, 7, 9, 11))),
        provisional=True,
    )


AZURE = [("azure-milan", "milan-v3-azure-v0"), ("azure-genoa", "genoa-v3-azure")]
AT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(("name", "snp"), AZURE)
def test_evidence_of_real_azure_guests_is_genuine_but_answers_others_nonces(name: str, snp: str) -> None:
    component, rules = azure(name, snp)
    verdict = verify_and_appraise_vtpm(component, rules, REPORT_DATA, AT)
    assert verdict.failed == ("quote_nonce",), str(verdict)
    for check in ("signature", "tcb_certificate", *OWN_CHECKS[:5], "measurement", "pcr_values"):
        assert check in {each.name for each in verdict.checks if each.ok}


@pytest.mark.parametrize(("name", "snp"), AZURE)
@pytest.mark.parametrize("part", ["report", "runtime_data", "quote", "signature"])
def test_one_flipped_bit_in_real_evidence(name: str, snp: str, part: str) -> None:
    component, rules = azure(name, snp)
    data = bytearray(getattr(component, part))
    place = {"report": 0x90, "quote": 100}.get(part, len(data) - 1)
    data[place] ^= 1
    expected = {"report": "signature", "runtime_data": "hcl_runtime_data"}.get(part, "quote_signature")
    verdict = verify_and_appraise_vtpm(component.model_copy(update={part: bytes(data)}), rules, REPORT_DATA, AT)
    assert verdict.failed[0] == expected and verdict.claims is None


@pytest.mark.parametrize("scheme", ["rsassa", "rsapss"])
def test_quotes_of_a_software_tpm(milan: Bench, paravisor: Paravisor, scheme: str) -> None:
    vector = recorded(f"swtpm-{scheme}")
    key = jwk(our_key().public_key(), n=base64url(int(vector["modulus"], 16)))
    component = with_runtime(paravisor, key).model_copy(
        update={
            "quote": bytes.fromhex(vector["quote"]),
            "signature": bytes.fromhex(vector["signature"]),
            "pcrs": pcr_values(tuple(vector["pcrs"])),
        }
    )
    rules = VtpmRules(pcrs=(PcrRule(index=4, digests=(hashlib.sha256(bytes(32) + b"\x04" * 32).digest(),)),))
    verdict = judged(milan, component, vtpm=rules)
    assert verdict.ok, str(verdict)
    assert {check.name: check.got for check in verdict.checks}["quote_signature"] == scheme.upper()
