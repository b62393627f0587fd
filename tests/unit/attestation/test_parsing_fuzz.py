"""Parsing raises nothing outside the error tree, and verification of hostile input raises nothing at all."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import casemate_attestation
from casemate_attestation.certificates import crl_profile, parse_certificate, parse_crl, vek_profile
from casemate_attestation.guest import certificates_of_table
from casemate_attestation.policy_file import PolicyFile
from casemate_attestation.report import AttestationReport
from casemate_attestation.verify import verify
from casemate_schemas.errors import CasemateError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import Bench

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.sampled_from(["set", "delete", "insert"]), st.integers(0, 255)), max_size=6
)


def edited(data: bytes, edits: list[tuple[int, str, int]]) -> bytes:
    """``data`` with a few bytes set, deleted or inserted."""
    result = bytearray(data)
    for position, kind, value in edits:
        at = position % (len(result) + 1)
        if kind == "insert":
            result.insert(at, value)
        elif at < len(result):
            if kind == "set":
                result[at] = value
            else:
                del result[at]
    return bytes(result)


def only_our_errors(parse: Callable[[bytes], object], data: bytes) -> None:
    try:
        parse(data)
    except CasemateError:
        return


@FUZZ
@given(edits=EDITS)
def test_edited_reports(milan: Bench, edits: list[tuple[int, str, int]]) -> None:
    original = milan.report()
    report = edited(original, edits)
    only_our_errors(AttestationReport.parse, report)
    assert milan.judge(report).ok == (report == original)


@FUZZ
@given(edits=EDITS, index=st.integers(0, 2))
def test_edited_certificates(milan: Bench, edits: list[tuple[int, str, int]], index: int) -> None:
    original = milan.chip.certificates
    changed = edited(original[index], edits)
    only_our_errors(lambda der: vek_profile(parse_certificate(der)), changed)
    chain = [changed if i == index else der for i, der in enumerate(original)]
    verdict = verify(milan.report(), chain, milan.policy(), milan.now)
    assert verdict.ok == (changed == original[index])


@FUZZ
@given(edits=EDITS)
def test_edited_revocation_lists(milan: Bench, edits: list[tuple[int, str, int]]) -> None:
    original = REVOCATION_LISTS.setdefault("list", milan.authority.issue_crl([3, 77]))
    changed = edited(original, edits)
    only_our_errors(lambda der: crl_profile(parse_crl(der)), changed)
    assert milan.judge(crl=changed).ok == (changed == original)


REVOCATION_LISTS: dict[str, bytes] = {}


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=400), text=st.text(max_size=100))
def test_arbitrary_bytes(data: bytes, text: str) -> None:
    for parse in (AttestationReport.parse, parse_certificate, parse_crl, certificates_of_table, PolicyFile.parse):
        only_our_errors(parse, data)
    only_our_errors(lambda _: PolicyFile.parse(text), b"")


def test_no_check_is_an_assert_statement() -> None:
    """``python -O`` would drop it."""
    package = Path(casemate_attestation.__file__).parent
    for source in package.glob("*.py"):
        tree = ast.parse(source.read_text("utf-8"))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], source.name
