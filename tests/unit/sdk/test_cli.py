"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from casemate.cli import COMMANDS, run
from casemate.cli.datasets import read_card, read_columns, read_licence
from casemate.cli.jobs import load_model
from casemate.cli.results import results
from casemate.identity import save_keys
from casemate.results import open_result
from casemate_schemas.errors import BudgetError, MalformedError, ParameterError, SetupError
from casemate_schemas.licence import WithMeasurement
from support.command_line import casemate, signed_in
from support.fake_gateway import FakeGateway, job_status
from support.results import JOB_ID, World

from .conftest import card_of, licence_of


def test_help_lists_every_command_and_imports_none_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = {name for name in sys.modules if name.startswith("casemate.cli.")}
    assert casemate("--help") == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name}" in text
    assert {name for name in sys.modules if name.startswith("casemate.cli.")} == loaded


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert casemate("version") == 0
    assert capsys.readouterr().out.startswith("casemate 0.")


def test_a_command_whose_extra_is_missing_says_the_line_that_mends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'nats'", name="nats")

    monkeypatch.setattr("casemate.cli.importlib.import_module", missing)
    with pytest.raises(SystemExit) as ended:
        casemate("up", "--whatever")
    assert ended.value.code == 2
    assert "pip install 'casemate[local]'" in capsys.readouterr().err


def test_errors_of_the_tree_are_one_line_and_an_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: Exception) -> Any:
        raise error

    assert run(lambda: fails(BudgetError("spent"))) == 1
    assert run(lambda: fails(SetupError("no key"))) == 2
    assert run(lambda: fails(click.UsageError("what?"))) == 2
    assert run(lambda: fails(ModuleNotFoundError("nats", name="nats"))) == 2
    with pytest.raises(ModuleNotFoundError):
        run(lambda: fails(ModuleNotFoundError("ours", name="casemate_gateway.app")))
    assert "casemate: spent [budget_exceeded]" in capsys.readouterr().err


def test_no_such_command_is_a_usage_error() -> None:
    assert casemate("nothing") == 2


def test_verify_shows_every_step_and_says_simulated(
    w: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, key = tmp_path / "out", tmp_path / "clara.key"
    open_result(w.result(), w.clara, w.expected()).save(folder)
    save_keys(key, w.clara.keys)
    arguments = ["results", "verify", str(folder), "--identity", str(key)]
    assert casemate(*arguments) == 0
    text = capsys.readouterr().out
    assert "SIMULATED" in text and "✓ 12" in text and JOB_ID in text
    assert casemate(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["simulation"] is True and len(found["verified"]) == 12
    release = folder / "release"
    release.write_bytes(release.read_bytes()[:-1] + b"\x00")
    assert casemate(*arguments) == 1
    assert "step 1 (release)" in capsys.readouterr().err


async def test_commands_speak_to_the_gateway_and_say_simulated(
    gateway: FakeGateway, w: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signed_in(monkeypatch, gateway.url, w.clara.keys, tmp_path)
    approval = {"key_broker": "north", "verdict": "refused\x1b[2J", "answer": None}
    gateway.status = job_status(JOB_ID, "refused", reason="licence_forbids", approvals=[approval])
    expected = {
        ("datasets", "list"): (0, "cardio@south"),
        ("datasets", "show", "cardio@north"): (0, "lets scientists list cardio@north"),
        ("datasets", "show", "none@north"): (1, ""),
        ("budget", "cardio@north"): (0, "2.5"),
        ("budget", "events", "cardio@north", "--out", str(tmp_path / "events.json")): (0, "what they follow"),
        ("jobs", "list"): (0, "licence_forbids"),
        ("jobs", "status", JOB_ID): (1, JOB_ID),
        ("jobs", "watch", JOB_ID): (1, "licence_forbids"),
        ("jobs", "cancel", JOB_ID): (0, JOB_ID),
    }
    for arguments, (status, text) in expected.items():
        assert await asyncio.to_thread(casemate, *arguments) == status, arguments
        shown = capsys.readouterr()
        assert text in shown.out and "SIMULATED" in shown.out and "\x1b[2J" not in shown.out, arguments
        assert ("first contact" in shown.err) == (arguments == ("datasets", "list"))
    assert await asyncio.to_thread(casemate, "results", "get", JOB_ID, "-o", str(tmp_path / "out")) == 1
    assert "licence_forbids" in capsys.readouterr().err


def test_results_group_has_its_commands() -> None:
    assert sorted(results.commands) == ["events", "get", "verify"]


def test_cards_and_licences_are_read_from_json(tmp_path: Path) -> None:
    card, licence = tmp_path / "card.json", tmp_path / "licence.json"
    card.write_text(card_of("north").model_dump_json())
    values = json.loads(licence_of("north").model_dump_json())
    values["permissions"][1]["rule"] = {"rule": "with_measurement", "measurement": "4d" * 48}
    values |= {"expires": "2027-01-01T01:00:00+01:00"}
    licence.write_text(json.dumps(values))
    assert dict(read_card(card)) == dict(card_of("north"))
    found = read_licence(licence)
    assert found.permissions[1].rule == WithMeasurement(measurement=b"\x4d" * 48)
    assert found.expires == 1_798_761_600_000
    wrong = ({"epsilon": -1}, {"expires": "2027-01-01T00:00:00"}, {"expires": "tomorrow"}, {"regions": ["FR", "DE"]})
    for text in ("[]", "{", '{"epsilon": NaN}', *(json.dumps(values | change) for change in wrong)):
        licence.write_text(text)
        with pytest.raises(ParameterError):
            read_licence(licence)
    card.write_text("{}")
    with pytest.raises(ParameterError):
        read_card(card)


def test_columns_are_read_without_pickles(tmp_path: Path) -> None:
    good, pickled, other = tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "c.npz"
    np.savez(good, age=np.arange(3, dtype=np.float32))
    assert read_columns(good)["age"].tolist() == [0.0, 1.0, 2.0]
    np.savez(pickled, age=np.array([{}], dtype=object))
    other.write_bytes(b"nothing")
    for path in (pickled, other):
        with pytest.raises(MalformedError):
            read_columns(path)


def test_a_model_comes_from_the_users_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def net():\n    return 'a module'\ndef bad():\n    raise ValueError('oops')\n")
    assert load_model(f"{path}:net") == "a module"
    for where in (f"{path}:missing", f"{path}:bad", str(path), f"{tmp_path}/no.py:net", f"{path}:a.b"):
        with pytest.raises(SetupError):
            load_model(where)
