"""Remembered chains: the verdict is the same with and without, and nothing that failed is remembered."""

from __future__ import annotations

import hashlib
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from casemate_attestation.certificates import parse_certificate, signed_by
from casemate_attestation.chain import ChainCache, JudgedChain, judge_chain, parse_chain
from casemate_attestation.verdict import Verdict
from casemate_attestation.verify import verify
from casemate_schemas.attestation_policy import AMD_ROOTS, AcceptedProduct
from casemate_schemas.errors import ParameterError

from .conftest import Bench, MakeBench

ROOTS = Path(__file__).parents[2] / "vectors" / "snp" / "roots"


def verified(bench: Bench, chains: ChainCache | None, report: bytes | None = None, **changed: Any) -> Verdict:
    arguments: dict[str, Any] = {"certificates": bench.chip.certificates, "policy": bench.policy(), "now": bench.now}
    return verify(bench.report() if report is None else report, **(arguments | changed), chains=chains)


def judged(bench: Bench) -> JudgedChain:
    return judge_chain(parse_chain(bench.chip.certificates))


@pytest.fixture
def warm(milan: Bench) -> ChainCache:
    """A cache that holds the chain of ``milan``."""
    chains = ChainCache()
    assert verified(milan, chains).ok
    assert len(chains) == 1
    return chains


def test_a_remembered_chain_is_not_judged_again(
    milan: Bench, warm: ChainCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = milan.report()
    cold = verified(milan, None, report)
    monkeypatch.setattr("casemate_attestation.verify.parse_chain", None)
    monkeypatch.setattr("casemate_attestation.verify.judge_chain", None)
    assert verified(milan, warm, report) == cold


def test_one_other_byte_is_another_chain(milan: Bench, warm: ChainCache) -> None:
    for index in range(3):
        certificates = list(milan.chip.certificates)
        certificates[index] = certificates[index][:-1] + bytes((certificates[index][-1] ^ 1,))
        assert "chain" in verified(milan, warm, certificates=certificates).failed
        assert warm.find(certificates) is None
    vek, ask, ark = milan.chip.certificates
    assert warm.find((ask, vek, ark)) is None
    assert verified(milan, warm, certificates=(vek, ask)).failed == ("certificate_format",)


def test_what_depends_on_more_than_the_bytes_is_judged_anew(milan: Bench, warm: ChainCache) -> None:
    elsewhere = AcceptedProduct(product="Milan", ark_sha256=(b"\1" * 32,))
    late = milan.now + timedelta(days=8 * 365)
    revoked = milan.authority.issue_crl([0x10001])
    assert verified(milan, warm, policy=milan.policy(products=(elsewhere,))).failed == ("root",)
    assert verified(milan, warm, now=late).failed == ("validity",)
    assert verified(milan, warm, crl=revoked).failed == ("revocation",)
    assert verified(milan, warm, milan.report(signer_info=1 << 2)).failed == ("signer_certificate",)
    assert verified(milan, warm, milan.report(chip_id=bytes(64))).failed == ("chip_id",)
    assert verified(milan, warm, milan.report(cpuid_model=0x11)).failed == ("product",)


def test_failures_are_not_remembered(milan: Bench, make_bench: MakeBench) -> None:
    chains = ChainCache()
    wrong = milan.with_vek(signer=milan.authority.keys.ark)
    elsewhere = AcceptedProduct(product="Milan", ark_sha256=(b"\1" * 32,))
    assert verified(wrong, chains).failed == ("chain",)
    assert verified(milan, chains, policy=milan.policy(products=(elsewhere,))).failed == ("root",)
    assert verified(milan, chains, make_bench().report()).failed == ("signature", "chip_id")
    assert verified(milan, chains, now=milan.now - timedelta(days=3)).failed == ("validity",)
    assert len(chains) == 0
    with pytest.raises(ParameterError):
        chains.remember(judged(wrong))
    assert verified(wrong, chains).failed == ("chain",)


def test_bounded_and_the_one_used_longest_ago_goes_first(make_bench: MakeBench) -> None:
    chains = ChainCache(max_entries=2)
    first, second, third = (make_bench() for _ in range(3))
    for bench in (first, second, first, third):
        assert verified(bench, chains).ok
    assert len(chains) == 2
    assert [chains.find(bench.chip.certificates) is not None for bench in (first, second, third)] == [True, False, True]
    with pytest.raises(ParameterError):
        ChainCache(max_entries=0)


def test_threads_share_it(make_bench: MakeBench) -> None:
    """More chips than room, all verified at once by several threads: every verdict right, never over the bound."""
    chains = ChainCache(max_entries=3)
    evidence = [(bench, bench.report()) for bench in (make_bench() for _ in range(6))]
    outcomes: list[bool] = []

    def work() -> None:
        for bench, report in evidence * 3:
            outcomes.append(verified(bench, chains, report).ok)
            outcomes.append(len(chains) <= 3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4 * 2 * 18 and all(outcomes)


@pytest.mark.parametrize("name", ["milan", "genoa", "turin"])
def test_amds_roots_signed_themselves(name: str) -> None:
    """What :func:`judge_chain` knows by heart of exactly these three files."""
    der = (ROOTS / f"ark_{name}.der").read_bytes()
    assert hashlib.sha256(der).digest() in AMD_ROOTS and len(AMD_ROOTS) == 3
    ark = parse_certificate(der)
    assert ark.issuer == ark.subject and signed_by(ark.tbs, ark.signature, ark)


def test_any_other_root_has_to_have_signed_itself(milan: Bench) -> None:
    vek, intermediate, ark = milan.chip.certificates
    broken = ark[:-1] + bytes([ark[-1] ^ 1])
    by_itself = "a signature on 'ARK-Milan' that is not by 'ARK-Milan'"
    assert judged(milan).problem is None
    assert judge_chain(parse_chain((vek, intermediate, broken))).problem == by_itself
    real = (ROOTS / "ark_milan.der").read_bytes()
    changed = real[:-1] + bytes([real[-1] ^ 1])
    names = ("milan-v3-azure-v0.vek.der", "roots/ask_milan.der")
    chain = tuple((ROOTS.parent / name).read_bytes() for name in names)
    assert judge_chain(parse_chain((*chain, real))).problem is None
    assert judge_chain(parse_chain((*chain, changed))).problem == by_itself
