from __future__ import annotations

import json

import pytest
from casemate_messaging.logs import ProgramLog


def test_a_line_is_one_json_object_with_allowed_fields_only(capsys: pytest.CaptureFixture[str]) -> None:
    log = ProgramLog("worker")
    log.info("claimed", job_id="0" * 32, attempt=2)
    log.warning("odd", reason="x\ny", weights="CANARY")  # type: ignore[typeddict-unknown-key]
    log.error("failed", error="ValueError")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert lines[0]["program"] == "worker"
    assert (lines[0]["event"], lines[0]["job_id"], lines[0]["attempt"]) == ("claimed", "0" * 32, 2)
    assert lines[1]["reason"] == "x\ny"
    assert "CANARY" not in json.dumps(lines)
