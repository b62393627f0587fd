"""The commands of a steward whose dataset is registered: amend, a patient's withdrawal, revoke, delete, and history."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import casemate as cm
import numpy as np
import pytest
from casemate_schemas.errors import DatasetError
from support.command_line import casemate, signed_in
from support.key_brokers import Bench

from .conftest import Road

CARDIO = "cardio@north"
Steward = Callable[..., Any]


@pytest.fixture
def steward(road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Steward:
    """Runs a command as north's steward; its exit status and what it printed."""
    nora = road.bench.stewards["north"]
    signed_in(monkeypatch, road.url, replace(nora.keys, delegation=nora.delegation), tmp_path)

    async def command(*arguments: str) -> tuple[int, str]:
        status = await asyncio.to_thread(casemate, *arguments)
        shown = capsys.readouterr()
        lines = (shown.out + shown.err).splitlines()  # the programs, which run in this process, log there as well
        return status, " ".join(word for line in lines if not line.startswith("{") for word in line.split())

    return command


def _files(bench: Bench, folder: Path, *, rows: int, **licence: Any) -> list[str]:
    age = np.linspace(0, 120, rows).astype(np.float32)
    np.savez(folder / "columns.npz", age=age, outcome=(age > 60).astype(np.int64))
    (folder / "card.json").write_text(bench.card(row_bound=rows).model_dump_json())
    found = bench.licence(CARDIO, expires=1 << 41, **licence)
    (folder / "licence.json").write_text(found.model_dump_json())
    return ["--columns", str(folder / "columns.npz"), "--card", str(folder / "card.json")]


async def test_a_dataset_from_its_first_version_to_its_end(road: Road, steward: Steward, tmp_path: Path) -> None:
    licence = str(tmp_path / "licence.json")
    columns = _files(road.bench, tmp_path, rows=150)
    assert (await steward("datasets", "push", *columns, "--licence", licence))[0] == 0

    _files(road.bench, tmp_path, rows=150, number=2, epsilon=2.5)
    status, shown = await steward("datasets", "amend", CARDIO, "--licence", licence, "--yes")
    assert status == 0 and "It is stricter" in shown and "licence 2 of cardio@north is in force" in shown
    assert "Privacy: ε 3 in all" in shown and "Privacy: ε 2.5 in all" in shown
    _files(road.bench, tmp_path, rows=150, number=3, epsilon=4.0)
    status, shown = await steward("datasets", "amend", CARDIO, "--licence", licence, "--yes")
    assert status == 0 and "It is looser" in shown
    assert (await steward("datasets", "amend", "other@north", "--licence", licence, "--yes"))[0] == 1

    columns = _files(road.bench, tmp_path, rows=149, number=3, epsilon=4.0)
    assert (await steward("datasets", "push", *columns, "--licence", licence))[0] == 0
    first = (await steward("budget", CARDIO))[1]
    assert (await steward("datasets", "delete", CARDIO, "--old-versions", "--confirm", "cardio"))[0] == 1
    status, shown = await steward("datasets", "delete", CARDIO, "--old-versions", "--confirm", CARDIO)
    assert status == 0 and "erased for good: 1 version of cardio@north" in shown and "stays" not in shown
    assert (await steward("budget", CARDIO))[1] == first

    clara, consortium_id = road.identity(road.bench.clara), road.bench.consortium.id.hex()
    async with cm.connect(
        road.url, identity=clara, state_dir=tmp_path / "clara", consortium=consortium_id
    ) as consortium:
        assert [(item.id, item.card.row_bound) for item in await consortium.datasets()] == [(CARDIO, 149)]
        status, shown = await steward("datasets", "revoke", CARDIO, "--yes")
        assert status == 0 and "It allows nobody anything" in shown and "licence 4" in shown
        assert len(await consortium.datasets()) == 0
        with pytest.raises(DatasetError):
            await _train(consortium)

    assert (await steward("datasets", "delete", CARDIO, "--confirm", CARDIO))[0] == 0
    status, shown = await steward("datasets", "history", CARDIO)
    assert status == 0 and shown.count("(erased)") == 2 and shown.count("licence ") == 4 and "is erased" in shown
    assert shown.index("at most 150 rows") < shown.index("at most 149 rows")
    assert (await steward("budget", CARDIO))[0] == 0
    assert (await steward("datasets", "amend", CARDIO, "--licence", licence, "--yes"))[0] == 1
    assert (await steward("datasets", "history", "none@north"))[0] == 1


async def _train(consortium: Any) -> None:
    from torch import nn

    await consortium.train(
        model=nn.Sequential(nn.Linear(1, 1)),
        datasets=[CARDIO],
        target="outcome",
        privacy=cm.Privacy(epsilon=1.0, delta=1e-4),
        optimizer=cm.SGD(lr=0.5),
        batch_size=10,
        steps=4,
    )


async def test_new_seed_secrets_and_backups_are_an_officers(road: Road, steward: Steward) -> None:
    status, shown = await steward("key-broker", "rotate-seeds")
    assert status == 0 and "epoch 2" in shown
    status, shown = await steward("key-broker", "backup")
    assert status == 2 and "backup_dir" in shown
