"""A few real runs with a fault each, and without: a smoke of `bench/planted_faults.py`, which tries all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penchant.disk import read_json_lines
from penchant.watch import DETECTORS

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules of the bench, which are no package."""
    sys.path.insert(0, str(BENCH))
    import planted_faults

    yield planted_faults
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def world(bench: Any) -> Any:
    return bench.World(0)


@pytest.mark.parametrize(
    "name",
    [
        "rate 5,000 times lower",
        "held-out columns swapped",
        "filler in the chosen",
        "a loss that cuts the graph",
        "a rule that sees no difference",
        "a rule that pays for length",
    ],
)
def test_a_planted_fault_is_seen_while_the_run_goes_on(name: str, bench: Any, world: Any, tmp_path: Path) -> None:
    codes, case = bench.FAULTS[name]
    bench.run(case, world, tmp_path / "run")
    told = {event["code"] for event in read_json_lines(tmp_path / "run" / "events.jsonl")}
    assert told & set(DETECTORS) >= set(codes)
    assert set(bench.told(tmp_path / "run")) == told & set(DETECTORS), "the doctor says the same"


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_of_a_clean_run_nothing_is_told(name: str, bench: Any, world: Any, tmp_path: Path) -> None:
    bench.run(bench.CLEAN[name], world, tmp_path / "run")
    told = {event["code"] for event in read_json_lines(tmp_path / "run" / "events.jsonl")}
    assert not told & set(DETECTORS)


def test_every_detector_has_a_run_with_its_fault(bench: Any) -> None:
    assert {code for codes, _ in bench.FAULTS.values() for code in codes} == set(DETECTORS)


def test_the_page_of_the_watch_tells_of_every_detector_and_threshold() -> None:
    page = (BENCH.parent / "docs" / "watch.md").read_text(encoding="utf-8")
    for code, detector in DETECTORS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| **{code}**")]
        thresholds = ", ".join(f"{name} {value:g}" for name, value in detector.thresholds.items())
        for text in (detector.looks_for, detector.meaning, detector.remedy, detector.source, thresholds):
            assert text in row, (code, text)
