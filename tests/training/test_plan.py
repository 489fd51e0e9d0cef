"""The plan of memory: what can be counted by hand is, and what autograd keeps is what it keeps of real tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from penchant.cli import main
from penchant.config import config_from
from penchant.disk import write_json
from penchant.errors import UserError
from penchant.layouts import padded, prefix_shared
from penchant.models.attention import use_attend
from penchant.scoring.policy import Policy
from penchant.training.estimate import held_bytes
from penchant.training.logger import RunLog, duration
from penchant.training.plan import Plan, plan

from ..conftest import make_tiny_model
from .test_run import rows, write_rows

CPU = torch.device("cpu")


def plans(model: Path, folder: Path, processes: int = 1, **settings: Any) -> list[Plan]:
    data = write_rows(folder / "pairs.jsonl", rows(12))
    config = config_from({"model": str(model), "data": data, "data_cache": "none", "eval_size": 0, **settings})
    return plan(config, processes, CPU, "float32", RunLog(quiet=True))


def test_what_is_kept_between_steps_is_split_over_processes(
    model_folder: Path, tiny_model: Any, tmp_path: Path
) -> None:
    size = sum(parameter.nbytes for parameter in tiny_model.parameters())
    every = plans(model_folder, tmp_path, 4, reference={"kind": "copy"})
    assert [one.processes for one in every] == [1, 2, 4]
    for one in every:
        kept = {name: one.memory[name] for name in ("weights", "gradients", "optimizer", "reference")}
        own = size // one.processes
        assert kept == {"weights": own, "gradients": own, "optimizer": 2 * own, "reference": own}
        assert one.num_trained == one.num_parameters == size // 4
    assert "gathered" not in every[0].memory
    assert "gathered" in every[1].memory


def test_an_adapter_is_the_same_in_every_process(model_folder: Path, tiny_model: Any, tmp_path: Path) -> None:
    size = sum(parameter.nbytes for parameter in tiny_model.parameters())
    (one, two) = plans(model_folder, tmp_path, 2, lora={"rank": 4})
    adapter = 4 * one.num_trained
    assert 0 < adapter < size
    assert one.memory["weights"] == size + adapter
    assert two.memory["weights"] == size // 2 + adapter
    assert two.memory["gradients"] == one.memory["gradients"] == adapter
    assert two.memory["optimizer"] == one.memory["optimizer"] == 2 * adapter
    assert "reference" not in one.memory


def test_one_moment_and_no_second_model_take_less(model_folder: Path, tmp_path: Path) -> None:
    (adamw,) = plans(model_folder, tmp_path)
    (rmsprop,) = plans(model_folder, tmp_path, optimizer="rmsprop")
    assert 2 * rmsprop.memory["optimizer"] == adamw.memory["optimizer"]
    assert "reference" not in adamw.memory


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_kept_for_the_backward_pass_is_counted_without_weights(
    layout: str, checkpointing: bool, model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from penchant.data.loader import draws
    from penchant.losses import build_loss
    from penchant.models.gradient_checkpointing import set_gradient_checkpointing
    from penchant.training.source import DataSource

    settings = {"layout": layout, "gradient_checkpointing": checkpointing, "batch_size": 4, "max_steps": 1}
    (counted,) = plans(model_folder, tmp_path, **settings)
    loss = {"model": str(model_folder), "data": str(tmp_path / "pairs.jsonl"), "data_cache": "none", "eval_size": 0}
    config = config_from({**loss, **settings})
    source = DataSource(config, build_loss(config.loss_settings()))
    examples = next(draws(source.datasets(tokenizer, RunLog(quiet=True)).train.examples, 4, 0, 0)).examples

    model = make_tiny_model()
    set_gradient_checkpointing(model, checkpointing)
    if layout == "prefix_shared":
        use_attend(model)
    batch = (padded if layout == "padded" else prefix_shared).collate(examples)
    policy = Policy(model, tokenizer)
    policy.token_logps(batch)  # the first pass tries the head
    share = counted.memory["activations"] / held_bytes(policy, batch)
    assert (
        0.99 < share < 1.15
    )  # of padded rows transformers leaves a mask out where contents show that it masks nothing
    assert counted.tokens == sum(one.num_scored_tokens for one in examples)


def test_more_processes_have_smaller_parts(model_folder: Path, tmp_path: Path) -> None:
    every = plans(model_folder, tmp_path, 4, batch_size=8)
    sizes = [one.tokens_at_once for one in every]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    assert len({one.tokens for one in every}) == 1


def test_methods_that_make_their_data_are_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="makes its data while it runs"):
        plans(model_folder, tmp_path, method="online-dpo", judge={"name": "rule", "function": "r.py:score"})


def test_the_command_says_whether_it_fits(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--model", str(model_folder), "--data", write_rows(tmp_path / "pairs.jsonl", rows(12))]
    assert main([*words, "--gpus", "2", "--memory", "1GB", "--tokens-per-s", "100"]) == 0
    said = capsys.readouterr().out
    assert "enough for 2" in said
    assert "time " in said
    assert main([*words, "--gpus", "2", "--memory", "1MB", "--loss.beta", "0.2"]) == 2
    assert "not enough for 2" in capsys.readouterr().out
    assert main([*words, "--processes", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["processes"] for one in told["plans"]] == [1, 2]
    assert told["plans"][1]["memory_bytes"] == sum(told["plans"][1]["memory"].values())


def test_a_rate_is_taken_from_a_run(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", str(model_folder), "--data", write_rows(tmp_path / "pairs.jsonl", rows(12))]
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "summary.json", {"tokens_per_s": 0.2, "processes": 2})
    assert main([*words, "--like", str(tmp_path / "run"), "--eval_size", "0"]) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time")]
    (one,) = plans(model_folder, tmp_path)
    assert told.removeprefix("time").strip() == duration(one.tokens / 0.1)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--memory", "much"], "is no size"),
        (["--gpus", "0"], "at least 1"),
        (["--like", "nowhere"], "how fast"),
        (["--gpus", "two"], None),
    ],
)
def test_what_cannot_be_planned_is_said(
    more: list[str], reason: str | None, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--model", str(model_folder), "--data", write_rows(tmp_path / "pairs.jsonl", rows(12)), *more]
    if reason is None:  # argparse's own words
        with pytest.raises(SystemExit):
            main(words)
        return
    assert main(words) == 2
    assert reason in capsys.readouterr().err
