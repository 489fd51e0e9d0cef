"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .training.test_run import rows, write_rows

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def penchant(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penchant", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, check=False)


def test_options_and_run_file_train_a_model_and_print_json(model_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    run_file = tmp_path / "run.yaml"
    run_file.write_text(f"model: {model_folder}\ndata: {data}\nlearning_rate: 5e-3\nbatch_size: 2\neval_size: 2\n")
    done = penchant(
        "train", str(run_file), "--batch-size", "4", "--loss.beta=0.2", "--method", "cdpo", "--num_samples", "1",
        "--sample_max_new_tokens", "3", "--max_steps", "2", "--lora.rank", "2", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["loss"] == {"name": "dpo", "beta": 0.2, "label_smoothing": 0.1}
    assert summary["steps"] == 2
    assert summary["pairs_seen"] == 8
    assert summary["lora"] is True
    run_dir = tmp_path / summary["run_dir"]
    assert run_dir == tmp_path / "runs" / "tiny-llama-cdpo"
    assert "learning_rate: 0.005" in (run_dir / "run.yaml").read_text()
    for said in ("10 pairs from pairs.jsonl (trl)", "2 pairs", "adapter switched off", "prefix_shared", "held out"):
        assert said in done.stderr, said
    again = penchant("report", str(run_dir))
    assert again.returncode == 0
    assert again.stdout.strip() == str(run_dir / "report.html")


def test_a_dry_run_prints_json_and_writes_nothing(model_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    done = penchant("train", "--model", str(model_folder), "--data", data, "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["chosen"].startswith("the cat")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train"], "model: is missing"),
        (["train", "nowhere.yaml"], "there is no such run file"),
        (["train", "list.yaml"], "list of 'key: value' lines"),
        (["train", "twice.yaml"], "the key 'seed' stands twice"),
        (["train", "unknown.yaml"], "did you mean 'learning_rate'"),
        (["train", "--model", "m", "--data", "d", "--learning_rte", "1"], "did you mean 'learning_rate'"),
        (["train", "--model", "m", "--data", "d", "--learning_rate", "fast"], "learning_rate: "),
        (["train", "--model", "m", "--data", "d", "--loss.beta"], "loss.beta: expected float"),
        (["train", "--model", "m", "--data", "nowhere.jsonl"], "there is no such file"),
        (["methods", "--loss.beta", "3"], "belong to `penchant train`"),
        (["report", "."], "run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_user_gets_wrong_is_one_sentence_and_exit_code_two(
    words: list[str], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "twice.yaml").write_text("model: m\ndata: d\nseed: 1\nseed: 2\n")
    (tmp_path / "unknown.yaml").write_text("model: m\ndata: d\nlearning_rat: 1\n")
    done = penchant(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_methods_teach_equation_source_and_settings() -> None:
    done = penchant("methods")
    assert done.returncode == 0
    for said in ("-log sigmoid(beta h)", "arXiv:2310.12036", "--loss.label_smoothing (default 0.1)"):
        assert said in done.stdout
    assert set(json.loads(penchant("methods", "--json").stdout)) == {"dpo", "cdpo", "ipo"}


def test_the_schema_is_json_and_knows_every_key() -> None:
    schema = json.loads(penchant("schema").stdout)
    assert {"model", "data", "learning_rate", "lora", "loss"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_in_hand_and_keeps_the_weights(
    signum: signal.Signals, model_folder: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    words = ["--model", str(model_folder), "--data", data, "--output_dir", "run", "--max_steps", "100000"]
    words += ["--num_train_epochs", "100000", "--eval_size", "2", "--num_samples", "0"]
    command = [sys.executable, "-m", "penchant", "train", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count('"loss"') >= 3):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signum)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{summary['steps']}"
    assert (checkpoint / "model.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()
    assert str(checkpoint.relative_to(tmp_path)) in said
