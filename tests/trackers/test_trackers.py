"""Trackers get the lines of the log, go on where they were, and can do the run no harm."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from penchant import trackers
from penchant.disk import append_json_line, read_json_lines, write_json, write_json_lines
from penchant.errors import UserError
from penchant.trackers import Trackers, refuse_missing, tracking
from penchant.trackers.__main__ import without_secrets

from ..training.test_run import train

FAKES = Path(__file__).parent / "fakes"
Told = list[tuple[str, int]]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with two lines of training and one of held-out metrics."""
    made = tmp_path / "my-run"
    made.mkdir()
    (made / "run.yaml").write_text("model: m\nloss: {name: dpo, beta: 0.1}\n")
    write_json(made / "summary.json", {"status": "running"})
    lines = [{"step": 0, "time_s": 0.1, "eval_loss": 0.7}]
    lines += [{"step": step, "time_s": 1.0, "loss": 1 / step, "kl": None} for step in (1, 2)]
    write_json_lines(made / "metrics.jsonl", lines)
    return made


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the fake clients where trackers find them; the file with what they were told."""
    path = tmp_path / "calls.jsonl"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("FAKE_CALLS", str(path))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    return path


@pytest.fixture
def told() -> Told:
    """What was told of trackers."""
    return []


@pytest.fixture
def left_to_themselves() -> Iterator[list[Any]]:
    """Processes that are killed behind the test."""
    processes: list[Any] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def follow(run_dir: Path, name: str, told: Told) -> Trackers:
    return Trackers(run_dir, [name], lambda sentence, step: told.append((sentence, step)))


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of a TensorBoard folder, by tag, as often as they stand in it."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                number = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
                found.setdefault(value.tag, []).append((event.step, number))
    return found


def single(value: float) -> float:
    """As a float32, which TensorBoard keeps."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def expected(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    values: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time_s") and value is not None:
                values.setdefault(name, []).append((row["step"], single(value)))
    return values


def test_tensorboard_holds_every_value_of_a_run(model_folder: Path, tmp_path: Path) -> None:
    result = train(model_folder, tmp_path, trackers=["tensorboard"], eval_steps=4)
    assert written(result.run_dir / "tensorboard") == expected(read_json_lines(result.run_dir / "metrics.jsonl"))
    assert not [event for event in read_json_lines(result.run_dir / "events.jsonl") if event["code"] == "tracker"]


def test_what_is_gone_on_with_goes_on_in_the_same_place_and_nothing_is_sent_twice(run_dir: Path, told: Told) -> None:
    rows = read_json_lines(run_dir / "metrics.jsonl")
    with tracking(run_dir, ["tensorboard"], lambda *one: told.append(one)):
        pass
    # A resumed run cuts its log back to a checkpoint and writes the same lines again, then new ones.
    write_json_lines(run_dir / "metrics.jsonl", rows[:2])
    with tracking(run_dir, ["tensorboard"], lambda *one: told.append(one)) as going:
        rows += [{"step": 2, "eval_loss": 0.6}, {"step": 3, "loss": 0.1}]
        for row in rows[2:]:
            append_json_line(run_dir / "metrics.jsonl", row)
            going.look(row["step"])
    assert written(run_dir / "tensorboard") == expected(rows)
    assert told == []


def test_wandb_goes_on_in_the_same_run(run_dir: Path, calls: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    follow(run_dir, "wandb", told).end()
    append_json_line(run_dir / "metrics.jsonl", {"step": 3, "loss": 0.25})
    write_json(run_dir / "summary.json", {"status": "finished"})
    follow(run_dir, "wandb", told).end()
    said = read_json_lines(calls)
    assert told == []
    assert [(one["call"], one.get("step"), one.get("data")) for one in said if one["call"] == "log"] == [
        ("log", 0, {"eval_loss": 0.7}),
        ("log", 1, {"loss": 1.0}),
        ("log", 2, {"loss": 0.5}),
        ("log", 3, {"loss": 0.25}),
    ]
    first, second = (one for one in said if one["call"] == "init")
    assert first == second
    assert len(first["id"]) == 8
    config = {"model": "m", "loss.name": "dpo", "loss.beta": 0.1}
    assert first == {"call": "init", "project": "mine", "dir": str(run_dir), "id": first["id"], "name": "my-run"} | {
        "config": config,
        "resume": "allow",
    }
    assert [one["exit_code"] for one in said if one["call"] == "finish"] == [1, 0]


def test_trackio_goes_on_in_the_same_run(run_dir: Path, calls: Path, told: Told) -> None:
    for _ in range(2):
        follow(run_dir, "trackio", told).end()
    said = read_json_lines(calls)
    assert [one["call"] for one in said] == ["init", "log", "log", "log", "finish", "init", "finish"]
    names = {one["name"] for one in said if one["call"] == "init"}
    assert len(names) == 1
    assert names.pop().startswith("my-run-")
    assert told == []


@pytest.mark.parametrize("place", ["init", "log"])
def test_a_tracker_that_fails_is_told_of_once_and_left_alone(
    place: str, run_dir: Path, calls: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAULT", f"fail in {place}")
    going = follow(run_dir, "wandb", told)
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        going.look(7)
        time.sleep(0.05)
    for step in (8, 9):
        going.look(step)
    going.end()
    ((sentence, step),) = told
    assert step == 7
    assert sentence == (
        "the tracker wandb has failed (RuntimeError: 401 for key ($WANDB_API_KEY)); the run goes on without it"
    )
    kept = [path for path in run_dir.rglob("*") if path.is_file() and b"0123456789abcdef" in path.read_bytes()]
    assert kept == []


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_tracker_that_hangs_holds_nothing_up(
    place: str,
    run_dir: Path,
    calls: Path,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    left_to_themselves: list[Any],
) -> None:
    monkeypatch.setenv("FAKE_FAULT", f"hang in {place}")
    monkeypatch.setattr(trackers, "PATIENCE_S", 3.0)
    going = follow(run_dir, "wandb", told)
    left_to_themselves.extend(going._processes.values())
    before = time.perf_counter()
    for step in range(1000):
        going.look(step)
    assert time.perf_counter() - before < 0.5, "half a millisecond a line would be much"
    before = time.monotonic()
    going.end()
    assert time.monotonic() - before < 4.5
    ((sentence, _),) = told
    assert "the tracker wandb has not sent everything within 3 s of the end" in sentence


def test_a_run_with_a_failing_tracker_is_the_run_without_it(
    model_folder: Path, tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("FAKE_FAULT", "fail in init")
    result = train(model_folder, tmp_path, trackers="wandb")
    assert result.summary["status"] == "finished"
    (event,) = [event for event in read_json_lines(result.run_dir / "events.jsonl") if event["code"] == "tracker"]
    assert event["severity"] == "warn"
    assert "401" in event["message"]


def test_a_missing_package_stops_a_run_before_it_begins(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'penchant\[wandb\]'"):
        train(model_folder, tmp_path, trackers=["tensorboard", "wandb"])
    assert not (tmp_path / "run").exists()
    refuse_missing(["tensorboard"])


def test_a_tracker_that_nobody_named_is_not_started(model_folder: Path, tmp_path: Path, calls: Path) -> None:
    result = train(model_folder, tmp_path)
    assert not (result.run_dir / "trackers").exists()
    assert not calls.exists()


def test_a_run_that_is_killed_leaves_no_process_behind(run_dir: Path, calls: Path) -> None:
    code = (
        "import os, signal, time; from pathlib import Path; from penchant.trackers import Trackers\n"
        f"Trackers(Path({str(run_dir)!r}), ['wandb'], print)\n"
        "until = time.monotonic() + 60\n"
        f"while time.monotonic() < until and not Path({str(calls)!r}).exists(): time.sleep(0.02)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and read_json_lines(calls)[-1]["call"] != "finish":
        time.sleep(0.05)
    assert [one["call"] for one in read_json_lines(calls)] == ["init", "log", "log", "log", "finish"]
    assert read_json_lines(calls)[-1]["exit_code"] == 1


def test_secrets_of_the_environment_are_taken_out_of_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "topsecret1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://u:pw@host/x")
    monkeypatch.setenv("HARMLESS", "plain words")
    said = without_secrets("at https://u:pw@host/x with topsecret1: plain words")
    assert said == "at ($MLFLOW_TRACKING_URI) with ($MY_API_KEY): plain words"


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@installed("mlflow")
def test_mlflow_itself_goes_on_in_the_same_run(
    run_dir: Path, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    place = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    monkeypatch.setattr(trackers, "PATIENCE_S", 120.0)
    follow(run_dir, "mlflow", told).end()
    append_json_line(run_dir / "metrics.jsonl", {"step": 3, "loss": 0.25})
    write_json(run_dir / "summary.json", {"status": "finished"})
    follow(run_dir, "mlflow", told).end()
    assert told == []
    mlflow.set_tracking_uri(place)
    (run,) = mlflow.search_runs(experiment_names=["penchant"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert run.data.params == {"model": "m", "loss.name": "dpo", "loss.beta": "0.1"}
    assert run.info.status == "FINISHED"


@installed("wandb")
def test_wandb_itself_takes_the_lines_offline(run_dir: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "PATIENCE_S", 120.0)
    follow(run_dir, "wandb", told).end()
    assert told == []
    assert not (run_dir / "trackers" / "wandb.log").exists()
    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    body = file.read_bytes()
    known: Mapping[str, Any] = json.loads((run_dir / "trackers" / "wandb.json").read_text())
    assert file.name == f"run-{known['name'].rpartition('-')[2]}.wandb"
    assert b"eval_loss" in body
    assert b"loss.beta" in body
