"""Margins as a filter and as weights."""

from __future__ import annotations

import math

import pytest

from penchant.data.filters import filter_by_margin
from penchant.errors import UserError
from penchant.examples import Pair, Unpaired

PAIRS = [Pair("p", "a", "b", f"f:{place}", 2.0, margin) for place, margin in enumerate([0.0, 0.5, 3.0, None])]


def test_pairs_below_the_margin_and_without_one_are_left_out_by_name() -> None:
    kept, problems = filter_by_margin([*PAIRS, Unpaired("p", "a", True, "f:9")], 0.5, weigh=False)
    assert kept == PAIRS[1:3]
    assert [(problem.source, problem.code) for problem in problems] == [("f:0", "F01"), ("f:3", "F02"), ("f:9", "F02")]


def test_weights_are_multiplied_by_the_advantage_of_bradley_and_terry() -> None:
    kept, problems = filter_by_margin(PAIRS, None, weigh=True)
    wins = [1 / (1 + math.exp(-margin)) for margin in (0.5, 3.0)]
    assert [pair.weight for pair in kept] == pytest.approx([2.0 * (win - (1 - win)) for win in wins], rel=1e-12)
    assert [(problem.source, problem.code) for problem in problems] == [("f:0", "F03"), ("f:3", "F02")]


@pytest.mark.parametrize(("min_margin", "weigh", "key"), [(1.0, True, "min_margin"), (None, True, "weigh_by_margin")])
def test_data_without_margins_are_refused(min_margin: float | None, weigh: bool, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: no pair has a margin"):
        filter_by_margin([PAIRS[3], Unpaired("p", "a", True)], min_margin, weigh)


def test_margins_that_are_all_too_small_leave_nothing_and_are_no_error_here() -> None:
    kept, problems = filter_by_margin(PAIRS[:2], 9.0, weigh=False)
    assert kept == []
    assert len(problems) == 2
