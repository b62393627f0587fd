"""What an attestation report vouches for: every claim, and nothing that could be read in two ways."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from casemate_schemas.codec import encode
from casemate_schemas.evidence import REPORT_DATA_DOMAIN, KeyBrokerNonce, WorkerClaims
from casemate_schemas.keys import SEALING_PUBLIC_BYTES
from pydantic import ValidationError


def nonce(key_broker: str, value: int = 1) -> KeyBrokerNonce:
    return KeyBrokerNonce(key_broker=key_broker, nonce=bytes([value]) * 32)


def claims(**changed: Any) -> WorkerClaims:
    fields: dict[str, Any] = {
        "consortium": b"\x01" * 32,
        "manifest": b"\x02" * 32,
        "job_id": "0" * 32,
        "terms": b"\x03" * 32,
        "attempt": 1,
        "sealing_key": b"\x04" * SEALING_PUBLIC_BYTES,
        "signing_key": b"\x05" * 32,
        "nonces": (nonce("north"), nonce("south")),
    }
    return WorkerClaims(**{**fields, **changed})


CHANGES: list[dict[str, Any]] = [
    {"consortium": b"\x0b" * 32},
    {"manifest": b"\x0b" * 32},
    {"job_id": "1" * 32},
    {"terms": b"\x0b" * 32},
    {"attempt": 2},
    {"sealing_key": b"\x0b" * SEALING_PUBLIC_BYTES},
    {"sealing_key": b"\x04" * (SEALING_PUBLIC_BYTES - 1) + b"\x05"},
    {"signing_key": b"\x0b" * 32},
    {"nonces": (nonce("north"), nonce("south", 2))},
    {"nonces": (nonce("north"), nonce("east-north"))[::-1]},
    {"nonces": (nonce("north"),)},
    {"nonces": (nonce("north"), nonce("south"), nonce("university"))},
]


def test_report_data_is_the_hash_of_domain_and_claims() -> None:
    expected = hashlib.sha512(b"casemate/v1/report-data\x00" + encode(claims())).digest()
    assert REPORT_DATA_DOMAIN == b"casemate/v1/report-data\x00"
    assert claims().report_data == expected and len(expected) == 64


def test_every_claim_changes_it() -> None:
    found = {claims().report_data, *(claims(**change).report_data for change in CHANGES)}
    assert len(found) == len(CHANGES) + 1
    assert {name for change in CHANGES for name in change} == set(WorkerClaims.model_fields) - {"version"}


@pytest.mark.parametrize(
    "nonces", [(), (nonce("south"), nonce("north")), (nonce("north"), nonce("north", 2)), tuple(map(nonce, "ab" * 40))]
)
def test_nonces_stand_in_one_order_one_each(nonces: tuple[KeyBrokerNonce, ...]) -> None:
    with pytest.raises(ValidationError):
        claims(nonces=nonces)


@pytest.mark.parametrize("attempt", [0, -1, (1 << 16) + 1, True])
def test_attempts_are_bounded(attempt: int) -> None:
    with pytest.raises(ValidationError):
        claims(attempt=attempt)


def test_each_key_broker_finds_its_own_nonce() -> None:
    assert claims().nonce_of("south") == b"\x01" * 32
    assert claims().nonce_of("university") is None
