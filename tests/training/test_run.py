"""Whole runs on a tiny model: what is trained, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import penchant
from penchant.scoring.policy import Policy

from ..conftest import WORDS

METRICS = {
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "length/chosen", "length/rejected", "entropy", "kl",
}  # fmt: skip


def rows(number: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Chosen answers speak of cats, rejected ones of dogs."""
    generator = torch.Generator().manual_seed(seed)

    def some(n: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator).tolist())

    return [
        {
            "prompt": [{"role": "user", "content": some(3 + i % 4)}],
            "chosen": [{"role": "assistant", "content": "the cat " + some(1 + i % 3)}],
            "rejected": [{"role": "assistant", "content": "a dog " + some(1 + (i + 1) % 4)}],
        }
        for i in range(number)
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


def metrics_of(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "loss" in r], [r for r in records if "eval_loss" in r]


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
    written = {path.name for path in result.run_dir.iterdir()}
    assert written == {
        "run.yaml", "metrics.jsonl", "events.jsonl", "samples.jsonl", "pairs.jsonl", "data.json", "summary.json",
        "report.html", "README.md", "model",
    }  # fmt: skip
    assert result.summary["status"] == "finished"
    assert result.summary["steps"] == 12
    assert result.summary["pairs_seen"] == 48
    assert len((result.run_dir / "samples.jsonl").read_text().splitlines()) == 2
    assert len((result.run_dir / "pairs.jsonl").read_text().splitlines()) == 4


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
        {"logging_steps": 1, "num_samples": 0},
    ],
    ids=str,
)
def test_reference_kind_layout_and_microbatches_change_no_number(
    settings: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    plain, _ = metrics_of(train(model_folder, tmp_path / "a", max_steps=4).run_dir)
    other, _ = metrics_of(train(model_folder, tmp_path / "b", max_steps=4, **settings).run_dir)
    for one, two in zip(plain, other, strict=True):
        for name in METRICS | {"grad_norm"}:
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=2e-4), name


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
    ({"method": "dppo"}, "did you mean 'dpo'"),
    ({"loss": "dop"}, "did you mean 'dpo'"),
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
    ({"max_length": 4}, "no pair is left"),
    ({"max_length": 24, "truncation": "error"}, "max_length is 24"),
    ({"chat_template": "nowhere.jinja"}, "cannot be read"),
    ({"data": [{"prompt": "a", "chosen": "b"}] * 4}, r"data\[0\].*rejected"),
    ({"data": [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 4}, "identical"),
    ({"data": [{"prompt": "a", "chosen": " ", "rejected": "b"}] * 4}, "empty"),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD, ids=str)
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
    with pytest.raises(penchant.UserError, match="holds a run already"):
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
