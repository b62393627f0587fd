"""The newest head of each key broker is kept and shown to it: nothing older replaces it, and nobody else's counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from casemate.state import State
from casemate_schemas.consortium import KeyBroker
from casemate_schemas.errors import SignatureError
from casemate_schemas.keyring import KeyRing
from casemate_schemas.requests import LedgerHead
from casemate_schemas.signatures import Signed, sign

CONSORTIUM = b"\x01" * 32
KEYS = KeyRing.generate()
NORTH = KeyBroker(id="north", serves=("north",), signing_key=KEYS.signing.public, sealing_key=KEYS.sealing.public)


def _head(keys: KeyRing = KEYS, **changed: Any) -> Signed:
    fields: dict[str, Any] = {
        "consortium": CONSORTIUM,
        "key_broker": "north",
        "branch": 0,
        "entries": 5,
        "ledger": bytes(32),
        "audit_size": 9,
        "audit_root": bytes(32),
        "at": 1,
    }
    return sign(LedgerHead(**(fields | changed)), keys.signing)


@pytest.fixture
def state(tmp_path: Path) -> State:
    made = State(tmp_path, CONSORTIUM)
    assert made.ledger_head(NORTH) is None
    made.remember_ledger_head(NORTH, CONSORTIUM, _head())
    return made


def test_only_what_goes_further_replaces_it(state: State) -> None:
    for older in ({"entries": 4, "audit_size": 99}, {"audit_size": 8}, {}):
        state.remember_ledger_head(NORTH, CONSORTIUM, _head(**older))
        assert state.ledger_head(NORTH) == _head()
    for newer in ({"audit_size": 10}, {"entries": 6}, {"branch": 1, "entries": 0, "audit_size": 3}):
        state.remember_ledger_head(NORTH, CONSORTIUM, _head(**newer))
        assert state.ledger_head(NORTH) == _head(**newer)


def test_others_heads_are_refused(state: State) -> None:
    for wrong in (_head(KeyRing.generate()), _head(key_broker="south"), _head(consortium=bytes(32))):
        with pytest.raises(SignatureError):
            state.remember_ledger_head(NORTH, CONSORTIUM, wrong)
    assert state.ledger_head(NORTH) == _head()


def test_after_a_change_of_keys_it_begins_anew(state: State) -> None:
    keys = KeyRing.generate()
    renewed = NORTH.model_copy(update={"signing_key": keys.signing.public})
    assert state.ledger_head(renewed) is None
    state.remember_ledger_head(renewed, CONSORTIUM, _head(keys, entries=1))
    assert state.ledger_head(renewed) == _head(keys, entries=1)
