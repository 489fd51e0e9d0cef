"""The table of checks: every name is known wherever it is used, and severities follow the share of rows."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from penchant.config import Drop
from penchant.data.chat import TOKEN_CHECKS
from penchant.data.formats import CHECKS
from penchant.data.units import UNIT_CHECKS
from penchant.doctor.findings import (
    CODES,
    DOCTOR_CHECKS,
    PROBLEMS,
    SOUND,
    Finding,
    Severity,
    finding,
    finding_by_share,
    severity_of,
    worst_first,
)

DOCS = Path(__file__).parents[2] / "docs" / "data-doctor.md"


def test_drop_takes_the_checks_that_point_at_rows() -> None:
    assert sorted(get_args(Drop)) == sorted(check.name for check in DOCTOR_CHECKS.values() if check.can_be_dropped)


def test_every_check_is_explained_in_the_docs_and_has_a_name_of_its_own() -> None:
    told = DOCS.read_text(encoding="utf-8")
    assert len(CODES) == len(DOCTOR_CHECKS)
    for code, check in DOCTOR_CHECKS.items():
        assert f"| {code} {check.name} |" in told, code


def test_codes_that_are_counted_are_codes_of_rows() -> None:
    assert set(PROBLEMS) <= set(CODES)
    assert set(PROBLEMS.values()) | SOUND <= set(CHECKS | TOKEN_CHECKS | UNIT_CHECKS)


@pytest.mark.parametrize(
    ("count", "severity"), [(0, None), (1, "info"), (49, "info"), (50, "warn"), (199, "warn"), (200, "major")]
)
def test_the_worst_level_that_is_reached_holds(count: int, severity: Severity | None) -> None:
    assert severity_of(count, 1000, {"info": 0.0, "warn": 0.05, "major": 0.20}) == severity


def test_a_finding_tells_count_share_meaning_and_mend() -> None:
    found = finding_by_share("duplicate", 12, 240, ["a:1", "a:2"])
    assert found is not None
    assert found.severity == "warn"
    assert found.message.startswith("12 of 240 rows (5.0%) repeat an earlier row")
    assert found.fix == "keep one of each, or leave the rows out with drop: [duplicate]"
    assert found.as_dict()["rows"] == ["a:1", "a:2"]
    assert found.as_dict()["code"] == found.code == "S04"


def test_what_is_dropped_anyway_is_worth_knowing_only() -> None:
    found = finding_by_share("inverted", 1, 10, ["a:1"], dropped=True)
    assert found is not None
    assert found.severity == "info"
    assert "drop names inverted" in found.fix


def test_a_check_that_does_not_go_by_a_share_cannot_be_asked_for_one() -> None:
    with pytest.raises(ValueError, match="length-bias"):
        finding_by_share("length-bias", 1, 2, [])


def test_the_worst_comes_first_and_then_the_order_of_codes() -> None:
    some = [finding("tie", "info", "x"), finding("leak", "warn", "x"), finding("prefix", "info", "x")]
    some.append(finding("inverted", "stop", "x"))
    assert [found.name for found in worst_first(some)] == ["inverted", "leak", "prefix", "tie"]
    assert worst_first([]) == []
    assert isinstance(some[0], Finding)
