"""Whole runs on a tiny model: what is trained, what is written, what is refused."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import penchant
from penchant.losses import build_loss
from penchant.scoring.policy import Policy
from penchant.training import run as run_module
from penchant.training import session as session_module

from ..conftest import WORDS

METRICS = {
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "length/chosen", "length/rejected", "entropy", "kl",
}  # fmt: skip


def some_words(number: int, generator: torch.Generator) -> str:
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (number,), generator=generator).tolist())


def rows(number: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Chosen answers speak of cats, rejected ones of dogs."""
    generator = torch.Generator().manual_seed(seed)

    def some(n: int) -> str:
        return some_words(n, generator)

    return [
        {
            "prompt": [{"role": "user", "content": some(3 + i % 4)}],
            "chosen": [{"role": "assistant", "content": "the cat " + some(1 + i % 3)}],
            "rejected": [{"role": "assistant", "content": "a dog " + some(1 + (i + 1) % 4)}],
        }
        for i in range(number)
    ]


def single_rows(number: int = 12, seed: int = 0, labels: Sequence[bool | None] = (True, False)) -> list[dict[str, Any]]:
    """Desirable answers speak of cats, the others of dogs; every prompt has one answer."""
    made = []
    for place, row in enumerate(rows(number, seed)):
        label = labels[place % len(labels)]
        completion = row["rejected" if label is False else "chosen"]
        made.append({"prompt": row["prompt"], "completion": completion, "label": label})
    return made


def ranked_rows(number: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """The best of three answers speaks of cats, the worst of dogs; they stand in the row in another order."""
    generator = torch.Generator().manual_seed(seed + 100)
    return [
        {
            "prompt": row["prompt"],
            "completions": [
                "two trees " + some_words(2, generator),
                row["rejected"][0]["content"],
                row["chosen"][0]["content"],
            ],
            "scores": [3.0, 1.0, 4.0],
        }
        for row in rows(number, seed)
    ]


def write_rows(path: Path, some_rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in some_rows))
    return str(path)


def train(model_folder: Path, tmp_path: Path, **settings: Any) -> Any:
    defaults = {
        "data": rows(),
        "eval_data": rows(4, seed=1),
        "batch_size": 4,
        "learning_rate": 3e-3,
        "num_train_epochs": 4,
        "num_samples": 2,
        "sample_max_new_tokens": 4,
        "output_dir": str(tmp_path / "run"),
        "quiet": True,
    }
    return penchant.train(**{"model": str(model_folder), **defaults, **settings})


def train_unseen(model_folder: Path, tmp_path: Path, **settings: Any) -> Any:
    """Without held-out examples and without samples."""
    plain = {"eval_data": None, "eval_size": 0, "num_samples": 0, "sample_max_new_tokens": 128}
    return train(model_folder, tmp_path, **{**plain, **settings})


def metrics_of(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "loss" in r], [r for r in records if "eval_loss" in r]


def losses_of(result: Any) -> list[float]:
    return [record["loss"] for record in metrics_of(result.run_dir)[0]]


def findings_of(result: Any) -> dict[str, Any]:
    return json.loads((result.run_dir / "data.json").read_text())


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_learns_and_writes_everything(model_folder: Path, tmp_path: Path) -> None:
    result = train(model_folder, tmp_path)
    trained, evaluated = metrics_of(result.run_dir)
    assert len(trained) == 12
    assert trained[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert set(trained[0]) >= METRICS | {"grad_norm", "learning_rate", "epoch", "step", "tokens_per_s"}
    assert evaluated[0]["step"] == 0
    assert evaluated[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert evaluated[-1]["step"] == 12
    assert evaluated[-1]["eval_rewards/accuracies"] == 1.0
    assert set(evaluated[-1]) >= {f"eval_{name}" for name in METRICS}
    assert trained[-1]["kl"] > trained[0]["kl"] >= 0
    written = {path.name for path in result.run_dir.iterdir() if path.name != ".lock"}
    assert written == {
        "run.yaml", "metrics.jsonl", "events.jsonl", "samples.jsonl", "pairs.jsonl", "data.json", "summary.json",
        "report.html", "README.md", "model",
    }  # fmt: skip
    assert result.summary["status"] == "finished"
    assert result.summary["steps"] == 12
    assert result.summary["examples_seen"] == 48
    assert len((result.run_dir / "samples.jsonl").read_text().splitlines()) == 2
    assert len((result.run_dir / "pairs.jsonl").read_text().splitlines()) == 4


def test_the_time_of_a_run_counts_all_of_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, referring = run_module._set_up, session_module.make_reference

    def slowly(function: Any) -> Any:
        def slow(*words: Any) -> Any:
            time.sleep(1)
            return function(*words)

        return slow

    monkeypatch.setattr(run_module, "_set_up", slowly(reading))
    monkeypatch.setattr(session_module, "make_reference", slowly(referring))
    started = time.monotonic()
    result = train(model_folder, tmp_path, max_steps=1)
    assert 2 <= result.summary["wall_s"] <= time.monotonic() - started
    (line, *_), _ = metrics_of(result.run_dir)
    assert line["time_s"] >= 2


def test_the_trained_model_loads_in_plain_transformers_with_the_same_log_probabilities(
    model_folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = Policy.from_pretrained(str(model_folder))
    result = train(model_folder, tmp_path, model=policy)
    prompts, completions = [row["prompt"] for row in rows(4)], [row["chosen"] for row in rows(4)]
    expected = policy.log_prob(prompts, completions).detach()
    start = Policy.from_pretrained(str(model_folder)).log_prob(prompts, completions).detach()
    assert (expected - start).abs().min() > 0.01  # it was trained

    model = AutoModelForCausalLM.from_pretrained(result.run_dir / "model").eval()
    loaded_tokenizer = AutoTokenizer.from_pretrained(result.run_dir / "model")
    for prompt, completion, value in zip(prompts, completions, expected, strict=True):
        start_text = loaded_tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = loaded_tokenizer(start_text).input_ids
        answer = loaded_tokenizer(completion[0]["content"] + "<|im_end|>").input_ids
        logps = model(torch.tensor([ids + answer])).logits.log_softmax(-1)[0]
        total = sum(logps[len(ids) - 1 + place, token] for place, token in enumerate(answer))
        assert total.item() == pytest.approx(value.item(), rel=1e-5)


def test_a_lora_run_loads_in_plain_peft_and_leaves_the_base_alone(model_folder: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    result = train(model_folder, tmp_path, lora={"rank": 4}, learning_rate=2e-2)
    assert (result.run_dir / "model" / "adapter_model.safetensors").exists()
    assert not (result.run_dir / "model" / "model.safetensors").exists()
    assert metrics_of(result.run_dir)[1][-1]["eval_rewards/accuracies"] == 1.0
    assert "adapter switched off" in result.summary["reference"]
    assert result.summary["num_trainable"] < result.summary["num_parameters"]

    plain = AutoPeftModelForCausalLM.from_pretrained(result.run_dir / "model").eval()
    merged = Policy.from_pretrained(str(result.run_dir / "model"))
    ids = torch.tensor([[3, 50, 60, 70]])
    torch.testing.assert_close(plain(ids).logits, merged.model(ids).logits, rtol=1e-4, atol=1e-4)
    with plain.disable_adapter():
        base = Policy.from_pretrained(str(model_folder)).model
        torch.testing.assert_close(plain(ids).logits, base(ids).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"reference": {"kind": "copy"}},
        {"reference": {"kind": "copy", "offload": True}},
        {"layout": "padded"},
        {"layout": "prefix_shared"},
        {"microbatch_tokens": 40},
        {"logging_steps": 1, "num_samples": 0, "sample_max_new_tokens": 128},
    ],
    ids=str,
)
def test_reference_kind_layout_and_microbatches_change_no_number(
    settings: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    plain, _ = metrics_of(train(model_folder, tmp_path / "a", max_steps=4).run_dir)
    other, _ = metrics_of(train(model_folder, tmp_path / "b", max_steps=4, **settings).run_dir)
    for one, two in zip(plain, other, strict=True):
        # As long as the policy is its reference, rounding decides which reward is the higher.
        is_at_start = abs(one["rewards/margins"]) < 1e-5
        for name in (METRICS | {"grad_norm"}) - ({"rewards/accuracies"} if is_at_start else set()):
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=2e-4), name
    assert not is_at_start


def test_another_model_as_reference_gives_its_numbers_precomputed_or_beside(
    model_folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    from ..conftest import make_tiny_model

    other = tmp_path / "other"
    make_tiny_model(seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    losses = []
    for name, kind in (("beside", "model"), ("before", "precomputed")):
        run = train(model_folder, tmp_path / name, max_steps=2, reference={"kind": kind, "model": str(other)})
        losses.append([record["loss"] for record in metrics_of(run.run_dir)[0]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert abs(losses[0][0] - 0.6931) > 0.01


@pytest.mark.parametrize(
    ("settings", "at_reference"),
    [
        ({"method": "cdpo"}, 0.693147),
        ({"method": "ipo"}, 25.0),
        ({"method": "ipo", "loss": {"length_normalize": False, "beta": 0.5}, "learning_rate": 3e-4}, 1.0),
        ({"loss": penchant.losses.DPOLoss(beta=0.5)}, 0.693147),
        ({"loss": "ipo"}, 25.0),
    ],
    ids=str,
)
def test_every_method_starts_at_its_value_at_the_reference_and_falls(
    settings: dict[str, Any], at_reference: float, model_folder: Path, tmp_path: Path
) -> None:
    trained, _ = metrics_of(train(model_folder, tmp_path, **settings).run_dir)
    assert trained[0]["loss"] == pytest.approx(at_reference, rel=1e-4)
    assert trained[-1]["loss"] < 0.98 * at_reference


def test_the_same_run_twice_gives_the_same_weights(model_folder: Path, tmp_path: Path) -> None:
    one = train(model_folder, tmp_path / "a", max_steps=3)
    two = train(model_folder, tmp_path / "b", max_steps=3)
    weights = [(run.run_dir / "model" / "model.safetensors").read_bytes() for run in (one, two)]
    assert weights[0] == weights[1]


def test_the_saved_run_file_repeats_the_run(model_folder: Path, tmp_path: Path) -> None:
    from penchant.config import load_config
    from penchant.training.run import execute

    data = write_rows(tmp_path / "pairs.jsonl", rows())
    one = train(model_folder, tmp_path, data=data, eval_data=None, eval_size=3, max_steps=2, method="ipo")
    config = load_config(str(one.run_dir / "run.yaml"), {"output_dir": str(tmp_path / "again")})
    two = execute(config)
    assert [r["loss"] for r in metrics_of(one.run_dir)[0]] == [r["loss"] for r in metrics_of(two.run_dir)[0]]
    assert json.loads((two.run_dir / "data.json").read_text())["eval"]["used"] == 3


def test_held_out_pairs_share_no_prompt_with_the_training_pairs(model_folder: Path, tmp_path: Path) -> None:
    doubled = [row for row in rows(10) for _ in range(2)]
    result = train(model_folder, tmp_path, data=doubled, eval_data=None, eval_size=0.3, max_steps=1)
    assert json.loads((result.run_dir / "data.json").read_text())["eval"]["used"] == 6
    held = {json.loads(line)["prompt"] for line in (result.run_dir / "pairs.jsonl").read_text().splitlines()}
    assert len(held) == 3


def test_checkpoints_load_and_the_newest_two_are_kept(model_folder: Path, tmp_path: Path) -> None:
    result = train(model_folder, tmp_path, save_steps=2, max_steps=9)
    folders = sorted(path.name for path in (result.run_dir / "checkpoints").iterdir())
    assert folders == ["step-6", "step-8"]
    Policy.from_pretrained(str(result.run_dir / "checkpoints" / "step-8"))


def test_a_run_without_held_out_pairs_says_so_and_works(model_folder: Path, tmp_path: Path) -> None:
    result = train(model_folder, tmp_path, eval_data=None, eval_size=0, max_steps=2)
    assert metrics_of(result.run_dir)[1] == []
    splits = {json.loads(line)["split"] for line in (result.run_dir / "pairs.jsonl").read_text().splitlines()}
    assert splits == {"train"}


def test_dropout_in_the_models_own_code_stops_the_run_before_step_one(model_folder: Path, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(str(model_folder))
    policy.model.model.norm.register_forward_hook(
        lambda module, inputs, output: torch.nn.functional.dropout(output, 0.2, training=module.training)
    )
    with pytest.raises(penchant.UserError, match=r"before the first step.*dropout"):
        train(model_folder, tmp_path, model=policy, layout="padded")


def test_weights_that_turn_nan_stop_the_run_after_three_steps(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penchant.losses import DPOLoss

    whole = DPOLoss.__call__
    calls = {"n": 0}

    def breaking(self: Any, logps: Any) -> torch.Tensor:
        calls["n"] += 1
        return whole(self, logps) * (float("nan") if calls["n"] > 6 else 1.0)

    monkeypatch.setattr(DPOLoss, "__call__", breaking)
    with pytest.raises(penchant.UserError, match="3 steps in a row"):
        train(model_folder, tmp_path, eval_data=None, eval_size=0)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert (tmp_path / "run" / "report.html").exists()
    codes = [json.loads(line)["code"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert codes.count("non-finite") == 3


BAD = [
    ({"data": "nowhere.jsonl"}, "there is no such file"),
    ({"model": "./nowhere"}, "there is no folder"),
    ({"method": "dpoo"}, "did you mean 'dpo'"),
    ({"loss": "simop"}, "did you mean 'simpo'"),
    ({"loss": {"betta": 1}}, "did you mean 'beta'"),
    ({"loss": {"beta": -1}}, "above 0"),
    ({"loss": {"beta": "high"}}, "expected float"),
    ({"batch_size": 0}, "greater than or equal to 1"),
    ({"learning_rat": 1}, "did you mean 'learning_rate'"),
    ({"lora": {"rnk": 1}}, "did you mean 'lora.rank'"),
    ({"lora": {"alpha": 1}}, "no effect without lora.rank"),
    ({"lora": {"rank": 2, "target_modules": ["nothing"]}}, "lora.target_modules"),
    ({"reference": {"kind": "adapter_off"}}, "needs an adapter"),
    ({"reference": {"kind": "model"}}, "needs reference.model"),
    ({"reference": {"offload": True}}, "only a reference of kind copy or model"),
    ({"eval_size": 4}, "no effect with eval_data"),
    ({"device": "gpu7"}, "not usable here"),
    ({"max_length": 4}, "no row is left"),
    ({"max_length": 24, "truncation": "error"}, "max_length is 24"),
    ({"chat_template": "nowhere.jinja"}, "cannot be read"),
    ({"data": [{"prompt": "a", "chosen": "b"}] * 4}, r"data\[0\].*rejected"),
    ({"data": [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 4}, "identical"),
    ({"data": [{"prompt": "a", "chosen": " ", "rejected": "b"}] * 4}, "empty"),
    ({"method": "rpo", "loss": {"beta": 0.2}}, r"loss\.beta: this loss is a sum \(of dpo, sft\)"),
    ({"warmup_steps": 3, "warmup_ratio": 0.2}, "warmup_ratio: has no effect with warmup_steps"),
    ({"optimizer": "rmsprop", "adam_beta1": 0.8}, "no effect with optimizer rmsprop"),
    ({"optimizer": "rmsprop", "adam_beta2": 0.95}, "no effect with optimizer rmsprop"),
    ({"num_samples": 0}, "sample_max_new_tokens: has no effect with num_samples 0"),
    ({"pairs_from_rankings": "all"}, "pairs_from_rankings: has no effect: there are no rankings in the data"),
    ({"pairs_from_rankings": "all", "method": "kto"}, "pairs_from_rankings: has no effect: 'kto' takes no pairs"),
    ({"pairs_from_rankings": "best_rest", "method": "pl-dpo", "data": ranked_rows()}, "'pl-dpo' takes no pairs"),
    ({"method": "simpo", "reference": {"kind": "copy"}}, "reference: the loss 'simpo' uses no reference"),
    ({"method": "simpo", "reference": {"kind": "adapter_off"}, "lora": {"rank": 2}}, "'simpo' uses no reference"),
    ({"method": "sft", "reference": {"model": "m"}}, "'sft' uses no reference"),
    ({"method": "odpo"}, r"'odpo' needs margin for every pair; data\[0\] has none"),
    ({"method": "odpo", "data": [{**row, "margin": 1.0} for row in rows()]}, r"eval_data\[0\] has none"),
    (
        {"method": "odpo", "data": [{**row, "margin": 1 if i != 5 else None} for i, row in enumerate(rows())]},
        r"data\[5\]",
    ),
    ({"method": "sppo-soft"}, r"'sppo' needs win_probabilities for every pair; data\[0\] has none"),
    ({"method": "kto", "data": single_rows(labels=[True, False, None])}, r"data\[2\].*\[D13\].*no label"),
    ({"method": "dpo", "data": single_rows()}, r"data\[0\].*\[U01\].*no undesirable completion"),
    ({"method": "dpo", "data": single_rows(labels=[None])}, r"data\[0\].*\[U06\].*no label"),
    ({"method": "kto", "data": ranked_rows()}, r"data\[0\].*\[U05\]"),
    ({"method": "pl-dpo", "data": single_rows()}, r"data\[0\].*\[U04\]"),
    ({"method": "pl-dpo", "data": [{**ranked_rows(1)[0], "scores": [1, 1, 2]}]}, r"data\[0\].*\[U03\].*equal scores"),
    (
        {"method": "kto", "data": [{**row, "prompt": "a"} for row in single_rows()], "eval_data": None},
        "'kto' estimates a KL divergence: .*one prompt only",
    ),
    (
        {"method": "kto", "data": [{**row, "prompt": "a"} for row in single_rows()], "eval_data": single_rows(4, 1)},
        "'kto' estimates a KL divergence: .*one prompt only",
    ),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD, ids=lambda given: str(given)[:50])
def test_what_cannot_work_is_refused_in_a_sentence_and_writes_nothing(
    settings: dict[str, Any], sentence: str, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(penchant.UserError, match=sentence):
        train(model_folder, tmp_path, **settings)
    assert not (tmp_path / "run").exists()


def test_a_bad_row_is_named_by_file_and_line_and_may_be_left_out(model_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", [*rows(), {"prompt": "a", "rejected": "b"}])
    with pytest.raises(penchant.UserError, match=r"pairs\.jsonl:13.*chosen"):
        train(model_folder, tmp_path, data=data)
    result = train(model_folder, tmp_path, data=data, max_bad_rows=0.1, max_steps=1)
    findings = json.loads((result.run_dir / "data.json").read_text())["train"]
    assert findings["used"] == 12
    assert sum(findings["dropped"].values()) == 1


def test_a_prompt_over_the_limit_is_left_out_and_named(model_folder: Path, tmp_path: Path) -> None:
    long = {**rows(1)[0], "prompt": [{"role": "user", "content": "cat " * 200}]}
    result = train(model_folder, tmp_path, data=[*rows(), long], max_length=128, max_steps=1)
    findings = json.loads((result.run_dir / "data.json").read_text())["train"]
    assert findings["used"] == 12
    assert "max_length 128" in findings["examples"][0]
    assert "data[12]" in findings["examples"][0]


def test_a_run_that_is_there_is_kept_unless_overwritten(model_folder: Path, tmp_path: Path) -> None:
    train(model_folder, tmp_path, max_steps=1)
    with pytest.raises(penchant.UserError, match="holds a finished run"):
        train(model_folder, tmp_path, max_steps=1)
    train(model_folder, tmp_path, max_steps=2, overwrite=True)
    assert len(metrics_of(tmp_path / "run")[0]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(penchant.UserError, match="not empty"):
        train(model_folder, tmp_path, output_dir=str(tmp_path / "mine"), overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_rendered_row_is_shown_and_costed_by_a_dry_run_that_writes_nothing(
    model_folder: Path, tmp_path: Path
) -> None:
    from penchant.config import config_from
    from penchant.training.logger import RunLog
    from penchant.training.run import dry_run

    data = write_rows(tmp_path / "pairs.jsonl", rows())
    before = set(tmp_path.rglob("*"))
    config = config_from({"model": str(model_folder), "data": data, "batch_size": 4, "eval_size": 0})
    plan = dry_run(config, RunLog(quiet=True))
    assert plan["steps"] == 3
    assert plan["memory_bytes"] > 4 * 320 * 32 * 4  # at least weights, gradient and moments of the embedding
    first = plan["rows"][0]
    assert first["prompt"].endswith("<|im_start|>assistant\n")
    assert first["chosen"].startswith("the cat")
    assert first["chosen"].endswith("<|im_end|>")
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("method", "data", "names"),
    [
        ("kto", single_rows(2), [["prompt", "desirable"], ["prompt", "undesirable"]]),
        ("sft", single_rows(2, labels=[None]), [["prompt", "completion"]] * 2),
        ("pl-dpo", ranked_rows(2), [["prompt", "rank 1", "rank 2", "rank 3"]] * 2),
        ("dpo", ranked_rows(2), [["prompt", "chosen", "rejected"]] * 2),
    ],
)
def test_a_dry_run_names_the_completions_of_every_unit(
    method: str, data: list[Any], names: list[list[str]], model_folder: Path, tmp_path: Path
) -> None:
    from penchant.config import config_from
    from penchant.training.logger import RunLog
    from penchant.training.run import dry_run

    file = write_rows(tmp_path / "data.jsonl", data)
    config = config_from({"model": str(model_folder), "data": file, "eval_size": 0, "method": method})
    shown = dry_run(config, RunLog(quiet=True))["rows"]
    assert [list(row) for row in shown] == names
    if data[0].get("scores"):
        assert shown[0][names[0][1]].startswith("the cat")
        assert shown[0][names[0][-1]].startswith("a dog")


def test_messages_for_a_tokenizer_without_template_are_written_out_and_announced(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import copy

    from transformers import AutoTokenizer

    from ..conftest import make_tiny_model

    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    make_tiny_model().save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    result = train(tmp_path / "base", tmp_path, max_steps=1, quiet=False)
    assert "no chat template" in capsys.readouterr().err
    saved = AutoTokenizer.from_pretrained(result.run_dir / "model")
    text = saved.apply_chat_template(rows(1)[0]["prompt"], add_generation_prompt=True, tokenize=False)
    assert text.startswith("\n\nHuman: ")
    assert text.endswith("\n\nAssistant:")


def test_bf16_starts_near_log_two_and_learns(model_folder: Path, tmp_path: Path) -> None:
    from penchant.training.hardware import multiplies_bf16

    result = train(model_folder, tmp_path, dtype="bf16")
    trained, evaluated = metrics_of(result.run_dir)
    assert trained[0]["loss"] == pytest.approx(0.693147, abs=2e-2)
    assert evaluated[-1]["eval_rewards/accuracies"] == 1.0
    assert result.summary["dtype"] == "bf16"
    events = (result.run_dir / "events.jsonl").read_text()
    assert ("no bf16 arithmetic" in events) == (not multiplies_bf16(torch.device("cpu")))


def test_a_policy_in_hand_takes_the_arithmetic_of_the_run(model_folder: Path, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(str(model_folder))
    assert train(model_folder, tmp_path, model=policy, dtype="bf16", max_steps=1).summary["dtype"] == "bf16"


# Every kind of data under every kind of loss.

LOG_TWO = math.log(2)
LEARNED: list[tuple[str, dict[str, Any], str, str, float]] = [
    ("kto", {"data": single_rows(), "eval_data": single_rows(4, 1)}, "completion", "completion", 0.5),
    ("kto", {}, "completion", "pair", 0.5),
    ("bco", {"data": single_rows(), "eval_data": rows(4, seed=1)}, "completion", "pair", LOG_TWO),
    (
        "dpo",
        {"data": [{**r, "label": good} for good in (True, False) for r in single_rows(labels=[good])]},
        "pair",
        "pair",
        LOG_TWO,
    ),
    ("pl-dpo", {"data": ranked_rows(), "eval_data": ranked_rows(4, 1)}, "ranking", "ranking", math.log(6)),
    ("pl-dpo", {}, "ranking", "ranking", LOG_TWO),
    ("dpo", {"data": ranked_rows()}, "pair", "pair", LOG_TWO),
    ("aot", {"microbatch_tokens": 40}, "pair", "pair", LOG_TWO),
]


@pytest.mark.parametrize(
    ("method", "settings", "unit", "eval_unit", "at_reference"),
    LEARNED,
    ids=[f"{method}, {list(settings)}, {unit}" for method, settings, unit, _, _ in LEARNED],
)
def test_every_unit_of_data_is_learned(
    method: str,
    settings: dict[str, Any],
    unit: str,
    eval_unit: str,
    at_reference: float,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    short = {"num_train_epochs": 2, "learning_rate": 6e-3, "eval_steps": 100, "num_samples": 1}
    result = train(model_folder, tmp_path, method=method, **{**short, **settings})
    trained, evaluated = metrics_of(result.run_dir)
    assert trained[0]["loss"] == pytest.approx(at_reference, rel=1e-4)
    assert evaluated[0]["eval_loss"] == pytest.approx(at_reference, rel=1e-4)
    assert trained[-1]["loss"] < 0.9 * at_reference
    assert evaluated[-1]["eval_rewards/accuracies"] > 0.9 > evaluated[0]["eval_rewards/accuracies"]
    assert evaluated[-1]["eval_rewards/margins"] > 0
    findings = findings_of(result)
    assert (findings["train"]["unit"], findings["eval"]["unit"]) == (unit, eval_unit)
    file = "completions.jsonl" if eval_unit == "completion" else "pairs.jsonl"
    assert len(lines_of(result.run_dir / file)) == 4


def test_sft_learns_from_completions_that_nobody_judged(model_folder: Path, tmp_path: Path) -> None:
    data, held = single_rows(labels=[None]), single_rows(4, 1, labels=[None])
    result = train(model_folder, tmp_path, method="sft", data=data, eval_data=held, learning_rate=1e-2)
    trained, evaluated = metrics_of(result.run_dir)
    assert trained[-1]["loss"] < 0.8 * trained[0]["loss"]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert result.summary["reference"] == "none"
    assert {"rewards/accuracies", "kl", "rewards/rejected"} & set(trained[0]) == set()
    records = lines_of(result.run_dir / "completions.jsonl")
    assert [record["desirable"] for record in records] == [None] * 4
    assert records[0]["completion"] == held[0]["completion"][0]["content"]
    start, policy = (Policy.from_pretrained(str(f)) for f in (model_folder, result.run_dir / "model"))
    assert records[0]["reward"] == pytest.approx(mean_logp(policy, held[0], "completion"), rel=1e-4)
    per_token = sum(evaluated[0]["eval_loss"] * record["length"] for record in records)
    total = -sum(mean_logp(start, row, "completion") * r["length"] for row, r in zip(held, records, strict=True))
    assert per_token == pytest.approx(total, rel=1e-4)


def mean_logp(policy: Policy, row: dict[str, Any], side: str) -> float:
    """log pi(answer | prompt) per token of the answer and its end."""
    answer = row[side][0]["content"]
    num_tokens = len(policy.tokenizer(answer + "<|im_end|>").input_ids)
    return policy.log_prob([row["prompt"]], [answer]).item() / num_tokens


@pytest.mark.parametrize(
    ("pairs_from_rankings", "margins"), [("best_worst", [3]), ("best_rest", [1, 3]), ("all", [1, 3, 2])]
)
def test_rankings_become_the_pairs_that_were_asked_for(
    pairs_from_rankings: str, margins: list[int], model_folder: Path, tmp_path: Path
) -> None:
    # odpo at the reference is log(1 + exp(margin)), and the margins of the data are the differences of the scores.
    settings = {"pairs_from_rankings": pairs_from_rankings, "method": "odpo", "batch_size": 36, "max_steps": 1}
    result = train_unseen(model_folder, tmp_path, data=ranked_rows(), **settings)
    expected = sum(math.log1p(math.exp(margin)) for margin in margins) / len(margins)
    assert losses_of(result) == pytest.approx([expected], rel=1e-4)
    assert findings_of(result)["train"]["used"] == 12 * len(margins)


def test_the_weight_column_weighs(model_folder: Path, tmp_path: Path) -> None:
    data = rows(4)
    weighted = [{**row, "weight": weight} for row, weight in zip(data, [1.0, 5.0, 0.5, 1.0], strict=True)]
    policy = Policy.from_pretrained(str(model_folder))
    likelihoods = [mean_logp(policy, row, "chosen") for row in data]
    settings = {"method": "sft", "loss": {"per": "sequence"}, "max_steps": 2, "learning_rate": 1e-2}
    plain = train_unseen(model_folder, tmp_path / "plain", data=data, **settings)
    found = train_unseen(model_folder, tmp_path / "weighted", data=weighted, **settings)
    expected = -(likelihoods[0] + 5 * likelihoods[1] + 0.5 * likelihoods[2] + likelihoods[3]) / 7.5
    assert losses_of(plain)[0] == pytest.approx(-sum(likelihoods) / 4, rel=1e-4)
    assert losses_of(found)[0] == pytest.approx(expected, rel=1e-4)
    gained = [
        mean_logp(Policy.from_pretrained(str(run.run_dir / "model")), data[1], "chosen") - likelihoods[1]
        for run in (plain, found)
    ]
    assert gained[1] > gained[0] > 0


# KTO, whose estimate of the KL divergence goes through all of a run.


def test_kto_has_the_same_losses_whatever_the_reference_the_layout_and_the_microbatches(
    model_folder: Path, tmp_path: Path
) -> None:
    whole: dict[str, Any] = {"method": "kto", "data": single_rows(7), "max_steps": 4, "learning_rate": 1e-2}
    lora = {"lora": {"rank": 4}}
    cases: dict[str, dict[str, Any]] = {
        "precomputed": {},
        "copy, padded": {"reference": {"kind": "copy"}, "layout": "padded"},
        "in parts": {"microbatch_tokens": 30},
        "adapter_off": lora,
        "adapter, precomputed": {**lora, "reference": {"kind": "precomputed"}},
        "adapter, copy": {**lora, "reference": {"kind": "copy", "offload": True}},
    }
    losses = {
        name: losses_of(train_unseen(model_folder, tmp_path / name, **whole, **settings))
        for name, settings in cases.items()
    }
    for name in cases:
        alike = "adapter_off" if "adapter" in name else "precomputed"
        assert losses[name] == pytest.approx(losses[alike], rel=1e-3), name
        assert losses[name][0] == pytest.approx(0.5, abs=1e-4)
    for name in ("precomputed", "adapter_off"):
        assert all(abs(one - other) > 1e-3 for one, other in pairwise(losses[name][1:]))


def test_the_first_estimate_of_kto_is_that_of_the_next_prompts_answers(model_folder: Path, tmp_path: Path) -> None:
    """At a reference of other weights: loss and estimate from the texts, one by one."""
    from penchant.data.loader import epoch_order

    from ..conftest import make_tiny_model

    data, other = single_rows(5), tmp_path / "other"
    make_tiny_model(seed=8).save_pretrained(other)
    policy = Policy.from_pretrained(str(model_folder))
    policy.tokenizer.save_pretrained(other)
    ref = Policy.from_pretrained(str(other))
    settings = {"method": "kto", "reference": {"model": str(other)}, "batch_size": 2, "max_steps": 1}
    result = train_unseen(model_folder, tmp_path, data=data, **settings)

    def log_ratio(row: dict[str, Any], answered: dict[str, Any]) -> float:
        texts = [row["prompt"]], [answered["completion"]]
        return policy.log_prob(*texts).item() - ref.log_prob(*texts).item()

    ordered = [data[place] for place in epoch_order(5, seed=0, epoch=0)]
    estimate = max(0.0, sum(log_ratio(ordered[place], ordered[place + 1]) for place in (0, 1)) / 2)
    surpluses = [(0.1 * (log_ratio(row, row) - estimate)) * (1 if row["label"] else -1) for row in ordered[:2]]
    assert losses_of(result)[0] == pytest.approx(sum(1 / (1 + math.exp(s)) for s in surpluses) / 2, rel=1e-4)
    assert estimate > 0.1


def test_kto_works_one_completion_at_a_time_and_with_one_class_alone(model_folder: Path, tmp_path: Path) -> None:
    one_by_one = train_unseen(
        model_folder, tmp_path / "a", method="kto", data=single_rows(6), batch_size=1, num_train_epochs=1
    )
    assert len(losses_of(one_by_one)) == 6
    assert losses_of(one_by_one)[0] == pytest.approx(0.5, abs=1e-4)
    for label in (True, False):
        result = train_unseen(
            model_folder, tmp_path / str(label), method="kto", data=single_rows(6, labels=[label]), num_train_epochs=2
        )
        trained, _ = metrics_of(result.run_dir)
        rewards = "rewards/chosen" if label else "rewards/rejected"
        assert (trained[-1][rewards] > 0) == label
        assert "rewards/accuracies" not in trained[-1]
        assert [record["desirable"] for record in lines_of(result.run_dir / "completions.jsonl")] == [label] * 6


def test_kto_without_held_out_examples_judges_those_it_was_trained_on(model_folder: Path, tmp_path: Path) -> None:
    result = train_unseen(model_folder, tmp_path, method="kto", data=single_rows())
    assert metrics_of(result.run_dir)[1] == []
    records = lines_of(result.run_dir / "completions.jsonl")
    assert {record["split"] for record in records} == {"train"}
    assert {record["prompt"] for record in records} == {row["prompt"][0]["content"] for row in single_rows()}
    rewards = {label: [r["reward"] for r in records if r["desirable"] is label] for label in (True, False)}
    assert min(rewards[True]) > max(rewards[False])


def test_held_out_prompts_that_are_all_the_same_take_completions_of_the_training_examples(
    model_folder: Path, tmp_path: Path
) -> None:
    held = [{**row, "prompt": single_rows(1, 7)[0]["prompt"]} for row in single_rows(3, seed=1)]
    result = train(model_folder, tmp_path, method="kto", data=single_rows(), eval_data=held)
    evaluated = metrics_of(result.run_dir)[1]
    assert evaluated[0]["eval_loss"] == pytest.approx(0.5, abs=1e-4)
    assert evaluated[-1]["eval_loss"] < 0.45


def test_kto_is_held_against_its_value_at_the_reference_before_the_first_step(
    model_folder: Path, tmp_path: Path
) -> None:
    # Of one class alone, so that a wrong estimate could not cancel out.
    settings = {"method": "kto", "data": single_rows(labels=[True]), "max_steps": 1}
    result = train_unseen(model_folder, tmp_path / "a", **settings)
    (message,) = [e["message"] for e in lines_of(result.run_dir / "events.jsonl") if e["code"] == "identity"]
    found, expected = (float(word.rstrip(",")) for word in message.split() if word[0] == "0")
    assert (found, expected) == (pytest.approx(0.5, abs=1e-4), 0.5)

    policy = Policy.from_pretrained(str(model_folder))
    policy.model.model.norm.register_forward_hook(
        lambda module, inputs, output: torch.nn.functional.dropout(output, 0.2, training=module.training)
    )
    with pytest.raises(penchant.UserError, match=r"before the first step.*must be 0\.5000.*dropout"):
        train_unseen(model_folder, tmp_path / "b", model=policy, layout="padded", **settings)


def test_prompts_that_are_trained_beside_a_reference_need_none_of_its_numbers(
    model_folder: Path, tmp_path: Path
) -> None:
    loss = {"dpo": {}, "orpo": {"nll_on_prompt": True, "weight": 0.5}}
    losses = []
    for kind in ("precomputed", "copy"):
        result = train_unseen(model_folder, tmp_path / kind, loss=loss, max_steps=3, reference={"kind": kind})
        losses.append(losses_of(result))
        assert result.summary["loss"] == build_loss(loss).settings()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] > LOG_TWO + 0.5
    assert losses[0][-1] < losses[0][0]


def test_rows_are_counted_as_read_whatever_they_become(model_folder: Path, tmp_path: Path) -> None:
    result = train(model_folder, tmp_path, method="kto", max_steps=1)
    found = json.loads((result.run_dir / "data.json").read_text())
    assert (found["train"]["rows"], found["train"]["used"], found["train"]["unit"]) == (12, 24, "completion")
    assert (found["eval"]["rows"], found["eval"]["used"], found["eval"]["unit"]) == (4, 4, "pair")


def test_one_bad_row_is_held_against_the_rows_of_the_file_not_the_pairs_made_of_them(
    model_folder: Path, tmp_path: Path
) -> None:
    singles = [
        {"prompt": f"the cat {i}", "completion": text, "label": label}
        for i in range(6)
        for text, label in (("sat on the mat", True), ("ran", False))
    ]
    data = [*singles, {"prompt": "the dog", "completion": "sat"}]  # 1 of 13 rows, and 1 of 7 examples
    result = train(model_folder, tmp_path, data=data, max_steps=1, max_bad_rows=0.1)
    assert json.loads((result.run_dir / "data.json").read_text())["train"]["rows"] == 13


def test_held_out_rows_that_all_fall_away_are_an_error(model_folder: Path, tmp_path: Path) -> None:
    lonely = [{"prompt": "the cat", "completion": "sat", "label": True}]
    with pytest.raises(penchant.UserError, match=r"eval_data: no row is left to hold against\.\n.*U01"):
        train(model_folder, tmp_path, eval_data=lonely)


def test_soft_sppo_trains_on_the_win_probabilities_of_the_data(model_folder: Path, tmp_path: Path) -> None:
    def judged(some_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "chosen_win_probability": 0.8, "rejected_win_probability": 0.4} for row in some_rows]

    result = train(
        model_folder, tmp_path, method="sppo-soft", data=judged(rows()), eval_data=judged(rows(4, seed=1)), max_steps=2
    )
    _, evaluated = metrics_of(result.run_dir)
    # At policy = reference it is eta^2 times the mean of (P - 1/2)^2.
    assert evaluated[0]["eval_loss"] == pytest.approx(1000**2 * (0.3**2 + 0.1**2) / 2, rel=1e-5)
    assert result.summary["steps"] == 2


@pytest.mark.parametrize(("method", "is_said"), [("dpo", True), ("odpo", False)])
def test_margins_that_a_method_does_not_read_are_said_to_be_unread(
    method: str, is_said: bool, model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, heldout = ([{**row, "margin": 1.0} for row in some] for some in (rows(), rows(4, seed=1)))
    train(model_folder, tmp_path, method=method, data=data, eval_data=heldout, max_steps=1, quiet=False)
    assert ("the rows carry margins, which dpo does not read (odpo does)" in capfd.readouterr().err) == is_said
