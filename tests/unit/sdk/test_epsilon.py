"""``casemate epsilon``: figures once more from the events of a result and of a real ledger; every forgery is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from casemate.cli.epsilon import recompute
from casemate.identity import save_keys
from casemate.results import open_result
from casemate_privacy.recorded import MAX_FILE_BYTES, RecordedEvents, events_of_ledger, read_events
from casemate_schemas.errors import MalformedError, ParameterError, TooLargeError
from casemate_schemas.job import NoisePhase
from casemate_schemas.requests import Budget, BudgetRenewed, RenewBudget, ShowBudget
from support.command_line import casemate
from support.key_brokers import Bench
from support.results import World


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Written by a key broker that charged two jobs, one of them under a schedule of noise, and one under a fresh budget."""
    bench = Bench(tmp_path_factory.mktemp("key-brokers"))
    try:
        dataset = bench.register(epsilon=5.0)
        steward = bench.stewards["north"]

        def budget() -> Budget:
            found = bench.ask("north", steward, ShowBudget(dataset=dataset.card.id))
            assert isinstance(found, Budget)
            return found

        schedule = (NoisePhase(first_step=6, factor=1.5),)
        for training in ({"steps": 5}, {"steps": 9, "noise_schedule": schedule}):
            bench.grant_all(bench.accepted_job(plan=bench.plan(dataset.use(), training=training)))
        renewal = RenewBudget(dataset=dataset.card.id, lineage=budget().lineage)
        assert isinstance(bench.ask("north", steward, renewal), BudgetRenewed)
        bench.grant_all(bench.accepted_job(plan=bench.plan(dataset.use(), training={"steps": 7})))
        return events_of_ledger(budget()).model_dump_json().encode()
    finally:
        bench.close()


def test_a_ledgers_charges_and_periods_are_those_that_follow_from_its_events(ledger: bytes) -> None:
    found = list(recompute(ledger, None, check=True))
    assert [item.rule for item in found] == ["fixed"] * 3 + ["adaptive"] * 2
    assert all(item.holds and item.charged == pytest.approx(item.epsilon, rel=1e-9) for item in found)
    assert all(item.checked.lower <= item.epsilon <= item.checked.upper for item in found[:3] if item.checked)
    first, second, third, whole, fresh = (item.epsilon for item in found)
    assert whole > second > first and fresh == third, "the only job of a period is stated at its own epsilon"
    events = read_events(ledger).guarantees[1].events[0]
    assert [(phase.steps, phase.noise_multiplier) for phase in events.phases] == [(6, 2.0), (3, 3.0)]


def _forgeries(record: dict[str, Any]) -> list[str]:
    """The file with one thing about one event, or one figure, made to look better."""
    better = []
    for field, value in (("steps", 4), ("noise_multiplier", 2.01), ("sample_rate", {"numerator": 1, "denominator": 9})):
        copy = json.loads(json.dumps(record))
        copy["guarantees"][0]["events"][0]["phases"][0][field] = value
        better.append(json.dumps(copy))
    for index in (0, 3):
        copy = json.loads(json.dumps(record))
        copy["guarantees"][index]["epsilon"] *= 0.9999
        better.append(json.dumps(copy))
    return better


def test_a_figure_that_does_not_follow_is_told_and_is_the_exit_status(
    ledger: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "events.json"
    file.write_bytes(ledger)
    assert casemate("epsilon", "--events", str(file)) == 0
    assert "✗" not in capsys.readouterr().out
    for forged in _forgeries(json.loads(ledger)):
        file.write_text(forged)
        assert casemate("epsilon", "--events", str(file)) == 1
        assert capsys.readouterr().out.count("✗") == 1


def test_a_results_figures_are_recomputed_offline_and_without_torch(
    w: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = open_result(w.result(), w.clara, w.expected())
    folder, key, file = tmp_path / "out", tmp_path / "clara.key", tmp_path / "events.json"
    result.save(folder)
    save_keys(key, w.clara.keys)
    assert casemate("results", "events", str(folder), "--identity", str(key), "--out", str(file)) == 0
    assert "3 figures" in capsys.readouterr().out
    code = (
        "import socket, sys; socket.socket.connect = None\n"
        "from casemate.cli import cli, run\n"
        f"status = run(lambda: cli.main(['epsilon', '--events', {str(file)!r}, '--json'], standalone_mode=False))\n"
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'opacus', 'nats')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(item["of"], item["rule"]) for item in found] == [
        ("cardio@north", "fixed"),
        ("cardio@south", "fixed"),
        ("a person in each of them", "person"),
    ]
    assert [item["epsilon"] for item in found] == [
        *(owner.epsilon for owner in result.privacy.owners),
        result.privacy.person_epsilon,
    ]
    assert all(item["holds"] and item["checked"] is None for item in found)


def test_another_delta_and_the_second_accountant(w: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "events.json"
    file.write_text(open_result(w.result(), w.clara, w.expected()).privacy_events().model_dump_json())
    assert casemate("epsilon", "--events", str(file), "--delta", "1e-6", "--check", "--json") == 0
    for item in json.loads(capsys.readouterr().out):
        assert item["charged"] is None and item["delta"] == 1e-6
        assert item["checked"]["lower"] <= item["epsilon"] <= item["checked"]["upper"]
        assert item["checked"]["upper"] - item["checked"]["lower"] < 0.005 * item["epsilon"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"neighbouring_relation": "replace-one"},
        {"surprise": 1},
        {"guarantees": [{}]},
        {"guarantees": "all"},
    ],
)
def test_what_is_no_such_file_is_refused(ledger: bytes, change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError, match=next(iter(change))):
        read_events(json.dumps(json.loads(ledger) | change).encode())


def test_hostile_files_are_refused_before_they_cost_anything(ledger: bytes) -> None:
    for data in (b"", b"[" * 100_000, b"\xff\xfe", b'{"guarantees": NaN}'):
        with pytest.raises(MalformedError):
            read_events(data)
    with pytest.raises(TooLargeError):
        read_events(b" " * (MAX_FILE_BYTES + 1))
    record = RecordedEvents.model_validate_json(ledger).model_dump(mode="json")
    record["guarantees"][0]["events"][0]["phases"][0]["noise_multiplier"] = 0.001
    with pytest.raises(ParameterError, match="cardio@north, train: noise multiplier"):
        list(recompute(json.dumps(record).encode(), None, check=False))
