"""Reward models trained by whole runs: what they learn, how they are saved, and that judges read them alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import penchant
from penchant.errors import UserError
from penchant.layouts import packed, padded, prefix_shared
from penchant.scoring.policy import Policy
from penchant.scoring.reward import RewardLearner, RewardModel
from penchant.types import TokenizedExample

from ..conftest import WORDS

WORTH = {word: place / 8 - 1 for place, word in enumerate(WORDS)}
"""What each word adds to the true score of a completion."""


def true_score(text: str) -> float:
    return sum(WORTH[word] for word in text.split())


def judged_pairs(number: int, seed: int, as_messages: bool = False) -> list[dict[str, Any]]:
    """Pairs whose better completion is drawn as Bradley and Terry say, from the true scores."""
    rng = np.random.default_rng(seed)
    found = []
    for place in range(number):
        one, other = (" ".join(rng.choice(WORDS, size=3)) for _ in range(2))
        if rng.random() > 1 / (1 + np.exp(true_score(other) - true_score(one))):
            one, other = other, one
        prompt = f"what is {WORDS[place % len(WORDS)]} of the"
        if as_messages:
            turns = [{"role": "user", "content": prompt}]
            answers = [[{"role": "assistant", "content": text}] for text in (one, other)]
            found.append({"prompt": turns, "chosen": answers[0], "rejected": answers[1]})
        else:
            found.append({"prompt": prompt, "chosen": " " + one, "rejected": " " + other})
    return found


def train_reward(model_folder: Path, run_dir: Path, as_messages: bool = False, **settings: Any) -> Any:
    usual = {
        "learning_rate": 3e-3,
        "batch_size": 32,
        "num_train_epochs": 4,
        "output_dir": str(run_dir),
        "quiet": True,
        "data": judged_pairs(600, 0, as_messages),
        "eval_data": judged_pairs(100, 1, as_messages),
        "method": "reward",
    }
    return penchant.train(str(model_folder), **{**usual, **settings})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("as_messages", "lora", "layout"),
    [(False, {}, "auto"), (True, {}, "padded"), (True, {"rank": 8}, "auto")],
    ids=["plain", "messages", "lora"],
)
def test_it_recovers_the_scores_behind_the_judgements_and_every_reader_gives_the_same(
    model_folder: Path, tmp_path: Path, as_messages: bool, lora: dict[str, Any], layout: str
) -> None:
    rate = 1e-2 if lora else 4e-3
    result = train_reward(model_folder, tmp_path / "run", as_messages, lora=lora, layout=layout, learning_rate=rate)
    judged = lines_of(result.run_dir / "pairs.jsonl")
    assert len(judged) == 100
    ours = np.array([row[f"{side}_reward"] for row in judged for side in ("chosen", "rejected")])
    texts = [row[side] for row in judged for side in ("chosen", "rejected")]
    truth = np.array([true_score(text) for text in texts])
    assert np.corrcoef(ours, truth)[0, 1] > 0.75
    slope = np.polyfit(truth, ours, 1)[0]
    assert 0.5 < slope < 2  # the judgements tell the scale, too

    model = RewardModel.from_pretrained(str(result.run_dir / "model"))
    prompts: list[Any] = [row["prompt"] for row in judged for _ in range(2)]
    if as_messages:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encoded = [model.encode(prompt, text).ids for prompt, text in zip(prompts, texts, strict=True)]
    np.testing.assert_allclose(model.scores(encoded), ours, atol=1e-4)

    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(result.run_dir / "model").eval()
    width, filling = max(map(len, encoded)), plain.config.pad_token_id
    ids = torch.tensor([row + [filling] * (width - len(row)) for row in encoded])
    with torch.no_grad():
        theirs = plain(ids, attention_mask=(torch.arange(width) < torch.tensor([*map(len, encoded)])[:, None]).long())
    np.testing.assert_allclose(theirs.logits.squeeze(-1).numpy(), ours, atol=1e-4)


def test_scores_and_gradients_are_the_same_in_every_layout(model_folder: Path) -> None:
    learner = RewardLearner.from_pretrained(str(model_folder))
    examples = [
        TokenizedExample([5, 6, 7], ([8, 9, 2], [10], [11, 12]), 0),
        TokenizedExample([4], ([13], [14, 15, 16, 17]), 1),
    ]
    found = {}
    for name, layout in (("padded", padded), ("packed", packed), ("prefix_shared", prefix_shared)):
        if name == "packed":
            from penchant.models.attention import use_attend

            assert use_attend(learner.model)
        batch = layout.collate(examples)
        scores = batch.sum_by_sequence(learner.token_logps(batch).logps)
        gradients = torch.autograd.grad(scores.square().sum(), [*learner.parameters()], allow_unused=True)
        found[name] = [scores.detach(), *(gradient for gradient in gradients if gradient is not None)]
    for name in ("packed", "prefix_shared"):
        for one, other in zip(found["padded"], found[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_margins_hold_the_scores_further_apart(model_folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "margin": 3.0} for row in judged_pairs(64, 0)]
    settings = {"data": rows, "num_train_epochs": 20, "eval_data": rows[:32]}
    gaps = []
    for name, loss in (("without", {}), ("with", {"alpha": 1.0})):
        result = train_reward(model_folder, tmp_path / name, loss=loss, **settings)
        judged = lines_of(result.run_dir / "pairs.jsonl")
        gaps.append(np.mean([row["chosen_reward"] - row["rejected_reward"] for row in judged]))
    assert gaps[1] > gaps[0] + 1


def test_a_run_that_was_broken_off_comes_to_the_same_scores(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_train_epochs": 1, "lora": {"rank": 2}, "save_steps": 4}
    whole = train_reward(model_folder, tmp_path / "whole", **settings)
    from penchant.training.loop import Training

    real, calls = Training._step, []

    def broken(self: Any, draw: Any) -> str:
        calls.append(draw)
        if len(calls) == 7:
            raise RuntimeError("broken off")
        return real(self, draw)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", broken)
        with pytest.raises(RuntimeError, match="broken off"):
            train_reward(model_folder, tmp_path / "run", **settings)
    again = train_reward(model_folder, tmp_path / "run", **settings)
    assert lines_of(again.run_dir / "pairs.jsonl") == lines_of(whole.run_dir / "pairs.jsonl")


def test_what_cannot_be_a_reward_model_is_refused_in_a_sentence(model_folder: Path, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(str(model_folder))
    with pytest.raises(UserError, match="needs a RewardLearner, and the one in hand is a Policy"):
        penchant.train(policy, data=judged_pairs(8, 0), method="reward", output_dir=str(tmp_path / "run"), quiet=True)
    with pytest.raises(UserError, match="uses no reference"):
        train_reward(model_folder, tmp_path / "run", reference={"kind": "copy"})
    with pytest.raises(UserError, match="needs margin"):
        train_reward(model_folder, tmp_path / "run", loss={"alpha": 1.0})
    assert not (tmp_path / "run").exists()
