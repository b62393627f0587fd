"""Licences as an owner writes them: in Python and in JSON, and what is said before anybody signs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import casemate as cm
import pytest
from casemate.cli.datasets import explain
from casemate.cli.datasets import read_licence as read
from casemate_schemas.errors import ParameterError
from casemate_schemas.licence import Before, Rule
from click.testing import CliRunner

from .conftest import licence_of

rules = cm.rules


def test_each_constructor_makes_its_rule() -> None:
    north, lab = rules.member("north"), rules.member("lab", of="recipient")
    assert north == cm.MemberIs(principal="submitter", member="north")
    assert lab == cm.MemberIs(principal="recipient", member="lab")
    assert rules.role("steward", of="approver") == cm.RoleIs(principal="approver", role="steward")
    assert rules.for_purpose("care") == cm.ForPurpose(purpose="care")
    assert rules.with_model("01" * 32) == rules.with_model(b"\x01" * 32) == cm.WithModel(model=b"\x01" * 32)
    assert rules.with_measurement("01" * 48) == cm.WithMeasurement(measurement=b"\x01" * 48)
    assert rules.all_of(north, lab) == cm.AllOf(rules=(north, lab))
    assert rules.any_of(north, lab) == cm.AnyOf(rules=(north, lab))
    assert rules.at_least(2, north, lab, lab) == cm.AtLeast(count=2, rules=(north, lab, lab))
    by = rules.role("steward", of="approver")
    assert rules.approvals(2, by=by, valid_s=60) == cm.Approvals(count=2, by=by, valid_s=60)
    east = timezone(timedelta(hours=1))
    for time in ("2027-01-01T01:00:00+01:00", datetime(2027, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, 1, tzinfo=east)):
        assert rules.before(time) == Before(time=1_798_761_600_000)


@pytest.mark.parametrize(
    "make",
    [
        lambda: rules.member("No Such"),
        lambda: rules.role("owner"),  # type: ignore[arg-type]
        lambda: rules.for_purpose(""),
        lambda: rules.with_model("zz"),
        lambda: rules.with_measurement(b"short"),
        lambda: rules.before("tomorrow"),
        lambda: rules.before(datetime(2027, 1, 1)),
        lambda: rules.all_of(),
        lambda: rules.at_least(3, rules.member("a"), rules.member("b")),
        lambda: rules.approvals(0, by=rules.role("steward", of="approver")),
    ],
)
def test_a_wrong_value_is_a_parameter_error(make: Callable[[], Rule]) -> None:
    with pytest.raises(ParameterError):
        make()


def test_explain_reads_a_licence_or_says_why_nobody_should_sign_it(tmp_path: Path) -> None:
    file = tmp_path / "licence.json"
    file.write_text(licence_of("north", legal_basis="consent\x1b[2J").model_dump_json())
    shown = CliRunner().invoke(explain, [str(file)], catch_exceptions=False).output
    assert shown.startswith("north lets scientists list cardio@north; scientists train on") and "\x1b" not in shown
    train = cm.Permission(action="train", rule=rules.for_purpose("research"))
    made = licence_of("north", permissions=(train,))
    file.write_text(made.model_dump_json())
    assert read(file) == made
    with pytest.raises(ParameterError, match="can hold for any submitter"):
        CliRunner().invoke(explain, [str(file)], catch_exceptions=False)
