"""Several processes do what one does: the same losses, the same weights, the same order of examples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from penchant.disk import read_json_lines
from penchant.training.rundir import read_summary

from ..conftest import make_tiny_model
from .several import (
    KINDS,
    LAYOUTS,
    assert_same_course,
    make_shelf,
    metrics_of,
    run_on,
    together,
    train_all,
    train_from_to,
    weights_of,
)


@pytest.fixture(scope="module")
def shelf(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and data."""
    return make_shelf(tmp_path_factory.mktemp("shelf"), tokenizer)


def cases(full: bool) -> list[tuple[str, str]]:
    """Each kind with each layout, or every layout and every kind of reference and loss."""
    if full:
        return [(kind, layout) for kind in KINDS for layout in LAYOUTS]
    rarer = ("unpaired, copy", "reward model")
    return [(kind, LAYOUTS[place % len(LAYOUTS)]) for place, kind in enumerate(KINDS) if kind not in rarer]


def test_the_numbers_are_those_of_one_process(shelf: Path, tmp_path: Path, full: bool) -> None:
    chosen = cases(full)
    for number in (1, 2, 4):
        home = tmp_path / str(number)
        together(
            number,
            train_all,
            [run_on(shelf, kind, layout, home / f"{kind}, {layout}") for kind, layout in chosen],
            said_in=home,
        )
    for kind, layout in chosen:
        one, *more = (tmp_path / str(number) / f"{kind}, {layout}" for number in (1, 2, 4))
        assert sum("loss" in record for record in metrics_of(one)) == 20
        for other in more:
            assert_same_course(one, other)
            assert read_summary(other)["processes"] == int(other.parent.name)


ONLINE: dict[str, dict[str, Any]] = {
    "online-dpo": {"method": "online-dpo", "online": {"rounds": 4}},
    "grpo": {"method": "grpo", "online": {"rounds": 2}, "num_train_epochs": 2},
    "ppo, lora": {"method": "ppo", "online": {"rounds": 3}, "lora": {"rank": 4}, "learning_rate": 1e-3},
    "sppo": {"method": "sppo", "online": {"rounds": 2}},
}


def sampled_run(shelf: Path, kind: str, run_dir: Path, **more: Any) -> dict[str, Any]:
    """What `penchant.train` is given for a run that samples its own data."""
    return {
        "model": str(shelf / "model"),
        "data": str(shelf / "pairs.jsonl"),
        "output_dir": str(run_dir),
        "judge": {"name": "rule", "function": f"{shelf / 'rule.py'}:score"},
        "sampling": {"max_new_tokens": 5, "completions": 3},
        "batch_size": 5,
        "num_train_epochs": 1,
        "eval_size": 3,
        "num_samples": 2,
        "sample_max_new_tokens": 3,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "quiet": True,
        **ONLINE[kind],
        **more,
    }


def test_sampling_is_shared_out(shelf: Path, tmp_path: Path) -> None:
    for number in (1, 3):
        home = tmp_path / str(number)
        together(number, train_all, [sampled_run(shelf, kind, home / kind) for kind in ONLINE], said_in=home)
    for kind in ONLINE:
        one, three = tmp_path / "1" / kind, tmp_path / "3" / kind
        assert_same_course(one, three)
        for name in ("samples.jsonl", "rounds/0001.jsonl"):
            assert read_json_lines(one / name) == read_json_lines(three / name)
            assert read_json_lines(one / name)


def test_a_judge_is_asked_by_one_process(shelf: Path, tmp_path: Path) -> None:
    run = sampled_run(
        shelf, "online-dpo", tmp_path / "run", judge={"name": "rule", "function": f"{shelf / 'noting.py'}:score"}
    )
    together(2, train_all, [run], said_in=tmp_path / "said")
    rounds = sum(len(read_json_lines(path)) for path in (tmp_path / "run" / "rounds").glob("*.jsonl"))
    asked = (shelf / "asked.txt").read_text().splitlines()
    looks = sum("eval_score" in record for record in metrics_of(tmp_path / "run"))
    assert len(set(asked)) == 1  # process
    assert len(asked) == rounds + 3 * looks


MODELS = {
    "tied": {"tie_word_embeddings": True},
    "in shares of nothing": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "intermediate_size": 7,
        "vocab_size": 321,
    },
}


def make_model(name: str) -> Any:
    """Models whose weights are kept in unusual ways."""
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=128, n_embd=16, n_layer=2, n_head=2))
    if name == "mixtral":  # transformers keeps its experts otherwise than it uses them
        config = MixtralConfig(
            vocab_size=320,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
        )
        return MixtralForCausalLM(config)
    return make_tiny_model(**MODELS[name])


def test_models_of_all_kinds_are_shared_out(shelf: Path, tokenizer: Any, tmp_path: Path) -> None:
    runs: dict[str, dict[str, Any]] = {}
    for name in (*MODELS, "gpt2", "mixtral"):
        make_model(name).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        runs[name] = {"model": str(tmp_path / name)}
    for name in ("gpt2", "mixtral"):
        runs[f"{name}, lora"] = {"model": str(tmp_path / name), "lora": {"rank": 2}}
    runs["checkpointing"] = {"gradient_checkpointing": True}
    for number in (1, 3):
        home = tmp_path / str(number)
        each = [
            run_on(
                shelf,
                "paired, cached",
                "padded",
                home / name,
                num_train_epochs=1,
                num_samples=2,
                sample_max_new_tokens=4,
                **more,
            )
            for name, more in runs.items()
        ]
        together(number, train_all, each, said_in=home)
    for name in runs:
        assert_same_course(tmp_path / "1" / name, tmp_path / "3" / name)
        assert len(read_json_lines(tmp_path / "3" / name / "samples.jsonl")) == 2


def test_a_run_that_samples_goes_on_with_fewer_processes(shelf: Path, tmp_path: Path) -> None:
    whole, moved = (sampled_run(shelf, "grpo", tmp_path / name) for name in ("whole", "moved"))
    together(1, train_from_to, whole, None, tmp_path / "whole.jsonl", said_in=tmp_path / "said")
    together(3, train_from_to, moved, 2, tmp_path / "moved.jsonl", said_in=tmp_path / "said")
    together(2, train_from_to, moved, None, tmp_path / "moved.jsonl", said_in=tmp_path / "said")
    drawn = [read_json_lines(tmp_path / f"{name}.jsonl") for name in ("whole", "moved")]
    assert len(drawn[0]) > 3
    assert drawn[0] == drawn[1]
    assert_same_course(tmp_path / "whole", tmp_path / "moved")


def test_a_model_written_in_shares_is_one_that_transformers_loads(shelf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    together(2, train_all, [run_on(shelf, "reference-free", "padded", tmp_path / "run")], said_in=tmp_path / "said")
    files = sorted(path.name for path in (tmp_path / "run" / "model").glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    written = weights_of(tmp_path / "run" / "model")
    assert all(torch.equal(parameter, written[name]) for name, parameter in model.named_parameters())
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"reference": {"kind": "copy", "offload": True}}, "reference.offload"),
        ({"method": "reward", "lora": {"rank": 2}, "reference": {}}, "a reward model with an adapter"),
    ],
)
def test_what_several_processes_cannot_do_is_said(
    settings: dict[str, Any], reason: str, shelf: Path, tmp_path: Path
) -> None:
    run = run_on(shelf, "paired, copy", "padded", tmp_path / "run", **settings)
    with pytest.raises(AssertionError, match=reason):
        together(2, train_all, [run], said_in=tmp_path / "said")
    assert not (tmp_path / "run").exists()


def be_refused(run: dict[str, Any], apart: str, reason: str) -> None:
    """The last process is not like the first one; both say so, and nothing is trained."""
    import penchant
    from penchant.errors import UserError
    from penchant.training import hardware
    from penchant.training import together as settling

    if os.environ["RANK"] == "1":
        match apart:
            case "versions":
                hardware.version = lambda package: "0.0"  # type: ignore[attr-defined]
            case "data":
                run = {**run, "data": str(Path(run["model"]).parent / "others.jsonl")}
            case "disk":
                os.chdir("/")
    settling._SECONDS_FOR_A_SHARED_DISK = 0.5
    with pytest.raises(UserError, match=reason):
        penchant.train(**run)


@pytest.mark.parametrize(
    ("apart", "reason"),
    [
        ("versions", "process 1 has penchant 0.0 .the first"),
        ("data", "process 1 reads something else than the first: .*data"),
        ("disk", "process 1 does not see output_dir"),
    ],
)
def test_processes_that_are_not_alike_are_refused(apart: str, reason: str, shelf: Path, tmp_path: Path) -> None:
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        run = run_on(shelf, "reference-free", "padded", Path("run"))
        together(2, be_refused, run, apart, reason, said_in=tmp_path / "said")
    finally:
        os.chdir(here)
    assert not list(tmp_path.glob("run/model"))


def finish_again(run: dict[str, Any], reason: str) -> None:
    """What the first process alone finds wrong is an error in all of them."""
    import penchant
    from penchant.errors import UserError

    penchant.train(**run)
    with pytest.raises(UserError, match=reason):
        penchant.train(**run)


def test_what_the_first_process_refuses_all_refuse(shelf: Path, tmp_path: Path) -> None:
    run = run_on(shelf, "reference-free", "padded", tmp_path / "run", num_train_epochs=1)
    together(2, finish_again, run, "holds a finished run", said_in=tmp_path / "said")
    assert read_summary(tmp_path / "run")["status"] == "finished"
