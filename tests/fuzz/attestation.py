"""Fuzzing of everything in attestation that reads bytes from outside: ``python tests/fuzz/attestation.py -runs=1000000``.

An input is one byte that names a target and the bytes for it. Targets that parse may raise :class:`CasemateError` and nothing
else; targets that verify may raise nothing, and accept nothing but the genuine evidence they started from. Inputs grow from
real reports and certificates (and from more of them where a folder of labelled cases lies beside the checkout) and from a
simulated chip, by edits that keep the outer structure whole: DER trees, fields of a report, keys of a policy.

Arguments are libFuzzer's.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import atheris

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

with atheris.instrument_imports(include=["casemate_attestation"]):
    from casemate_attestation.appraise import appraise
    from casemate_attestation.certificates import (
        authority_profile,
        crl_profile,
        parse_certificate,
        parse_crl,
        vek_profile,
    )
    from casemate_attestation.chain import ChainCache
    from casemate_attestation.guest import certificates_of_table
    from casemate_attestation.hcl import HclReport, attestation_key
    from casemate_attestation.policy_file import PolicyFile, TrustedRoots
    from casemate_attestation.report import AttestationReport
    from casemate_attestation.simulated_chip import SimulatedAuthority, SimulatedKeys
    from casemate_attestation.tpm import Quote, Signature
    from casemate_attestation.verify import verify
    from casemate_attestation.vtpm import verify_and_appraise_vtpm
    from casemate_schemas.attestation_policy import AcceptedProduct, AttestationPolicy
    from casemate_schemas.errors import CasemateError, VerificationError
    from support.vtpm import RULES, Paravisor, Quoted, hcl_report, tpmt_signature

VECTORS = TESTS / "vectors" / "snp"
LABELLED = TESTS.parents[1] / "shared" / "snp-reports"
MAX_SEEDS = 64
REPORT_DATA = bytes(range(64))
MEASUREMENT = b"\x4d" * 48
REAL = ("milan-v2-sev", "milan-v3-azure-v0", "genoa-v3-azure")
FIELDS = (0, 4, 8, 0x10, 0x30, 0x34, 0x38, 0x40, 0x48, 0x4C, 0x50, 0x90, 0x180, 0x188, 0x1A0, 0x1E0, 0x1E8, 0x1EC, 0x1F0,
          0x1F8, 0x200, 0x208, 0x2A0, 0x2D0, 0x2E8, 0x318, 0x330, 0x49F)  # fmt: skip


def read_some(folder: Path, pattern: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob(pattern))[:MAX_SEEDS]]


class Genuine:
    """A simulated chip, and evidence of it that everything accepts."""

    def __init__(self) -> None:
        authority = SimulatedAuthority(SimulatedKeys.generate())
        self.chip = authority.issue_chip()
        self.report = self.chip.launch(MEASUREMENT).attest(REPORT_DATA).report
        self.certificates = self.chip.certificates
        self.crl = authority.issue_crl([3, 77])
        accepted = AcceptedProduct(product="Milan", ark_sha256=(self.chip.root.ark_sha256,))
        self.policy = AttestationPolicy(
            simulation=True,
            products=(accepted,),
            measurements=(MEASUREMENT,),
            evidence_types=(("sev-snp-vtpm",),),
            vtpm=RULES,
        )
        self.now = datetime.now(UTC)
        self.chains = ChainCache()
        verdict = verify(self.report, self.certificates, self.policy, self.now, self.crl, self.chains)
        if verdict.claims is None:
            raise AssertionError(str(verdict))
        self.claims = verdict.claims
        self.component = Paravisor(self._attest).component(REPORT_DATA)

    def _attest(self, report_data: bytes) -> tuple[bytes, tuple[bytes, bytes, bytes]]:
        return self.chip.launch(MEASUREMENT).attest(report_data).report, self.certificates

    def table(self) -> bytes:
        """The certificates as a host hands them over."""
        vcek, ask, ark = (bytes.fromhex(guid) for guid in (
            "63da758de6644564adc5f4b93be8accd", "4ab7b379bbac4fe4a02f05aef327c782", "c0b406a4a803495297433fb6014cd0ae"
        ))  # fmt: skip
        entries, offset = b"", 4 * 24
        for guid, der in zip((vcek, ask, ark), self.certificates, strict=True):
            entries += guid + struct.pack("<II", offset, len(der))
            offset += len(der)
        return entries + bytes(24) + b"".join(self.certificates)


GENUINE = Genuine()
ROOTS = TrustedRoots.load(VECTORS / "roots")


# --- targets ----------------------------------------------------------------------------------------------------------


def parses_certificate(data: bytes) -> None:
    certificate = parse_certificate(data)
    for judge in (vek_profile, lambda c: authority_profile(c, may_issue_crls=True)):
        try:
            judge(certificate)
        except VerificationError:
            continue


def parses_policy(data: bytes) -> None:
    file = PolicyFile.parse(data)
    appraise(GENUINE.claims, file.under(ROOTS), file.expected_report_data())


def verifies_report(data: bytes) -> None:
    verdict = verify(data, GENUINE.certificates, GENUINE.policy, GENUINE.now, None, GENUINE.chains)
    str(verdict)
    expect(verdict.ok == (data == GENUINE.report), "a report")


def verifies_certificate(data: bytes) -> None:
    index, der = data[0] % 3 if data else 0, data[1:]
    chain = [der if place == index else genuine for place, genuine in enumerate(GENUINE.certificates)]
    verdict = verify(GENUINE.report, chain, GENUINE.policy, GENUINE.now, None, GENUINE.chains)
    str(verdict)
    expect(verdict.ok == (der == GENUINE.certificates[index]), "a chain")


def verifies_crl(data: bytes) -> None:
    verdict = verify(GENUINE.report, GENUINE.certificates, GENUINE.policy, GENUINE.now, data, GENUINE.chains)
    str(verdict)
    expect(verdict.ok == (data == GENUINE.crl), "a revocation list")


def verifies_quote(data: bytes) -> None:
    """One part of a virtual TPM's evidence replaced; at its bounds the schema stands before this code."""
    part = ("runtime_data", "quote", "signature")[data[0] % 3 if data else 0]
    component = GENUINE.component.model_copy(update={part: data[1:]})
    policy, chains = GENUINE.policy, GENUINE.chains
    verdict = verify_and_appraise_vtpm(component, policy, REPORT_DATA, GENUINE.now, None, chains)
    str(verdict)
    expect(verdict.ok == (data[1:] == getattr(GENUINE.component, part)), "a quote")


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"{what} was accepted that is not the genuine one, or the genuine one was refused")


@dataclass
class Target:
    """What reads the bytes, what they grow from, and how."""

    name: str
    run: Callable[[bytes], object]
    seeds: list[bytes]
    edit: Callable[[bytes, random.Random], bytes] | None = None
    may_refuse: bool = True
    outcomes: Counter[str] = field(default_factory=Counter)

    def __call__(self, data: bytes) -> None:
        try:
            self.run(data)
        except CasemateError as error:
            if not self.may_refuse:
                raise
            self.outcomes[type(error).__name__] += 1
        else:
            self.outcomes["returned"] += 1


# --- edits that keep the structure ------------------------------------------------------------------------------------

Node = tuple[int, Any]
"""A DER element: its tag, and its bytes or (if it is constructed) its elements."""


def der_tree(data: bytes) -> list[Node]:
    """The elements of ``data`` as far as they are DER; what is not stands for itself under tag −1."""
    nodes: list[Node] = []
    position = 0
    while position + 2 <= len(data):
        tag, length, start = data[position], data[position + 1], position + 2
        if length >= 0x80:
            start += length & 0x7F
            length = int.from_bytes(data[position + 2 : start], "big")
        if start + length > len(data):
            break
        content = data[start : start + length]
        nodes.append((tag, der_tree(content) if tag & 0x20 else content))
        position = start + length
    return [*nodes, (-1, data[position:])] if position < len(data) else nodes


def der_bytes(nodes: list[Node]) -> bytes:
    parts = []
    for tag, content in nodes:
        body = der_bytes(content) if isinstance(content, list) else content
        size = len(body).to_bytes((len(body).bit_length() + 7) // 8 or 1, "big")
        length = size if len(body) < 0x80 else bytes((0x80 | len(size),)) + size
        parts.append(body if tag < 0 else bytes((tag,)) + length + body)
    return b"".join(parts)


def edit_der(data: bytes, rng: random.Random) -> bytes:
    """One element somewhere in the tree changed, doubled, dropped or moved, all lengths around it made right."""
    tree = der_tree(data)
    nodes = tree
    while nodes:
        index = rng.randrange(len(nodes))
        tag, content = nodes[index]
        if isinstance(content, list) and content and rng.random() < 0.85:
            nodes = content
            continue
        choice = rng.randrange(6)
        if choice == 0:
            nodes[index] = (rng.randrange(256), content if isinstance(content, bytes) else der_bytes(content))
        elif choice == 1:
            nodes.insert(rng.randrange(len(nodes) + 1), nodes[index])
        elif choice == 2:
            del nodes[index]
        elif isinstance(content, bytes):
            nodes[index] = (tag, bytes(atheris.Mutate(content, 600)) if choice < 5 else b"")
        else:
            rng.shuffle(content)
        break
    return der_bytes(tree)


def edit_numbered_der(data: bytes, rng: random.Random) -> bytes:
    return bytes((rng.randrange(3),)) + edit_der(data[1:], rng)


def edit_report(data: bytes, rng: random.Random) -> bytes:
    """A few fields set to small, large or any numbers, or one more or one less byte."""
    report = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.choice(FIELDS) + rng.randrange(8)
        value = rng.choice((0, 1, 2, 3, 5, 6, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        if at < len(report):
            report[at] = value
    if rng.random() < 0.02:
        report.append(0)
    return bytes(report)


def edit_policy(data: bytes, rng: random.Random) -> bytes:
    """One key of the JSON object set to a value that may fit."""
    try:
        policy = dict(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        policy = {}
    sizes = (8, 16, 32, 48, 64)
    hexes = bytes(rng.choice(sizes)).hex()
    values: tuple[Any, ...] = (None, 0, 1, -1, 5, 1 << 64, True, [], {}, hexes, [hexes], [1, 55, 0], [0, 1], {"bl": 1},
                               {"debug": True}, {"smt": False}, {"min_abi": [1, 51]}, 0.5, "Milan", [[]])  # fmt: skip
    policy[rng.choice((*PolicyFile.model_fields, "unknown"))] = rng.choice(values)
    return json.dumps(policy).encode()


# --- the run ----------------------------------------------------------------------------------------------------------


def make_targets() -> list[Target]:
    reports = [(VECTORS / f"{name}.bin").read_bytes() for name in REAL] + read_some(LABELLED / "real", "*.bin")
    certificates = read_some(VECTORS, "*.der") + read_some(LABELLED, "*.der") + list(GENUINE.certificates)
    lists = [GENUINE.crl, *read_some(LABELLED, "*.crl")]
    policies = [b"{}", json.dumps({"vmpl": [0], "min_tcb": {"snp": 8}, "guest_policy": {"smt": True}}).encode()]
    component = GENUINE.component
    quote = Quoted(REPORT_DATA[:32]).attest()
    parts = [
        bytes((n,)) + part for n, part in enumerate((component.runtime_data, component.quote, component.signature))
    ]
    numbered = [bytes((n,)) + der for n, der in enumerate(GENUINE.certificates)]
    return [
        Target("report", AttestationReport.parse, [*reports, GENUINE.report], edit_report),
        Target("certificate", parses_certificate, certificates, edit_der),
        Target("revocation list", lambda data: crl_profile(parse_crl(data)), lists, edit_der),
        Target("certificate table", certificates_of_table, [GENUINE.table()]),
        Target("policy file", parses_policy, policies, edit_policy),
        Target("paravisor's report", HclReport.parse, [hcl_report(GENUINE.report, component.runtime_data)]),
        Target("runtime data", attestation_key, [component.runtime_data]),
        Target("quote", Quote.parse, [component.quote, quote]),
        Target("quote's signature", Signature.parse, [component.signature, tpmt_signature(quote, pss=True)]),
        Target("verify report", verifies_report, [GENUINE.report], edit_report, may_refuse=False),
        Target("verify certificate", verifies_certificate, numbered, edit_numbered_der, may_refuse=False),
        Target("verify revocation list", verifies_crl, [GENUINE.crl], edit_der, may_refuse=False),
        Target("verify quote", verifies_quote, parts, may_refuse=False),
    ]


TARGETS = make_targets()
SUMMARY_EVERY = 100_000
_count = 0


def one_input(data: bytes) -> None:
    global _count
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])
    _count += 1
    if _count % SUMMARY_EVERY == 0:
        print_summary()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """An input for the same target, or once in a while for another: an edit of the data, or of a seed."""
    rng = random.Random(seed)
    number = rng.randrange(len(TARGETS)) if not data or rng.random() < 0.2 else data[0] % len(TARGETS)
    target = TARGETS[number]
    same = bool(data) and number == data[0] % len(TARGETS)
    payload = data[1:] if same and rng.random() < 0.6 else rng.choice(target.seeds)
    if target.edit is not None and rng.random() < 0.7:
        payload = target.edit(payload, rng)
    else:
        payload = bytes(atheris.Mutate(payload, max(max_size - 1, 1)))
    return bytes((number,)) + payload[: max_size - 1]


def print_summary() -> None:
    lines = [f"{_count} inputs"]
    for target in TARGETS:
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in target.outcomes.most_common())
        lines.append(f"  {target.name}: {outcomes}")
    sys.stderr.write("\n".join(lines) + "\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as corpus:
        for number, target in enumerate(TARGETS):
            for index, seed in enumerate(target.seeds):
                target(seed)
                Path(corpus, f"{number}-{index}").write_bytes(bytes((number,)) + seed)
        crashes = f"-artifact_prefix={tempfile.gettempdir()}/casemate-fuzz-"
        atheris.Setup([sys.argv[0], crashes, "-max_len=16384", "-timeout=20", *sys.argv[1:], corpus], one_input,
                      custom_mutator=mutate)  # fmt: skip
        atheris.Fuzz()


if __name__ == "__main__":
    main()
