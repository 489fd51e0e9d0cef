"""The watch beside real runs: told once, the same after a kill, and acting only where it is asked to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penchant.cli import main
from penchant.config import config_from
from penchant.disk import read_json_lines
from penchant.doctor.diagnosis import diagnose
from penchant.errors import UserError
from penchant.training.loop import Training
from penchant.training.run import train
from penchant.watch import DETECTORS

ROWS = [
    {"prompt": f"the {one} is", "chosen": f" {one} Paris yes", "rejected": f" {two} mat no"}
    for one in ("cat", "dog", "tree", "capital")
    for two in ("red", "blue", "one", "two", "under", "France")
]
"""So easy that margins soon are large."""

LOW = {"margin-explosion.warn": 0.5, "margin-explosion.major": 2.0}
"""Thresholds that a run of a second passes."""


@pytest.fixture
def settings(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(model_folder),
        "data": ROWS,
        "eval_data": ROWS[:8],
        "output_dir": str(tmp_path / "run"),
        "batch_size": 8,
        "num_train_epochs": 6,
        "learning_rate": 1e-2,
        "eval_steps": 6,
        "num_samples": 0,
        "quiet": True,
        "watch": {"thresholds": LOW},
    }


def told(run_dir: str | Path) -> list[dict[str, Any]]:
    """The findings of the watch among the events of a run."""
    events = read_json_lines(Path(run_dir) / "events.jsonl")
    return [
        event for event in events if event["code"] in DETECTORS or event["code"] in ("rate-lowered", "stopped-early")
    ]


def metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    lines = read_json_lines(Path(run_dir) / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in ("time_s", "tokens_per_s")} for line in lines]


def test_findings_are_told_once_as_events_with_what_to_do(settings: dict[str, Any]) -> None:
    train(**settings)
    findings = told(settings["output_dir"])
    assert "margin-explosion" in {event["code"] for event in findings}
    assert len({(event["code"], event["severity"]) for event in findings}) == len(findings)
    for event in findings:
        detector = DETECTORS[event["code"]]
        assert detector.meaning in event["message"]
        assert 0 <= event["step"] <= 18


def test_the_doctor_finds_in_the_log_what_was_told_beside_training(settings: dict[str, Any]) -> None:
    train(**settings)
    diagnosis = diagnose(Path(settings["output_dir"]))
    replayed = {(trouble.first.code, trouble.first.step) for trouble in diagnosis.troubles}
    first: dict[str, int] = {}
    for event in told(settings["output_dir"]):
        first.setdefault(event["code"], event["step"])
    assert replayed == set(first.items())


@pytest.mark.parametrize("stop_at", [7, 14])
def test_a_run_that_was_killed_tells_the_same_as_one_that_was_not(
    settings: dict[str, Any], tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["watch"]["lower_learning_rate_on"] = ["margin-explosion"]
    settings["save_steps"] = 5
    train(**settings)
    whole = settings["output_dir"]
    settings["output_dir"] = str(tmp_path / "killed")
    step = Training._step

    def fails(self: Training, draw: Any) -> str:
        if self.progress.step == stop_at:
            raise RuntimeError("the machine is gone")
        return step(self, draw)

    monkeypatch.setattr(Training, "_step", fails)
    with pytest.raises(RuntimeError, match="gone"):
        train(**settings)
    monkeypatch.undo()
    train(**settings)
    assert told(settings["output_dir"]) == told(whole)
    assert metrics(settings["output_dir"]) == metrics(whole)


def test_the_learning_rate_is_halved_where_it_is_asked_for_and_only_there(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    train(**settings)
    plain = {line["step"]: line["learning_rate"] for line in metrics(settings["output_dir"]) if "loss" in line}
    assert not [event for event in told(settings["output_dir"]) if event["code"] == "rate-lowered"]
    settings |= {
        "output_dir": str(tmp_path / "slower"),
        "watch": {"thresholds": LOW, "lower_learning_rate_on": ["margin-explosion"]},
    }
    train(**settings)
    (event, *more) = [event for event in told(settings["output_dir"]) if event["code"] == "rate-lowered"]
    for line in metrics(settings["output_dir"]):
        if "loss" in line:
            halvings = sum(line["step"] > one["step"] for one in (event, *more))
            assert line["learning_rate"] == pytest.approx(plain[line["step"]] / 2**halvings)


def test_a_run_can_be_ended_at_a_finding_and_gone_on_with(settings: dict[str, Any]) -> None:
    settings["watch"]["stop_on"] = ["margin-explosion"]
    summary = train(**settings).summary
    run_dir = Path(settings["output_dir"])
    stop = summary["stopped_by"]
    assert (summary["status"], stop["code"], summary["steps"]) == ("stopped", "margin-explosion", stop["step"])
    assert summary["steps"] < summary["total_steps"]
    assert (run_dir / "report.html").exists()
    assert (run_dir / "model" / "config.json").exists()
    assert (run_dir / "checkpoints" / f"step-{stop['step']}").exists()
    assert metrics(run_dir)[-1]["step"] == stop["step"]
    assert "eval_loss" in metrics(run_dir)[-1], "the model that is kept was measured"
    again = train(**settings).summary
    assert (again["status"], again["steps"]) == ("finished", again["total_steps"])
    assert [event["code"] for event in told(run_dir)].count("margin-explosion") == 1


def test_a_kill_while_a_stopped_run_ends_does_not_make_it_go_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["watch"]["stop_on"] = ["margin-explosion"]
    from penchant.training.session import Session

    def fails(self: Session) -> None:
        assert self.training is not None
        self.training.save()
        raise RuntimeError("the machine is gone")

    monkeypatch.setattr(Session, "_save_model", fails)
    with pytest.raises(RuntimeError, match="gone"):
        train(**settings)
    monkeypatch.undo()
    summary = train(**settings).summary
    assert (summary["status"], summary["stopped_by"]["code"]) == ("stopped", "margin-explosion")
    assert summary["steps"] == summary["stopped_by"]["step"]


def test_without_the_watch_nothing_is_told(settings: dict[str, Any]) -> None:
    train(**{**settings, "watch": {"enabled": False}})
    assert told(settings["output_dir"]) == []


def test_thresholds_of_the_run_file_hold_in_the_run_and_for_the_doctor(settings: dict[str, Any]) -> None:
    train(**settings)
    assert "margin-explosion" in {trouble.first.code for trouble in diagnose(Path(settings["output_dir"])).troubles}
    settings["watch"] = {"thresholds": {"margin-explosion.warn": 1e6}}
    train(**settings, overwrite=True)
    assert "margin-explosion" not in {event["code"] for event in told(settings["output_dir"])}
    codes = {trouble.first.code for trouble in diagnose(Path(settings["output_dir"])).troubles}
    assert "margin-explosion" not in codes


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({"stop_on": ["displacd"]}, "watch.stop_on: there is no finding 'displacd'; did you mean 'displaced'?"),
        ({"thresholds": {"displaced.wran": 1.0}}, "there is no threshold 'displaced.wran'; did you mean"),
        ({"enabled": False, "stop_on": ["stop"]}, "watch.stop_on: has no effect without watch.enabled"),
    ],
)
def test_what_the_watch_does_not_know_is_named(watch: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        config_from({"model": "m", "data": "d", "watch": watch})


def test_the_command_ends_with_an_exit_code_of_its_own(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["train", "--model", settings["model"], "--data", str(tmp_path / "rows.jsonl"), "--eval_size", "0"]
    words += [
        "--output_dir",
        str(tmp_path / "cli"),
        "--batch_size",
        "8",
        "--num_train_epochs",
        "12",
        "--num_samples",
        "0",
    ]
    low = ["--watch.thresholds", "{margin-explosion.warn: 0.5}"]
    assert main([*words, "--learning_rate", "1e-2", "--watch.stop_on", "margin-explosion,stop", *low]) == 4
    assert main(["doctor", str(tmp_path / "cli")]) in (0, 2)
