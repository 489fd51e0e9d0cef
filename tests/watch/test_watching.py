"""Findings are told once, and again when they get worse, whether a run was interrupted or not."""

from __future__ import annotations

import json
from typing import Any

from penchant.watch import Watch, worst_first

from .logs import DPO, training


def growing() -> list[dict[str, Any]]:
    """The margin goes from 1 to 80."""
    return [{**line, "rewards/margins": float(line["step"])} for line in training(80)]


def test_a_finding_is_told_once_and_again_when_it_is_worse() -> None:
    watch = Watch(DPO)
    told = [(found.code, found.severity, found.step) for line in growing() for found in watch.look(line)]
    # The mean of the last ten lines passes 10 at step 15, and 50 at step 55.
    assert [one for one in told if one[0] == "margin-explosion"] == [
        ("margin-explosion", "warn", 15),
        ("margin-explosion", "major", 55),
    ]
    assert len({one[:2] for one in told}) == len(told)
    assert worst_first(watch.told.values())[0].severity == "major"


def test_a_watch_that_was_put_away_and_taken_up_again_says_the_same() -> None:
    whole = Watch(DPO)
    expected = [found for line in growing() for found in whole.look(line)]
    for stop in (0, 14, 15, 40, 55, 79):
        first = Watch(DPO)
        told = [found for line in growing()[:stop] for found in first.look(line)]
        second = Watch(DPO)
        second.load(json.loads(json.dumps(first.to_json())))
        told += [found for line in growing()[stop:] for found in second.look(line)]
        assert told == expected
        assert second.to_json() == whole.to_json()


def test_thresholds_of_the_run_hold() -> None:
    watch = Watch(DPO, {"margin-explosion": {"warn": 60.0, "major": 70.0}})
    told = [(found.code, found.step) for line in growing() for found in watch.look(line)]
    assert ("margin-explosion", 65) in told
    assert ("margin-explosion", 15) not in told
