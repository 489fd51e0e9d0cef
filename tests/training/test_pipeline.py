"""Stages: each begins with what the one before has made, is kept when finished, and is gone on with when not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from penchant.cli import main
from penchant.config import load_stages
from penchant.errors import UserError
from penchant.scoring.policy import Policy

from ..conftest import CHAT_TEMPLATE
from .test_online import RULE
from .test_run import rows, write_rows

STAGES: list[dict[str, Any]] = [
    {"method": "sft", "lora": {"rank": 0}},
    {"method": "dpo", "name": "prefer", "loss": {"beta": 0.2}},
    {
        "method": "grpo",
        "max_steps": 2,
        "batch_size": 2,
        "loss": {"beta": 0.0},
        "sampling": {"max_new_tokens": 4, "completions": 3},
    },
]


@pytest.fixture
def run_file(model_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "rule.py").write_text(RULE)
    settings = {
        "model": str(model_folder),
        "output_dir": str(tmp_path / "out"),
        "data": write_rows(tmp_path / "pairs.jsonl", rows(12)),
        "eval_data": write_rows(tmp_path / "heldout.jsonl", rows(4, seed=1)),
        "batch_size": 4,
        "max_steps": 3,
        "num_samples": 0,
        "learning_rate": 1e-3,
        "lora": {"rank": 2},
        "save_steps": 1,
        "stages": [dict(stage) for stage in STAGES],
    }
    settings["stages"][2]["judge"] = {"name": "rule", "function": f"{tmp_path / 'rule.py'}:score"}
    place = tmp_path / "stages.yaml"
    place.write_text(yaml.safe_dump(settings))
    return place


def summaries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / name / "summary.json").read_text()) for name in ("1-sft", "2-prefer", "3-grpo")]


def test_each_stage_begins_with_the_weights_and_the_template_of_the_one_before(
    run_file: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("hello " + CHAT_TEMPLATE)
    settings = yaml.safe_load(run_file.read_text())
    settings["stages"][0]["chat_template"] = str(template)
    run_file.write_text(yaml.safe_dump(settings))
    assert main(["train", str(run_file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["1-sft", "2-prefer", "3-grpo"]
    assert all(stage["status"] == "finished" for stage in told.values())
    out = tmp_path / "out"
    assert (out / "report.html").exists()
    # The second one trained an adapter on the first one's weights, the third one on both, folded together.
    first, second, third = (out / name / "model" for name in ("1-sft", "2-prefer", "3-grpo"))
    assert (second / "adapter_config.json").exists()
    merged = out / "2-prefer" / "merged"
    assert (merged / "model.safetensors").exists()
    assert Path(json.loads((third / "adapter_config.json").read_text())["base_model_name_or_path"]) == merged
    prompts, completions = ["what is one"], [" two three"]
    with torch.no_grad():
        whole = Policy.from_pretrained(str(merged)).log_prob(prompts, completions)
        torch.testing.assert_close(Policy.from_pretrained(str(second)).log_prob(prompts, completions), whole)
        assert not torch.allclose(Policy.from_pretrained(str(first)).log_prob(prompts, completions), whole)
    for folder in (first, merged, third):
        assert Policy.from_pretrained(str(folder)).tokenizer.chat_template == template.read_text()


def test_options_win_over_every_stage_and_what_is_finished_is_kept(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(run_file), "--max_steps", "1", "--lora.rank", "0", "--output_dir", str(tmp_path / "other")]
    assert main(command) == 0
    assert [stage["steps"] for stage in summaries(tmp_path / "other")] == [1, 1, 1]
    assert not any(stage["lora"] for stage in summaries(tmp_path / "other"))
    before = (tmp_path / "other" / "3-grpo" / "summary.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().err.count("kept") == 3
    assert (tmp_path / "other" / "3-grpo" / "summary.json").stat().st_mtime_ns == before
    # A stage that is gone is trained again, and so is everything that was made from it.
    shutil.rmtree(tmp_path / "other" / "2-prefer")
    assert main(command) == 0
    assert (tmp_path / "other" / "3-grpo" / "summary.json").stat().st_mtime_ns > before


def test_an_option_may_be_for_one_stage_alone(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load_stages(str(run_file), {"max_steps": 1, "stages.2.max_steps": 2, "stages.3.sampling.completions": 5})
    assert found
    assert [config.max_steps for config in found[2]] == [1, 2, 1]
    assert [config.sampling.completions for config in found[2]] == [None, None, 5]
    assert found[2][2].sampling.max_new_tokens == 4  # what else the stage says of sampling stays
    for words, said in {
        ("--stages.4.max_steps", "1"): "stages.4: there are stages 1 to 3",
        ("--stages.2", "1"): "stages.2: name a key of that stage, as stages.2.max_steps",
        ("--stages.2.max_stps", "1"): "did you mean 'max_steps'",
    }.items():
        assert main(["train", str(run_file), *words]) == 2
        assert said in capsys.readouterr().err


_KILLED = """
import os, signal, sys
from penchant.cli import main
from penchant.training.loop import Training
stage, step = sys.argv[1], int(sys.argv[2])
real = Training._step
def dying(self, draw):
    if self.run_dir.name == stage and self.progress.step == step:
        self.finish_writing()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, draw)
Training._step = dying
main(sys.argv[3:])
"""


@pytest.mark.parametrize(("stage", "step"), [("1-sft", 2), ("2-prefer", 1), ("3-grpo", 1)])
def test_killed_in_any_stage_it_comes_to_the_same_end(run_file: Path, tmp_path: Path, stage: str, step: int) -> None:
    assert main(["train", str(run_file), "--output_dir", str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-c", _KILLED, stage, str(step), "train", str(run_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert main(["resume", str(tmp_path / "out")]) == 0
    for name in ("1-sft/model/model", "2-prefer/model/adapter_model", "3-grpo/model/adapter_model"):
        one, other = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("out", "whole"))
        assert all(torch.equal(one[key], other[key]) for key in other), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "stages: is a list of sections"),
        ({"stages": {"method": "sft"}}, "stages: is a list of sections"),
        ({"stages": [{"method": "sft", "model": "x"}]}, "stage 1 names model"),
        ({"stages": [{"method": "sft", "name": "a/b"}]}, "'a/b' cannot be the name of a folder"),
        ({"stages": [{"method": "sft"}, {"method": "dop"}]}, "stage 2-dop: method: there is no method 'dop'"),
        ({"stages": [{"method": "sft", "los": {}}]}, "stage 1-sft: los: there is no such setting"),
        ({"output_dir": None}, "output_dir: is missing"),
        ({"model": None}, "model: is missing"),
    ],
)
def test_what_is_no_pipeline_is_refused_in_a_sentence(run_file: Path, change: dict[str, Any], message: str) -> None:
    run_file.write_text(yaml.safe_dump({**yaml.safe_load(run_file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_stages(str(run_file), {})


def test_what_is_for_one_run_is_refused(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--dry-run"], ["--sweep", "seed=0,1"], ["--allow-change", "data"]):
        assert main(["train", str(run_file), *words]) == 2
        assert "stages" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
