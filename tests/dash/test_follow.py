"""A log is read as it grows, each line once; when it is cut back, reading begins anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penchant.dash import follow
from penchant.dash.follow import FollowedMetrics
from penchant.disk import append_json_line, write_json_lines
from penchant.report.rundir import read_run

from .conftest import MakeRun


def test_what_is_followed_is_what_the_report_reads(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_LINES_AT_ONCE", 7)
    run_dir = make_run()
    followed = FollowedMetrics(run_dir / "metrics.jsonl")
    assert followed.read_on(10)
    assert followed.series() == read_run(run_dir).metrics
    assert (followed.step, followed.num_lines, followed.share_read) == (120, 127, 1.0)
    assert followed.seconds_per_step() == pytest.approx(1.3)


def test_new_lines_are_added_and_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    followed = FollowedMetrics(path)
    assert followed.read_on(1)
    assert followed.series() == {}
    append_json_line(path, {"step": 1, "loss": 0.5})
    followed.read_on(1)
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    followed.read_on(1)
    assert followed.series()["loss"].points == ((1, 0.5),)
    with path.open("a") as file:
        file.write('ss": 0.25}\n')
    followed.read_on(1)
    assert followed.series()["loss"].points == ((1, 0.5), (2, 0.25))
    assert followed.cut_back_at is None


@pytest.mark.parametrize("way", ["exchanged", "shortened", "gone and back", "rewritten in place"])
def test_a_log_that_was_cut_back_is_read_anew(way: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_json_lines(path, [{"step": step, "loss": float(step)} for step in range(1, 10)])
    followed = FollowedMetrics(path)
    followed.read_on(1)
    kept = [{"step": step, "loss": -float(step)} for step in range(1, 5)]
    if way == "exchanged":  # as a resumed run does it
        write_json_lines(path, kept)
    elif way == "gone and back":
        path.unlink()
        followed.read_on(1)
        write_json_lines(path, kept)
    else:
        if way == "rewritten in place":
            kept += [{"step": step, "loss": -float(step)} for step in range(5, 20)]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    followed.read_on(1)
    assert followed.series()["loss"].points == tuple((row["step"], row["loss"]) for row in kept)
    assert followed.num_lines == len(kept)
    assert followed.cut_back_at in (9, 0) if way == "gone and back" else followed.cut_back_at == 9


def test_lines_that_are_no_metrics_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines: list[Any] = [
        '{"step": 1, "loss": 0.5}',
        "{broken",
        "[1, 2]",
        '{"loss": 9}',
        '{"step": "x", "loss": 9}',
        '{"step": 2, "loss": "text", "other": true, "deep": {"a": 1}}',
        '{"step": 3, "loss": null, "kl": 1e400}',
        '{"step": 4, "loss": ' + "9" * 400 + "}",
        '{"loss": 0.125, "step": 5}',
        '{"step": 6, "loss": 0.1}',
    ]
    path.write_text("\n".join(lines) + "\n")
    followed = FollowedMetrics(path)
    assert followed.read_on(1)
    points = dict(followed.series()["loss"].points)
    assert {step: points[step] for step in (1, 3, 4, 5, 6)} == {1: 0.5, 3: None, 4: None, 5: 0.125, 6: 0.1}
    assert set(points) <= {1, 3, 4, 5, 6}
    assert followed.num_unreadable == 1
    assert followed.step == 6


def test_reading_goes_on_where_the_time_was_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_LINES_AT_ONCE", 10)
    path = tmp_path / "metrics.jsonl"
    write_json_lines(path, [{"step": step, "loss": float(step)} for step in range(1, 101)])
    followed = FollowedMetrics(path)
    shares, looks = [], 0
    while not followed.read_on(0.0):
        shares.append(followed.share_read)
        looks += 1
    assert looks == 9
    assert shares == sorted(shares)
    assert 0.05 < shares[0] < 0.15
    assert followed.num_lines == 100


def test_a_line_without_end_is_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n' + b"x" * (20 << 20) + b'\n{"step": 2, "loss": 2.0}\n')
    followed = FollowedMetrics(path)
    assert followed.read_on(20)
    assert followed.series()["loss"].points == ((1, 1.0), (2, 2.0))
