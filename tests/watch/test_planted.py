"""A few real runs with a fault each, and without: a smoke of `bench/planted_faults.py`, which tries all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penchant.disk import read_json_lines
from penchant.doctor.diagnosis import diagnose
from penchant.watch import DETECTORS

BENCH = Path(__file__).parents[2] / "bench"
RUNS = {
    "dpo": set(),
    "orpo": set(),
    "rate 5,000 times lower": {"rate-too-low"},
    "held-out columns swapped": {"reversed"},
    "filler in the chosen": {"length-exploitation"},
    "a loss that cuts the graph": {"no-gradient"},
    "a rule that sees no difference": {"undecided"},
    "a rule that pays for length": {"answers-grow", "unfinished"},
}
"""What is tried, and what has to be told of it."""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The logs of these runs, made in a process of their own: the bench defines a loss that nobody else may know."""
    folder = tmp_path_factory.mktemp("planted")
    command = [sys.executable, str(BENCH / "planted_faults.py"), "--seeds", "1", "--folder", str(folder)]
    subprocess.run([*command, "--only", *RUNS], capture_output=True, check=False)  # the table lacks the other runs
    found = {place.parent.name: place for place in folder.glob("*/*/0")}
    return {name: found[name.replace(",", "").replace(" ", "-")] for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_a_planted_fault_is_told_and_of_a_clean_run_nothing(name: str, logs: dict[str, Path]) -> None:
    told = {event["code"] for event in read_json_lines(logs[name] / "events.jsonl")} & set(DETECTORS)
    assert told >= RUNS[name]
    if not RUNS[name]:
        assert told == set()
    assert {trouble.first.code for trouble in diagnose(logs[name]).troubles} == told, "the doctor says the same"


def test_every_detector_has_a_run_with_its_fault() -> None:
    code = (
        "import json, planted_runs as runs; print(json.dumps([c for codes, _ in runs.FAULTS.values() for c in codes]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, env=environment)
    assert set(json.loads(said.stdout.splitlines()[-1])) == set(DETECTORS)


def test_the_page_of_the_watch_tells_of_every_detector_and_threshold() -> None:
    page = (BENCH.parent / "docs" / "watch.md").read_text(encoding="utf-8")
    for code, detector in DETECTORS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| **{code}**")]
        thresholds = ", ".join(f"{name} {value:g}" for name, value in detector.thresholds.items())
        for text in (detector.looks_for, detector.meaning, detector.remedy, detector.source, thresholds):
            assert text in row, (code, text)
