"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penchant.config import METHODS

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
    assert summary["examples_seen"] == 8
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
    listed = penchant("methods").stdout
    assert "-log sigmoid(beta h)" in listed
    assert "rpo                dpo (beta 0.1) + sft (weight 1.0, per sequence)" in listed
    told = penchant("methods", "ipo").stdout
    for said in ("arXiv:2310.12036", "--loss.length_normalize (default True)", "the paper's sum over tokens", "pairs"):
        assert said in told, said
    assert "--loss.sft.weight (default 1.0)" in penchant("methods", "rpo").stdout
    assert set(json.loads(penchant("methods", "--json").stdout)) == set(METHODS)
    wrong = penchant("methods", "simpol")
    assert (wrong.returncode, wrong.stderr) == (2, "error: there is no method 'simpol'; did you mean 'simpo'?\n")


def test_the_loss_shown_to_contributors_trains_from_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "my_loss.py").write_text(shown)
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    words = ["--model", str(model_folder), "--data", data, "--eval_size", "2", "--num_samples", "0", "--max_steps", "2"]
    done = penchant(
        "train", *words, "--import", "my_loss.py", "--method", "squared-hinge", "--loss.beta", "0.2", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["loss"] == {"name": "squared-hinge", "beta": 0.2}
    first = json.loads((tmp_path / summary["run_dir"] / "metrics.jsonl").read_text().splitlines()[0])
    assert first["eval_loss"] == pytest.approx(1.0, abs=1e-5)  # max(0, 1 - 0)^2 at policy = reference
    told = penchant("methods", "squared-hinge", "--import", "my_loss.py", cwd=tmp_path).stdout
    assert "Slope of the hinge before it is squared." in told
    unknown = penchant("train", *words, "--method", "squared-hinge", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "there is no method 'squared-hinge'" in unknown.stderr
    assert "--import" in unknown.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "there is no file"), ("1 / 0", "ZeroDivisionError"), ("def", "SyntaxError")],
)
def test_a_file_that_cannot_be_imported_is_an_error_in_a_sentence(
    text: str | None, sentence: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    done = penchant("methods", "--import", "mine.py", cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_trains_each_combination_compares_them_and_keeps_what_is_finished(
    model_folder: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    words = ["train", "--model", str(model_folder), "--data", data, "--eval_size", "4", "--num_samples", "0"]
    words += ["--max_steps", "1", "--output_dir", "sweep", "--sweep", "method=dpo,kto", "--sweep", "loss.beta=0.1,0.5"]
    done = penchant(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "sweep"
    names = ["dpo,beta=0.1", "dpo,beta=0.5", "kto,beta=0.1", "kto,beta=0.5"]
    assert sorted(path.name for path in folder.iterdir()) == ["compare.html", *names]
    for name in names:
        summary = json.loads((folder / name / "summary.json").read_text())
        assert summary["loss"]["name"] == name.partition(",")[0]
        assert summary["loss"]["beta"] == float(name.rpartition("=")[2])
        assert name in done.stdout
    # Read and tokenised once for each unit of data; scored by the reference once a prompt and completion.
    assert done.stderr.count("reference  precomputed") == 4

    (folder / "dpo,beta=0.5" / "summary.json").write_text(json.dumps({"status": "failed"}))
    before = (folder / "kto,beta=0.1" / "metrics.jsonl").stat().st_mtime_ns
    again = penchant(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("there already with these settings; kept") == 3
    assert (folder / "kto,beta=0.1" / "metrics.jsonl").stat().st_mtime_ns == before
    assert json.loads((folder / "dpo,beta=0.5" / "summary.json").read_text())["status"] == "finished"

    other = penchant(*words, "--learning_rate", "1e-3", cwd=tmp_path)
    assert other.returncode == 2  # other settings, and the folders are taken
    assert "holds a finished run" in other.stderr

    compared = penchant("compare", "sweep", "--json", cwd=tmp_path)
    assert len(json.loads(compared.stdout)["runs"]) == 4
    assert penchant("compare", "sweep/dpo,beta=0.1", "nowhere", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        (["loss.beta"], "write KEY=VALUE,VALUE"),
        (["loss.beta=0.1", "loss.beta=0.2"], "swept twice"),
        (["output_dir=a,b"], "folder of its own"),
        (["loss.betta=0.1"], "did you mean 'beta'"),
        (["method=dpo,nope"], "there is no method 'nope'"),
        (["learning_rate=1e-6,-1"], "learning_rate"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_before_anything_is_written(
    axes: list[str], sentence: str, model_folder: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    words = [word for axis in axes for word in ("--sweep", axis)]
    done = penchant("train", "--model", str(model_folder), "--data", data, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_failing_run_does_not_stop_the_others_of_a_sweep(model_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows())  # they carry no margins, which odpo needs
    words = ["--model", str(model_folder), "--data", data, "--max_steps", "1", "--num_samples", "0"]
    done = penchant("train", *words, "--sweep", "method=odpo,simpo", cwd=tmp_path)
    assert done.returncode == 2
    assert "odpo" in done.stderr
    assert "needs margin for every pair" in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["compare.html", "simpo"]


def test_recipes_are_listed_printed_and_run_by_name(model_folder: Path, tmp_path: Path) -> None:
    assert "zephyr-7b" in penchant("recipes").stdout
    assert "learning_rate: 5.0e-7" in penchant("recipes", "zephyr-7b").stdout
    wrong = penchant("recipes", "zefyr-7b")
    assert wrong.returncode == 2
    assert "did you mean 'zephyr-7b'" in wrong.stderr
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    words = ["train", "zephyr-7b", "--model", str(model_folder), "--data", data, "--dry-run"]
    done = penchant(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "beta=0.01" in done.stderr


def test_the_schema_is_json_and_knows_every_key() -> None:
    schema = json.loads(penchant("schema").stdout)
    assert {"model", "data", "learning_rate", "lora", "loss"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_keeps_its_state(signum: signal.Signals, model_folder: Path, tmp_path: Path) -> None:
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
    assert process.returncode == 128 + signum, said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{summary['steps']}"
    assert (checkpoint / "model.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()
    assert f"stopped at step {summary['steps']} of 100000; `penchant resume run` goes on from there" in said
