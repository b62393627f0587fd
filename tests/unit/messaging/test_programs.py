"""Wrong settings end every program alike: one line that says what is wrong, exit status 2, and never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import casemate_gateway.__main__ as gateway
import casemate_key_broker.__main__ as key_broker
import casemate_worker.__main__ as worker
import pytest
from casemate_messaging.programs import run_program
from casemate_schemas.codec import encode
from casemate_schemas.errors import IntegrityError, RolledBackError, SetupError, UnavailableError
from casemate_schemas.keyring import KeyRing
from support.consortium import ConsortiumKeys, consortium_for_tests

PROGRAMS: dict[str, Callable[[], None]] = {
    "casemate-gateway": gateway.main,
    "casemate-key-broker": key_broker.main,
    "casemate-worker": worker.main,
}
SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
"""The example in the documentation of nkeys: the key of nobody."""


@pytest.fixture(scope="module")
def keys() -> ConsortiumKeys:
    return consortium_for_tests()


def good(program: str, folder: Path, keys: ConsortiumKeys) -> dict[str, str]:
    """Settings of a program that could run, were there a NATS."""
    (folder / "manifest").write_bytes(encode(keys.chain))
    for name, text in (("seed.nk", SEED), ("keys", keys.key_brokers["north"].to_text())):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    shared = {
        "nats_url": "nats://127.0.0.1:1",
        "nats_seed_file": str(folder / "seed.nk"),
        "consortium": keys.consortium.id.hex(),
        "manifest_file": str(folder / "manifest"),
        "state_dir": str(folder / "state"),
    }
    own = {
        "casemate-gateway": {"port": "0"},
        "casemate-key-broker": {"key_broker": "north", "keys_file": str(folder / "keys")},
        "casemate-worker": {
            "name": "worker-1",
            "guest": "simulated",
            "simulated_chip_socket": str(folder / "chip"),
            "scratch_dir": str(folder),
        },
    }
    return shared | own[program]


Change = Callable[[Path, dict[str, str]], object]


def _open(folder: Path, _: dict[str, str]) -> None:
    (folder / "seed.nk").chmod(0o644)


WRONG: dict[str, tuple[Change, str]] = {
    "an unknown setting": (lambda _, s: s.update(surprise="1"), "setting surprise"),
    "no consortium": (lambda _, s: s.pop("consortium"), "setting consortium"),
    "another consortium": (lambda _, s: s.update(consortium="00" * 32), "another consortium"),
    "no manifest file": (lambda f, _: (f / "manifest").unlink(), "cannot read"),
    "a manifest file that is none": (lambda f, _: (f / "manifest").write_bytes(b"\xc1\x00"), "[malformed]"),
    "an empty manifest file": (lambda f, _: (f / "manifest").write_bytes(b""), "[malformed]"),
    "a manifest file that is a folder": (lambda f, s: s.update(manifest_file=str(f)), "cannot read"),
    "no seed": (lambda f, _: (f / "seed.nk").unlink(), "cannot read"),
    "a seed that others can read": (_open, "chmod 600"),
    "a seed that is none": (lambda f, _: (f / "seed.nk").write_text("seed\n"), "seed"),
    "a seed that is no text": (lambda f, _: (f / "seed.nk").write_bytes(b"\xff\xfe\x00"), "seed"),
    "a URL of another kind": (lambda _, s: s.update(nats_url="http://127.0.0.1"), "URL"),
    "a URL without a host": (lambda _, s: s.update(nats_url="nats://"), "URL"),
    "a URL with a port that is none": (lambda _, s: s.update(nats_url="nats://127.0.0.1:99999999"), "URL"),
    "credentials in a URL": (lambda _, s: s.update(nats_url="nats://a:b@127.0.0.1"), "credentials"),
    "a TLS file that is none": (lambda f, s: s.update(nats_ca_file=str(f / "seed.nk")), "TLS files"),
    "a state folder that is a file": (lambda f, s: s.update(state_dir=str(f / "seed.nk")), "state"),
    "a state folder in a file": (lambda f, s: s.update(state_dir=str(f / "seed.nk" / "state")), "state"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("program", PROGRAMS)
def test_wrong_settings_are_one_line_and_status_two(
    program: str,
    wrong: str,
    keys: ConsortiumKeys,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = good(program, tmp_path, keys)
    change, says = WRONG[wrong]
    change(tmp_path, settings)
    path = tmp_path / "settings.toml"
    path.write_text("".join(f'{name} = "{value}"\n' for name, value in settings.items()))
    status, told = ended(program, path, monkeypatch, capfd)
    assert (status, told.count("\n")) == (2, 1), told
    assert told.startswith(f"{program}: ") and says in told and told.rstrip().endswith("]"), told


def ended(
    program: str, settings: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[object, str]:
    """Exit status and standard error of a program that ends by itself."""
    monkeypatch.setattr(sys, "argv", [program, "--settings", str(settings)])
    monkeypatch.setattr(worker, "keep_memory_private", lambda: None)
    monkeypatch.setattr(worker, "refuse_devices", lambda **_: None)
    with pytest.raises(SystemExit) as caught:
        PROGRAMS[program]()
    shown = capfd.readouterr()
    assert shown.out == ""
    return caught.value.code, shown.err


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "text", [None, b"= nothing", b"\xff\xfe", b"a = " + b"[" * 2000], ids=["none", "bad", "bytes", "deep"]
)
def test_a_settings_file_that_is_none(
    program: str,
    text: bytes | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "settings.toml"
    if text is not None:
        path.write_bytes(text)
    status, told = ended(program, path, monkeypatch, capfd)
    assert (status, told.count("\n")) == (2, 1), told
    assert str(path) in told and told.rstrip().endswith("[setup]")


@pytest.mark.parametrize(
    "wrong", [b"", b"\xff", KeyRing.generate().to_text().encode()], ids=["empty", "bytes", "others"]
)
def test_keys_that_are_not_the_key_brokers(
    wrong: bytes,
    keys: ConsortiumKeys,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = good("casemate-key-broker", tmp_path, keys)
    (tmp_path / "keys").write_bytes(wrong)
    path = tmp_path / "settings.toml"
    path.write_text("".join(f'{name} = "{value}"\n' for name, value in settings.items()))
    status, told = ended("casemate-key-broker", path, monkeypatch, capfd)
    assert (status, told.count("\n")) == (2, 1), told


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SetupError("no\nkey\x1b[2J"), 2),
        (UnavailableError("no NATS"), 1),
        (RolledBackError("set back"), 1),
        (IntegrityError("broken"), 1),
    ],
)
def test_what_may_pass_and_what_may_not(error: Exception, status: int, capfd: pytest.CaptureFixture[str]) -> None:
    def program() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_program("casemate-x", program)
    told = capfd.readouterr().err
    assert caught.value.code == status and told.count("\n") == 1 and "\x1b" not in told


def test_a_flaw_of_the_program_is_not_dressed_up() -> None:
    def program() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_program("casemate-x", program)
