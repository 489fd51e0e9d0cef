"""Steps that go wrong: numbers that are no numbers, losses that jump, memory that is not there."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import penchant
from penchant.cli import main
from penchant.scoring.policy import Policy
from penchant.training import step as step_module
from penchant.training.checkpoint import newest_checkpoint
from penchant.training.trouble import Spikes
from penchant.types import Batch, TokenLogps

from ..training.test_run import lines_of, losses_of, metrics_of, rows, train, train_unseen, write_rows
from .matrix import Matrix

Poison = Callable[[Any, float], float]


def nan_loss(policy: Any, loss: float) -> float:
    """What a loss of nan leaves: a gradient of nothing but nan."""
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    return math.nan


def infinite_gradient(policy: Any, loss: float) -> float:
    """A sound loss, and one number of the gradient that has overflowed."""
    next(policy.parameters()).grad.view(-1)[7] = math.inf
    return loss


def infinite_loss(policy: Any, loss: float) -> float:
    """A loss that has overflowed, and a gradient that happens to be finite."""
    return math.inf


POISONS: dict[str, Poison] = {
    "a loss of nan": nan_loss,
    "an infinite gradient": infinite_gradient,
    "an infinite loss": infinite_loss,
}


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`poison(what, steps)` does something to the gradient and the loss of these steps."""
    real = step_module.accumulate_gradient

    def poison(what: Poison, steps: Any) -> None:
        taken = itertools.count(1)

        def poisoned(policy: Policy, *arguments: Any) -> float:
            loss = real(policy, *arguments)
            return what(policy, loss) if next(taken) in steps else loss

        monkeypatch.setattr(step_module, "accumulate_gradient", poisoned)

    return poison


def codes_of(run_dir: Path) -> list[tuple[str, int]]:
    """What was worth an event in the eyes of this file, and at which step."""
    looked_for = {"non-finite", "spike", "out-of-memory"}
    return [
        (event["code"], event["step"]) for event in lines_of(run_dir / "events.jsonl") if event["code"] in looked_for
    ]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Policy.from_pretrained(str(folder)).model.named_parameters())


# Numbers that are no numbers.


CONSTANT = {"lr_scheduler": "constant", "warmup_ratio": 0, "num_train_epochs": 99}


@pytest.mark.parametrize("kind", POISONS)
def test_one_step_that_is_not_finite_costs_that_step_and_no_more(
    kind: str, model_folder: Path, tmp_path: Path, poison: Any, matrix: Matrix
) -> None:
    poison(POISONS[kind], {3})
    with matrix.trial(10, f"{kind}, once"):
        result = train_unseen(model_folder, tmp_path, max_steps=6, **CONSTANT)
        assert all(weight.isfinite().all() for weight in weights_of(result.run_dir / "model").values())
        assert result.summary["status"] == "finished"
        assert codes_of(result.run_dir) == [("non-finite", 3)]
        records = lines_of(result.run_dir / "metrics.jsonl")
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
        losses = [record.get("loss") for record in records]
        assert losses[2] is None
        assert losses[0] > losses[3] > losses[5]


def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(
    model_folder: Path, tmp_path: Path, poison: Any, matrix: Matrix
) -> None:
    from safetensors.torch import load_file

    poison(nan_loss, {3})
    with matrix.trial(10, "a loss of nan: weights and moments, to the bit"):
        result = train_unseen(model_folder, tmp_path, max_steps=5, save_steps=1, keep_checkpoints=9)
        two, three, four = (result.run_dir / "checkpoints" / f"step-{step}" for step in (2, 3, 4))
        for name in ("model.safetensors", "training.safetensors"):
            before, at, after = (load_file(folder / name) for folder in (two, three, four))
            assert all(torch.equal(before[key], at[key]) for key in before)
            assert not all(torch.equal(at[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", POISONS)
def test_when_no_step_is_finite_any_more_the_run_stops_and_its_checkpoint_is_sound(
    kind: str,
    model_folder: Path,
    tmp_path: Path,
    poison: Any,
    monkeypatch: pytest.MonkeyPatch,
    matrix: Matrix,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "--model", str(model_folder), "--data", write_rows(tmp_path / "pairs.jsonl", rows())]
    words += ["--output_dir", str(tmp_path / "run"), "--batch_size", "4", "--max_steps", "9", "--num_train_epochs", "9"]
    words += ["--eval_size", "0", "--num_samples", "0", "--save_steps", "2", "--learning_rate", "3e-3"]
    poison(POISONS[kind], range(4, 100))
    with matrix.trial(10, f"{kind}, for ever"):
        assert main(words) == 2
        said = capfd.readouterr().err
        assert "3 steps in a row had a loss or gradient that is not finite" in said
        assert "Traceback" not in said
        assert codes_of(tmp_path / "run") == [("non-finite", step) for step in (4, 5, 6)]
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
        assert not (tmp_path / "run" / "model").exists()
        found = newest_checkpoint(tmp_path / "run" / "checkpoints", pytest.fail)
        assert found is not None
        assert found.step == 4
        assert all(weight.isfinite().all() for weight in weights_of(found.folder).values())
        # What was the matter is mended, and the run goes on.
        monkeypatch.undo()
        assert main(["resume", str(tmp_path / "run")]) == 0
        assert [record["step"] for record in lines_of(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 10))


def test_the_batch_that_was_kept_is_enough_to_compute_its_loss_again(
    model_folder: Path, tmp_path: Path, poison: Any, matrix: Matrix
) -> None:
    """With plain transformers, from the checkpoint before and from the model that the run began with."""
    from transformers import AutoModelForCausalLM

    poison(infinite_gradient, {3})
    with matrix.trial(10, "the batch that was kept gives the loss again"):
        result = train_unseen(model_folder, tmp_path, max_steps=3, save_steps=1, num_train_epochs=9)
        kept = json.loads((result.run_dir / "bad_steps" / "step-3.json").read_text())
        assert (kept["step"], kept["grad_norm"], len(kept["examples"])) == (3, "inf", 4)
        folders = (result.run_dir / "checkpoints" / "step-2", model_folder)
        policy, reference = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders)

        def logp(model: Any, prompt: list[int], answer: list[int]) -> float:
            logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            return sum(logits[len(prompt) + place - 1, token].item() for place, token in enumerate(answer))

        losses = []
        for example in kept["examples"]:
            ratios = [
                logp(policy, example["prompt_ids"], ids) - logp(reference, example["prompt_ids"], ids)
                for ids in example["completion_ids"]
            ]
            losses.append(math.log1p(math.exp(-0.1 * (ratios[0] - ratios[1]))))
        assert kept["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
        assert kept["loss"] < 0.69


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_batch_that_was_kept_says_what_the_model_was_given(
    method: str, model_folder: Path, tmp_path: Path, poison: Any, tokenizer: Any
) -> None:
    poison(nan_loss, {1})
    result = train_unseen(model_folder, tmp_path, method=method, max_steps=2)
    kept = json.loads((result.run_dir / "bad_steps" / "step-1.json").read_text())
    assert kept["loss"] == "nan"
    assert len(kept["mismatched"]) == (4 if method == "kto" else 0)
    for example in [*kept["examples"], *kept["mismatched"]]:
        assert example["prompt"] == tokenizer.decode(example["prompt_ids"])
        assert example["completions"] == [tokenizer.decode(ids) for ids in example["completion_ids"]]
        assert example["source"].startswith("data[")


def test_weights_of_rows_that_overflow_are_told_with_the_rows(
    model_folder: Path, tmp_path: Path, matrix: Matrix
) -> None:
    """No test double: two weights of the data whose sum is beyond float32."""
    data = [{**row, "weight": 3e38 if place in (5, 9) else 1.0} for place, row in enumerate(rows())]
    with matrix.trial(10, "weights of the data that overflow"):
        result = train_unseen(model_folder, tmp_path, data=data, batch_size=12, max_steps=2, num_train_epochs=2)
        assert codes_of(result.run_dir) == [("non-finite", 1), ("non-finite", 2)]
        kept = json.loads((result.run_dir / "bad_steps" / "step-1.json").read_text())
        assert {e["source"] for e in kept["examples"] if e["weight"] > 1} == {"data[5]", "data[9]"}
        start, end = weights_of(model_folder), weights_of(result.run_dir / "model")
        assert all(torch.equal(start[name], end[name]) for name in start)


# Losses that jump.


def spike(policy: Any, loss: float) -> float:
    """A batch that pulls the other way, a hundredfold."""
    for parameter in policy.parameters():
        parameter.grad.mul_(-100)
    return 100 * loss


def test_a_spike_is_flagged_and_skipping_it_leaves_the_run_as_it_was(
    model_folder: Path, tmp_path: Path, poison: Any, monkeypatch: pytest.MonkeyPatch, matrix: Matrix
) -> None:
    settings = {
        "data": rows(40),
        "batch_size": 2,
        "max_steps": 38,
        "eval_steps": 99,
        "num_samples": 0,
        "sample_max_new_tokens": 128,
    }
    settings |= {**CONSTANT, "max_grad_norm": 1e6, "learning_rate": 5e-5}
    clean = train(model_folder, tmp_path / "clean", **settings)
    poison(spike, {35})
    flagged = train(model_folder, tmp_path / "flagged", **settings)
    monkeypatch.undo()
    poison(spike, {35})
    skipped = train(model_folder, tmp_path / "skipped", skip_spikes=True, **settings)
    with matrix.trial(11, "a loss a hundredfold for one batch"):
        assert codes_of(clean.run_dir) == []
        assert ("spike", 35) in codes_of(flagged.run_dir)
        assert codes_of(skipped.run_dir) == [("spike", 35)]
        losses = [metrics_of(run.run_dir)[1][-1]["eval_loss"] for run in (clean, flagged, skipped)]
        assert abs(losses[2] / losses[0] - 1) < 0.01
        assert losses[1] / losses[0] - 1 > 0.03, "taken, it would have done harm"


def noise(dice: np.random.Generator, number: int) -> Any:
    return 0.7 + 0.05 * dice.standard_normal(number)


def falling(dice: np.random.Generator, number: int) -> Any:
    return 0.1 + 0.6 * np.exp(-np.arange(number) / 100) + 0.03 * dice.standard_normal(number)


def mean_of_a_batch(dice: np.random.Generator, number: int) -> Any:
    """Means of 32 examples, the single losses far from normal."""
    return dice.exponential(1.0, (number, 32)).mean(1)


def vanishing(dice: np.random.Generator, number: int) -> Any:
    return np.exp(-np.arange(number) / 50 + 0.5 * dice.standard_normal(number))


@pytest.mark.parametrize("series", [noise, falling, mean_of_a_batch, vanishing])
def test_what_is_ordinary_is_never_flagged(series: Any, matrix: Matrix, full: bool) -> None:
    calm = 0
    for seed in range(20):
        dice, spikes = np.random.default_rng(seed), Spikes()
        losses, norms = (series(dice, 1000 if full else 100).tolist() for _ in range(2))
        calm += not any(map(spikes.look, losses, norms))
    matrix.record(11, f"no false alarm: {series.__name__.replace('_', ' ')}", 20, calm)


@pytest.mark.parametrize(
    ("tails", "at_most"),
    [(lambda dice, n: dice.standard_t(3, n), 0.005), (lambda dice, n: dice.lognormal(0, 1, n), 0.03)],
)
def test_heavy_tails_are_flagged_now_and_then(tails: Any, at_most: float, full: bool) -> None:
    steps = flagged = 0
    for seed in range(20 if full else 2):
        dice, spikes = np.random.default_rng(seed), Spikes()
        found = [spikes.look(loss, 1.0) for loss in tails(dice, 1000).tolist()]
        steps, flagged = steps + len(found), flagged + sum(words is not None for words in found)
    assert 0 < flagged / steps < at_most


def test_clean_runs_raise_no_false_alarm(model_folder: Path, tmp_path: Path, matrix: Matrix, full: bool) -> None:
    calm, seeds = 0, 20 if full else 1
    for seed in range(seeds):
        run = train_unseen(model_folder, tmp_path / str(seed), seed=seed, max_steps=120 if full else 40, **CONSTANT)
        calm += codes_of(run.run_dir) == []
    matrix.record(11, "no false alarm: real runs", seeds, calm)


# Memory that is not there.

DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
HOST = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes.")


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`little_memory(tokens, error)`: a pass over more tokens than that fails, from the `after`-th pass on."""

    def little_memory(most: int, error: Exception, after: int = 0, only: str | None = None) -> None:
        real, passes = Policy.token_logps, itertools.count()

        def token_logps(self: Policy, batch: Batch, *arguments: Any, **more: Any) -> TokenLogps:
            is_meant = only is None or (only == "learning") == torch.is_grad_enabled()
            if is_meant and next(passes) >= after and batch.model_inputs["input_ids"].numel() > most:
                raise error
            return real(self, batch, *arguments, **more)

        monkeypatch.setattr(Policy, "token_logps", token_logps)

    return little_memory


@pytest.mark.parametrize(
    ("error", "settings"),
    [
        (DEVICE, {}),
        (HOST, {"layout": "padded"}),
        (DEVICE, {"method": "kto", "reference": {"kind": "copy"}}),
        (HOST, {"method": "ipo", "lora": {"rank": 4}}),
        (DEVICE, {"method": "aot"}),
    ],
    ids=str,
)
def test_batches_are_cut_smaller_and_no_number_changes(
    error: Exception, settings: Any, model_folder: Path, tmp_path: Path, little_memory: Any, matrix: Matrix
) -> None:
    more = {**settings, "max_steps": 2, "data": rows(16), "batch_size": 8, "num_samples": 0, "dtype": "float32"}
    more |= {"sample_max_new_tokens": 128, "learning_rate": 1e-3}
    clean = metrics_of(train(model_folder, tmp_path / "clean", **more).run_dir)
    little_memory(120, error, after=3)
    with matrix.trial(12, "memory for a part of the batch only"):
        run = train(model_folder, tmp_path, **more)
        for one, other, name in zip(clean, metrics_of(run.run_dir), ("loss", "eval_loss"), strict=True):
            assert [record[name] for record in other] == pytest.approx([record[name] for record in one], rel=1e-6)
        assert codes_of(run.run_dir)[0][0] == "out-of-memory"
        assert run.summary["examples_seen"] == 16


@pytest.mark.parametrize(
    ("only", "settings", "step"),
    [
        ("scoring", {"eval_data": None, "eval_size": 0}, 0),  # the reference's pass
        ("scoring", {"reference": {"kind": "copy"}}, 0),  # the check before the first step, and the evaluation
        ("learning", {"layout": "padded"}, 1),
    ],
    ids=["precomputing", "evaluating", "learning"],
)
def test_each_pass_is_cut_smaller_where_it_does_not_fit(
    only: str, settings: Any, step: int, model_folder: Path, tmp_path: Path, little_memory: Any, matrix: Matrix
) -> None:
    more = {"num_samples": 0, "sample_max_new_tokens": 128, "max_steps": 2, **settings}
    clean = losses_of(train(model_folder, tmp_path / "clean", **more))
    little_memory(90, DEVICE, only=only)
    with matrix.trial(12, f"memory for a part only, while {only}"):
        run = train(model_folder, tmp_path, **more)
        assert losses_of(run) == pytest.approx(clean, rel=1e-6)
        assert ("out-of-memory", step) in codes_of(run.run_dir)


def test_an_evaluation_is_cut_to_single_examples_before_it_is_given_up(
    model_folder: Path, tmp_path: Path, little_memory: Any, matrix: Matrix
) -> None:
    """Passes without gradient take twice as many tokens: where each example learns alone, they still hold two."""
    longest = 70
    settings = {"num_samples": 0, "sample_max_new_tokens": 128, "max_steps": 2, "microbatch_tokens": longest - 20}
    clean = metrics_of(train(model_folder, tmp_path / "clean", **settings).run_dir)[1]
    little_memory(longest, DEVICE, only="scoring")
    with matrix.trial(12, "memory for a single example of an evaluation"):
        found = metrics_of(train(model_folder, tmp_path, **settings).run_dir)[1]
        assert [r["eval_loss"] for r in found] == pytest.approx([r["eval_loss"] for r in clean], rel=1e-6)


@pytest.mark.parametrize("error", [DEVICE, HOST], ids=["device", "host"])
def test_an_example_that_does_not_fit_alone_ends_the_run(
    error: Exception, model_folder: Path, tmp_path: Path, little_memory: Any, matrix: Matrix
) -> None:
    little_memory(10, error, only="learning", after=2)  # the expected cost is measured by two
    with matrix.trial(12, "memory for no single example"):
        with pytest.raises(penchant.UserError, match=r"memory: a single example does not fit .*lower max_length"):
            train_unseen(model_folder, tmp_path, max_steps=4, layout="padded")
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("settings", [{"layout": "padded"}, {"eval_data": rows(2), "num_samples": 1}], ids=str)
def test_memory_that_runs_out_where_nothing_can_be_cut_is_told_in_a_sentence(
    settings: Any,
    model_folder: Path,
    tmp_path: Path,
    little_memory: Any,
    monkeypatch: pytest.MonkeyPatch,
    matrix: Matrix,
) -> None:
    def generate(*arguments: Any, **more: Any) -> Any:
        raise DEVICE

    if "num_samples" in settings:
        monkeypatch.setattr(Policy, "generate", generate)
    else:
        little_memory(0, DEVICE)
    with (
        matrix.trial(12, "memory runs out where nothing can be cut"),
        pytest.raises(penchant.UserError, match=r"memory: there is not enough \(CUDA out of memory.*lower max_length"),
    ):
        train(model_folder, tmp_path, **{"num_samples": 0, "sample_max_new_tokens": 128, **settings})


def test_memory_that_runs_out_within_the_optimizer_is_not_tried_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: Matrix
) -> None:
    """By then some of the weights are changed: once more would change them twice."""
    steps, real = itertools.count(1), torch.optim.AdamW.step

    def step(self: Any, closure: Any = None) -> None:
        if next(steps) == 3:
            raise DEVICE
        real(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with matrix.trial(12, "memory runs out within the optimizer"):
        with pytest.raises(penchant.UserError, match=r"no room for the optimizer.s moments"):
            train_unseen(model_folder, tmp_path, max_steps=4, save_steps=1)
        assert next(steps) == 4
        found = newest_checkpoint(tmp_path / "run" / "checkpoints", pytest.fail)
        assert found is not None
        assert found.step == 2


def test_other_errors_of_a_step_are_not_taken_for_want_of_memory(
    model_folder: Path, tmp_path: Path, little_memory: Any
) -> None:
    little_memory(0, RuntimeError("a bug"), only="learning", after=2)
    with pytest.raises(RuntimeError, match="a bug"):
        train_unseen(model_folder, tmp_path, max_steps=2, layout="padded")
    assert codes_of(tmp_path / "run") == []
