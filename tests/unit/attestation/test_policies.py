"""Policies: what may be written down at all, on the wire and in a policy file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from casemate_attestation.policy_file import PolicyFile, TrustedRoots
from casemate_schemas.attestation_policy import AMD_ARK_SHA256, AcceptedProduct, AttestationPolicy
from casemate_schemas.codec import decode, encode
from casemate_schemas.errors import MalformedError, SetupError
from pydantic import ValidationError

from .conftest import Bench

AMD_MILAN = AcceptedProduct(product="Milan", ark_sha256=(AMD_ARK_SHA256["Milan"],))
SIMULATED = AcceptedProduct(product="Milan", ark_sha256=(b"\1" * 32,))
BOTH = AcceptedProduct(product="Milan", ark_sha256=(AMD_ARK_SHA256["Milan"], b"\1" * 32))
MISPLACED = AcceptedProduct(product="Genoa", ark_sha256=(AMD_ARK_SHA256["Milan"],))


@pytest.mark.parametrize(
    ("simulation", "product", "valid"),
    [
        (False, AMD_MILAN, True),
        (True, SIMULATED, True),
        (True, AMD_MILAN, False),
        (False, SIMULATED, False),
        (True, BOTH, False),
        (False, BOTH, False),
        (False, MISPLACED, False),
        (True, MISPLACED, False),
    ],
)
def test_no_policy_accepts_both_kinds_of_roots(simulation: bool, product: AcceptedProduct, valid: bool) -> None:
    def make() -> AttestationPolicy:
        return AttestationPolicy(simulation=simulation, products=(product,), measurements=(bytes(48),))

    if valid:
        assert make().simulation is simulation
    else:
        with pytest.raises(ValidationError):
            make()


def test_a_consortiums_policy_names_its_programs() -> None:
    with pytest.raises(ValidationError):
        AttestationPolicy(simulation=False, products=(AMD_MILAN,), measurements=())
    with pytest.raises(ValidationError):
        AttestationPolicy(simulation=False, products=(), measurements=(bytes(48),))
    with pytest.raises(ValidationError):
        AttestationPolicy(simulation=False, products=(AMD_MILAN, AMD_MILAN), measurements=(bytes(48),))


def test_a_policy_survives_the_wire(milan: Bench) -> None:
    policy = milan.policy(chip_ids=(b"\2" * 64, b"\3" * 8), csp_ids=("a cloud",), host_data=bytes(32), vmpl=(0, 1))
    assert decode(AttestationPolicy, encode(policy)) == policy


def test_safe_defaults(milan: Bench) -> None:
    policy = AttestationPolicy(simulation=True, products=(SIMULATED,), measurements=(bytes(48),))
    rules = policy.guest_policy
    assert not (rules.debug or rules.migrate_ma or rules.cxl or policy.provisional)
    assert policy.vmpl == (0,)
    assert policy.min_report_version == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"measurement": []}',
        '{"measurements": []}',
        '{"measurements": ["00"]}',
        '{"measurements": "00"}',
        '{"report_data": "' + "zz" * 64 + '"}',
        '{"report_data": "' + "AA" * 64 + '"}',
        '{"min_tcb": {"bl": 256}}',
        '{"min_tcb": {"boot": 1}}',
        '{"min_fw": [1, 55]}',
        '{"vmpl": []}',
        '{"vmpl": [4]}',
        '{"guest_policy": {"debug": 1}}',
        '{"guest_policy": {"debgu": true}}',
        '{"platform": {"smt": "true"}}',
        '{"mit_launch": -1}',
        '{"max_crl_age_s": 0}',
        '{"mit_launch": 18446744073709551616}',
        '{"provisional": "no"}',
        '{"csp_ids": ["\\u001b"]}',
        '{"vmpl": [0], "unknown": 1}',
        " " * (2 << 20),
    ],
)
def test_a_policy_file_with_a_mistake_is_refused(text: str) -> None:
    with pytest.raises(MalformedError):
        PolicyFile.parse(text)


def test_a_policy_file_means_what_it_says(milan: Bench, tmp_path: Path) -> None:
    _, ask, ark = milan.chip.certificates
    (tmp_path / "ark_milan.der").write_bytes(ark)
    (tmp_path / "ask_milan.der").write_bytes(ask)
    text = {
        "measurements": ["ab" * 48],
        "min_fw": [1, 55, 21],
        "min_tcb": {"bl": 9, "fmc": 2},
        "mit_launch": 5,
        "chip_ids": ["01" * 8],
        "min_version": 4,
        "max_crl_age_s": 86400,
        "platform": {"iommu_write_safe": True},
        "guest_policy": {"min_abi": [1, 51]},
    }
    file = PolicyFile.parse(json.dumps(text))
    policy = file.under(TrustedRoots.load(tmp_path))
    assert policy.simulation
    assert policy.measurements == (b"\xab" * 48,)
    assert policy.products[0].ark_sha256 == (milan.chip.root.ark_sha256,)
    assert policy.products[0].min_firmware == (1, 55, 21)
    assert (policy.products[0].min_tcb.bl, policy.products[0].min_tcb.fmc) == (9, 2)
    assert (policy.launch_mitigations, policy.min_report_version) == (5, 4)
    assert policy.guest_policy.min_abi == (1, 51)
    assert (policy.max_crl_age_s, policy.platform.iommu_write_safe) == (86400, True)
    assert policy.guest_policy.smt and not policy.guest_policy.debug
    assert not file.is_empty
    assert PolicyFile.parse("{}").is_empty


def test_roots_of_both_kinds_are_refused(milan: Bench, tmp_path: Path) -> None:
    vectors = Path(__file__).parents[2] / "vectors" / "snp" / "roots"
    with pytest.raises(SetupError):
        TrustedRoots.load(tmp_path)
    (tmp_path / "ark_milan.der").write_bytes(milan.chip.certificates[2])
    (tmp_path / "ask_milan.der").write_bytes(milan.chip.certificates[1])
    assert not TrustedRoots.load(tmp_path).are_amds
    (tmp_path / "ark_genoa.der").write_bytes((vectors / "ark_genoa.der").read_bytes())
    with pytest.raises(SetupError, match="not both"):
        TrustedRoots.load(tmp_path)
    assert TrustedRoots.load(vectors).are_amds
    (tmp_path / "ark_genoa.der").write_bytes(b"no certificate")
    with pytest.raises(MalformedError):
        TrustedRoots.load(tmp_path)
