"""``casemate`` as a person runs it, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from casemate import cli
from casemate.identity import save_keys
from casemate_schemas.keyring import KeyRing


def casemate(*arguments: str) -> int:
    """The exit status of ``casemate ARGUMENTS``."""
    return cli.run(lambda: cli.cli.main(list(arguments), standalone_mode=False))


def signed_in(monkeypatch: pytest.MonkeyPatch, url: str, keys: KeyRing, folder: Path) -> None:
    """Commands speak to that gateway with these keys; what they need and keep is in ``folder``."""
    save_keys(folder / "person.key", keys)
    monkeypatch.setenv("CASEMATE_URL", url)
    monkeypatch.setenv("CASEMATE_IDENTITY", str(folder / "person.key"))
    monkeypatch.setenv("CASEMATE_STATE_DIR", str(folder / "state"))


def network_in(folder: Path) -> str:
    """A file with one linear layer of two inputs, as ``--model`` takes it."""
    (folder / "net.py").write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(2, 1))\n")
    return f"{folder / 'net.py'}:net"
