"""Runs of reinforcement learning: every method, what is learned, resumes to the bit, cuts that change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from penchant import UserError
from penchant.config import config_from
from penchant.online.advantages import gae, token_rewards, whitened
from penchant.scoring.metrics import Means
from penchant.training.checkpoint import newest_checkpoint
from penchant.training.logger import RunLog
from penchant.training.loop import Training
from penchant.training.online import set_up_online
from penchant.training.rollouts import Rollouts
from penchant.training.run import execute
from penchant.training.setup import make_reference
from penchant.training.step import accumulate_gradient

from .test_online import PROMPTS, RULE, rows_of


@pytest.fixture
def settings(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rule.py").write_text(RULE)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return {
        "model": str(model_folder),
        "data": str(tmp_path / "prompts.jsonl"),
        "eval_size": 4,
        "judge": {"name": "rule", "function": f"{tmp_path / 'rule.py'}:score"},
        "sampling": {"max_new_tokens": 6, "completions": 4},
        "batch_size": 4,
        "learning_rate": 1e-3,
        "num_samples": 0,
        "output_dir": str(tmp_path / "run"),
    }


def quietly(settings: dict[str, Any], **more: Any) -> Path:
    return execute(config_from({**settings, **more}), log=RunLog(quiet=True)).run_dir


def trained_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in rows_of(folder, "metrics.jsonl") if "loss" in line]


CASES = {
    "grpo": ("grpo", {}, 3),
    "grpo with lora": ("grpo", {"lora": {"rank": 2}}, 3),
    "grpo, no reference": ("grpo", {"loss": {"beta": 0.0}}, 3),
    "grpo, two passes": ("grpo", {"num_train_epochs": 2, "loss": {"per": "token", "clip_high": 0.28}}, 6),
    "dr-grpo": ("dr-grpo", {}, 3),
    "rloo": ("rloo", {}, 3),
    "ppo": ("ppo", {"online": {"prompts_per_round": 8, "rounds": 3}, "num_train_epochs": 2}, 12),
    "ppo with lora": ("ppo", {"online": {"prompts_per_round": 8}, "lora": {"rank": 2}, "learning_rate": 1e-2}, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_every_method_runs_to_its_end(case: str, settings: dict[str, Any]) -> None:
    method, more, steps = CASES[case]
    folder = quietly(settings, method=method, **more)
    lines = trained_lines(folder)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line in lines:
        assert all(np.isfinite(value) for value in line.values())
        assert line["grad_norm"] > 0
    assert {"samples/score", "samples/length", "samples/finished", "entropy", "old_kl", "clipped"} <= set(lines[0])
    assert lines[0]["old_kl"] == pytest.approx(0, abs=1e-9)  # nothing has moved yet
    assert lines[0]["clipped"] == 0.0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert "difference" in summary["answers"]
    assert (folder / "report.html").exists()
    if method == "grpo":
        assert lines[0]["loss"] == pytest.approx(0, abs=1e-6)
        assert ("kl" in lines[0]) == ("no reference" not in case)
    if method == "ppo":
        assert {"value_error", "samples/explained", "samples/kl"} <= set(lines[0])
        assert lines[0]["samples/kl"] == pytest.approx(0, abs=1e-4)
        assert max(line.get("clipped", 0) for line in lines[1:]) > 0


@pytest.mark.parametrize("method", ["grpo", "dr-grpo", "rloo", "ppo"])
def test_it_learns_what_the_judge_likes(method: str, settings: dict[str, Any]) -> None:
    more = {"online": {"rounds": 24}}
    if method == "ppo":
        more = {"online": {"rounds": 12}, "num_train_epochs": 2}
    settings["sampling"]["completions"] = 8
    folder = quietly(settings, method=method, learning_rate=5e-3, **more)
    difference = json.loads((folder / "summary.json").read_text())["answers"]["difference"]
    assert difference["low"] > 1.0  # letters a in six tokens


@pytest.mark.parametrize("case", ["grpo, two passes", "ppo"])
@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_run_that_was_stopped_comes_to_the_same_end_and_samples_nothing_twice(
    case: str, stop_at: int, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, more, _ = CASES[case]
    settings |= {"method": method, "save_steps": 1, **more}
    whole = quietly({**settings, "output_dir": str(tmp_path / "whole")})
    real_step, real_sample, sampled = Training._step, Rollouts._sample, []

    def broken(self: Training, draw: Any) -> str:
        if self.progress.step == stop_at:
            raise RuntimeError("broken off")
        return real_step(self, draw)

    def counting(self: Rollouts, number: int, prompts: Any) -> Any:
        sampled.append((number, len(prompts)))
        return real_sample(self, number, prompts)

    monkeypatch.setattr(Rollouts, "_sample", counting)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", broken)
        with pytest.raises(RuntimeError, match="broken off"):
            quietly(settings)
    run = quietly(settings)
    assert sum(number for _, number in sampled) == sum(len(rows_of(path.parent, path.name)) for path in _rounds(whole))

    def told(folder: Path) -> list[dict[str, Any]]:
        lines = rows_of(folder, "metrics.jsonl")
        return [{key: value for key, value in line.items() if key not in ("time_s", "tokens_per_s")} for line in lines]

    assert told(run) == told(whole)
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    if method == "ppo":  # the value head is no part of the model, but of the checkpoint
        assert not any("value_head" in name for name in one)
        checkpoint = newest_checkpoint(run / "checkpoints", lambda fault: None)
        assert checkpoint is not None
        tensors = load_file(checkpoint.folder / "training.safetensors")
        assert tensors["value_head.weight"].abs().max() > 0


def _rounds(folder: Path) -> list[Path]:
    return sorted((folder / "rounds").glob("[0-9]*.jsonl"))


@pytest.mark.parametrize("case", ["grpo, two passes", "ppo", "dr-grpo"])
def test_how_a_batch_is_cut_changes_no_gradient(case: str, settings: dict[str, Any], tmp_path: Path) -> None:
    method, more, _ = CASES[case]
    setup = set_up_online(config_from({**settings, "method": method, **more}), RunLog(quiet=True))
    reference = make_reference(setup, RunLog(quiet=True))
    rounds = Rollouts(setup, reference, RunLog(quiet=True), tmp_path)
    with torch.no_grad():  # so that the policy has moved from the one that sampled
        draw = next(rounds.draws())
        for parameter in setup.policy.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    found = []
    for max_tokens in (10_000, 40):
        setup.max_tokens = max_tokens
        parts = setup.batches(draw.examples)
        value = accumulate_gradient(
            setup.policy, reference if "reference" in setup.loss.needs else None, setup.loss, parts, Means()
        )
        gradients = [p.grad.clone() for p in setup.policy.parameters() if p.grad is not None]
        for parameter in setup.policy.parameters():
            parameter.grad = None
        found.append((len(parts), value, gradients))
    (few, one, gradients), (many, other, others) = found
    assert few < many
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for own, its in zip(gradients, others, strict=True):
        torch.testing.assert_close(own, its, rtol=1e-3, atol=1e-6)


def test_the_advantages_of_ppo_are_those_of_the_files_it_keeps(settings: dict[str, Any], tmp_path: Path) -> None:
    setup = set_up_online(
        config_from({**settings, "method": "ppo", "online": {"prompts_per_round": 8}}), RunLog(quiet=True)
    )
    assert setup.policy.value_head is not None
    torch.nn.init.normal_(setup.policy.value_head.weight, std=0.3)
    rounds = Rollouts(setup, make_reference(setup, RunLog(quiet=True)), RunLog(quiet=True), tmp_path)
    draws = rounds.draws()
    examples = [example for _ in range(setup.steps_per_round) for example in next(draws).examples]
    assert len(examples) == 8
    kept = load_file(tmp_path / "rounds" / "0001.said.safetensors")
    place, advantages, by_prompt = 0, [], {}
    for row in rows_of(tmp_path / "rounds", "0001.jsonl"):
        for ids, score in zip(row["ids"], row["scores"], strict=True):
            span = slice(place, place + len(ids))
            logps, ref_logps, values = (kept[name][span].double().numpy() for name in ("logps", "ref_logps", "values"))
            assert np.abs(logps - ref_logps).max() < 1e-4
            own = gae(token_rewards(score, logps, ref_logps, 0.05), values, 1.0, 0.95)
            by_prompt.setdefault(row["source"], []).append((own, values, ids))
            advantages.append(own)
            place += len(ids)
    white = iter(whitened(advantages))
    expected = {source: [(next(white), *one) for one in own] for source, own in by_prompt.items()}
    for example in examples:
        own = expected[setup.source_of(example)]
        for rollout, completion, (advantage, raw, values, ids) in zip(
            example.rollouts, example.completion_ids, own, strict=True
        ):
            assert list(completion) == ids
            np.testing.assert_allclose(rollout.advantages, advantage, rtol=1e-9)
            assert rollout.returns is not None
            np.testing.assert_allclose(rollout.returns, raw + values, rtol=1e-9)


def test_answers_that_were_cut_off_may_have_a_score_of_their_own(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"method": "dr-grpo", "advantage": {"unfinished_score": -5.0}, "max_steps": 1}
    folder = quietly(settings)
    scores = [
        score if finished else -5.0
        for row in rows_of(folder / "rounds", "0001.jsonl")
        for score, finished in zip(row["scores"], row["finished"], strict=True)
    ]
    assert -5.0 in scores
    (line,) = trained_lines(folder)
    assert line["samples/score"] == pytest.approx(np.mean(scores))


def test_prompts_whose_answers_all_score_alike_are_told(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text("def score(prompt, completions):\n    return [1.0] * len(completions)\n")
    folder = quietly(settings, method="grpo", max_steps=1, loss={"beta": 0.0})
    (line,) = trained_lines(folder)
    assert line["samples/undecided"] == 1.0
    assert line["grad_norm"] == 0.0
    (event,) = [event for event in rows_of(folder, "events.jsonl") if event["code"] == "undecided"]
    assert "the answers to 100% of the prompts scored alike" in event["message"]


def test_a_temperature_is_warned_of(settings: dict[str, Any]) -> None:
    settings["sampling"]["temperature"] = 0.7
    folder = quietly(settings, method="grpo", max_steps=1)
    assert [event["code"] for event in rows_of(folder, "events.jsonl") if event["code"] == "narrowed"] == ["narrowed"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "grpo", "sampling": {"completions": 1}}, "sampling.completions: advantage.kind standardized needs"),
        ({"method": "grpo", "online": {"pairs": "all"}}, "online.pairs: method grpo learns from advantages"),
        ({"method": "online-dpo", "online": {"pairs": "none"}}, "online.pairs: method online-dpo learns from pairs"),
        ({"method": "online-dpo", "advantage": {"gamma": 0.9}}, "advantage: has no effect with method online-dpo"),
        ({"method": "grpo", "advantage": {"gae_lambda": 0.5}}, "advantage.gae_lambda: has no effect"),
        ({"method": "grpo", "online": {"min_gap": 0.5}}, "online.min_gap, online.accept: have no effect"),
        ({"method": "grpo", "loss": {"name": "dpo"}}, "loss.name: with online.pairs none a loss over weighed"),
        ({"method": "ppo", "reference": {"kind": "precomputed"}}, "asked about fresh completions in every round"),
        ({"method": "dr-grpo", "reference": {"kind": "copy"}}, "uses no reference"),
        ({"loss": {"name": "ppo"}, "judge": {}, "sampling": {}}, "learns from what the policy samples; say method"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    more: dict[str, Any], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        quietly(settings, **more)
